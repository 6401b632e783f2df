# SPDX-License-Identifier: Apache-2.0
"""What the guest says: the slot of shared memory that it filled before it wrote to the ucall port.

A call is copied out of its slot when it is read, so it stays what it was while the guest goes on.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmpy.core import observe
from kvmpy.core.address import Gva
from kvmpy.guest import layout
from kvmpy.guest.layout import AssertKind, UcallCmd
from kvmpy.x86 import exceptions

if TYPE_CHECKING:
    from kvmpy.guest.program import GuestProgram

NONE = int(UcallCmd.NONE)
SYNC = int(UcallCmd.SYNC)
DONE = int(UcallCmd.DONE)
ABORT = int(UcallCmd.ABORT)
PRINTF = int(UcallCmd.PRINTF)
EXCEPTION = int(UcallCmd.EXCEPTION)
USER = int(UcallCmd.USER)

_SLOT_SIZE = layout.UCALL_SLOT_SIZE
_WORDS_AT = layout.UCALL_CMD
_TEXT_AT = layout.UCALL_TEXT
_HAS_TEXT = layout.UCALL_HAS_TEXT
_unpack_words = struct.Struct("<I8Q").unpack_from
_WORD = struct.Struct("<Q")
_U64 = (1 << 64) - 1

_OPERATORS = {
    AssertKind.EQ: "==",
    AssertKind.NE: "!=",
    AssertKind.LT: "<",
    AssertKind.LE: "<=",
    AssertKind.GT: ">",
    AssertKind.GE: ">=",
}


class Ucall:
    """One call of the guest: ``.cmd``, ``.args`` (up to eight u64), ``.vcpu`` (its index), ``.slot``."""

    __slots__ = ("_page", "_strings", "args", "cmd", "slot", "vcpu")

    def __init__(
        self,
        cmd: int,
        args: tuple[int, ...] = (),
        vcpu: int = 0,
        slot: int = 0,
        page: memoryview | bytearray | None = None,
        strings: tuple[str, ...] = (),
    ) -> None:
        self.cmd = cmd
        self.args = args
        self.vcpu = vcpu
        self.slot = slot
        self._page = page
        self._strings = strings

    def reply(self, value: int) -> None:
        """Give the guest *value* (64 bits) as the result of its GUEST_ASK(); before the vCPU runs again."""
        if self._page is None:
            raise ValueError(f"{self!r} did not come from a guest")
        offset = self.slot * _SLOT_SIZE + layout.UCALL_ARGS
        _WORD.pack_into(self._page, offset, value & _U64)
        for observer in observe.host:
            observer.memory_written(memoryview(self._page)[offset : offset + _WORD.size])

    @property
    def text(self) -> str:
        """What PRINTF printed or which expression failed; empty for other commands."""
        return self._strings[0] if self._strings else ""

    @property
    def file(self) -> str:
        """The source file of an ABORT; empty for other commands."""
        return self._strings[1] if self.cmd == ABORT and len(self._strings) > 1 else ""

    @property
    def name(self) -> str:
        """The command's name, such as ``SYNC`` or ``USER+3``."""
        return command_name(self.cmd)

    @property
    def rip(self) -> int | None:
        """Where the guest was, if the call says so: ABORT (return address) and EXCEPTION do."""
        if self.cmd == ABORT and len(self.args) > 4:
            return self.args[4]
        if self.cmd == EXCEPTION and len(self.args) > 2:
            return self.args[2]
        return None

    def __repr__(self) -> str:
        args = [hex(arg) for arg in self.args]
        if self.text:
            args.append(repr(self.text))
        return f"<{self.name}({', '.join(args)}) of vcpu{self.vcpu}>"


def read(page: memoryview | bytearray, slot: int, index: int) -> Ucall:
    """Return the call in slot *slot* of the ucall page *page* of vCPU *index*."""
    words = _unpack_words(page, slot * _SLOT_SIZE + _WORDS_AT)
    word = words[0]
    if not word & _HAS_TEXT:
        return Ucall(word & 0xFFFF, words[1 : 1 + (word >> 16 & 0xFF)], index, slot, page)
    text = bytes(page[slot * _SLOT_SIZE + _TEXT_AT : (slot + 1) * _SLOT_SIZE])
    strings = tuple(part.decode("utf-8", "replace") for part in text.split(b"\0", 2)[:2])
    return Ucall(word & 0xFFFF, words[1 : 1 + (word >> 16 & 0xFF)], index, slot, page, strings)


def command_name(command: int) -> str:
    """Return the name of a ucall command, such as ``SYNC`` or ``USER+3``."""
    if command >= USER:
        return f"USER+{command - USER}" if command > USER else "USER"
    try:
        return UcallCmd(command).name
    except ValueError:
        return f"ucall {command:#x}"


def _number(value: int, signed: bool) -> str:
    shown = value - (1 << 64) if signed and value >> 63 else value
    return f"{shown} ({value:#x})"


def _where(program: GuestProgram, rip: int) -> str:
    function = program.function(Gva(rip))
    return f"{function[0]}+{function[1]:#x}" if function else f"{rip:#x}"


def assertion_text(call: Ucall, program: GuestProgram) -> str:
    """Return what the ABORT *call* says: the expression, both values, file and line, vCPU and function."""
    got, expected, line, flags, rip = padded(call.args)[:5]
    # The address is that of the next instruction, which may belong to another function.
    file, line = program.placed(call.file, line)
    place = f"{file}:{line}: vcpu{call.vcpu} in {_where(program, rip - 1 & _U64)}"
    kind = flags & layout.ASSERT_KIND_MASK
    if kind == AssertKind.FAIL:
        return f"guest failed: {call.text}\n  at {place}"
    lines = [f"guest assertion failed: {call.text}"]
    operator = next((sign for known, sign in _OPERATORS.items() if known == kind), None)
    if operator is not None:
        lines.append(f"       got {_number(got, bool(flags & layout.ASSERT_GOT_SIGNED))}")
        wanted = _number(expected, bool(flags & layout.ASSERT_EXPECTED_SIGNED))
        lines.append(f"  expected {'' if operator == '==' else operator + ' '}{wanted}")
    lines.append(f"  at {place}")
    return "\n".join(lines)


def padded(args: tuple[int, ...]) -> tuple[int, ...]:
    """Return all eight arguments, those that the guest did not give as 0."""
    return (*args, *(0,) * layout.UCALL_NR_ARGS)[: layout.UCALL_NR_ARGS]


def exception_text(call: Ucall, program: GuestProgram) -> str:
    """Return what the EXCEPTION *call* says: which one, error code, where, the address of a page fault."""
    vector, error_code, rip, rsp, cr2, rflags = padded(call.args)[:6]
    text = f"unexpected {exceptions.describe(vector, error_code)} on vcpu{call.vcpu}"
    if vector == exceptions.Vector.PF:
        text += f", address {cr2:#x}"
    line = program.line(Gva(rip))
    place = f" at {line[0]}:{line[1]}" if line else ""
    return f"{text}\n  in {_where(program, rip)}{place}\n  rip {rip:#x} rsp {rsp:#x} rflags {rflags:#x}"
