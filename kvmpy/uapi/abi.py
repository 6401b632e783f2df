# SPDX-License-Identifier: Apache-2.0
"""The ABI as kvmpy knows it, as plain data, and its comparison with kernel headers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvmpy.uapi import ffi
from kvmpy.uapi import headers as kernel_headers
from kvmpy.uapi.constants import ALL
from kvmpy.uapi.headers import Declared, Headers, Question
from kvmpy.uapi.ioctls import IOCTLS, SEV_COMMANDS, SEV_PLATFORM_COMMANDS, TDX_COMMANDS, Command
from kvmpy.uapi.struct_base import Field, flat_fields
from kvmpy.uapi.structs import STRUCTS

LINUX = "7.2"

# What the declarations for cffi cannot say (see cdef/nested.h).
_EXTRA_FIELDS = {"kvm_nested_state": {"data.vmx": "data", "data.svm": "data"}}


@dataclass(frozen=True)
class StructAbi:
    """A struct: size; by path in C, offset and size of each field, first bit and width of each bit-field."""

    size: int
    fields: dict[str, tuple[int, int]]
    bits: dict[str, tuple[int, int]]


def _paths(fields: list[Field], prefix: str, base: int) -> Iterator[tuple[str, Field]]:
    for each in fields:
        placed = each._replace(offset=base + each.offset)
        yield prefix + each.name, placed
        kind = each.ctype
        path = prefix + each.name
        while kind.kind == "array":
            kind = kind.item
            path += "[0]"
        if kind.kind in ("struct", "union") and "__" in kind.cname:
            yield from _paths(flat_fields(kind), path + ".", placed.offset)


def struct_abi(name: str) -> StructAbi:
    """Return the layout of struct *name*; the members of nameless types are listed as ``outer.inner``."""
    fields: dict[str, tuple[int, int]] = {}
    bits: dict[str, tuple[int, int]] = {}
    for path, each in _paths(flat_fields(ffi.typeof(f"struct {name}")), "", 0):
        if each.bits:
            bits[path] = (each.offset * 8 + each.shift, each.bits)
        else:
            fields[path] = (each.offset, each.size)
    for path, like in _EXTRA_FIELDS.get(name, {}).items():
        fields[path] = fields[like]
    return StructAbi(STRUCTS[name].SIZE, fields, bits)


def _commands(table: dict[str, Any]) -> dict[str, dict[str, object]]:
    rows: dict[str, Command] = table
    return {
        name: {
            "id": row.id,
            "struct": row.struct,
            "arg": row.arg,
            "families": list(row.families),
            "implemented": row.implemented,
        }
        for name, row in rows.items()
    }


def content() -> dict[str, Any]:
    """Return everything as JSON-able data.

    A field is [offset, size] in bytes (size 0: an open array); bit-fields are apart, under "bits", as [first
    bit, width].  Fields of nameless types carry the path that ``offsetof`` takes.
    """
    layouts = {name: struct_abi(name) for name in STRUCTS}
    return {
        "linux": LINUX,
        "ioctls": {
            name: {
                "nr": entry.nr,
                "fd": entry.fd,
                "struct": entry.struct,
                "cap": entry.cap,
                "arg": entry.arg,
                "scalar": entry.scalar,
                "also": dict(entry.also),
            }
            for name, entry in IOCTLS.items()
        },
        "structs": {
            name: {
                "size": layout.size,
                "fields": {path: list(place) for path, place in layout.fields.items()},
                **(
                    {"bits": {path: list(place) for path, place in layout.bits.items()}}
                    if layout.bits
                    else {}
                ),
            }
            for name, layout in layouts.items()
        },
        "constants": dict(ALL),
        "sev_commands": _commands(SEV_COMMANDS),
        "sev_platform_commands": _commands(SEV_PLATFORM_COMMANDS),
        "tdx_commands": _commands(TDX_COMMANDS),
    }


@dataclass(frozen=True)
class Difference:
    """What kvmpy and the headers have differently: *what* is the number, size, offset or place.

    *reason* says so where releases of the kernel differ by design.
    """

    kind: str
    name: str
    what: str
    kvmpy: int | tuple[int, int]
    headers: int | tuple[int, int]
    reason: str = ""

    def __str__(self) -> str:
        text = f"{self.kind} {self.name}: {self.what} {_show(self.kvmpy)}, headers {_show(self.headers)}"
        return f"{text} ({self.reason})" if self.reason else text


def _show(value: int | tuple[int, int]) -> str:
    if isinstance(value, tuple):
        return f"{value[1]} bits from bit {value[0]}"
    return str(value) if abs(value) < 10 else f"{value} ({value:#x})"


@dataclass(frozen=True)
class Drift:
    """Something that only the headers have; *reason* says why kvmpy leaves it out, or is empty."""

    kind: str
    name: str
    value: int | None
    reason: str = ""

    def __str__(self) -> str:
        value = "" if self.value is None else f" = {_show(self.value)}"
        return f"{self.kind} {self.name}{value}{f' ({self.reason})' if self.reason else ''}"


@dataclass
class Report:
    """The outcome: *compared* counts the numbers that both sides have, *absent* names what only kvmpy has."""

    differences: list[Difference] = field(default_factory=list)
    drift: list[Drift] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    compared: int = 0

    @property
    def unexplained(self) -> list[Drift]:
        """The drift without a reason."""
        return [each for each in self.drift if not each.reason]


_REMOVED = f"removed before Linux {LINUX}"

# Why the headers have something that kvmpy leaves out.
_REASONS: tuple[tuple[str, str], ...] = (
    (r"ioctl KVM_S390_\w+|struct kvm_s390_\w+|struct kvm_pv_cmd", "s390 only"),
    (r"constant KVM_(S390|PV_(INFO|DUMP|ENABLE|DISABLE|SET|UNPACK|VERIFY|PREP|UNSHARE))\w*", "s390 only"),
    (r"ioctl KVM_(PPC_\w+|CREATE_SPAPR_TCE(_64)?|ALLOCATE_RMA|DIRTY_TLB)", "PowerPC only"),
    (r"constant KVM_PPC_\w+|struct kvm_(ppc_\w+|config_tlb|dirty_tlb|vfio_spapr_tce)", "PowerPC only"),
    (r"(ioctl|constant) KVM_ARM_\w+|struct kvm_arm_\w+", "arm64 only"),
    (r"ioctl (__KVM_DEPRECATED_\w+|KVM_SET_MEMORY_(REGION|ALIAS)|KVM_(DE)?ASSIGN_\w+)", _REMOVED),
    (r"constant KVM_((TRC|TRACE|ASSIGN|DEV_ASSIGN|DEV_IRQ)_\w+|DEBUG_GUEST)", _REMOVED),
    (r"constant KVM_(MAX_MSIX_PER_DEV|X86_DISABLE_VALID_EXITS)", _REMOVED),
    (
        r"struct kvm_(memory_alias|memory_region|user_trace_setup|breakpoint|debug_guest|assigned_\w+)",
        _REMOVED,
    ),
    (r"field (kvm_run\.hypercall\.pad|kvm_vcpu_pv_apf_data\.enabled)", _REMOVED),
)

# Numbers that differ from one kernel to the next by design: ends of enums and sums of all flags.
_GROWING = re.compile(
    r"KVM_(DEV_TYPE|SEV_NR|TDX_CMD_NR)_MAX|SEV(_RET)?_MAX|UFFD_API_(FEATURES|(RANGE_)?IOCTLS(_BASIC)?)"
    r"|KVM_STATS_(TYPE|UNIT|BASE)_MAX|KVM_\w+_VALID_(FLAG_)?(MASK|FIELDS)|kvm_ioeventfd_flag_nr_max"
)


def _reason(kind: str, name: str) -> str:
    return next((text for pattern, text in _REASONS if re.fullmatch(pattern, f"{kind} {name}")), "")


class _Check:
    """Questions to the compiler about what both sides have, with what kvmpy answers; and the rest."""

    def __init__(self, declared: Declared) -> None:
        self.declared = declared
        self.report = Report()
        self.expected: dict[str, tuple[str, str, str, int | tuple[int, int]]] = {}
        self.foreign: dict[str, tuple[str, str]] = {}
        self.questions: list[Question] = []

    def _ask(
        self, kind: str, name: str, aspect: str, mine: int | tuple[int, int], question: Question
    ) -> None:
        self.expected[question.key] = (kind, name, aspect, mine)
        self.questions.append(question)

    def numbers(self, kind: str, mine: dict[str, int], theirs: list[str]) -> None:
        """Compare named numbers."""
        for name in theirs:
            key = f"{kind} {name}"
            if name in mine:
                self._ask(kind, name, "number", mine[name], Question(key, name))
            else:
                self.foreign[key] = (kind, name)
                self.questions.append(Question(key, name))
        self.report.absent += [f"{kind} {name}" for name in mine if name not in set(theirs)]

    def structs(self) -> None:
        """Compare layouts."""
        for name, members in self.declared.structs.items():
            if name in STRUCTS:
                self._struct(name, members)
            else:
                key = f"struct {name}"
                self.foreign[key] = ("struct", name)
                self.questions.append(Question(key, f"sizeof(struct {name})"))
        self.report.absent += [f"struct {name}" for name in STRUCTS if name not in self.declared.structs]

    def _struct(self, name: str, members: list[kernel_headers.Member]) -> None:
        mine = struct_abi(name)
        size = Question(f"size {name}", f"sizeof(struct {name})")
        self._ask("struct", name, "size", mine.size, size)
        for member in members:
            path = f"{name}.{member.path}"
            place = f"struct {name}, {member.path}"
            if member.bits:
                if member.path in mine.bits:
                    question = Question(f"bits {path}", struct=name, member=member.path)
                    self._ask("field", path, "place", mine.bits[member.path], question)
                    continue
            elif member.path in mine.fields:
                offset, length = mine.fields[member.path]
                self._ask("field", path, "offset", offset, Question(f"offset {path}", f"offsetof({place})"))
                width = "0" if member.open else f"sizeof(((struct {name} *)0)->{member.path})"
                self._ask("field", path, "size", length, Question(f"size {path}", width))
                continue
            self.report.drift.append(Drift("field", path, None, _reason("field", path)))
        known = {member.path for member in members}
        self.report.absent += [
            f"field {name}.{path}" for path in (*mine.fields, *mine.bits) if path not in known
        ]

    def judge(self, answers: dict[str, int | tuple[int, int]]) -> Report:
        """Turn the compiler's answers into the report."""
        for key, (kind, name, label, mine) in self.expected.items():
            if key not in answers:
                self.report.absent.append(f"{kind} {name} (declared there, but not a number)")
                continue
            self.report.compared += 1
            if answers[key] != mine:
                reason = "grows with the kernel" if _GROWING.fullmatch(name) else ""
                self.report.differences.append(Difference(kind, name, label, mine, answers[key], reason))
        for key, (kind, name) in self.foreign.items():
            value = answers.get(key)
            # A macro that is no number (a string, a type) is nothing that kvmpy could have.
            if value is not None or kind != "constant":
                number = value if isinstance(value, int) and kind != "struct" else None
                self.report.drift.append(Drift(kind, name, number, _reason(kind, name)))
        return self.report


def check(directory: Path) -> Report:
    """Compare with the kernel headers in *directory*; HeaderError when they cannot be read."""
    headers: Headers = kernel_headers.locate(directory)
    declared = kernel_headers.declared(headers)
    work = _Check(declared)
    work.numbers("ioctl", {name: entry.nr for name, entry in IOCTLS.items()}, declared.ioctls)
    work.numbers("constant", ALL, declared.constants)
    work.structs()
    return work.judge(kernel_headers.measure(headers, work.questions))
