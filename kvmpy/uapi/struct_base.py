# SPDX-License-Identifier: Apache-2.0
"""What all kernel structs in Python share: one class for each, made from the cffi declaration.

Attributes are the struct's fields, members of nameless unions included.  Numbers are ints, nested structs are
views of the same memory, arrays the views of :mod:`kvmpy.uapi.struct_arrays`.
"""

from __future__ import annotations

import difflib
import keyword
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from operator import attrgetter
from struct import Struct as Packing
from struct import unpack_from
from typing import Any, ClassVar, NamedTuple, TypeVar

from kvmpy.uapi import ffi
from kvmpy.uapi.struct_arrays import AnyArray, array_maker

_new = ffi.new
_cast = ffi.cast
_addressof = ffi.addressof

_S = TypeVar("_S", bound="Struct")
_F = TypeVar("_F", bound="FlexStruct")


class Field(NamedTuple):
    """A field: offset and size in bytes (size 0: an open array); a bit-field has *bits* from bit *shift*."""

    name: str
    offset: int
    size: int
    ctype: Any
    shift: int = 0
    bits: int = 0

    @property
    def attribute(self) -> str:
        """The name in Python: that of the kernel, with ``_`` behind what is a keyword here."""
        return f"{self.name}_" if keyword.iskeyword(self.name) else self.name


