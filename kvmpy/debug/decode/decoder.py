# SPDX-License-Identifier: Apache-2.0
"""Ioctls to words: the name, the argument before and after with what its pointers lead to, the result.

Works on :class:`kvmpy.debug.record.events.Ioctl`, so on anything that was recorded, and on bare bytes. What
kvmpy does not know is shown raw; nothing is left out.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from kvmpy.debug.record.events import CHUNK, IOCTL, Chunk, Ioctl
from kvmpy.debug.record.format import CUT, What, When
from kvmpy.uapi import ffi, lib
from kvmpy.uapi.argument_text import bytes_text, exit_words, run_of, struct_words
from kvmpy.uapi.buffers import BUFFERS, TDX_BUFFER, Buffer, children_of, field_place, struct_class
from kvmpy.uapi.constants import ExitReason, MemFlag, VmType
from kvmpy.uapi.error_hints import EHWPOISON, error_words, hint
from kvmpy.uapi.error_rules import Slots
from kvmpy.uapi.field_words import (
    Namer,
    Words,
    argument_words,
    number_words,
)
from kvmpy.uapi.ioctl_type import READ, WRITE, decode
from kvmpy.uapi.ioctls import (
    BY_NR,
    IOCTLS,
    KVM_MEMORY_ENCRYPT_OP,
    KVM_RUN,
)
from kvmpy.uapi.ioctls import Ioctl as Op
from kvmpy.uapi.struct_base import FlexStruct, Struct
from kvmpy.uapi.struct_text import Style, shown_fields
from kvmpy.uapi.structs import kvm_run

# KVM_RUN fails, and yet kvm_run says why.
_EXIT_BESIDE_ERROR = (errno.EINTR, errno.EFAULT, EHWPOISON)
_EXITS_BESIDE_ERROR = (ExitReason.KVM_EXIT_INTR, ExitReason.KVM_EXIT_MEMORY_FAULT)
_REASON_AT = 8
PARTIAL = frozenset(op.nr for op in IOCTLS.values() if op.struct == "kvm_msrs")
"""Ioctls that return how many entries were done, without an error for the one that was not."""


@dataclass(frozen=True)
class Place:
    """Where an ioctl was issued: the *kind* of file descriptor (as in the ioctl table) and its VM's type.

    *slots* are the VM's memory slots, None where they are not known.
    """

    kind: str = ""
    vm_type: int = 0
    slots: Slots | None = field(default=None, compare=False)


@dataclass
class Decoded:
    """An ioctl in words: its argument ``before`` and ``after``, ``nested`` is what pointers lead to."""

    name: str
    known: bool
    before: str = ""
    after: str = ""
    nested: list[tuple[str, str]] = field(default_factory=list)
    result: str = ""
    meaning: str = ""
    exit: str = ""
    remarks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [self.name]
        if self.before:
            parts.append(self.before)
        if self.after:
            parts.append(f"-> {self.after}")
        parts += [f"{name}={text}" for name, text in self.nested]
        parts += [f"[{text}]" for text in self.remarks]
        if self.result:
            parts.append(f"= {self.result}")
        if self.exit:
            parts.append(self.exit)
        return " ".join(parts)


@lru_cache(4096)
def request_name(nr: int) -> str:
    """Return the name of an ioctl; of an unknown one its number, its parts, and what it is like."""
    if nr in BY_NR:
        return BY_NR[nr].name
    like = relative(nr)
    text = f"{nr:#x} {request_words(nr)}"
    return f"{text} (like {like.name}, another size)" if like is not None else text


def request_words(nr: int) -> str:
    """Return a request number that has no name by its parts, such as ``_IOWR(0xae, 0x55, 24)``."""
    request = decode(nr)
    form = {0: "_IO", WRITE: "_IOW", READ: "_IOR", READ | WRITE: "_IOWR"}[request.direction]
    size = f", {request.size}" if request.direction or request.size else ""
    return f"{form}({request.type:#x}, {request.number:#x}{size})"


def relatives(nr: int) -> list[Op]:
    """Return the known ioctls of the same type and number, whose argument has another size or direction."""
    request = decode(nr)
    return [
        op
        for op in IOCTLS.values()
        if op.request.type == request.type and op.request.number == request.number and op.nr != nr
    ]


def relative(nr: int) -> Op | None:
    """Return the known ioctl whose argument is shorter or longer than that of *nr*, None without one."""
    request = decode(nr)
    same = [op for op in relatives(nr) if op.request.direction == request.direction and op.struct]
    return same[0] if request.direction and len(same) == 1 else None


class Decoder:
    """Turns ioctls into words; *extra* names numbers in fields that the table of this room does not.

    *firmware* tells what a status of the SEV firmware means, *arrays* what the bytes of an array say. With
    *full* no array is shortened.
    """

    def __init__(
        self,
        extra: Mapping[tuple[str, str], Namer] | None = None,
        *,
        firmware: Callable[[int], str] | None = None,
        arrays: Mapping[tuple[str, str], Callable[[bytes], str]] | None = None,
        full: bool = False,
    ) -> None:
        self.full = full
        self.firmware = firmware
        self.words = Words(extra)
        self.style = Style(self.words, full=full, arrays=arrays)
        # A guest that waits for a device leaves for the same reason again and again.
        self._exit = lru_cache(1024)(lambda head, data: self.exit_text(run_of(head), data))

    # Structs and bytes.

    def struct_text(self, value: Struct, place: Place = Place()) -> str:
        """Return a struct as ``{field=value, ...}``."""
        return struct_words(value, place.kind, self.style)

    def content_text(self, struct: str | None, scalar: str | None, data: bytes, place: Place) -> str:
        """Return the content of a buffer as words; bytes beyond what the struct declares are raw."""
        if scalar is not None:
            number = int.from_bytes(data, "little", signed=scalar.startswith("int"))
            return hex(number) if number > 9 else str(number)
        if struct is None:
            return bytes_text(data, full=self.full)
        value, rest = struct_of(struct, data)
        text = self.struct_text(value, place)
        if len(data) < value.SIZE:
            text += f" (only {len(data)} of {value.SIZE} bytes)"
        if any(rest):
            text += f" +{bytes_text(rest, full=self.full)}"
        return text

    # Ioctls.

    def ioctl(self, event: Ioctl, place: Place = Place()) -> Decoded:
        """Return *event* in words."""
        op = BY_NR.get(event.request)
        decoded = Decoded(request_name(event.request), op is not None)
        if event.request == KVM_RUN.nr:
            self._run(decoded, event, place)
        else:
            self._argument(decoded, event, op, place)
        if event.end_order or event.result or event.errno:
            if event.result < 0:
                # The firmware's status is what a SEV command left.
                left = event.argument_out if event.request == KVM_MEMORY_ENCRYPT_OP.nr else None
                content, nested = left or event.argument_in or b"", _data_of(event)
                decoded.meaning = hint(op.name if op else None, event.errno, content, place.slots, nested)
            decoded.result = self._result(event, decoded.meaning)
        return decoded

    def _result(self, event: Ioctl, meaning: str) -> str:
        if event.result < 0:
            return f"-1 {error_words(None, event.errno).partition(':')[0]}{meaning and ': '}{meaning}"
        op = BY_NR.get(event.request)
        if op is not None and op.arg == "none" and op.unit:
            return f"{event.result} {op.unit}"
        text = hex(event.result) if event.result > 0xFFFF else str(event.result)
        missing = refused_msr(event)
        if missing is None:
            return text
        index, count = missing
        name = self.words.extra.get(("kvm_msr_entry", "index"), hex)(index)
        return f"{text} of {count}: {name if name == hex(index) else f'{name} ({index:#x})'} was refused"

    def _argument(self, decoded: Decoded, event: Ioctl, op: Op | None, place: Place) -> None:
        if op is not None and op.arg == "int":
            decoded.before = argument_words(op, event.arg)
            return
        buffer = buffer_of(event.request, place)
        before, after = event.argument_in, event.argument_out
        if buffer is None and before is None and after is None:
            decoded.before = f"arg={event.arg:#x}" if event.arg else ""
            return
        if not before and not after:
            decoded.before = f"arg={event.arg:#x}" + (" (not readable)" if event.arg else "")
            return
        struct, scalar = (buffer.struct, buffer.scalar) if buffer is not None else (None, None)
        if buffer is None:
            like = relative(event.request)
            struct = like.struct if like is not None else None
        if buffer is not None and buffer.reads is not None and before is not None:
            decoded.before = self.content_text(struct, scalar, before[: buffer.reads], place)
            decoded.before = decoded.before.partition(" (only")[0]
        elif before is not None and (buffer is None or buffer.arg != "out"):
            decoded.before = self.content_text(struct, scalar, before, place)
        if after is not None and after != before:
            decoded.after = self.content_text(struct, scalar, after, place)
        if _cut(event, event.arg):
            decoded.remarks.append("the argument could be read in part only")
        if buffer is not None:
            decoded.nested += self._nested(
                event, buffer, before if before is not None else after or b"", "", place
            )
            self._status(decoded, buffer, after or before or b"")

    def _nested(
        self, event: Ioctl, buffer: Buffer, content: bytes, prefix: str, place: Place
    ) -> Iterator[tuple[str, str]]:
        for child in children_of(buffer, selected_of(buffer, content)):
            address = number_in(buffer, content, child.pointer)
            name = f"{prefix}*{child.pointer}"
            if not address:
                continue
            before, after = event.chunk(address, When.IN), event.chunk(address, When.OUT)
            texts = []
            if before is not None and child.arg != "out":
                texts.append(self.content_text(child.struct, child.scalar, before, place))
            if after is not None and after != before:
                texts.append(f"-> {self.content_text(child.struct, child.scalar, after, place)}")
            if texts:
                yield name, " ".join(texts)
            inner = before if before is not None else after
            if inner is not None:
                yield from self._nested(event, child, inner, f"{prefix}{child.pointer}.", place)

    def _status(self, decoded: Decoded, buffer: Buffer, content: bytes) -> None:
        if buffer.struct not in ("kvm_sev_cmd", "sev_issue_cmd") or self.firmware is None:
            return
        status = number_in(buffer, content, "error")
        meaning = self.firmware(status) if status else ""
        if meaning:
            decoded.remarks.append(f"firmware: {meaning}")

    # KVM_RUN.

    def _run(self, decoded: Decoded, event: Ioctl, place: Place) -> None:
        before = [chunk for chunk in event.chunks if chunk.what == What.RUN and chunk.when & When.IN]
        after = [chunk for chunk in event.chunks if chunk.what == What.RUN and chunk.when & When.OUT]
        for chunk in before:
            if len(chunk.data) < _HEAD:
                decoded.remarks.append(f"data in {bytes_text(chunk.data, full=self.full)}")
        heads = [chunk for chunk in (*before, *after) if len(chunk.data) >= _HEAD]
        # Beside what the host changed, what the run left: KVM changes this flag never, a signal handler may.
        if any(run_of(head.data).immediate_exit for head in heads):
            decoded.remarks.append("immediate_exit")
        shown = next((chunk for chunk in after if len(chunk.data) >= _HEAD), None)
        if shown is None or (event.result < 0 and event.errno not in _EXIT_BESIDE_ERROR):
            return
        reason = int.from_bytes(shown.data[_REASON_AT : _REASON_AT + 4], "little")
        if event.result < 0 and reason not in _EXITS_BESIDE_ERROR:
            return
        data = next((chunk for chunk in after if chunk is not shown and len(chunk.data) < _HEAD), None)
        decoded.exit = self._exit(shown.data, data.data if data is not None else None)
        if reason == ExitReason.KVM_EXIT_MMIO and place.slots:
            decoded.exit += _why_mmio(run_of(shown.data), place.slots)

    def exit_text(self, run: kvm_run, data: bytes | None = None) -> str:
        """Return why KVM_RUN ended: the reason, its payload, and *data* of a port access."""
        return exit_words(run, data, self.style)


_HEAD = lib.KVMPY_RUN_HEAD
_RUN, _OUT = int(What.RUN), int(When.OUT)
_MSRS_AT, _MSR_SIZE = 8, 16


def buffer_of(nr: int, place: Place) -> Buffer | None:
    """Return what the argument of *nr* is, None where it is no address that kvmpy knows of."""
    if nr == KVM_MEMORY_ENCRYPT_OP.nr and place.vm_type == VmType.KVM_X86_TDX_VM:
        return TDX_BUFFER
    return BUFFERS.get(nr)


def struct_of(name: str, data: bytes) -> tuple[Struct, bytes]:
    """Return *data* as a struct, filled up with zeros, and the bytes that lie beyond it."""
    kind = struct_class(name)
    if issubclass(kind, FlexStruct):
        return kind.from_bytes(data.ljust(kind.SIZE, b"\0")), b""
    return kind.from_bytes(data[: kind.SIZE].ljust(kind.SIZE, b"\0")), data[kind.SIZE :]


def _data_of(event: Ioctl) -> bytes:
    """Return what the pointer of a SEV command leads to, as the kernel found it."""
    if event.request != KVM_MEMORY_ENCRYPT_OP.nr:
        return b""
    return next((each.data for each in event.chunks if each.what == What.NESTED and each.when & When.IN), b"")


def _why_mmio(run: kvm_run, slots: Slots) -> str:
    """Say why an access to guest memory left as MMIO (Linux: virt/kvm/kvm_main.c, hva_to_pfn())."""
    address, write = run.mmio.phys_addr, run.mmio.is_write
    for number, slot in slots.items():
        if not slot.gpa <= address < slot.gpa + slot.size:
            continue
        if write and slot.flags & MemFlag.KVM_MEM_READONLY:
            return f" [slot {number} is read-only]"
        done = "written" if write else "read"
        return (
            f" [inside slot {number}: the host page at {slot.hva + address - slot.gpa:#x} cannot be {done}]"
        )
    return ""


def refused_msr(event: Ioctl) -> tuple[int, int] | None:
    """Return the MSR that KVM_GET_MSRS or KVM_SET_MSRS stopped at, and how many were asked for.

    None where all were done. Entries behind it are untouched (Linux: arch/x86/kvm/x86.c, __msr_io()).
    """
    if event.request not in PARTIAL or event.result < 0:
        return None
    content = event.argument_in or b""
    count, start = int.from_bytes(content[:4], "little"), _MSRS_AT + event.result * _MSR_SIZE
    if event.result >= count or len(content) < start + 4:
        return None
    return int.from_bytes(content[start : start + 4], "little"), count


def was_partial(payload: bytes) -> bool:
    """Whether the frame of an ioctl tells that it did less than it was asked for."""
    try:
        return refused_msr(Ioctl.unpack(payload)) is not None
    except (ValueError, struct.error):
        return False


def exit_name(payload: bytes, result: int, errno: int) -> str:
    """Return the exit that the frame of a KVM_RUN tells, ``""`` for none, without decoding the rest."""
    if result < 0 and errno not in _EXIT_BESIDE_ERROR:
        return ""
    position, end = IOCTL.size, len(payload)
    while position + CHUNK.size <= end:
        _, size, when, source, _ = CHUNK.unpack_from(payload, position)
        position += CHUNK.size
        if source == _RUN and when & _OUT and size >= _HEAD and position + _HEAD <= end:
            reason = int.from_bytes(payload[position + _REASON_AT : position + _REASON_AT + 4], "little")
            return "" if result < 0 and reason not in _EXITS_BESIDE_ERROR else _reason_name(reason)
        position += size + 7 & ~7
    return ""


@lru_cache(256)
def _reason_name(reason: int) -> str:
    return number_words(ExitReason, reason)


def number_in(buffer: Buffer, content: bytes, name: str) -> int:
    """Return the number in the field *name* of *content*, 0 where *content* does not reach it."""
    if buffer.struct is None:
        return 0
    offset, size = field_place(buffer.struct, name)
    return int.from_bytes(content[offset : offset + size], "little")


def selected_of(buffer: Buffer, content: bytes) -> int | None:
    """Return the number of the command in *content*, None where the buffer has none."""
    return number_in(buffer, content, buffer.select) if buffer.select else None


def _cut(event: Ioctl, address: int) -> bool:
    return any(chunk.flags & CUT and chunk.address == address for chunk in event.chunks)


def _chunk_json(chunk: Chunk, struct: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "address": hex(chunk.address),
        "when": {1: "in", 2: "out", 3: "in, out"}.get(chunk.when, str(chunk.when)),
        "bytes": chunk.data.hex(),
    }
    if struct is not None:
        row["struct"] = struct
        kind = struct_class(struct)
        data = chunk.data.ljust(kind.SIZE, b"\0")
        # Of the exits' many payloads the one that counts.
        names = _run_names(chunk.data) if struct == "kvm_run" else None
        row["fields"] = kind.values_in(data, names, hexed=True)
    return row


@lru_cache(256)
def _run_names(head: bytes) -> tuple[str, ...]:
    return tuple(field.attribute for field in shown_fields(run_of(head)) if field.offset < len(head))


def as_json(event: Ioctl, decoded: Decoded, place: Place = Place()) -> dict[str, Any]:
    """Return an ioctl as JSON-ready values: the words, and every chunk with its fields."""
    row: dict[str, Any] = {
        "ioctl": decoded.name,
        "known": decoded.known,
        "request": hex(event.request),
        "fd": event.fd,
        "arg": hex(event.arg),
        "result": event.result,
    }
    if event.errno:
        row["errno"] = error_words(None, event.errno).partition(" ")[0]
        row["meaning"] = decoded.meaning
    structs: dict[int, str | None] = {}
    buffer = buffer_of(event.request, place)
    if buffer is not None:
        structs[event.arg] = buffer.struct
        _collect(event, buffer, event.argument_in or event.argument_out or b"", structs)
    row["chunks"] = [
        _chunk_json(
            chunk,
            ("kvm_run" if len(chunk.data) == _HEAD else None)
            if chunk.what == What.RUN
            else structs.get(chunk.address),
        )
        for chunk in event.chunks
    ]
    if decoded.exit:
        row["exit"] = decoded.exit.partition(" ")[0]
    row["text"] = str(decoded)
    return row


def _collect(event: Ioctl, buffer: Buffer, content: bytes, structs: dict[int, str | None]) -> None:
    for child in children_of(buffer, selected_of(buffer, content)):
        address = number_in(buffer, content, child.pointer)
        data = event.chunk(address, When.IN) or event.chunk(address, When.OUT)
        if address and data is not None:
            structs[address] = child.struct
            _collect(event, child, data, structs)


def decode_argument(op: Op, data: bytes, decoder: Decoder, place: Place = Place()) -> str:
    """Return the argument of *op* in words, from its bytes; ValueError when it takes none, or bytes miss."""
    if op.arg in ("none", "int"):
        raise ValueError(f"{op.name} takes no struct")
    size = int(ffi.sizeof(op.scalar)) if op.scalar else struct_class(op.struct or "").SIZE
    if len(data) < size:
        raise ValueError(f"{op.name} takes {size} bytes, {len(data)} were given")
    buffer = buffer_of(op.nr, place)
    return decoder.content_text(buffer.struct if buffer else None, op.scalar, data, place)
