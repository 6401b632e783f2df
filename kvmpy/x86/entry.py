# SPDX-License-Identifier: Apache-2.0
"""Page-table entries and what a walk of them says (Intel SDM volume 3, 4.3 to 4.5; AMD APM volume 2, 5.2 and
5.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvmpy.core.address import PAGE_SIZE, SIZE_1G, SIZE_2M, SIZE_4M, EncryptionBit, Gpa, Gva, RawGpa

PRESENT = 1 << 0
WRITABLE = 1 << 1
USER = 1 << 2
WRITE_THROUGH = 1 << 3
CACHE_DISABLE = 1 << 4
ACCESSED = 1 << 5
DIRTY = 1 << 6
PAGE_SIZE_BIT = 1 << 7  # in a table pointer of level 2 or 3: this is a leaf
PAT_4K = 1 << 7
GLOBAL = 1 << 8
PAT_HUGE = 1 << 12  # an address bit everywhere else
NO_EXECUTE = 1 << 63
KEY_SHIFT = 59
ADDRESS_MASK = 0x000F_FFFF_FFFF_F000

LEVEL_NAMES = {1: "PTE", 2: "PDE", 3: "PDPTE", 4: "PML4E", 5: "PML5E"}
SIZE_NAMES = {PAGE_SIZE: "4 KiB", SIZE_2M: "2 MiB", SIZE_4M: "4 MiB", SIZE_1G: "1 GiB"}


class Format(NamedTuple):
    """A kind of page tables: how many levels, how many bits of an address index each, which have leaves.

    Four and five levels are those of long mode; three are PAE's, whose top level is four entries without
    rights; two have entries of 32 bits, and pages of 4 MiB where CR4.PSE is set.
    """

    levels: int
    index_bits: int = 9
    entry_size: int = 8
    leaf_levels: int = 3

    @property
    def bits(self) -> int:
        """The width of a linear address."""
        return 32 if self.levels < 4 else 12 + self.index_bits * self.levels

    @property
    def page_sizes(self) -> dict[int, int]:
        """The size of a leaf of each level that has some."""
        return {level: self.span(level) for level in range(1, self.leaf_levels + 1)}

    @property
    def leaf_names(self) -> str:
        """The page sizes in words."""
        *first, last = (SIZE_NAMES[size] for size in self.page_sizes.values())
        return f"{', '.join(first)} or {last}"

    @property
    def physical_bits(self) -> int:
        """How wide an address in an entry can be."""
        return 32 if self.levels == 2 else 52

    def span(self, level: int) -> int:
        """Return the bytes that one entry of *level* covers."""
        return 1 << (12 + self.index_bits * (level - 1))

    def is_leaf(self, entry: int, level: int) -> bool:
        """Tell whether *entry* of *level* maps a page instead of pointing to a table."""
        huge = 1 < level <= self.leaf_levels and bool(entry & PAGE_SIZE_BIT)
        return bool(entry & PRESENT) and (level == 1 or huge)


FORMATS = {
    2: Format(2, index_bits=10, entry_size=4, leaf_levels=2),
    3: Format(3, leaf_levels=2),
    4: Format(4),
    5: Format(5),
}
LONG = FORMATS[4]


def raw_address(entry: int, level: int, form: Format = LONG) -> RawGpa:
    """Return the address in *entry*, with the encryption bit and without the PAT bit of a huge leaf."""
    address = entry & ADDRESS_MASK
    return RawGpa(address & ~(form.span(level) - 1) if form.is_leaf(entry, level) else address)


def split_raw(raw: RawGpa, encryption: EncryptionBit | None) -> tuple[Gpa, bool | None]:
    """Return the address without the encryption bit, and whether it is private (None: no such bit)."""
    return (Gpa(int(raw)), None) if encryption is None else encryption.from_raw(raw)


def pat_bits(pat: int, level: int) -> int:
    """Return the bits of a leaf of *level* that select entry *pat* of the PAT; ValueError outside 0..7."""
    if not 0 <= pat <= 7:
        raise ValueError(f"PAT entry {pat} is outside 0..7")
    high = PAT_4K if level == 1 else PAT_HUGE
    return (WRITE_THROUGH if pat & 1 else 0) | (CACHE_DISABLE if pat & 2 else 0) | (high if pat & 4 else 0)


def pat_index(entry: int, level: int) -> int:
    """Return which entry of the PAT a leaf of *level* selects."""
    high = PAT_4K if level == 1 else PAT_HUGE
    return (entry & WRITE_THROUGH) >> 3 | (entry & CACHE_DISABLE) >> 3 | (4 if entry & high else 0)


def flag_words(entry: int, level: int, form: Format = LONG) -> str:
    """Return the flags of *entry* as words, such as ``P RW US A D PS NX``."""
    if not entry & PRESENT:
        return "not present"
    words = ["P"]
    words += [name for bit, name in ((WRITABLE, "RW"), (USER, "US")) if entry & bit]
    leaf = form.is_leaf(entry, level)
    if leaf and pat_index(entry, level):
        words.append(f"PAT{pat_index(entry, level)}")
    elif not leaf:
        words += [name for bit, name in ((WRITE_THROUGH, "PWT"), (CACHE_DISABLE, "PCD")) if entry & bit]
    if entry & ACCESSED:
        words.append("A")
    if leaf and entry & DIRTY:
        words.append("D")
    if level > 1 and entry & PAGE_SIZE_BIT:
        words.append("PS")
    if leaf and entry & GLOBAL:
        words.append("G")
    if leaf and entry >> KEY_SHIFT & 0xF:
        words.append(f"PK{entry >> KEY_SHIFT & 0xF}")
    if entry & NO_EXECUTE:
        words.append("NX")
    return " ".join(words)


def privacy_word(private: bool | None) -> str:
    """Return ``private``, ``shared`` or nothing."""
    return "" if private is None else "private" if private else "shared"


@dataclass(frozen=True)
class WalkStep:
    """One entry of a walk: which table (raw address), which index, its value and what that says."""

    level: int
    table: RawGpa
    index: int
    value: int
    encryption: EncryptionBit | None = None
    form: Format = LONG

    @property
    def name(self) -> str:
        """``PTE`` to ``PML5E``."""
        return LEVEL_NAMES[self.level]

    @property
    def present(self) -> bool:
        """Whether the present bit is set."""
        return bool(self.value & PRESENT)

    @property
    def leaf(self) -> bool:
        """Whether the entry maps a page."""
        return self.form.is_leaf(self.value, self.level)

    @property
    def raw(self) -> RawGpa:
        """The address in the entry, as it stands there."""
        return raw_address(self.value, self.level, self.form)

    @property
    def gpa(self) -> Gpa:
        """The address in the entry, without the encryption bit."""
        return split_raw(self.raw, self.encryption)[0]

    @property
    def private(self) -> bool | None:
        """What the encryption bit says; None where there is none or the entry is not present."""
        return split_raw(self.raw, self.encryption)[1] if self.present else None

    @property
    def flags(self) -> str:
        """The flags as words."""
        return flag_words(self.value, self.level, self.form)

    def __str__(self) -> str:
        digits = 2 + 2 * self.form.entry_size
        where = f"{self.name:<5} table {self.table} [{self.index:3d}] = {self.value:#0{digits}x}"
        if not self.present:
            return f"{where}  not present"
        text = f"{SIZE_NAMES[self.form.span(self.level)]} page" if self.leaf else "table"
        words = (text, str(self.gpa), privacy_word(self.private), self.flags)
        return f"{where}  {' '.join(word for word in words if word)}"


@dataclass(frozen=True)
class Walk:
    """What the page tables say about one address, entry by entry from the root."""

    gva: Gva
    steps: tuple[WalkStep, ...]
    encryption: EncryptionBit | None = None

    @property
    def entries(self) -> tuple[WalkStep, ...]:
        """The steps, under the name of what they hold."""
        return self.steps

    @property
    def leaf(self) -> WalkStep | None:
        """The entry that maps the page, or None."""
        return self.steps[-1] if self.steps and self.steps[-1].leaf else None

    @property
    def present(self) -> bool:
        """Whether the address is mapped."""
        return self.leaf is not None

    @property
    def level(self) -> int:
        """The level of the last entry seen (1 = PTE)."""
        return self.steps[-1].level

    @property
    def page_size(self) -> int:
        """The size of the page in bytes, 0 when not mapped."""
        return self.steps[-1].form.span(self.level) if self.present else 0

    @property
    def raw(self) -> RawGpa | None:
        """The address's place as the leaf names it, encryption bit included; None when not mapped."""
        return None if self.leaf is None else self.leaf.raw + (int(self.gva) & (self.page_size - 1))

    @property
    def gpa(self) -> Gpa | None:
        """The guest-physical address, or None when not mapped."""
        return None if self.leaf is None else self.leaf.gpa + (int(self.gva) & (self.page_size - 1))

    @property
    def private(self) -> bool | None:
        """What the leaf's encryption bit says; None without such a bit, or when not mapped."""
        return None if self.leaf is None else self.leaf.private

    @property
    def tables_private(self) -> tuple[bool, ...]:
        """Whether each table on the way is private by the pointer to it, CR3's first; empty without such a
        bit.
        """
        if self.encryption is None:
            return ()
        return tuple(self.encryption.from_raw(step.table)[1] for step in self.steps)

    def _all(self, bit: int) -> bool:
        # The top level of PAE has no rights.
        steps = [step for step in self.steps if (step.level, step.form.levels) != (3, 3)]
        return self.present and all(step.value & bit for step in steps)

    @property
    def writable(self) -> bool:
        """Whether every level allows writes."""
        return self._all(WRITABLE)

    @property
    def user(self) -> bool:
        """Whether every level allows user accesses."""
        return self._all(USER)

    @property
    def nx(self) -> bool:
        """Whether some level forbids execution."""
        return self.present and any(step.value & NO_EXECUTE for step in self.steps)

    @property
    def global_(self) -> bool:
        """Whether the leaf is global."""
        return self.leaf is not None and bool(self.leaf.value & GLOBAL)

    @property
    def pat(self) -> int:
        """The leaf's entry of the PAT (0 when not mapped)."""
        return 0 if self.leaf is None else pat_index(self.leaf.value, self.leaf.level)

    @property
    def protection_key(self) -> int:
        """The leaf's protection key (0 when not mapped)."""
        return 0 if self.leaf is None else self.leaf.value >> KEY_SHIFT & 0xF

    @property
    def flags(self) -> str:
        """The last entry's flags as words."""
        return self.steps[-1].flags

    def __str__(self) -> str:
        lines = [f"gva {self.gva} -> {'gpa ' + str(self.gpa) if self.present else 'not mapped'}"]
        if self.private is not None:
            lines[0] += f" ({privacy_word(self.private)})"
        return "\n".join(lines + [f"  {step}" for step in self.steps])


@dataclass(frozen=True)
class Mapped:
    """Leaves alike that follow one another in both address spaces; *entry* is the first."""

    gva: Gva
    size: int
    gpa: Gpa
    page_size: int
    entry: int
    private: bool | None
    form: Format = LONG

    @property
    def level(self) -> int:
        """The leaves' level (1 = PTE)."""
        return {size: level for level, size in self.form.page_sizes.items()}[self.page_size]

    @property
    def flags(self) -> str:
        """The flags as words."""
        return flag_words(self.entry, self.level, self.form)

    def __str__(self) -> str:
        return (
            f"{int(self.gva):016x}..{int(self.gva) + self.size - 1:016x} -> {int(self.gpa):012x}"
            f" {self.size // self.page_size:8d} x {SIZE_NAMES[self.page_size]}"
            f" {privacy_word(self.private):7} {self.flags}"
        )
