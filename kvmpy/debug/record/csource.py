# SPDX-License-Identifier: Apache-2.0
"""Kernel structs and constants as C text: initialisers by field name, flags by their names, and definitions
of what older kernel headers lack.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmpy.uapi import constants
from kvmpy.uapi.buffers import struct_class
from kvmpy.uapi.field_words import CAP_ARGUMENTS, FIELDS, Kind, number_words
from kvmpy.uapi.ioctl_type import Ioctl
from kvmpy.uapi.struct_arrays import ByteArray, NestedArray, StructArray
from kvmpy.uapi.struct_base import Field, FlexStruct, Struct
from kvmpy.uapi.struct_text import active_member

_NAME = re.compile(r"(KVM|SEV|SNP|GUEST_MEMFD)_[A-Z0-9_]+$")
# What the headers of Linux 6.1 lack: these get a definition of their own.
_NEWER = re.compile(
    r"KVM_X86_\w+_VM$|KVM_MEM_GUEST_MEMFD|KVM_MEMORY_|GUEST_MEMFD_|KVM_SEV_INIT2|KVM_SEV_SNP_|KVM_TDX_|"
    r"KVM_SEV_PAGE_TYPE|KVM_X86_QUIRK_|KVM_X86_DISABLE_EXITS_APERFMPERF|KVM_X86_GRP_|KVM_X86_SEV_|"
    r"KVM_X86_SNP_|KVM_EXIT_(HYPERCALL_LONG_MODE|LOONGARCH|MEMORY_FAULT|TDX|ARM_|SNP_)|KVM_RUN_X86_GUEST|"
    r"KVM_PMU_|KVM_X2APIC_|KVM_XEN_|KVM_DEV_VFIO_FILE|KVM_MSR_\w+_VALID_MASK|SNP_|KVM_REG_|KVM_X86_REG_"
)
_FIRST_NEW_CAP = 224
# Structs that they lack, and the macro whose absence tells so.
NEW_STRUCTS = {
    "kvm_userspace_memory_region2": "KVM_SET_USER_MEMORY_REGION2",
    "kvm_memory_attributes": "KVM_SET_MEMORY_ATTRIBUTES",
    "kvm_create_guest_memfd": "KVM_CREATE_GUEST_MEMFD",
    "kvm_pre_fault_memory": "KVM_PRE_FAULT_MEMORY",
    "kvm_sev_init": "KVM_X86_SEV_VM",
    "kvm_sev_snp_launch_start": "KVM_X86_SNP_VM",
    "kvm_sev_snp_launch_update": "KVM_X86_SNP_VM",
    "kvm_sev_snp_launch_finish": "KVM_X86_SNP_VM",
}
# Structs whose fields differ from one version of <linux/psp-sev.h> to the next: they get names of their own.
_CHANGING = "sev_user_data_snp_"
_NEW_IOCTLS = {name: struct for struct, name in NEW_STRUCTS.items() if "_VM" not in name}
# Fields that are pointers in the kernel's headers; elsewhere addresses are numbers.
_POINTERS = {
    ("kvm_dirty_log", "dirty_bitmap"),
    ("kvm_clear_dirty_log", "dirty_bitmap"),
    ("kvm_msr_filter_range", "bitmap"),
}
_WIDTH = 100
_C_TYPES = {
    f"{sign}int{bits}_t": f"__{letter}{bits}"
    for sign, letter in (("u", "u"), ("", "s"))
    for bits in (8, 16, 32, 64)
}

Reference = Callable[[int], str | None]


class UnspeakableError(ValueError):
    """A struct whose content no initialiser by field names can give: it needs raw bytes."""


class Vocabulary:
    """The names of constants that a C file uses, and the definitions that it needs for them."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.structs: set[str] = set()
        self.ioctls: dict[str, Ioctl] = {}

    def words(self, kind: Kind, value: int) -> str:
        """Return *value* as names joined by ``|``; as a number where one of them is not the kernel's.

        A status of the firmware's is a number, too: its names are no macros, and headers differ in them.
        """
        if kind is constants.SevRet:
            return number(value)
        parts = number_words(kind, value).split("|")
        names = [part for part in parts if not part[0].isdigit() and part[0] != "-"]
        if not names or not all(_NAME.match(name) and name in constants.ALL for name in names):
            return number(value)
        for name in names:
            self.names[name] = constants.ALL[name]
        return " | ".join(parts)

    def request(self, op: Ioctl) -> str:
        """Return the name of an ioctl."""
        self.ioctls[op.name] = op
        return op.name

    def struct(self, name: str) -> str:
        """Return the C type of a struct."""
        self.structs.add(name)
        return f"struct {_c_name(name)}"

    def definitions(self) -> Iterator[str]:
        """Yield the lines that make up for older headers."""
        # An ioctl's number needs its struct, also where its argument could not be read.
        needed = self.structs | {_NEW_IOCTLS[name] for name in self.ioctls if name in _NEW_IOCTLS}
        for name in sorted(needed & NEW_STRUCTS.keys()):
            op = next(
                (
                    self.ioctls[ioctl]
                    for ioctl, struct in _NEW_IOCTLS.items()
                    if struct == name and ioctl in self.ioctls
                ),
                None,
            )
            yield f"#ifndef {NEW_STRUCTS[name]}"
            yield from declaration(name)
            if op is not None:
                letters = {1: "W", 2: "R", 3: "WR"}[op.request.direction]
                yield f"#define {op.name} _IO{letters}(KVMIO, {op.request.number:#x}, struct {name})"
            yield "#endif"
        for name in sorted(name for name in self.structs if name.startswith(_CHANGING)):
            yield from declaration(name)
        for name, value in sorted(self.names.items()):
            if _NEWER.match(name) or (name.startswith("KVM_CAP_") and value >= _FIRST_NEW_CAP):
                yield f"#ifndef {name}"
                yield f"#define {name} {number(value)}"
                yield "#endif"


