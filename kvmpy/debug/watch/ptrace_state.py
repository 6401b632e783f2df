# SPDX-License-Identifier: Apache-2.0
"""What a tracer learns from outside a process: its memory, its file descriptors, where its run areas are."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

from kvmpy.debug.record.capture import Known, Source
from kvmpy.debug.record.format import PAGE_SIZE, ObjectKind
from kvmpy.uapi.links import Link, link_of

_MAPS = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+ *(.*)$", re.MULTILINE)
RUN_PAGES = 64
_NAMED = {"/dev/kvm": (ObjectKind.SYSTEM, "kvm"), "/dev/sev": (ObjectKind.SEV, "sev")}


# A descriptor that no process has: nothing can be read through it.
_NO_FILE = (1 << 31) - 1


class Traced(Known):
    """An object of a traced process."""

    __slots__ = ("dumped", "kind", "name", "vm")

    def __init__(self, ident: int, kind: ObjectKind, name: str, maker: Traced | None, vm_type: int) -> None:
        super().__init__(ident, kind, maker, vm_type=vm_type, name=name)
        self.kind = kind
        self.name = name
        self.vm: Traced = self if maker is None or kind == ObjectKind.VM else maker.vm
        self.dumped = False
        """Whether its initial memory was told."""

    @property
    def slots(self) -> Iterator[tuple[int, int]]:
        """Address and bytes of each memory slot."""
        for index in range(self.native.nr_slots):
            slot = self.native.slots[index]
            if slot.size:
                yield int(slot.hva), int(slot.size)


class Process:
    """A traced process; threads share one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.objects: dict[int, Traced] = {}
        self._source: Source | None = None

    @property
    def source(self) -> Source:
        """The process's memory."""
        if self._source is None:
            memory = _NO_FILE
            with contextlib.suppress(OSError):
                memory = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            self._source = Source(memory)
        return self._source

    def populated(self, address: int, size: int) -> Iterator[tuple[int, bytes]]:
        """Yield address and content of the runs of whole pages that have content, without populating any.

        A page has content where the process has it mapped (or swapped out); where it maps a file or shared
        memory, also where that has data, as far as kvmpy may open it (/proc/PID/map_files).
        """
        for start, end, offset, backing in self._areas(address, address + (size & -PAGE_SIZE)):
            try:
                yield from self._content(start, end, offset, backing)
            finally:
                if backing >= 0:
                    os.close(backing)

    def _areas(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield a range's mapped parts: begin, end, offset in the file behind it, and that (-1: none)."""
        for low, high, offset, name in self._maps():
            if high <= start or end <= low:
                continue
            first, last = max(start, low), min(end, high)
            backing = -1
            if name.startswith("/"):
                with contextlib.suppress(OSError):
                    path = f"/proc/{self.pid}/map_files/{low:x}-{high:x}"
                    backing = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            yield first, last, offset + first - low, backing

    def _content(self, start: int, end: int, offset: int, backing: int) -> Iterator[tuple[int, bytes]]:
        here = self._mapped(start, end)
        data = _data_of(backing, offset, end - start) if backing >= 0 else set()
        pages = [page for page in range((end - start) // PAGE_SIZE) if here[page] or page in data]
        while pages:
            run = 1
            while run < min(len(pages), RUN_PAGES) and pages[run] == pages[0] + run:
                run += 1
            content = b""
            for page in pages[:run]:
                where = start + page * PAGE_SIZE
                if here[page]:
                    part = self.source.read(where, PAGE_SIZE)
                else:
                    part = _read(backing, offset + page * PAGE_SIZE)
                content += part.ljust(PAGE_SIZE, b"\0")
            yield start + pages[0] * PAGE_SIZE, content
            del pages[:run]

    def _mapped(self, start: int, end: int) -> list[bool]:
        count = (end - start) // PAGE_SIZE
        try:
            with open(f"/proc/{self.pid}/pagemap", "rb", buffering=0) as file:
                raw = os.pread(file.fileno(), count * 8, start // PAGE_SIZE * 8)
        except OSError:
            raw = b""
        # The two topmost bits: present, swapped out (Linux: Documentation/admin-guide/mm/pagemap.rst).
        known = [bool(raw[position] >> 6) for position in range(7, len(raw), 8)]
        return known + [True] * (count - len(known))

    def executed(self) -> None:
        """The process runs another program: its memory and most file descriptors are new."""
        self.close()
        self.objects = {}

    def close(self) -> None:
        """Let go of the process's memory."""
        if self._source is not None and self._source.mem != _NO_FILE:
            os.close(self._source.mem)
        self._source = None

    def link(self, fd: int) -> Link:
        """Return what /proc says of a file descriptor."""
        try:
            return link_of(os.readlink(f"/proc/{self.pid}/fd/{fd}"))
        except OSError:
            return link_of("")

    def open_files(self) -> list[int]:
        """Return the process's file descriptors."""
        try:
            return sorted(int(name) for name in os.listdir(f"/proc/{self.pid}/fd"))
        except OSError:
            return []

    def run_mappings(self, vcpu: Link) -> list[tuple[int, int]]:
        """Return address and length of the mappings of vCPU files with this name, from their begin."""
        return [
            (start, end - start)
            for start, end, offset, name in self._maps()
            if offset == 0 and link_of(name) == vcpu
        ]

    def _maps(self) -> list[tuple[int, int, int, str]]:
        """Return begin, end, offset in the file and its name of every mapping."""
        try:
            with open(f"/proc/{self.pid}/maps", errors="replace") as file:
                text = file.read()
        except OSError:
            return []
        return [
            (int(start, 16), int(end, 16), int(offset, 16), name)
            for start, end, offset, name in _MAPS.findall(text)
        ]


def _read(file: int, offset: int) -> bytes:
    try:
        return os.pread(file, PAGE_SIZE, offset)
    except OSError:
        return b""


def _data_of(file: int, offset: int, size: int) -> set[int]:
    """Return which pages of a part of *file* hold data, by number from its begin."""
    names: set[int] = set()
    start = offset
    with contextlib.suppress(OSError):
        while start < offset + size:
            begin = max(start, os.lseek(file, start, os.SEEK_DATA))
            start = min(os.lseek(file, begin, os.SEEK_HOLE), offset + size)
            names.update(range((begin - offset) // PAGE_SIZE, -(-(start - offset) // PAGE_SIZE)))
    return names
