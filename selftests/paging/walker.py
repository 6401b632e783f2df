# SPDX-License-Identifier: Apache-2.0
"""A page-table walker that shares nothing with the code that writes page tables.

It follows the manuals' tables (Intel SDM volume 3, 4.5; AMD APM volume 2, 5.3 and 15.34.1) bit by bit and
reads memory through a callback only, so that it can judge tables of any origin: written by the host, by a
guest, or broken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

ReadU64 = Callable[[int], int]
"""Reads the 8 bytes at a raw guest-physical address, the encryption bit included."""


@dataclass(frozen=True)
class Entry:
    """One entry met on the way: its level (1 = PTE), its own raw address and its value."""

    level: int
    at: int
    value: int


@dataclass(frozen=True)
class Translation:
    """What a walk found.

    *fault* is None, ``non-canonical``, ``not-present`` or ``reserved``; *raw* is the address with the
    encryption bit as the leaf has it, *physical* without; *private* is None without encryption bit.
    Permissions are those of all levels together.
    """

    gva: int
    fault: str | None = None
    raw: int = 0
    physical: int = 0
    private: bool | None = None
    page_size: int = 0
    writable: bool = False
    user: bool = False
    executable: bool = False
    global_: bool = False
    accessed: bool = False
    dirty: bool = False
    pat: int = 0
    key: int = 0
    table_privacy: tuple[bool, ...] = ()
    entries: tuple[Entry, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Walker:
    """How to read one set of page tables.

    *cr3* is raw; *encryption_bit* is the bit's position (None: none) and *set_is_private* its meaning;
    *physical_bits* is the guest's physical address width: address bits above it, but for the encryption bit,
    are reserved.
    """

    read_u64: ReadU64
    cr3: int
    levels: int = 4
    encryption_bit: int | None = None
    set_is_private: bool = True
    physical_bits: int = 52

    def walk(self, gva: int) -> Translation:
        """Translate *gva* (0 to 2**64 - 1) as the CPU would, without permission checks."""
        width = 48 if self.levels == 4 else 57
        sign = gva >> (width - 1)
        if sign not in (0, (1 << (65 - width)) - 1):
            return Translation(gva, "non-canonical")
        table = self.cr3 & 0x000F_FFFF_FFFF_F000
        writable = user = executable = True
        seen: list[Entry] = []
        privacy: list[bool] = []
        for level in range(self.levels, 0, -1):
            if self.encryption_bit is not None:
                privacy.append((table >> self.encryption_bit & 1 == 1) == self.set_is_private)
            index = gva >> (3 + 9 * level) & 0x1FF
            offset = table + index * 8
            value = self.read_u64(offset)
            seen.append(Entry(level, offset, value))
            if value & 1 == 0:
                return Translation(gva, "not-present", table_privacy=tuple(privacy), entries=tuple(seen))
            last = level == 1 or value >> 7 & 1 == 1
            if self._reserved(value, level, last):
                return Translation(gva, "reserved", table_privacy=tuple(privacy), entries=tuple(seen))
            writable = writable and value >> 1 & 1 == 1
            user = user and value >> 2 & 1 == 1
            executable = executable and value >> 63 == 0
            if last:
                return self._leaf(gva, level, value, writable, user, executable, tuple(privacy), tuple(seen))
            table = value & 0x000F_FFFF_FFFF_F000
        raise AssertionError("a walk ends at level 1")

    def pages(self, gva: int, size: int) -> Iterator[Translation]:
        """Yield the translation of each mapped page in *size* bytes at *gva*, skipping holes page by page."""
        position = gva
        while position < gva + size:
            entry = self.walk(position)
            step = 4096 if entry.fault else entry.page_size
            if not entry.fault:
                yield entry
            position = (position // step + 1) * step

    def _reserved(self, value: int, level: int, last: bool) -> bool:
        if last and level > 3:
            return True
        allowed = (1 << self.physical_bits) - 1
        if self.encryption_bit is not None:
            allowed |= 1 << self.encryption_bit
        address = value & 0x000F_FFFF_FFFF_F000
        if address & ~allowed:
            return True
        # The address bits of a huge leaf start at its size; bit 12 is PAT there, bits 13 and up must be zero.
        below = {1: 0, 2: 0x1F_E000, 3: 0x3FFF_E000}.get(level, 0)
        return last and bool(value & below)

    def _leaf(
        self,
        gva: int,
        level: int,
        value: int,
        writable: bool,
        user: bool,
        executable: bool,
        privacy: tuple[bool, ...],
        seen: tuple[Entry, ...],
    ) -> Translation:
        size = {1: 0x1000, 2: 0x20_0000, 3: 0x4000_0000}[level]
        raw = (value & 0x000F_FFFF_FFFF_F000) // size * size + gva % size
        private: bool | None = None
        physical = raw
        if self.encryption_bit is not None:
            private = (raw >> self.encryption_bit & 1 == 1) == self.set_is_private
            physical = raw - (raw >> self.encryption_bit & 1) * 2**self.encryption_bit
        high = value >> 7 & 1 if level == 1 else value >> 12 & 1
        return Translation(
            gva,
            None,
            raw,
            physical,
            private,
            size,
            writable,
            user,
            executable,
            global_=value >> 8 & 1 == 1,
            accessed=value >> 5 & 1 == 1,
            dirty=value >> 6 & 1 == 1,
            pat=(value >> 3 & 1) + 2 * (value >> 4 & 1) + 4 * high,
            key=value >> 59 & 15,
            table_privacy=privacy,
            entries=seen,
        )
