# SPDX-License-Identifier: Apache-2.0
"""Guest addresses that say what they are, and the encryption bit that tells two of them apart.

A :class:`Gpa` never carries the encryption bit; a :class:`RawGpa` is what a page-table entry or CR3 holds.
Only :meth:`EncryptionBit.to_raw` and :meth:`EncryptionBit.from_raw` convert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, overload

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
SIZE_2M = 1 << 21
SIZE_4M = 1 << 22
SIZE_1G = 1 << 30

_A = TypeVar("_A", bound="_Address")


class _Address(int):
    """An unsigned 64-bit address; adding an ``int`` keeps its kind, mixing two kinds is a TypeError."""

    def __new__(cls: type[_A], value: int) -> _A:
        if isinstance(value, _Address) and type(value) is not cls:
            raise TypeError(
                f"{value!r} is a {type(value).__name__}, not a {cls.__name__}: "
                "convert with to_raw()/from_raw() or a page-table walk"
            )
        if not 0 <= value < 1 << 64:
            raise ValueError(f"{cls.__name__} {value:#x} is not an unsigned 64-bit address")
        return super().__new__(cls, value)

    def _same_kind(self, other: int) -> None:
        if isinstance(other, _Address) and type(other) is not type(self):
            raise TypeError(f"cannot mix a {type(self).__name__} with a {type(other).__name__}")

    def __add__(self: _A, other: int) -> _A:
        if isinstance(other, _Address):
            raise TypeError(f"cannot add two addresses ({type(self).__name__}, {type(other).__name__})")
        return type(self)(int(self) + other)

    __radd__ = __add__

    @overload
    def __sub__(self: _A, other: _A) -> int: ...  # type: ignore[overload-overlap]
    @overload
    def __sub__(self: _A, other: int) -> _A: ...
    def __sub__(self: _A, other: int) -> _A | int:
        self._same_kind(other)
        difference = int(self) - int(other)
        return difference if isinstance(other, _Address) else type(self)(difference)

    def __lt__(self, other: int) -> bool:
        self._same_kind(other)
        return int(self) < int(other)

    def __le__(self, other: int) -> bool:
        self._same_kind(other)
        return int(self) <= int(other)

    def __gt__(self, other: int) -> bool:
        self._same_kind(other)
        return int(self) > int(other)

    def __ge__(self, other: int) -> bool:
        self._same_kind(other)
        return int(self) >= int(other)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _Address) and type(other) is not type(self):
            raise TypeError(f"cannot compare a {type(self).__name__} with a {type(other).__name__}")
        return int.__eq__(self, other) is True

    __hash__ = int.__hash__

    def align_down(self: _A, size: int) -> _A:
        """Return the address rounded down to a multiple of *size* (a power of two, bytes)."""
        return type(self)(int(self) & ~(size - 1))

    def align_up(self: _A, size: int) -> _A:
        """Return the address rounded up to a multiple of *size* (a power of two, bytes)."""
        return type(self)((int(self) + size - 1) & ~(size - 1))

    def is_aligned(self, size: int = PAGE_SIZE) -> bool:
        """Tell whether the address is a multiple of *size* (a power of two, bytes)."""
        return int(self) & (size - 1) == 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({int(self):#x})"

    def __str__(self) -> str:
        return f"{int(self):#x}"

    def __format__(self, spec: str) -> str:
        return format(int(self), spec) if spec else str(self)


class Gva(_Address):
    """A guest-virtual address."""


class Gpa(_Address):
    """A guest-physical address without the encryption bit."""

    @property
    def gfn(self) -> int:
        """The guest frame number (address / 4 KiB)."""
        return int(self) >> PAGE_SHIFT


class RawGpa(_Address):
    """A guest-physical address as a page-table entry or CR3 holds it: the encryption bit is part of it."""


@dataclass(frozen=True)
class EncryptionBit:
    """The address bit that tells private from shared memory.

    ``set_means_private`` is True for AMD's C-bit (set = private) and False for the S-bit of Intel TDX
    (set = shared).  *bit* is its position, 32 to 51.
    """

    bit: int
    set_means_private: bool = True

    def __post_init__(self) -> None:
        if not 32 <= self.bit <= 51:
            raise ValueError(f"encryption bit {self.bit} is outside 32..51")

    @property
    def name(self) -> str:
        """``C-bit`` or ``S-bit``."""
        return "C-bit" if self.set_means_private else "S-bit"

    @property
    def mask(self) -> int:
        """The bit as a mask."""
        return 1 << self.bit

    def bits(self, private: bool) -> int:
        """Return what must be OR-ed into a raw address for a private or shared page."""
        return self.mask if private == self.set_means_private else 0

    def to_raw(self, gpa: Gpa, private: bool) -> RawGpa:
        """Return *gpa* with the bit as a page-table entry needs it."""
        self.check(gpa)
        return RawGpa(int(gpa) | self.bits(private))

    def from_raw(self, raw: RawGpa) -> tuple[Gpa, bool]:
        """Split *raw* into the address and whether it names the private page."""
        value = int(raw)
        return Gpa(value & ~self.mask), bool(value & self.mask) == self.set_means_private

    def check(self, gpa: int) -> None:
        """Raise ValueError when *gpa* carries the encryption bit."""
        if int(gpa) & self.mask:
            raise ValueError(
                f"Gpa {int(gpa):#x} has bit {self.bit} set, which is the {self.name}: "
                "a Gpa never carries it; use from_raw() on a RawGpa"
            )