def _c_name(struct: str) -> str:
    return struct.removeprefix("sev_user_data_") if struct.startswith(_CHANGING) else struct


def declaration(name: str) -> list[str]:
    """Return the lines of a struct's declaration, with the kernel's types; KeyError when there is none."""
    folder = Path(constants.__file__).parents[1] / "cdef"
    for path in sorted(folder.glob("*.h")):
        matched = re.search(rf"^struct {name} \{{.*?^\}};", path.read_text(), re.MULTILINE | re.DOTALL)
        if matched:
            text = re.sub(r"\bu?int\d+_t\b", lambda match: _C_TYPES[match[0]], matched[0])
            return text.replace(name, _c_name(name), 1).splitlines()
    raise KeyError(name)


def number(value: int) -> str:
    """Return a number as C: small ones decimal, others hexadecimal, with a suffix where it needs one."""
    if -10 < value < 10:
        return str(value)
    suffix = "ULL" if value >= 1 << 32 else "U" if value >= 1 << 31 else ""
    return f"{value:#x}{suffix}"


def byte_rows(data: bytes, indent: str = "\t") -> list[str]:
    """Return *data* as rows of an initialiser, twelve bytes each."""
    return [
        indent + ", ".join(f"0x{byte:02x}" for byte in data[offset : offset + 12]) + ","
        for offset in range(0, len(data), 12)
    ]


def initializer(value: Struct, words: Vocabulary, reference: Reference, indent: str) -> list[str]:
    """Return the lines between the braces of an initialiser for *value*.

    *reference* gives the C expression for what lies at an offset, where it is no constant.
    UnspeakableError where names of fields do not lead to the same bytes.
    """
    writer = _Initializer(words, reference, bytearray(value.nbytes))
    lines = list(writer.fields(value, indent))
    if any(byte and not seen for byte, seen in zip(value.to_bytes(), writer.covered, strict=True)):
        raise UnspeakableError(value.NAME)
    return lines


