# SPDX-License-Identifier: Apache-2.0
"""What an ioctl reads and writes, copied as chunks: its argument, and what the pointers in it lead to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from struct import Struct as Packing
from typing import Any

from kvmpy.debug.record.format import CUT, PADDING, What, When
from kvmpy.uapi import ffi
from kvmpy.uapi.buffers import BUFFERS, Buffer, children_of
from kvmpy.uapi.ioctl_type import decode

# A wrong length in a negative test must not fill the disk.
MOST = 1 << 20

_pack = Packing("<QIBBH").pack
_buffer: Any = ffi.buffer
_cast = ffi.cast
_IN, _OUT, _BOTH = int(When.IN), int(When.OUT), int(When.BOTH)
_ARGUMENT, _NESTED = int(What.ARGUMENT), int(What.NESTED)

Peek = Callable[[int, int], bytes]
SlotBytes = Callable[[int], int]
Holds = Callable[[int], bool]


def chunk(address: int, data: bytes, when: int, kind: int, flags: int = 0) -> bytes:
    """Return a chunk as bytes."""
    size = len(data)
    return _pack(address, size, when, kind, flags) + data + PADDING[size & 7]


class Plan:
    """How the argument of one request is copied: before, after, both; and whether pointers are followed."""

    __slots__ = ("after", "before", "buffer", "deep", "size", "when")

    def __init__(self, nr: int) -> None:
        self.buffer: Buffer | None = BUFFERS.get(nr)
        arg = self.buffer.arg if self.buffer is not None else "inout"
        self.before = arg in ("in", "inout")
        self.after = arg in ("out", "inout")
        self.when = _BOTH if arg == "in" else _IN
        self.deep = self.buffer is not None and bool(self.buffer.children or self.buffer.cases)
        self.size = decode(nr).size if self.buffer is None else self.buffer.size.bytes(0)


_plans: dict[int, Plan] = {}


def plan_of(nr: int) -> Plan:
    """Return the plan of a request number."""
    plan = _plans.get(nr)
    if plan is None:
        plan = _plans[nr] = Plan(nr)
    return plan


def struct_chunk(arg: Any, when: int) -> bytes:
    """Return the chunk of a struct that is the argument."""
    cdata = arg.cdata
    size: int = arg.nbytes
    data: bytes = _buffer(cdata, size)[:]
    return _pack(int(_cast("uintptr_t", cdata)), size, when, _ARGUMENT, 0) + data + PADDING[size & 7]


class Follower:
    """Copies arguments that are addresses, and what pointers lead to, without ever faulting."""

    def __init__(self, peek: Peek, holds: Holds) -> None:
        self._peek = peek
        self._holds = holds

    def raw(self, address: int, plan: Plan, when: int) -> list[bytes]:
        """Return the chunk of an argument that was passed as a number, none where it is a null pointer."""
        if plan.size == 0 or address == 0:
            return []
        size = self._size(plan.buffer, address) if plan.buffer is not None else plan.size
        data = self._peek(address, size)
        return [chunk(address, data, when, _ARGUMENT, 0 if len(data) == size else CUT)]

    def _size(self, buffer: Buffer, address: int) -> int:
        size = buffer.size
        if not size.own or not size.count:
            return min(size.bytes(0), MOST)
        offset, width = buffer.place(size.count)
        return min(size.bytes(int.from_bytes(self._peek(address + offset, width), "little")), MOST)

    def nested(self, buffer: Buffer, content: bytes, when: int, slot_bytes: SlotBytes) -> Iterator[bytes]:
        """Yield a chunk for each pointer in *content*, what *buffer* describes, that counts at *when*."""
        for child in children_of(buffer, self._selected(buffer, content)):
            address = _field(buffer, content, child.pointer)
            if not address or (child.when and not _field(buffer, content, child.when)):
                continue
            if child.guest or self._holds(address):
                continue
            size = self._child_size(buffer, child, content, address, slot_bytes)
            data = self._peek(address, size) if size else b""
            wanted = when & (_BOTH if child.arg == "inout" else _IN if child.arg == "in" else _OUT)
            if wanted and size:
                told = _BOTH if child.arg == "in" else when
                yield chunk(address, data, told, _NESTED, 0 if len(data) == size else CUT)
            if child.children or child.cases:
                yield from self.nested(child, data, when, slot_bytes)

    @staticmethod
    def _selected(buffer: Buffer, content: bytes) -> int | None:
        return _field(buffer, content, buffer.select) if buffer.select else None

    def _child_size(
        self, parent: Buffer, child: Buffer, content: bytes, address: int, slot_bytes: SlotBytes
    ) -> int:
        size = child.size
        if size.special == "slot-bitmap":
            wanted = slot_bytes(_field(parent, content, "slot"))
        elif size.special == "one-reg":
            wanted = 1 << (_field(parent, content, "id") >> 52 & 0xF)
        elif size.own:
            return self._size(child, address)
        else:
            wanted = size.bytes(_field(parent, content, size.count) if size.count else 0)
        return min(wanted, MOST)


def _field(buffer: Buffer, content: bytes, name: str) -> int:
    offset, size = buffer.place(name)
    return int.from_bytes(content[offset : offset + size], "little")


def content_of(packed: bytes) -> bytes:
    """Return the content of the chunk *packed*."""
    size = int.from_bytes(packed[8:12], "little")
    return packed[16 : 16 + size]
