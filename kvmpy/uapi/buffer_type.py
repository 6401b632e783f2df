# SPDX-License-Identifier: Apache-2.0
"""How the ioctl table says where pointers lead: to buffers, with their lengths and pointers of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from kvmpy.uapi import ffi
from kvmpy.uapi.struct_base import FlexStruct, Struct
from kvmpy.uapi.structs import NESTED, STRUCTS

DataKind = Literal["none", "in", "out", "inout"]
Special = Literal["slot-bitmap", "xsave", "one-reg"]
"""Sizes that the struct does not tell.

``slot-bitmap``: one bit for each page of the memory slot, in whole quadwords. ``xsave``: what
KVM_CHECK_EXTENSION(KVM_CAP_XSAVE2) says of the VM, 4096 at least. ``one-reg``: in the register's id.
"""


@dataclass(frozen=True, slots=True)
class Size:
    """How long a buffer is: ``max(least, base + count * unit / per)`` bytes, a multiple of ``round``.

    *count* is a field of the parent, or with *own* of the buffer itself. Without *count* it is *base*.
    """

    base: int = 0
    count: str = ""
    own: bool = False
    unit: int = 1
    per: int = 1
    least: int = 0
    round: int = 1
    special: Special | None = None

    def bytes(self, count: int) -> int:
        """Return the length for a *count*."""
        size = self.base + -(-count * self.unit // self.per)
        return max(self.least, -(-size // self.round) * self.round)


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory that an ioctl reads (``arg`` in), writes (out), or both.

    *pointer* is the field of the parent that holds its address (dots lead into nested structs), ``""`` for
    the argument itself; *when* is a field of the parent without which the kernel ignores the pointer. *reads*
    says how many bytes the kernel reads where that is less than all. *guest*: it is guest memory. *placed*:
    where it lies in its page counts, as the kernel hands it on by its physical address.
    *cases* holds further children by the value of the field *select*.
    """

    struct: str | None
    arg: DataKind
    size: Size
    pointer: str = ""
    scalar: str | None = None
    when: str = ""
    reads: int | None = None
    guest: bool = False
    placed: bool = False
    children: tuple[Buffer, ...] = ()
    select: str = ""
    cases: Mapping[int, tuple[Buffer, ...]] = field(default_factory=dict)

    @property
    def kind(self) -> type[Struct] | None:
        """The class of the struct that lies here."""
        return None if self.struct is None else struct_class(self.struct)

    def place(self, name: str) -> tuple[int, int]:
        """Return offset and size of the field *name* of the struct that lies here."""
        if self.struct is None:
            raise ValueError(f"bytes have no field {name}")
        return field_place(self.struct, name)


def struct_class(name: str) -> type[Struct]:
    """Return the class of a struct, nested ones included."""
    return STRUCTS[name] if name in STRUCTS else NESTED[name]


def field_place(struct: str, name: str) -> tuple[int, int]:
    """Return offset and size of a field; dots lead into nested structs, ``[N]`` to an item of an array."""
    kind = struct_class(struct)
    offset = size = 0
    parts = name.split(".")
    for number, part in enumerate(parts):
        base, _, index = part.partition("[")
        member = kind.FIELDS[base]
        offset += member.offset
        ctype, size = member.ctype, member.size
        if index:
            ctype = ctype.item
            size = int(ffi.sizeof(ctype))
            offset += int(index.removesuffix("]")) * size
        if number < len(parts) - 1:
            kind = struct_class(ctype.cname.split(" ", 1)[1])
    return offset, size


def _whole(struct: str) -> Size:
    kind = struct_class(struct)
    if struct == "kvm_nested_state":
        return Size(count="size", own=True, least=kind.SIZE)
    if issubclass(kind, FlexStruct) and kind.COUNT is not None:
        count = ".".join((*kind.OPEN[:-1], kind.COUNT))
        return Size(kind.OPEN_OFFSET, count, own=True, unit=kind.ENTRY_SIZE)
    return Size(kind.SIZE)


def struct_at(struct: str, arg: DataKind, **more: object) -> Buffer:
    """Return the buffer of a struct, as long as it says."""
    return replace(Buffer(struct, arg, _whole(struct)), **more)  # type: ignore[arg-type]


def bytes_at(
    pointer: str, length: str, arg: DataKind, *, guest: bool = False, placed: bool = False, when: str = ""
) -> Buffer:
    """Return a buffer of bytes whose number is in the field *length*."""
    return Buffer(None, arg, Size(count=length), pointer, guest=guest, placed=placed, when=when)


def fixed_at(pointer: str, size: int, arg: DataKind, when: str = "") -> Buffer:
    """Return a buffer of *size* bytes."""
    return Buffer(None, arg, Size(size), pointer, when=when)
