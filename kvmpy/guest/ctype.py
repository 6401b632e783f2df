# SPDX-License-Identifier: Apache-2.0
"""The C types of a guest's globals, from its debug information: Python values to bytes and back.

A number is an int, an array a list (of bytes: ``bytes``), a struct or union a namespace with its fields.
DWARF Debugging Information Format 5, 5.7 "Structure, Union, Class and Interface Type Entries".
"""

from __future__ import annotations

import difflib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kvmpy.guest.errors import GuestTypeError

if TYPE_CHECKING:
    from elftools.dwarf.die import DIE

_SAME_AS = {"DW_TAG_const_type", "DW_TAG_volatile_type", "DW_TAG_atomic_type"}
_SIGNED = {5, 6, 13}  # DW_ATE_signed, signed_char, signed_fixed
_ADDRESS_OF = 0x03  # DW_OP_addr


@dataclass(frozen=True)
class Member:
    """A field: *offset* in bytes; a bit-field has *bits* from bit *shift* of its bytes."""

    name: str
    offset: int
    type: CType
    shift: int = 0
    bits: int = 0


@dataclass(frozen=True)
class CType:
    """A type: *size* in bytes; a struct has *members*, an array *count* elements of type *element*."""

    name: str
    size: int
    signed: bool = False
    members: tuple[Member, ...] = ()
    element: CType | None = None
    count: int = 0
    _by_name: dict[str, Member] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._by_name.update({member.name: member for member in self.members})

    def member(self, name: str) -> Member:
        """Return a field; GuestTypeError with the closest names when there is none."""
        try:
            return self._by_name[name]
        except KeyError:
            close = difflib.get_close_matches(name, self._by_name, n=3, cutoff=0.5)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise GuestTypeError(f"{self.name} has no field {name!r}{hint}") from None

    def encode(self, value: Any) -> bytes:
        """Return *value* as this type; what is not given is 0, as in a C initialiser.

        GuestTypeError for an unknown field, too many elements, and a number that does not fit.
        """
        data = bytearray(self.size)
        self._put(data, 0, value)
        return bytes(data)

    def decode(self, data: bytes | memoryview) -> Any:
        """Return the value that *data* holds as this type."""
        if self.element is not None:
            width = self.element.size
            if width == 1:
                return bytes(data[: self.count])
            return [self.element.decode(data[i * width : (i + 1) * width]) for i in range(self.count)]
        if self.members:
            return SimpleNamespace(**{member.name: _get(data, member) for member in self.members})
        return int.from_bytes(data[: self.size], "little", signed=self.signed)

    def _put(self, data: bytearray, position: int, value: Any) -> None:
        if self.element is not None:
            self._put_elements(data, position, value)
        elif self.members:
            fields = value if isinstance(value, Mapping) else getattr(value, "__dict__", None)
            if fields is None:
                raise GuestTypeError(f"{self.name} takes its fields by name, not {value!r}")
            for name, part in fields.items():
                member = self.member(name)
                if member.bits:
                    _put_bits(data, position, member, part)
                else:
                    member.type._put(data, position + member.offset, part)
        else:
            data[position : position + self.size] = self._number(value)

    def _put_elements(self, data: bytearray, offset: int, value: Any) -> None:
        assert self.element is not None
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise GuestTypeError(f"{self.name} takes a sequence, not {value!r}")
        if len(value) > self.count:
            raise GuestTypeError(f"{self.name} has room for {self.count} elements, not {len(value)}")
        for number, part in enumerate(value):
            self.element._put(data, offset + number * self.element.size, part)

    def _number(self, value: Any) -> bytes:
        try:
            number = int(value)
            # A negative number in an unsigned type is its two's complement, as in C.
            signed = self.signed or number < 0
            return number.to_bytes(self.size, "little", signed=signed)
        except (TypeError, ValueError, OverflowError):
            raise GuestTypeError(f"{value!r} does not fit into {self.name} ({self.size} bytes)") from None


def _get(data: bytes | memoryview, member: Member) -> Any:
    part = data[member.offset : member.offset + member.type.size]
    if member.bits:
        return int.from_bytes(part, "little") >> member.shift & ((1 << member.bits) - 1)
    return member.type.decode(part)


