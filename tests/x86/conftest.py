# SPDX-License-Identifier: Apache-2.0
"""Guest memory without KVM: two mappings, so that a table read through the wrong alias is garbage."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from kvmpy.core.address import EncryptionBit, Gpa
from kvmpy.core.backing import Anonymous, Mapping
from kvmpy.core.memory import GuestMemory, PageAllocator, Segment
from kvmpy.x86.paging import PageTables
from selftests.paging.walker import Walker

TABLES_AT = 0x4_0000_0000
POISON = b"\xcc" * 4096


@dataclass
class Space:
    """Guest memory with page tables in it."""

    memory: GuestMemory
    allocator: PageAllocator
    tables: PageTables
    mappings: tuple[Mapping, ...]

    def read_u64(self, raw: int) -> int:
        """Read what the CPU would read at a raw address, independently of kvmpy's own translation."""
        bit = self.tables.encryption
        private = bit is not None and (raw >> bit.bit & 1 == 1) == bit.set_means_private
        address = raw if bit is None else raw & ~(1 << bit.bit)
        view = self.mappings[1 if private else 0].view(address - TABLES_AT, 8)
        return int(struct.unpack("<Q", view)[0])

    def walker(self, **changes: int) -> Walker:
        """Return the independent walker for the tables."""
        bit = self.tables.encryption
        return Walker(
            self.read_u64,
            int(self.tables.cr3),
            levels=self.tables.levels,
            encryption_bit=None if bit is None else bit.bit,
            set_is_private=bit is None or bit.set_means_private,
            **changes,
        )


class SpaceMaker:
    """Makes spaces and unmaps them at the end."""

    def __init__(self) -> None:
        self.mappings: list[Mapping] = []

    def __call__(
        self,
        *,
        encryption: EncryptionBit | None = None,
        levels: int = 4,
        private_tables: bool = True,
        size: int = 8 << 20,
        poison: bool = False,
        at: int = TABLES_AT,
        **more: int,
    ) -> Space:
        memory = GuestMemory()
        shared = Anonymous().map(size)
        private = shared if encryption is None else Anonymous().map(size)
        self.mappings += [shared] if private is shared else [shared, private]
        if poison:
            other = shared if private_tables else private
            for offset in range(0, size, 4096):
                other.view(offset, 4096)[:] = POISON
        memory.add(Segment(Gpa(at), size, shared, private))
        allocator = PageAllocator(memory, private=encryption is not None)
        tables = PageTables(
            memory, allocator, levels=levels, encryption=encryption, private_tables=private_tables, **more
        )
        return Space(memory, allocator, tables, (shared, private))

    def close(self) -> None:
        """Unmap everything."""
        while self.mappings:
            self.mappings.pop().close()


@pytest.fixture
def make_space() -> Iterator[SpaceMaker]:
    """Return a function that makes guest memory with page tables."""
    maker = SpaceMaker()
    yield maker
    maker.close()
