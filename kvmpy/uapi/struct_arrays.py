# SPDX-License-Identifier: Apache-2.0
"""Arrays inside kernel structs: views that read and write the struct's own memory and keep it alive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from kvmpy.uapi import ffi

if TYPE_CHECKING:
    from kvmpy.uapi.struct_base import Struct

_T = TypeVar("_T")
_S = TypeVar("_S", bound="Struct")

_SHOWN_ITEMS = 8
_SHOWN_BYTES = 32


class _Array(Sequence[_T]):
    """*cdata* points to the first of *length* items; *owner* keeps the memory alive.

    Slices are lists.
    """

    __slots__ = ("_length", "_owner", "cdata")

    # What an item is called, and what makes it 0.
    ITEMS = "numbers"
    ZERO: Any = 0

    def __init__(self, cdata: Any, length: int, owner: object) -> None:
        self.cdata = cdata
        self._length = length
        self._owner = owner

    def __len__(self) -> int:
        return self._length

    def _at(self, index: int) -> int:
        if not -self._length <= index < self._length:
            raise IndexError(f"index {index} of {self._length} items")
        return index if index >= 0 else index + self._length

    def _range(self, index: slice) -> range:
        return range(*index.indices(self._length))

    @property
    def size(self) -> int:
        """Bytes of all items."""
        return self._length * int(ffi.sizeof(ffi.typeof(self.cdata).item))

    def to_bytes(self) -> bytes:
        """Return the memory of all items."""
        return bytes(ffi.buffer(self.cdata, self.size))

    def _item(self, index: int) -> _T:
        item: _T = self.cdata[index]
        return item

    @overload
    def __getitem__(self, index: int) -> _T: ...

    @overload
    def __getitem__(self, index: slice) -> list[_T]: ...

    def __getitem__(self, index: int | slice) -> _T | list[_T]:
        if isinstance(index, slice):
            return [self._item(i) for i in self._range(index)]
        return self._item(self._at(index))

    def __setitem__(self, index: int, value: Any) -> None:
        item: Any = self[index]
        item.assign(value)

    def assign(self, values: Iterable[Any]) -> None:
        """Set the leading items to *values* and the others to 0; ValueError when there are too many."""
        items = list(values)
        if len(items) > self._length:
            raise ValueError(f"{len(items)} {self.ITEMS} for {self._length} items")
        for i in range(self._length):
            self[i] = items[i] if i < len(items) else self.ZERO

    def __repr__(self) -> str:
        shown = ", ".join(map(self._shown, self[:_SHOWN_ITEMS]))
        return f"[{shown}{f', ... {self._length} items' if self._length > _SHOWN_ITEMS else ''}]"

    _shown: Callable[[Any], str] = staticmethod(repr)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Sequence) and not isinstance(other, str):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]


class _Numbers(_Array[int]):
    __slots__ = ()

    _pack: Callable[[Iterable[int]], Any] = list

    def _store(self, start: int, values: Any) -> None:
        self.cdata[start : start + len(values)] = values

    @overload
    def __setitem__(self, index: int, value: int) -> None: ...

    @overload
    def __setitem__(self, index: slice, value: Iterable[int]) -> None: ...

    def __setitem__(self, index: int | slice, value: int | Iterable[int]) -> None:
        if isinstance(index, slice):
            values = self._pack([value] if isinstance(value, int) else value)
            where = self._range(index)
            if len(values) != len(where):
                raise ValueError(f"{len(values)} {self.ITEMS} for {len(where)} items")
            if where.step == 1:
                self._store(where.start, values)
            else:
                for i, number in zip(where, values, strict=True):
                    self.cdata[i] = number
        else:
            self.cdata[self._at(index)] = value

    def assign(self, values: Iterable[int]) -> None:
        """Set the leading items to *values* and the others to 0; ValueError when there are too many."""
        packed = self._pack(values)
        self[:] = packed + self._pack([0]) * (self._length - len(packed))


class IntArray(_Numbers):
    """An array of numbers; slices are lists, assigned slices must keep their length."""

    __slots__ = ()

    _shown = staticmethod(hex)

    def __iter__(self) -> Iterator[int]:
        return iter(ffi.unpack(self.cdata, self._length) if self._length else ())


class ByteArray(_Numbers):
    """An array of bytes; slices are ``bytes``, and ``bytes(array)`` copies all of it."""

    __slots__ = ()

    ITEMS = "bytes"
    _pack = bytes

    def _store(self, start: int, values: Any) -> None:
        ffi.memmove(self.cdata + start, values, len(values))

    @overload  # type: ignore[override]
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> bytes: ...

    def __getitem__(self, index: int | slice) -> int | bytes:
        return self.to_bytes()[index] if isinstance(index, slice) else super().__getitem__(index)

    def __bytes__(self) -> bytes:
        return self.to_bytes()

    def __iter__(self) -> Iterator[int]:
        return iter(self.to_bytes())

    def __repr__(self) -> str:
        shown = self[:_SHOWN_BYTES].hex()
        return f"<{shown}{f'... {self._length} bytes' if self._length > _SHOWN_BYTES else ''}>"


class StructArray(_Array[_S], Generic[_S]):
    """An array of structs; items are views, assigning copies into them."""

    __slots__ = ("_kind",)

    ITEMS = "structs"
    ZERO: Mapping[str, object] = MappingProxyType({})

    def __init__(self, cdata: Any, length: int, owner: object, kind: type[_S]) -> None:
        super().__init__(cdata, length, owner)
        self._kind = kind

    def _item(self, index: int) -> _S:
        return self._kind.wrap(self.cdata + index, self._owner)


class NestedArray(_Array[ByteArray]):
    """An array of arrays of bytes."""

    __slots__ = ()

    ITEMS = "rows"
    ZERO = b""

    def _item(self, index: int) -> ByteArray:
        row = self.cdata[index]
        return ByteArray(row + 0, len(row), self._owner)


AnyArray = IntArray | ByteArray | StructArray[Any] | NestedArray

ArrayMaker = Callable[[Any, int, object], AnyArray]


def array_maker(item: Any, struct_of: Callable[[Any], type[Struct]]) -> ArrayMaker:
    """Return what makes the view of an array whose items have the cffi type *item*."""
    if item.kind in ("struct", "union"):
        kind = struct_of(item)

        def make(cdata: Any, length: int, owner: object) -> AnyArray:
            return StructArray(cdata, length, owner, kind)

        return make
    if item.kind == "array":
        if item.item.cname != "uint8_t":
            raise TypeError(f"no view for an array of {item.cname}")
        return NestedArray
    return ByteArray if item.cname == "uint8_t" else IntArray
