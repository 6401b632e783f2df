# SPDX-License-Identifier: Apache-2.0
"""Which memory an ioctl reads and writes: the argument, and what the pointers in it lead to.

``BUFFERS`` maps request numbers to the argument's :class:`Buffer`; its fields lead to its children.
The recorders in Python and in C, the decoder and the reproducer follow pointers by this table alone.
Guest memory behind an address (a memory slot's, or the data of a SEV command) is marked and not followed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from kvmpy.uapi import ffi, ioctls
from kvmpy.uapi.buffer_type import Buffer, DataKind, Size, field_place, struct_at, struct_class
from kvmpy.uapi.commands import TDX_COMMANDS, Command
from kvmpy.uapi.ioctl_type import Ioctl
from kvmpy.uapi.struct_base import FlexStruct

__all__ = [
    "BUFFERS",
    "TDX_BUFFER",
    "Buffer",
    "Size",
    "children_of",
    "descriptors_in",
    "field_place",
    "struct_class",
]


def _pointee(row: Ioctl | Command, arg: DataKind, pointer: str = "") -> Buffer:
    """Return the buffer of the struct that an ioctl's or a command's argument leads to."""
    struct = str(row.struct)
    result = struct_at(struct, arg, pointer=pointer, children=row.pointers)
    if row.fills:
        kind = struct_class(struct)
        result = replace(result, reads=kind.OPEN_OFFSET if issubclass(kind, FlexStruct) else kind.SIZE)
    return result


def _cases(commands: Iterable[Command]) -> dict[int, tuple[Buffer, ...]]:
    return {
        command.id: (_pointee(command, command.arg, "data"),) if command.struct else ()
        for command in commands
    }


def _argument(op: Ioctl) -> Buffer | None:
    if op.arg == "none" or op.arg == "int":
        return None
    if op.struct is None:
        return Buffer(None, op.arg, Size(int(ffi.sizeof(op.scalar))), scalar=op.scalar)
    built = _pointee(op, op.arg)
    if op.size is not None:
        built = replace(built, size=Size(built.size.base, special=op.size))
    return replace(built, select=op.select, cases=_cases(op.commands))


BUFFERS: dict[int, Buffer] = {
    op.nr: made for op in ioctls.IOCTLS.values() if (made := _argument(op)) is not None
}

TDX_BUFFER = struct_at("kvm_tdx_cmd", "inout", select="id", cases=_cases(TDX_COMMANDS.values()))
"""The argument of KVM_MEMORY_ENCRYPT_OP on VMs of type KVM_X86_TDX_VM and their vCPUs."""


def descriptors_in(op: Ioctl, content: bytes) -> Iterator[tuple[int, int]]:
    """Yield offset and size of each field of the argument *content* that holds a file descriptor."""
    struct = op.struct
    if struct is None or len(content) < struct_class(struct).SIZE:
        return
    for each in op.fd_fields:
        offset, size = field_place(struct, each.where) if each.mask else (0, 0)
        if int.from_bytes(content[offset : offset + size], "little") & each.mask == each.value:
            yield field_place(struct, each.name)


def children_of(buffer: Buffer, selected: int | None) -> Iterator[Buffer]:
    """Yield what the pointers of *buffer* lead to; *selected* is the value of its field ``select``."""
    yield from buffer.children
    if selected is not None:
        yield from buffer.cases.get(selected, ())
