# SPDX-License-Identifier: Apache-2.0
"""Kernel structs and constants as C text: initialisers by field name, flags by their names, and definitions
of what older kernel headers lack.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvmpy.uapi import constants
from kvmpy.uapi.buffers import struct_class
from kvmpy.uapi.field_words import CAP_ARGUMENTS, FIELDS, Kind, number_words
from kvmpy.uapi.ioctl_type import Ioctl
from kvmpy.uapi.struct_arrays import ByteArray, IntArray, NestedArray, StructArray
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
        """Return *value* as names joined by ``|``; as a number where one of them is not the kernel's."""
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
        return f"struct {name}"

    def definitions(self) -> Iterator[str]:
        """Yield the lines that make up for older headers."""
        for name in sorted(self.structs & NEW_STRUCTS.keys()):
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
        for name, value in sorted(self.names.items()):
            if _NEWER.match(name) or (name.startswith("KVM_CAP_") and value >= _FIRST_NEW_CAP):
                yield f"#ifndef {name}"
                yield f"#define {name} {number(value)}"
                yield "#endif"


def declaration(name: str) -> list[str]:
    """Return the lines of a struct's declaration, with the kernel's types; KeyError when there is none."""
    folder = Path(constants.__file__).parents[1] / "cdef"
    for path in sorted(folder.glob("*.h")):
        found = re.search(rf"^struct {name} \{{.*?^\}};", path.read_text(), re.MULTILINE | re.DOTALL)
        if found:
            text = re.sub(r"\bu?int\d+_t\b", lambda match: _C_TYPES[match[0]], found[0])
            return text.splitlines()
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
        indent + ", ".join(f"0x{byte:02x}" for byte in data[at : at + 12]) + ","
        for at in range(0, len(data), 12)
    ]


def initializer(value: Struct, words: Vocabulary, reference: Reference, indent: str) -> list[str]:
    """Return the lines between the braces of an initialiser for *value*.

    *reference* gives the C expression for what lies at an offset, where it is no constant.
    UnspeakableError where names of fields do not lead to the same bytes.
    """
    covered = bytearray(value.nbytes)
    lines = list(_fields(value, words, reference, indent, 0, covered))
    raw = value.to_bytes()
    if any(byte and not seen for byte, seen in zip(raw, covered, strict=True)):
        raise UnspeakableError(value.NAME)
    return lines


def _fields(
    value: Struct,
    words: Vocabulary,
    reference: Reference,
    indent: str,
    base: int,
    covered: bytearray,
    inner: str | None = None,
) -> Iterator[str]:
    for field in _chosen(value, inner):
        at = base + field.offset
        expression = reference(at)
        content = getattr(value, field.attribute)
        if expression is not None and isinstance(content, int):
            _mark(covered, at, field.size)
            cast = "(void *)" if (value.NAME, field.name) in _POINTERS else "(uintptr_t)"
            yield f"{indent}.{field.name} = {expression if _is_number(expression) else cast + expression},"
            continue
        if isinstance(content, int):
            if content:
                _mark(covered, at, field.size)
                yield f"{indent}.{field.name} = {_word(value, field, content, words)},"
            elif _named_zero(value, field):
                yield f"{indent}.{field.name} = {_word(value, field, 0, words)},"
            continue
        yield from _compound(value, field, content, words, reference, indent, at, covered)


def _is_number(expression: str) -> bool:
    return expression.startswith(("(uint32_t)", "(uint64_t)")) or expression[0].isdigit()


def _named_zero(value: Struct, field: Field) -> bool:
    kind = FIELDS.get((value.NAME, field.name))
    return kind is not None and field.name in ("id", "type", "chip_id")


def _mark(covered: bytearray, at: int, size: int) -> None:
    covered[at : at + size] = b"\1" * len(covered[at : at + size])


def _compound(
    value: Struct,
    field: Field,
    content: Any,
    words: Vocabulary,
    reference: Reference,
    indent: str,
    at: int,
    covered: bytearray,
) -> Iterator[str]:
    head = f"{indent}.{field.name} = "
    deeper = indent + "\t"
    if isinstance(content, Struct):
        member = active_member(value) if content.IS_UNION else None
        lines = list(_fields(content, words, reference, deeper, at, covered, member))
        if lines:
            yield from braces(head, lines, indent)
        return
    if isinstance(content, StructArray):
        yield from _struct_array(value, field, content, words, reference, indent, at, covered)
        return
    raw = content.to_bytes()
    _mark(covered, at, len(raw))
    if not any(raw):
        return
    if isinstance(content, (ByteArray, NestedArray)):
        if isinstance(content, NestedArray):
            raise UnspeakableError(value.NAME)
        end = len(raw.rstrip(b"\0"))
        first = next(place for place, byte in enumerate(raw) if byte)
        if end - first <= 8:
            items = [f"[{place}] = 0x{raw[place]:02x}," for place in range(first, end) if raw[place]]
            yield from braces(head, [deeper + item for item in items], indent)
        else:
            yield from [head + "{", *byte_rows(raw[:end], deeper), indent + "},"]
        return
    cap = isinstance(content, IntArray) and value.NAME == "kvm_enable_cap" and field.name == "args"
    kind = CAP_ARGUMENTS.get(value.cap) if cap else None  # type: ignore[attr-defined]
    items = []
    size = len(raw) // max(1, len(content))
    for place, item in enumerate(content):
        expression = reference(at + place * size)
        if item or expression is not None:
            text = expression or (
                words.words(kind, item) if kind is not None and place == 0 else number(item)
            )
            items.append(f"{deeper}[{place}] = {text},")
    yield from braces(head, items, indent)


def _struct_array(
    value: Struct,
    field: Field,
    content: StructArray[Any],
    words: Vocabulary,
    reference: Reference,
    indent: str,
    at: int,
    covered: bytearray,
) -> Iterator[str]:
    deeper = indent + "\t"
    flexible = field.size == 0
    count = len(content)
    if flexible and isinstance(value, FlexStruct):
        count = min(len(value), value.room)
    rows: list[str] = []
    for place in range(count):
        item = content[place]
        start = at + place * item.nbytes
        lines = list(_fields(item, words, reference, deeper + "\t", start, covered))
        label = "" if flexible else f"[{place}] = "
        if lines or flexible:
            rows += braces(deeper + label, lines, deeper)
    if rows:
        yield from [f"{indent}.{field.name} = {{", *rows, indent + "},"]


def braces(head: str, lines: list[str], indent: str) -> list[str]:
    """Return *lines* in braces behind *head*, on one line where they fit."""
    flat = head + "{ " + " ".join(line.strip() for line in lines).rstrip(",") + " },"
    if len(flat.expandtabs(8)) <= _WIDTH and "{" not in "".join(lines):
        return [flat if lines else head + "{ 0 },"]
    return [head + "{", *lines, indent + "},"]


def _word(value: Struct, field: Field, content: int, words: Vocabulary) -> str:
    kind = FIELDS.get((value.NAME, field.name))
    return words.words(kind, content) if kind is not None else number(content)


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
