# SPDX-License-Identifier: Apache-2.0
"""``kvmpy watch``: VMs as they are created and destroyed."""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kvmpy.debug.watch.uevents import KvmUevent

_POLL = 0.5


def process_of(task: int) -> tuple[int, str] | None:
    """Return process id and command line of the process that has thread *task*; None once it is gone."""
    import psutil

    try:
        with open(f"/proc/{task}/status", encoding="utf-8", errors="replace") as status:
            pid = next((int(line.split()[1]) for line in status if line.startswith("Tgid:")), task)
        process = psutil.Process(pid)
        return pid, " ".join(process.cmdline()) or process.name()
    except (OSError, psutil.Error):
        return None


class Names:
    """Remembers who made which VM: when it is destroyed its process is often gone already."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, str]] = {}

    def of(self, event: KvmUevent) -> tuple[int, str]:
        """Return process id and command line of the event's creator."""
        known = self._known.get(event.pid)
        if event.kind.value == "destroy" and known is not None:
            return known  # while a process exits it has no command line any more
        owner = process_of(event.pid)
        if owner is None:
            return event.pid, "(gone)"
        self._known[event.pid] = owner
        return owner


def describe(event: KvmUevent, pid: int, command: str, age: float | None) -> str:
    """Return the event's line, without its time."""
    from kvmpy.cli.columns import shorten, span

    which = f"{pid}:{event.vm_fd}" if event.vm_fd is not None else str(pid)
    lived = f", lived {span(age)}" if age is not None else ""
    mark = "+" if event.kind.value == "create" else "-"
    return f"{mark} {which:<14} {shorten(command, 60)}  ({event.count} in all now{lived})"


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@click.option("--count", type=click.IntRange(1), help="Stop after this many events.")
@click.option("--timeout", type=click.FloatRange(0.1), help="Stop after this many seconds.")
def watch(as_json: bool, count: int | None, timeout: float | None) -> None:
    """Show VMs of this machine as they are created and destroyed; press Ctrl-C to stop.

    Needs no privilege: the kernel sends these events to everybody in its initial network namespace.
    """
    from kvmpy.debug.watch.uevents import UeventListener, UeventsLostError, why_unreachable

    reason = why_unreachable()
    if reason is not None:
        raise click.ClickException(f"cannot receive KVM uevents: {reason}")
    names = Names()
    born: dict[tuple[int, int | None], float] = {}
    seen = 0
    end = None if timeout is None else time.monotonic() + timeout
    with UeventListener() as listener:
        click.echo("watching: + created, - destroyed", err=True)
        try:
            while (count is None or seen < count) and (end is None or time.monotonic() < end):
                left = _POLL if end is None else min(_POLL, max(0.0, end - time.monotonic()))
                try:
                    event = listener.next(left)
                except TimeoutError:
                    continue
                except UeventsLostError as error:
                    click.echo(f"events were lost: {error.strerror}", err=True)
                    continue
                seen += 1
                _show(event, names, born, as_json)
        except KeyboardInterrupt:
            pass


def _show(event: KvmUevent, names: Names, born: dict[tuple[int, int | None], float], as_json: bool) -> None:
    pid, command = names.of(event)
    key, now = (event.pid, event.vm_fd), time.monotonic()
    age = None
    if event.kind.value == "create":
        born[key] = now
    elif key in born:
        age = now - born.pop(key)
    stamp = datetime.now().astimezone()
    if as_json:
        line = {
            "time": stamp.isoformat(timespec="milliseconds"),
            "event": event.kind.value,
            "pid": pid,
            "fd": event.vm_fd,
            "command": command,
            "vms": event.count,
            "created": event.created,
            "lived": age,
        }
        click.echo(json.dumps(line))
    else:
        click.echo(f"{stamp:%H:%M:%S}.{stamp.microsecond // 1000:03} {describe(event, pid, command, age)}")
