# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ARG002 - the arguments are those of PageTables
"""What stands in for page tables where a guest runs without paging."""

from __future__ import annotations

from typing import Any

from kvmpy.core.address import EncryptionBit, Gpa, Gva, RawGpa
from kvmpy.core.memory import GuestMemory, PageAllocator
from kvmpy.x86.entry import Mapped, Walk
from kvmpy.x86.paging import PageTables
from kvmpy.x86.paging_errors import PagingError


class NoPaging(PageTables):
    """Linear addresses are guest-physical ones; what would change that is a PagingError."""

    def __init__(
        self,
        memory: GuestMemory,
        allocator: PageAllocator,
        *,
        levels: int = 0,
        encryption: EncryptionBit | None = None,
        private_tables: bool = True,
    ) -> None:
        if levels or encryption is not None:
            raise ValueError(f"levels={levels}: without paging there are none, and no encryption bit")
        self.memory, self.allocator = memory, allocator
        self.levels, self.encryption, self.private_tables = 0, None, False
        self.root, self.cr3 = Gpa(0), RawGpa(0)

    def map(self, gva: Gva, gpa: Gpa, size: int, **how: Any) -> None:
        """Refuse all but the mapping that there is."""
        if int(gva) != int(gpa) or int(gva) + size > 1 << 32:
            raise PagingError(f"gva {gva} cannot lead to gpa {gpa}: the guest runs without paging")

    def _edit(self, gva: Gva, size: int, *what: Any, **how: Any) -> None:
        raise PagingError(f"gva {gva} cannot be changed: the guest runs without paging")

    def walk(self, gva: Gva) -> Walk:
        """Refuse: there is nothing to walk."""
        raise PagingError("paging is off")

    def translate(self, gva: Gva) -> Gpa:
        """Return the same address."""
        return Gpa(int(gva))

    def extents(self, gva: Gva, size: int) -> list[tuple[Gpa, int]]:
        """Return the same range."""
        return [(Gpa(int(gva)), size)]

    def mappings(self, gva: Gva | None = None, size: int | None = None) -> list[Mapped]:
        """Return nothing."""
        return []

    def dump(self) -> str:
        """Say so."""
        return "paging is off"

    @property
    def table_pages(self) -> int:
        """None."""
        return 0

    @property
    def spare_pages(self) -> int:
        """None."""
        return 0

    def free(self) -> None:
        """Do nothing."""
