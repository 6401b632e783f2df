# SPDX-License-Identifier: Apache-2.0
"""Kernel structs as text: fields that are 0 are left out, unions show the member that counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from kvmpy.uapi.constants.irq import IrqChip, IrqRouting
from kvmpy.uapi.constants.run import ExitReason, HypervExit, InternalError, XenExit
from kvmpy.uapi.constants.vcpu import NestedFormat
from kvmpy.uapi.constants.xen import XenAttr, XenVcpuAttr
from kvmpy.uapi.struct_arrays import ByteArray, IntArray, NestedArray, StructArray
from kvmpy.uapi.struct_base import Field, FlexStruct, Struct

_PADDING = re.compile(r"(u8_)?(pad|padding|reserved|rsvd|dummy)\d*")

# exit reason -> member of the union in struct kvm_run
EXIT_MEMBERS: dict[int, str] = {
    ExitReason.KVM_EXIT_UNKNOWN: "hw",
    ExitReason.KVM_EXIT_EXCEPTION: "ex",
    ExitReason.KVM_EXIT_IO: "io",
    ExitReason.KVM_EXIT_HYPERCALL: "hypercall",
    ExitReason.KVM_EXIT_DEBUG: "debug",
    ExitReason.KVM_EXIT_MMIO: "mmio",
    ExitReason.KVM_EXIT_FAIL_ENTRY: "fail_entry",
    ExitReason.KVM_EXIT_TPR_ACCESS: "tpr_access",
    ExitReason.KVM_EXIT_S390_SIEIC: "s390_sieic",
    ExitReason.KVM_EXIT_S390_RESET: "s390_reset_flags",
    ExitReason.KVM_EXIT_DCR: "dcr",
    ExitReason.KVM_EXIT_INTERNAL_ERROR: "internal",
    ExitReason.KVM_EXIT_OSI: "osi",
    ExitReason.KVM_EXIT_PAPR_HCALL: "papr_hcall",
    ExitReason.KVM_EXIT_S390_UCONTROL: "s390_ucontrol",
    ExitReason.KVM_EXIT_S390_TSCH: "s390_tsch",
    ExitReason.KVM_EXIT_EPR: "epr",
    ExitReason.KVM_EXIT_SYSTEM_EVENT: "system_event",
    ExitReason.KVM_EXIT_S390_STSI: "s390_stsi",
    ExitReason.KVM_EXIT_IOAPIC_EOI: "eoi",
    ExitReason.KVM_EXIT_HYPERV: "hyperv",
    ExitReason.KVM_EXIT_ARM_NISV: "arm_nisv",
    ExitReason.KVM_EXIT_X86_RDMSR: "msr",
    ExitReason.KVM_EXIT_X86_WRMSR: "msr",
    ExitReason.KVM_EXIT_XEN: "xen",
    ExitReason.KVM_EXIT_RISCV_SBI: "riscv_sbi",
    ExitReason.KVM_EXIT_RISCV_CSR: "riscv_csr",
    ExitReason.KVM_EXIT_NOTIFY: "notify",
    ExitReason.KVM_EXIT_LOONGARCH_IOCSR: "iocsr_io",
    ExitReason.KVM_EXIT_MEMORY_FAULT: "memory_fault",
    ExitReason.KVM_EXIT_TDX: "tdx",
    ExitReason.KVM_EXIT_ARM_SEA: "arm_sea",
    ExitReason.KVM_EXIT_ARM_LDST64B: "arm_nisv",
    ExitReason.KVM_EXIT_SNP_REQ_CERTS: "snp_req_certs",
}

_MEMBERS: dict[str, tuple[str, dict[int, str]]] = {
    "kvm_irqchip": (
        "chip_id",
        {
            IrqChip.KVM_IRQCHIP_PIC_MASTER: "pic",
            IrqChip.KVM_IRQCHIP_PIC_SLAVE: "pic",
            IrqChip.KVM_IRQCHIP_IOAPIC: "ioapic",
        },
    ),
    "kvm_irq_routing_entry": (
        "type",
        {
            IrqRouting.KVM_IRQ_ROUTING_IRQCHIP: "irqchip",
            IrqRouting.KVM_IRQ_ROUTING_MSI: "msi",
            IrqRouting.KVM_IRQ_ROUTING_S390_ADAPTER: "adapter",
            IrqRouting.KVM_IRQ_ROUTING_HV_SINT: "hv_sint",
            IrqRouting.KVM_IRQ_ROUTING_XEN_EVTCHN: "xen_evtchn",
        },
    ),
    "kvm_hyperv_exit": (
        "type",
        {
            HypervExit.KVM_EXIT_HYPERV_SYNIC: "synic",
            HypervExit.KVM_EXIT_HYPERV_HCALL: "hcall",
            HypervExit.KVM_EXIT_HYPERV_SYNDBG: "syndbg",
        },
    ),
    "kvm_xen_exit": ("type", {XenExit.KVM_EXIT_XEN_HCALL: "hcall"}),
    "kvm_nested_state": (
        "format",
        {NestedFormat.KVM_STATE_NESTED_FORMAT_VMX: "vmx", NestedFormat.KVM_STATE_NESTED_FORMAT_SVM: "svm"},
    ),
    "kvm_xen_hvm_attr": (
        "type",
        {
            XenAttr.KVM_XEN_ATTR_TYPE_LONG_MODE: "long_mode",
            XenAttr.KVM_XEN_ATTR_TYPE_SHARED_INFO: "shared_info",
            XenAttr.KVM_XEN_ATTR_TYPE_UPCALL_VECTOR: "vector",
            XenAttr.KVM_XEN_ATTR_TYPE_EVTCHN: "evtchn",
            XenAttr.KVM_XEN_ATTR_TYPE_XEN_VERSION: "xen_version",
            XenAttr.KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG: "runstate_update_flag",
            XenAttr.KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA: "shared_info",
        },
    ),
    "kvm_xen_vcpu_attr": (
        "type",
        {
            XenVcpuAttr.KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA: "runstate",
            XenVcpuAttr.KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST: "runstate",
            XenVcpuAttr.KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT: "runstate",
            XenVcpuAttr.KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID: "vcpu_id",
            XenVcpuAttr.KVM_XEN_VCPU_ATTR_TYPE_TIMER: "timer",
            XenVcpuAttr.KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR: "vector",
            XenVcpuAttr.KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA: "hva",
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Style:
    """How much is told: *words* may name a number in a field, *entries* of an open array are shown.

    *arrays* tell the bytes of an array in words, by (struct, field). With *full* no array is shortened.
    """

    words: Callable[[Struct, Field, int], str | None] | None = None
    entries: int = 4
    full: bool = False
    arrays: Mapping[tuple[str, str], Callable[[bytes], str]] | None = None


PLAIN = Style()


def active_member(value: Struct) -> str | None:
    """Return the union member that the type field of *value* selects; None where there is no such field."""
    if value.NAME == "kvm_run":
        run: Any = value
        emulation = InternalError.KVM_INTERNAL_ERROR_EMULATION
        if run.exit_reason == ExitReason.KVM_EXIT_INTERNAL_ERROR and run.internal.suberror == emulation:
            return "emulation_failure"
        return EXIT_MEMBERS.get(run.exit_reason, "")
    if value.NAME in _MEMBERS:
        selector, members = _MEMBERS[value.NAME]
        return members.get(getattr(value, selector))
    return None


def shown_fields(value: Struct, member: str | None = None) -> Iterator[Field]:
    """Yield the fields that tell what is in *value*: of fields that overlap only one, no padding that is 0.

    *member* names the one to show where there is a choice.
    """
    kind: Any = type(value)  # a class has a hash, whatever its instances have
    return iter(_shown(kind, active_member(value) if member is None else member))


@lru_cache(None)
def _shown(kind: type[Struct], chosen: str | None) -> tuple[Field, ...]:
    fields = list(kind.FIELDS.values())
    taken: list[Field] = []
    for field in sorted(fields, key=lambda each: (each.name != chosen, bool(_PADDING.fullmatch(each.name)))):
        overlaps = any(_overlap(field, other) for other in fields if other is not field)
        if overlaps and field.name != chosen and kind.NAME == "kvm_run":
            continue
        if not any(_overlap(field, other) for other in taken):
            taken.append(field)
    return tuple(field for field in fields if field in taken)


def _overlap(one: Field, other: Field) -> bool:
    if one.bits and other.bits and one.offset == other.offset:
        return one.shift < other.shift + other.bits and other.shift < one.shift + one.bits
    return one.offset < other.offset + other.size and other.offset < one.offset + one.size


def describe(value: Struct, member: str | None = None, style: Style = PLAIN) -> str:
    """Return the fields of *value* that are not 0 as ``name=0x1, ...``."""
    parts = []
    inner = active_member(value)
    for field in shown_fields(value, member):
        text = _text(value, field, inner, style)
        if text:
            parts.append(f"{field.name}={text}")
    return ", ".join(parts)


def _number(value: Struct, field: Field, number: int, style: Style) -> str:
    words = style.words(value, field, number) if style.words is not None else None
    if words is not None:
        return words
    signed = field.ctype.kind == "primitive" and field.ctype.cname.startswith("int")
    return (str(number) if signed else hex(number)) if number else ""


def _text(value: Struct, field: Field, inner: str | None, style: Style) -> str:
    content = getattr(value, field.attribute)
    if isinstance(content, int):
        return _number(value, field, content, style)
    if isinstance(content, Struct):
        text = describe(content, inner if content.IS_UNION else None, style)
        return f"{{{text}}}" if text else ""
    if field.size == 0 and isinstance(value, FlexStruct):
        return _entries(value, field, style)
    raw = content.to_bytes()
    words = style.arrays.get((value.NAME, field.name)) if style.arrays else None
    if words is not None and any(raw):
        return f"{{{words(raw)}}}"
    return _array(content, style) if any(raw) else ""


def _array(content: IntArray | ByteArray | NestedArray | StructArray[Any], style: Style) -> str:
    if isinstance(content, StructArray):
        items = [(number, describe(item, None, style)) for number, item in enumerate(content)]
        return "[" + ", ".join(f"{number}: {{{text}}}" for number, text in items if text) + "]"
    if style.full and isinstance(content, ByteArray):
        return f"<{content.to_bytes().hex()}>"
    if style.full and isinstance(content, IntArray):
        return f"[{', '.join(map(hex, content))}]"
    return repr(content)


def _entries(value: FlexStruct, field: Field, style: Style) -> str:
    count = min(value.counted, value.room)
    array = value._array()
    if isinstance(array, ByteArray):
        return _array(ByteArray(array.cdata, count, value), style) if any(array.to_bytes()) else ""
    shown: list[Any] = list(array[: count if style.full else min(count, style.entries)])
    texts = [
        f"{{{describe(item, None, style)}}}"
        if isinstance(item, Struct)
        else _number(value, field, item, style) or hex(item)
        for item in shown
    ]
    more = f", ... {count} entries" if count > len(texts) else ""
    return f"[{', '.join(texts)}{more}]" if texts else ""