def _put_bits(data: bytearray, offset: int, member: Member, value: Any) -> None:
    start, end = offset + member.offset, offset + member.offset + member.type.size
    if not 0 <= int(value) < 1 << member.bits:
        raise GuestTypeError(f"{value!r} does not fit into the {member.bits} bits of {member.name}")
    mask = ((1 << member.bits) - 1) << member.shift
    word = int.from_bytes(data[start:end], "little") & ~mask | int(value) << member.shift
    data[start:end] = word.to_bytes(end - start, "little")


def of_variable(elf: bytes, name: str, gva: int) -> CType:
    """Return the type of the global *name* at *gva*; GuestTypeError when the image does not say."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        image = ELFFile(io.BytesIO(elf))
        if image.has_dwarf_info():
            for unit in image.get_dwarf_info().iter_CUs():
                for entry in unit.get_top_DIE().iter_children():
                    if entry.tag == "DW_TAG_variable" and _place(entry) == gva:
                        return _type(_attribute(entry, "DW_AT_type"))
    except (ELFError, KeyError, ValueError, AttributeError, IndexError) as error:
        raise GuestTypeError(f"the debug information of {name} cannot be read: {error}") from error
    raise GuestTypeError(f"the program has no debug information of {name}")


def _place(entry: DIE) -> int | None:
    location = entry.attributes.get("DW_AT_location")
    if location is None or not isinstance(location.value, list) or location.value[:1] != [_ADDRESS_OF]:
        return None
    return int.from_bytes(bytes(location.value[1:9]), "little")


def _attribute(entry: DIE, attribute: str) -> DIE:
    """Return the entry that an attribute refers to, be it of the declaration that this one completes."""
    while attribute not in entry.attributes:
        entry = entry.get_DIE_from_attribute("DW_AT_specification")
    return entry.get_DIE_from_attribute(attribute)


def _text(entry: DIE, attribute: str = "DW_AT_name") -> str:
    value = entry.attributes.get(attribute)
    return value.value.decode() if value is not None else ""


def _size(entry: DIE) -> int:
    return int(entry.attributes["DW_AT_byte_size"].value)


def _type(entry: DIE) -> CType:
    if entry.tag in _SAME_AS:
        return _type(entry.get_DIE_from_attribute("DW_AT_type"))
    if entry.tag == "DW_TAG_typedef":
        return replace(_type(entry.get_DIE_from_attribute("DW_AT_type")), name=_text(entry))
    if entry.tag == "DW_TAG_base_type":
        return CType(_text(entry), _size(entry), int(entry.attributes["DW_AT_encoding"].value) in _SIGNED)
    if entry.tag in ("DW_TAG_pointer_type", "DW_TAG_enumeration_type"):
        return CType(_text(entry) or "pointer", _size(entry))
    if entry.tag in ("DW_TAG_structure_type", "DW_TAG_union_type"):
        kind = "struct" if entry.tag == "DW_TAG_structure_type" else "union"
        members = tuple(member for child in entry.iter_children() for member in _members(child))
        return CType(f"{kind} {_text(entry)}".rstrip(), _size(entry), members=members)
    if entry.tag == "DW_TAG_array_type":
        return _array(entry)
    raise GuestTypeError(f"{_text(entry) or entry.tag} is a type that kvmpy does not read or write")


def _array(entry: DIE) -> CType:
    result = _type(entry.get_DIE_from_attribute("DW_AT_type"))
    bounds = [child for child in entry.iter_children() if child.tag == "DW_TAG_subrange_type"]
    for bound in reversed(bounds):
        if "DW_AT_count" in bound.attributes:
            count = int(bound.attributes["DW_AT_count"].value)
        else:
            count = int(bound.attributes["DW_AT_upper_bound"].value) + 1
        result = CType(f"{result.name}[{count}]", result.size * count, element=result, count=count)
    return result


def _members(child: DIE) -> list[Member]:
    """Return the field that *child* is; of a nameless struct or union inside, its fields."""
    if child.tag != "DW_TAG_member":
        return []
    address = child.attributes.get("DW_AT_data_member_location")
    offset = int(address.value) if address is not None else 0
    inner = _type(child.get_DIE_from_attribute("DW_AT_type"))
    if "DW_AT_name" not in child.attributes:
        return [Member(m.name, offset + m.offset, m.type, m.shift, m.bits) for m in inner.members]
    if "DW_AT_bit_size" in child.attributes:
        first = int(child.attributes["DW_AT_data_bit_offset"].value)
        bits = int(child.attributes["DW_AT_bit_size"].value)
        unit = inner.size * 8
        return [Member(_text(child), first // unit * inner.size, inner, first % unit, bits)]
    return [Member(_text(child), offset, inner)]