@dataclass(frozen=True)
class _Initializer:
    """Writes fields, and notes in *covered* which bytes they lead to."""

    words: Vocabulary
    reference: Reference
    covered: bytearray

    def _cover(self, start: int, size: int) -> None:
        self.covered[start : start + size] = b"\1" * len(self.covered[start : start + size])

    def fields(self, value: Struct, indent: str, base: int = 0, inner: str | None = None) -> Iterator[str]:
        for field in _chosen(value, inner):
            address, content = base + field.offset, getattr(value, field.attribute)
            head = f"{indent}.{field.name} = "
            if not isinstance(content, int):
                yield from self._compound(value, field, content, indent, address)
                continue
            expression, kind = self.reference(address), FIELDS.get((value.NAME, field.name))
            named = kind is not None and field.name in ("id", "type", "chip_id")
            if expression is not None or content:
                self._cover(address, field.size)
            if expression is not None:
                number_ = expression.startswith(("(uint32_t)", "(uint64_t)")) or expression[0].isdigit()
                cast = "(void *)" if (value.NAME, field.name) in _POINTERS else "(uintptr_t)"
                yield f"{head}{expression if number_ else cast + expression},"
            elif content or named:
                yield f"{head}{self.words.words(kind, content) if kind is not None else number(content)},"

    def _compound(
        self, value: Struct, field: Field, content: Any, indent: str, position: int
    ) -> Iterator[str]:
        head, deeper = f"{indent}.{field.name} = ", indent + "\t"
        if isinstance(content, Struct):
            member = active_member(value) if content.IS_UNION else None
            lines = list(self.fields(content, deeper, position, member))
            yield from braces(head, lines, indent) if lines else []
            return
        if isinstance(content, StructArray):
            rows = list(self._structs(value, content, deeper, position, flexible=field.size == 0))
            yield from [head + "{", *rows, indent + "},"] if rows else []
            return
        raw = content.to_bytes()
        self._cover(position, len(raw))
        if not any(raw):
            return
        if isinstance(content, NestedArray):
            raise UnspeakableError(value.NAME)
        if isinstance(content, ByteArray):
            end = len(raw.rstrip(b"\0"))
            first = next(place for place, byte in enumerate(raw) if byte)
            if end - first > 8:
                yield from [head + "{", *byte_rows(raw[:end], deeper), indent + "},"]
                return
            items = [f"[{place}] = 0x{raw[place]:02x}," for place in range(first, end) if raw[place]]
        else:
            items = list(self._numbers(value, field, content, len(raw) // max(1, len(content)), position))
        yield from braces(head, [deeper + item for item in items], indent)

    def _numbers(self, value: Struct, field: Field, content: Any, size: int, offset: int) -> Iterator[str]:
        capability = value.NAME == "kvm_enable_cap" and field.name == "args"
        kind = CAP_ARGUMENTS.get(value.cap) if capability else None  # type: ignore[attr-defined]
        for place, item in enumerate(content):
            expression = self.reference(offset + place * size)
            if item or expression is not None:
                words = self.words.words(kind, item) if kind is not None and place == 0 else number(item)
                yield f"[{place}] = {expression or words},"

    def _structs(
        self, value: Struct, content: StructArray[Any], indent: str, offset: int, *, flexible: bool
    ) -> Iterator[str]:
        count = len(content)
        if flexible and isinstance(value, FlexStruct):
            count = min(len(value), value.room)
        for place in range(count):
            item = content[place]
            lines = list(self.fields(item, indent + "\t", offset + place * item.nbytes))
            if lines or flexible:
                yield from braces(indent if flexible else f"{indent}[{place}] = ", lines, indent)


def braces(head: str, lines: list[str], indent: str) -> list[str]:
    """Return *lines* in braces behind *head*, on one line where they fit."""
    flat = head + "{ " + " ".join(line.strip() for line in lines).rstrip(",") + " },"
    if len(flat.expandtabs(8)) <= _WIDTH and "{" not in "".join(lines):
        return [flat if lines else head + "{ 0 },"]
    return [head + "{", *lines, indent + "},"]


def _chosen(value: Struct, inner: str | None = None) -> list[Field]:
    """Return the fields to set: of those that overlap the active one, or the first that has all the bytes."""
    fields = list(value.FIELDS.values())
    active = inner if inner is not None else active_member(value)

    def weight(field: Field) -> tuple[bool, bool, int]:
        padding = bool(re.fullmatch(r"(u8_)?(pad|padding|reserved|rsvd|dummy)\d*", field.name))
        return (field.name != active, padding, -field.size)

    taken: list[Field] = []
    for field in sorted(fields, key=weight):
        if any(_overlap(field, other) for other in taken):
            continue
        taken.append(field)
    return [field for field in fields if field in taken]


def _overlap(one: Field, other: Field) -> bool:
    if one.bits and other.bits and one.offset == other.offset:
        return one.shift < other.shift + other.bits and other.shift < one.shift + one.bits
    return one.offset < other.offset + other.size and other.offset < one.offset + one.size


def make_struct(name: str, data: bytes) -> Struct:
    """Return a struct with the content *data*, cut or filled up to its size."""
    kind = struct_class(name)
    if issubclass(kind, FlexStruct):
        return kind.from_bytes(data)
    return kind.from_bytes(data[: kind.SIZE].ljust(kind.SIZE, b"\0"))
