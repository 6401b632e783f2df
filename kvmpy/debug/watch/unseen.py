# SPDX-License-Identifier: Apache-2.0
"""VMs and vCPUs that recorded processes hold though no frame told of them: made past the recorder."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

from kvmpy.debug.record.events import Object, Payload
from kvmpy.debug.record.format import ObjectKind
from kvmpy.uapi.links import link_of

_SOONEST_S = 0.01
# Frames of an ioctl come after its descriptor: in this time they have come.
_SETTLED_S = 1.0
_NAMED = 3


class Unseen:
    """Compares the links in /proc/PID/fd with the objects that frames tell of.

    By name, ``vm`` and ``vcpu0``, not by number: descriptors are copied, inherited and handed on.
    """

    def __init__(self) -> None:
        self.hinted: set[int] = set()
        """The processes that were named."""
        self._known: set[str] = set()
        self._seen: dict[tuple[int, str], float] = {}
        self._begin = self._due = time.monotonic()

    def known(self, said: Payload | None) -> None:
        """Take in what a frame tells."""
        if isinstance(said, Object) and said.kind in (ObjectKind.VM, ObjectKind.VCPU):
            name = said.name.rpartition("/")[2]
            self._known.add(name if said.kind == ObjectKind.VCPU else "vm")

    def look(self, pids: Iterable[int]) -> list[str]:
        """Look at what *pids* hold, often at first and once a second later; return hints."""
        now = time.monotonic()
        if now < self._due:
            return []
        self._due = now + min(max(now - self._begin, _SOONEST_S), _SETTLED_S)
        for pid in pids:
            for name in _held(pid):
                self._seen.setdefault((pid, name), now)
        return self._hints(now - _SETTLED_S)

    def rest(self) -> list[str]:
        """Return hints for what was seen at any time, once every frame has come."""
        return self._hints(time.monotonic())

    def _hints(self, before: float) -> list[str]:
        names: dict[int, list[str]] = {}
        for (pid, name), since in self._seen.items():
            if since <= before and name not in self._known and pid not in self.hinted:
                names.setdefault(pid, []).append(name)
        self.hinted.update(names)
        return [_text(pid, held) for pid, held in names.items()]


def _held(pid: int) -> set[str]:
    names = set()
    try:
        with os.scandir(f"/proc/{pid}/fd") as items:
            for item in items:
                link = link_of(os.readlink(item.path))
                if link.kind in ("vm", "vcpu"):
                    names.add(link.name)
    except OSError:
        # It went meanwhile, or is another user's; what was read counts.
        return names
    return names


def _text(pid: int, names: list[str]) -> str:
    first = sorted(names, key=lambda name: (len(name), name))[:_NAMED]
    more = f" and {len(names) - len(first)} more" if len(names) > len(first) else ""
    return (
        f"process {pid} holds {', '.join(first)}{more}, which the recorder did not see made: programs that "
        "issue system calls by themselves are traced with --ptrace"
    )