class Struct:
    """A kernel struct that owns its memory, or a view of one; ``cdata`` is the pointer for an ioctl.

    Fields that are not given are 0.  TypeError for an unknown field, OverflowError for a number that does not
    fit its field.
    """

    __slots__ = ("_owner", "cdata")

    NAME: ClassVar[str] = ""
    SIZE: ClassVar[int] = 0
    INDEX: ClassVar[int] = 0
    """The place of the class in :data:`CLASSES`."""
    IS_UNION: ClassVar[bool] = False
    FIELDS: ClassVar[dict[str, Field]] = {}
    _pointer: ClassVar[Any] = None

    cdata: Any

    def __init__(self, **fields: object) -> None:
        self.cdata = self._owner = _new(self._pointer)
        if fields:
            self._fill(fields)

    def _fill(self, fields: Mapping[str, object]) -> None:
        for name, value in fields.items():
            if name not in self.FIELDS:
                close = difflib.get_close_matches(name, self.FIELDS, 3)
                hint = f" (did you mean {', '.join(close)}?)" if close else ""
                raise TypeError(f"{self.NAME} has no field {name!r}{hint}")
            setattr(self, name, value)

    @classmethod
    def wrap(cls: type[_S], cdata: Any, owner: object) -> _S:
        """Return a view of the struct at *cdata*, a pointer; *owner* is kept alive with it."""
        made = cls.__new__(cls)
        made.cdata = cdata
        made._owner = owner
        return made

    @classmethod
    def fields(cls) -> dict[str, tuple[int, int]]:
        """Return offset and size in bytes of every field by name."""
        return {field.name: (field.offset, field.size) for field in cls.FIELDS.values()}

    @classmethod
    def from_bytes(cls: type[_S], data: bytes | bytearray | memoryview) -> _S:
        """Return a struct with this content; ValueError when *data* is not as long as the struct."""
        if len(data) != cls.SIZE:
            raise ValueError(f"{cls.NAME} has {cls.SIZE} bytes, {len(data)} were given")
        made = cls()
        ffi.memmove(made.cdata, data, cls.SIZE)
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of this struct, with the entries that it has room for."""
        return self.SIZE

    @property
    def size(self) -> int:
        """The same as :attr:`nbytes`, unless the kernel's struct has a field of this name."""
        return self.nbytes

    @property
    def host_address(self) -> int:
        """The address in this process, valid as long as this object lives."""
        return int(_cast("uintptr_t", self.cdata))

    def to_bytes(self) -> bytes:
        """Return the content."""
        return bytes(ffi.buffer(self.cdata, self.nbytes))

    def copy(self: _S) -> _S:
        """Return a struct of its own memory with the same content."""
        return type(self).from_bytes(self.to_bytes())

    def assign(self, value: Struct | Mapping[str, object]) -> None:
        """Copy another struct of this type, or take the fields from a mapping; those not given become 0."""
        if isinstance(value, Mapping):
            ffi.memmove(self.cdata, bytes(self.nbytes), self.nbytes)
            self._fill(value)
        elif type(value) is type(self):
            if value.nbytes > self.nbytes:
                raise ValueError(f"{value.nbytes} bytes of {self.NAME} do not fit {self.nbytes}")
            ffi.memmove(self.cdata, value.to_bytes().ljust(self.nbytes, b"\0"), self.nbytes)
        else:
            raise TypeError(f"{self.NAME} cannot be set from {type(value).__name__}")

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as plain values: ints, bytes, lists and dicts; unions show every member."""
        return self.values_in(self.to_bytes())

    @classmethod
    def values_in(
        cls, data: bytes, names: Iterable[str] | None = None, *, hexed: bool = False
    ) -> dict[str, Any]:
        """Return the fields (of *names*) in *data*, which may be longer, as :meth:`as_dict` does.

        With *hexed* bytes are hexadecimal digits.  Several times as fast as by way of a struct.
        """
        readers = _readers(cls._pointer.item, hexed)
        return {name: readers[name](data, 0) for name in (readers if names is None else names)}

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.to_bytes() == other.to_bytes()

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Callable[[bytes], Struct], tuple[bytes]]:
        return type(self).from_bytes, (self.to_bytes(),)

    def __repr__(self) -> str:
        from kvmpy.uapi.struct_text import describe

        return f"{self.NAME}({describe(self)})"


class FlexStruct(Struct):
    """A struct that ends in an open array: it has room for as many entries as were asked for."""

    __slots__ = ("_bytes",)

    OPEN: ClassVar[tuple[str, ...]] = ()
    OPEN_OFFSET: ClassVar[int] = 0
    ENTRY_SIZE: ClassVar[int] = 1
    COUNT: ClassVar[str | None] = None

    _bytes: int

    def __init__(self, **fields: object) -> None:
        self._bytes = self.SIZE
        super().__init__(**fields)

    @classmethod
    def wrap(cls: type[_F], cdata: Any, owner: object, size: int | None = None) -> _F:
        """Return a view of the struct at *cdata* that reaches *size* bytes (default: no entries)."""
        made = super().wrap(cdata, owner)
        made._bytes = cls.SIZE if size is None else size
        return made

    @classmethod
    def with_bytes(cls: type[_F], size: int) -> _F:
        """Return a struct of *size* bytes, all 0; the count field is left alone.

        ValueError when that is less than the part before the entries.
        """
        if size < cls.OPEN_OFFSET:
            raise ValueError(f"{cls.NAME} needs {cls.OPEN_OFFSET} bytes, {size} were given")
        room = max(size, cls.SIZE)
        raw = _new("uint64_t[]", (room + 7) // 8)
        return cls.wrap(_cast(cls._pointer, raw), raw, room)

    @classmethod
    def with_entries(cls: type[_F], count: int, **fields: object) -> _F:
        """Return a struct with room for *count* entries and its count field set accordingly."""
        if count < 0:
            raise ValueError(f"{cls.NAME} with {count} entries")
        made = cls.with_bytes(cls.OPEN_OFFSET + count * cls.ENTRY_SIZE)
        if cls.COUNT is not None:
            setattr(made._holder(), cls.COUNT, count)
        made._fill(fields)
        return made

    @classmethod
    def of(cls: type[_F], entries: Iterable[Any], **fields: object) -> _F:
        """Return a struct that holds copies of *entries* (structs, mappings or numbers)."""
        items = list(entries)
        made = cls.with_entries(len(items), **fields)
        made._array().assign(items)
        return made

    @classmethod
    def from_bytes(cls: type[_F], data: bytes | bytearray | memoryview) -> _F:
        """Return a struct with this content and room for as many entries as *data* holds."""
        made = cls.with_bytes(len(data))
        ffi.memmove(made.cdata, data, len(data))
        return made

    def _holder(self) -> Struct:
        holder: Struct = self
        for name in self.OPEN[:-1]:
            holder = getattr(holder, name)
        return holder

    def _array(self) -> AnyArray:
        array: AnyArray = getattr(self._holder(), self.OPEN[-1])
        return array

    @property
    def nbytes(self) -> int:
        """Bytes of this struct, with the entries that it has room for."""
        return self._bytes

    @property
    def room(self) -> int:
        """How many entries there is memory for."""
        return max(0, self._bytes - self.OPEN_OFFSET) // self.ENTRY_SIZE

    @property
    def counted(self) -> int:
        """How many entries the count field says there are, which may be any number of its type; the room
        where there is no such field.
        """
        return self.room if self.COUNT is None else int(getattr(self._holder(), self.COUNT))

    def __len__(self) -> int:
        # OverflowError, as with any object of Python, from 2**63 on.
        return self.counted

    def __bool__(self) -> bool:
        return True

    def entries_list(self) -> list[Any]:
        """Return the entries, as many as the count field says; ValueError when there is room for fewer."""
        count = self.counted
        if count > self.room:
            raise ValueError(f"{self.NAME} counts {count} entries and has room for {self.room}")
        return list(self._array()[:count])


_Reader = Callable[[bytes, int], Any]


@lru_cache(None)
def _readers(ctype: Any, hexed: bool) -> dict[str, _Reader]:
    """Return what reads each field of a struct type from bytes in which a struct begins."""
    return {field.attribute: _reader(field, hexed) for field in flat_fields(ctype)}


def _reader(field: Field, hexed: bool) -> _Reader:
    offset, ctype = field.offset, field.ctype
    if ctype.kind == "array":
        return _array_reader(offset, ctype, hexed)
    if ctype.kind != "primitive":
        inner = _readers(ctype, hexed)
        return lambda data, at: {name: read(data, at + offset) for name, read in inner.items()}
    unpack = Packing(_packing(ctype)).unpack_from
    if field.bits:
        shift, mask = field.shift, (1 << field.bits) - 1
        return lambda data, at: unpack(data, at + offset)[0] >> shift & mask
    return lambda data, at: unpack(data, at + offset)[0]


def _packing(ctype: Any) -> str:
    code = {1: "b", 2: "h", 4: "i", 8: "q"}[ffi.sizeof(ctype)]
    return f"<{code if int(_cast(ctype, -1)) < 0 else code.upper()}"


def _array_reader(offset: int, ctype: Any, hexed: bool) -> _Reader:
    item, length = ctype.item, ctype.length
    size = ffi.sizeof(item)

    def bounds(data: bytes, at: int) -> tuple[int, int]:
        begin = at + offset
        return begin, max(0, len(data) - begin) // size if length is None else length

    if item.cname == "uint8_t":

        def read(data: bytes, at: int) -> Any:
            begin, count = bounds(data, at)
            return data[begin : begin + count].hex() if hexed else data[begin : begin + count]

    elif item.kind == "primitive":
        code = _packing(item)[1]

        def read(data: bytes, at: int) -> Any:
            begin, count = bounds(data, at)
            return list(unpack_from(f"<{count}{code}", data, begin))

    elif item.kind == "array":
        row = _array_reader(0, item, hexed)

        def read(data: bytes, at: int) -> Any:
            begin, count = bounds(data, at)
            return [row(data, begin + number * size) for number in range(count)]

    else:
        inner = _readers(item, hexed)

        def read(data: bytes, at: int) -> Any:
            begin, count = bounds(data, at)
            return [
                {name: each(data, begin + number * size) for name, each in inner.items()}
                for number in range(count)
            ]

    return read


def _number(field: Field) -> property:
    name = field.name

    def fset(self: Struct, value: int) -> None:
        try:
            setattr(self.cdata, name, value)
        except OverflowError:
            kind = f"{field.bits} bits" if field.bits else field.ctype.cname
            raise OverflowError(f"{self.NAME}.{name}: {value:#x} does not fit {kind}") from None

    return property(attrgetter(f"cdata.{name}"), fset)


def _nested(field: Field, kind: type[Struct]) -> property:
    name = field.name
    offset = field.offset

    if issubclass(kind, FlexStruct):
        flex: type[FlexStruct] = kind

        def fget(self: Struct) -> Struct:
            return flex.wrap(_addressof(self.cdata, name), self._owner, self.nbytes - offset)

    else:

        def fget(self: Struct) -> Struct:
            return kind.wrap(_addressof(self.cdata, name), self._owner)

    def fset(self: Struct, value: Struct | Mapping[str, object]) -> None:
        fget(self).assign(value)

    return property(fget, fset)


def _array(field: Field, struct_of: Callable[[Any], type[Struct]]) -> property:
    name = field.name
    offset = field.offset
    item = field.ctype.item
    length = field.ctype.length
    pointer = ffi.typeof(ffi.getctype(item, "*"))
    make = array_maker(item, struct_of)
    item_size = ffi.sizeof(item)

    def fget(self: Struct) -> AnyArray:
        count = max(0, self.nbytes - offset) // item_size if length is None else length
        return make(_cast(pointer, _addressof(self.cdata, name)), count, self._owner)

    def fset(self: Struct, values: Iterable[Any]) -> None:
        fget(self).assign(values)

    return property(fget, fset)


def flat_fields(ctype: Any, base: int = 0) -> list[Field]:
    """Return the fields of a cffi struct type; the members of nameless ones stand for them."""
    found = []
    for name, entry in ctype.fields:
        offset = base + entry.offset
        if not name:
            found += flat_fields(entry.type, offset)
            continue
        is_open = entry.type.kind == "array" and entry.type.length is None
        size = 0 if is_open else ffi.sizeof(entry.type)
        bits = max(entry.bitsize, 0)
        found.append(Field(name, offset, size, entry.type, entry.bitshift if bits else 0, bits))
    return found


CLASSES: list[type[Struct]] = [Struct]


def make_class(
    ctype: Any, counts: Mapping[str, str], struct_of: Callable[[Any], type[Struct]]
) -> type[Struct]:
    """Return the class for a cffi struct or union type; *counts* names the field that counts the entries."""
    tag = ctype.cname.split(" ", 1)[1]
    fields = {field.attribute: field for field in flat_fields(ctype)}
    space: dict[str, Any] = {
        "__slots__": (),
        "__module__": "kvmpy.uapi.structs",
        "__doc__": f"``{ctype.cname.replace('__', '.')}``, {ffi.sizeof(ctype)} bytes.",
        "NAME": tag,
        "SIZE": ffi.sizeof(ctype),
        "IS_UNION": ctype.kind == "union",
        "FIELDS": fields,
        "_pointer": ffi.typeof(f"{ctype.cname} *"),
    }
    base: type[Struct] = Struct
    for attribute, field in fields.items():
        if field.ctype.kind == "primitive":
            space[attribute] = _number(field)
        elif field.ctype.kind == "array":
            space[attribute] = _array(field, struct_of)
            if field.ctype.length is None:
                base = FlexStruct
                space["OPEN"] = (attribute,)
                space["OPEN_OFFSET"] = field.offset
                space["ENTRY_SIZE"] = ffi.sizeof(field.ctype.item)
                space["COUNT"] = counts.get(tag)
        else:
            kind = struct_of(field.ctype)
            space[attribute] = _nested(field, kind)
            if issubclass(kind, FlexStruct):
                base = FlexStruct
                space["OPEN"] = (attribute, *kind.OPEN)
                space["OPEN_OFFSET"] = field.offset + kind.OPEN_OFFSET
                space["ENTRY_SIZE"] = kind.ENTRY_SIZE
                space["COUNT"] = kind.COUNT
    if base is Struct:
        space["nbytes"] = space["SIZE"]  # as an attribute, since every ioctl asks
    space["INDEX"] = len(CLASSES)
    CLASSES.append(type(tag, (base,), space))
    return CLASSES[-1]
