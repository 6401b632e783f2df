# SPDX-License-Identifier: Apache-2.0
"""Which fields hold the members of an enum or flags, and numbers as those names.

:class:`Words` is for :func:`kvmpy.uapi.struct_text.describe`; callers may add names that this room does not
know (MSRs, registers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum, IntFlag
from typing import Any

from kvmpy.uapi import constants as c
from kvmpy.uapi.ioctl_type import Ioctl
from kvmpy.uapi.ioctls import IOCTLS
from kvmpy.uapi.struct_base import Field, Struct

Kind = type[IntEnum] | type[IntFlag]
Namer = Callable[[int], str]

FIELDS: dict[tuple[str, str], Kind] = {
    ("kvm_userspace_memory_region", "flags"): c.MemFlag,
    ("kvm_userspace_memory_region2", "flags"): c.MemFlag,
    ("kvm_memory_attributes", "attributes"): c.MemoryAttribute,
    ("kvm_create_guest_memfd", "flags"): c.GmemFlag,
    ("kvm_dirty_gfn", "flags"): c.DirtyGfnFlag,
    ("kvm_enable_cap", "cap"): c.Cap,
    ("kvm_create_device", "type"): c.DeviceType,
    ("kvm_create_device", "flags"): c.CreateDeviceFlag,
    ("kvm_irqchip", "chip_id"): c.IrqChip,
    ("kvm_irq_routing_entry", "type"): c.IrqRouting,
    ("kvm_irq_routing_irqchip", "irqchip"): c.IrqChip,
    ("kvm_irq_routing_xen_evtchn", "priority"): c.XenEvtchnPriority,
    ("kvm_irqfd", "flags"): c.IrqfdFlag,
    ("kvm_ioeventfd", "flags"): c.IoeventfdFlag,
    ("kvm_msi", "flags"): c.MsiFlag,
    ("kvm_pit_state2", "flags"): c.PitFlag,
    ("kvm_pit_config", "flags"): c.PitConfigFlag,
    ("kvm_clock_data", "flags"): c.ClockFlag,
    ("kvm_mp_state", "mp_state"): c.MpState,
    ("kvm_guest_debug", "control"): c.GuestDebug,
    ("kvm_vcpu_events", "flags"): c.VcpuEventFlag,
    ("kvm_vcpu_events__interrupt", "shadow"): c.ShadowInt,
    ("kvm_cpuid_entry2", "flags"): c.CpuidFlag,
    ("kvm_sregs2", "flags"): c.Sregs2Flag,
    ("kvm_nested_state", "flags"): c.NestedFlag,
    ("kvm_nested_state", "format"): c.NestedFormat,
    ("kvm_vmx_nested_state_hdr", "flags"): c.NestedVmxFlag,
    ("kvm_vmx_nested_state_hdr__smm", "flags"): c.NestedSmmFlag,
    ("kvm_msr_filter", "flags"): c.MsrFilterDefault,
    ("kvm_msr_filter_range", "flags"): c.MsrFilterFlag,
    ("kvm_pmu_event_filter", "action"): c.PmuEvent,
    ("kvm_pmu_event_filter", "flags"): c.PmuEventFlag,
    ("kvm_run", "exit_reason"): c.ExitReason,
    ("kvm_run", "flags"): c.RunFlag,
    ("kvm_run", "kvm_valid_regs"): c.SyncReg,
    ("kvm_run", "kvm_dirty_regs"): c.SyncReg,
    ("kvm_run__io", "direction"): c.IoDirection,
    ("kvm_run__hypercall", "nr"): c.Hypercall,
    ("kvm_run__internal", "suberror"): c.InternalError,
    ("kvm_run__emulation_failure", "suberror"): c.InternalError,
    ("kvm_run__emulation_failure", "flags"): c.InternalErrorFlag,
    ("kvm_run__system_event", "type"): c.SystemEvent,
    ("kvm_run__msr", "reason"): c.MsrExitReason,
    ("kvm_run__notify", "flags"): c.NotifyFlag,
    ("kvm_run__memory_fault", "flags"): c.MemoryFaultFlag,
    ("kvm_run__arm_sea", "flags"): c.ArmSeaFlag,
    ("kvm_run__ex", "exception"): c.X86Vector,
    ("kvm_debug_exit_arch", "exception"): c.X86Vector,
    ("kvm_hyperv_exit", "type"): c.HypervExit,
    ("kvm_hyperv_eventfd", "flags"): c.HypervEventfd,
    ("kvm_xen_exit", "type"): c.XenExit,
    ("kvm_xen_hvm_config", "flags"): c.XenHvmFlag,
    ("kvm_xen_hvm_attr", "type"): c.XenAttr,
    ("kvm_xen_hvm_attr__u__evtchn", "flags"): c.XenEvtchnFlag,
    ("kvm_xen_vcpu_attr", "type"): c.XenVcpuAttr,
    ("kvm_sev_cmd", "id"): c.SevCmd,
    ("kvm_sev_cmd", "error"): c.SevRet,
    ("sev_issue_cmd", "cmd"): c.SevPlatformCmd,
    ("sev_issue_cmd", "error"): c.SevRet,
    ("sev_user_data_status", "flags"): c.SevStatusFlag,
    ("kvm_sev_snp_launch_update", "type"): c.SnpPageType,
    ("kvm_tdx_cmd", "id"): c.TdxCmd,
    ("uffdio_register", "mode"): c.UffdRegisterMode,
    ("uffdio_api", "features"): c.UffdFeature,
    ("uffdio_copy", "mode"): c.UffdCopyMode,
    ("uffdio_zeropage", "mode"): c.UffdZeropageMode,
    ("uffdio_writeprotect", "mode"): c.UffdWriteprotectMode,
    ("uffdio_continue", "mode"): c.UffdContinueMode,
    ("uffdio_poison", "mode"): c.UffdPoisonMode,
    ("uffdio_move", "mode"): c.UffdMoveMode,
}
"""Fields of structs by (struct, field)."""

ARGUMENTS: dict[str, Kind] = {op.name: op.names for op in IOCTLS.values() if op.names is not None}
"""Ioctls whose argument is a number with a name."""

CAP_ARGUMENTS: dict[int, Kind] = {
    c.KVM_CAP_X86_DISABLE_EXITS: c.DisableExits,
    c.KVM_CAP_DISABLE_QUIRKS: c.Quirk,
    c.KVM_CAP_DISABLE_QUIRKS2: c.Quirk,
    c.KVM_CAP_X86_USER_SPACE_MSR: c.MsrExitReason,
    c.KVM_CAP_X86_BUS_LOCK_EXIT: c.BusLock,
    c.KVM_CAP_X86_NOTIFY_VMEXIT: c.NotifyVmexit,
    c.KVM_CAP_PMU_CAPABILITY: c.PmuCap,
    c.KVM_CAP_X2APIC_API: c.X2apicFlag,
    c.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: c.DirtyLogFlag,
    c.KVM_CAP_XEN_HVM: c.XenHvmFlag,
}
"""What ``args[0]`` of KVM_ENABLE_CAP holds."""

DEVICE_ATTRIBUTES: dict[str, tuple[Kind, dict[int, Kind]]] = {
    "system": (
        c.SystemGroup,
        {c.KVM_X86_GRP_SYSTEM: c.SystemAttr, c.KVM_X86_GRP_SEV: c.SevAttr},
    ),
    "vcpu": (c.VcpuGroup, {c.KVM_VCPU_TSC_CTRL: c.VcpuTscAttr}),
}
"""Groups of struct kvm_device_attr by the kind of file descriptor, and the attributes of each group."""


def number_words(kind: Kind, value: int) -> str:
    """Return the member's name, or the names of the flags joined by ``|``; what has none is hexadecimal.

    Members of an IntEnum that are flags in the kernel are told apart only where the value is one of them.
    """
    if issubclass(kind, IntEnum):
        signed = value - (1 << 32) if value >= 1 << 31 and any(int(each) < 0 for each in kind) else value
        member = kind._value2member_map_.get(signed)
        return str(member.name) if member is not None else hex(value)
    names = []
    left = value
    for name, member in kind.__members__.items():
        bit = int(member)
        if bit and not bit & (bit - 1) and left & bit:
            names.append(name)
            left &= ~bit
    if left or not names:
        names.append(hex(left))
    return "|".join(names)


def parse_words(kind: Kind, text: str) -> int:
    """Return the number for what :func:`number_words` gives, numbers among the names allowed; ValueError."""
    value = 0
    for part in text.split("|"):
        word = part.strip()
        if word in kind.__members__:
            value |= int(kind.__members__[word])
        else:
            value |= int(word, 0)
    return value


def argument_words(op: Ioctl, value: int) -> str:
    """Return the argument of an ioctl that takes a number."""
    if op.names is not None:
        return number_words(op.names, value)
    return f"{value} {op.unit}" if op.unit else hex(value) if value > 9 else str(value)


# Basic exit reasons of VM entries that failed (Intel SDM volume 3, 28.8), and VM-instruction errors (32.4).
_VMX_ENTRY = {33: "invalid guest state", 34: "MSR loading", 41: "a machine check"}
_VMX_INSTRUCTION = {7: "invalid control fields of the VMCS", 8: "invalid host state of the VMCS"}


def entry_failure(value: int) -> str:
    """Return why the hardware did not enter the guest (``hardware_entry_failure_reason``)."""
    if value in ((1 << 64) - 1, (1 << 32) - 1):
        return "SVM: VMEXIT_INVALID, the VMCB holds no legal guest state"
    if value >> 31 & 1:
        return f"VMX: VM entry failed, {_VMX_ENTRY.get(value & 0xFFFF, f'basic reason {value & 0xFFFF}')}"
    return f"VMX: {_VMX_INSTRUCTION[value]}" if value in _VMX_INSTRUCTION else ""


_EVENTS = {0: "external interrupt", 2: "NMI", 3: "exception", 4: "INT n", 5: "INT1", 6: "INT3 or INTO"}


def simultaneous(data: Sequence[int]) -> str:
    """Return what ``data`` of KVM_INTERNAL_ERROR_SIMUL_EX says: two event fields of the VMCS, an error code.

    Linux: arch/x86/kvm/vmx/vmx.c, handle_exception_nmi(); Intel SDM volume 3, 26.9.2.
    """

    def event(value: int) -> str:
        vector = number_words(c.X86Vector, value & 0xFF)
        return f"{_EVENTS.get(value >> 8 & 7, 'event')} {vector}"

    text = f"{event(data[1])} while {event(data[0])} was delivered"
    return text + (f", error code {data[2]:#x}" if data[1] >> 11 & 1 and len(data) > 2 else "")


class Words:
    """Names for the numbers in structs: this module's, and *extra* ones by (struct, field)."""

    def __init__(self, extra: Mapping[tuple[str, str], Namer] | None = None) -> None:
        self.extra = {
            ("kvm_run__fail_entry", "hardware_entry_failure_reason"): entry_failure,
            **(extra or {}),
        }

    def __call__(self, value: Struct, field: Field, number: int) -> str | None:
        """Return *number* in the field as words, None where it has none."""
        key = (value.NAME, field.name)
        if key in self.extra:
            text = self.extra[key](number)
            if not number and key in _TELLS_ZERO:
                return f"0 ({text})"
            return f"{number:#x} ({text})" if number and text and text != hex(number) else None
        kind = FIELDS.get(key)
        if kind is None or (not number and not _tells_zero(kind)):
            return None
        text = number_words(kind, number)
        if key == _SUBERROR and number == c.InternalError.KVM_INTERNAL_ERROR_SIMUL_EX:
            internal: Any = value
            text += f" ({simultaneous(list(internal.data))})" if internal.ndata >= 2 else ""
        return text


_SUBERROR = ("kvm_run__internal", "suberror")
# What lacks a bit that must be set is wrong as 0, too.
_TELLS_ZERO = frozenset({("kvm_sev_snp_launch_start", "policy")})


def _tells_zero(kind: Kind) -> bool:
    return issubclass(kind, IntEnum) and 0 in kind._value2member_map_ and kind is not c.SevRet
