# SPDX-License-Identifier: Apache-2.0
"""Guest memory by name or address, read and written from the host."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Literal

from kvmpy.core.address import Gpa, Gva

if TYPE_CHECKING:
    from kvmpy.guest.ctype import CType
    from kvmpy.guest.vm import GuestVm


_bytes = bytes


def _number(code: str) -> property:
    form = struct.Struct("<" + code)

    def get(self: GuestVariable) -> int:
        return int(form.unpack(self._load(form.size))[0])

    def put(self: GuestVariable, value: int) -> None:
        self._store(form.pack(value))

    kind = "unsigned" if code.isupper() else "signed"
    return property(
        get, put, doc=f"The first {form.size * 8} bits as an {kind} number; the width must fit the variable."
    )


class GuestVariable:
    """A global of the guest: read and write it as ``.u8`` to ``.u64``, ``.i8`` to ``.i64``, ``.bytes``,
    ``.text``, as an array of numbers (:meth:`view`), or by its C type: ``.value`` and :meth:`set`.

    ``vm.symbol("orders")[2].set(op=1, address=gva)`` writes an element of an array of structs;
    ``vm.symbol("reply").value.status`` reads a field.  Every access goes to guest memory.
    PrivateMemoryError where the page is private and the protection keeps it from the host: declare the
    variable GUEST_SHARED to look at it under every protection.
    """

    __slots__ = ("_ctype", "_vm", "gva", "name", "size")

    def __init__(self, vm: GuestVm, name: str, gva: Gva, size: int, ctype: CType | None = None) -> None:
        self._vm = vm
        self.name = name
        self.gva = gva
        self.size = size
        self._ctype = ctype

    @property
    def ctype(self) -> CType:
        """Its C type; GuestTypeError when the program does not say."""
        if self._ctype is None:
            self._ctype = self._vm.program.type_of(self.name)
        return self._ctype

    @property
    def value(self) -> Any:
        """What it holds by its C type: an int, a list, bytes, or a namespace of a struct's fields."""
        return self.ctype.decode(self._load(self.ctype.size))

    @value.setter
    def value(self, value: Any) -> None:
        self._store(self.ctype.encode(value))

    def set(self, **fields: Any) -> None:
        """Write a struct; a field that is not given becomes 0.  GuestTypeError for an unknown field or a
        value that does not fit.
        """
        self._store(self.ctype.encode(fields))

    def __getitem__(self, index: int) -> GuestVariable:
        """Return an element of an array; IndexError behind its end."""
        element = self.ctype.element
        if element is None:
            raise TypeError(f"{self.name} is not an array")
        if not 0 <= index < self.ctype.count:
            raise IndexError(f"{self.name} has {self.ctype.count} elements; there is no [{index}]")
        name = f"{self.name}[{index}]"
        return GuestVariable(self._vm, name, self.gva + index * element.size, element.size, element)

    def field(self, name: str) -> GuestVariable:
        """Return a field of a struct; GuestTypeError with the closest names when there is none."""
        member = self.ctype.member(name)
        if member.bits:
            raise TypeError(f"{self.name}.{name} is a bit-field, which has no address")
        return GuestVariable(
            self._vm, f"{self.name}.{name}", self.gva + member.offset, member.type.size, member.type
        )

    @property
    def gpa(self) -> Gpa:
        """The guest-physical address behind it."""
        return self._vm.gva_to_gpa(self.gva)

    def _load(self, size: int) -> _bytes:
        self._check(size)
        return self._vm.read(self.gva, size)

    def _store(self, data: _bytes) -> None:
        self._check(len(data))
        self._vm.write(self.gva, data)

    def _check(self, size: int) -> None:
        if self.size and size > self.size:
            raise ValueError(f"{self.name} has {self.size} bytes, not {size}")

    u8 = _number("B")
    u16 = _number("H")
    u32 = _number("I")
    u64 = _number("Q")
    i8 = _number("b")
    i16 = _number("h")
    i32 = _number("i")
    i64 = _number("q")

    @property
    def bytes(self) -> _bytes:
        """The whole variable."""
        return self._load(self.size)

    @bytes.setter  # noqa: A003 - the property above
    def bytes(self, data: _bytes) -> None:
        self._store(data)

    @property
    def text(self) -> str:
        """The variable as a C string, up to its NUL."""
        return self.bytes.split(b"\0", 1)[0].decode("utf-8", "replace")

    def view(self, code: Literal["B", "b", "H", "h", "I", "i", "Q", "q"] = "B") -> memoryview:
        """Return the memory itself as an array of struct-module *code* (``"Q"`` for u64); not a copy.

        ValueError when the variable crosses into a page that is elsewhere in physical memory.
        """
        return self._vm.view(self.gva, self.size).cast("B").cast(code)

    def __repr__(self) -> str:
        return f"<GuestVariable {self.name} {self.gva} {self.size} bytes>"
