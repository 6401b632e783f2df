# SPDX-License-Identifier: Apache-2.0
"""Exit reasons and what the payloads in struct kvm_run hold."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class HypervExit(IntEnum):
    """``type`` of struct kvm_hyperv_exit."""

    KVM_EXIT_HYPERV_SYNIC = 1
    KVM_EXIT_HYPERV_HCALL = 2
    KVM_EXIT_HYPERV_SYNDBG = 3


class XenExit(IntEnum):
    """``type`` of struct kvm_xen_exit."""

    KVM_EXIT_XEN_HCALL = 1


class IoDirection(IntEnum):
    """``direction`` of KVM_EXIT_IO."""

    KVM_EXIT_IO_IN = 0
    KVM_EXIT_IO_OUT = 1


class HypercallFlag(IntFlag):
    """``flags`` of KVM_EXIT_HYPERCALL."""

    KVM_EXIT_HYPERCALL_LONG_MODE = 1


class ArmSeaFlag(IntFlag):
    """``flags`` of KVM_EXIT_ARM_SEA."""

    KVM_EXIT_ARM_SEA_FLAG_GPA_VALID = 1


class ExitReason(IntEnum):
    """``exit_reason`` of struct kvm_run."""

    KVM_EXIT_UNKNOWN = 0
    KVM_EXIT_EXCEPTION = 1
    KVM_EXIT_IO = 2
    KVM_EXIT_HYPERCALL = 3
    KVM_EXIT_DEBUG = 4
    KVM_EXIT_HLT = 5
    KVM_EXIT_MMIO = 6
    KVM_EXIT_IRQ_WINDOW_OPEN = 7
    KVM_EXIT_SHUTDOWN = 8
    KVM_EXIT_FAIL_ENTRY = 9
    KVM_EXIT_INTR = 10
    KVM_EXIT_SET_TPR = 11
    KVM_EXIT_TPR_ACCESS = 12
    KVM_EXIT_S390_SIEIC = 13
    KVM_EXIT_S390_RESET = 14
    KVM_EXIT_DCR = 15
    KVM_EXIT_NMI = 16
    KVM_EXIT_INTERNAL_ERROR = 17
    KVM_EXIT_OSI = 18
    KVM_EXIT_PAPR_HCALL = 19
    KVM_EXIT_S390_UCONTROL = 20
    KVM_EXIT_WATCHDOG = 21
    KVM_EXIT_S390_TSCH = 22
    KVM_EXIT_EPR = 23
    KVM_EXIT_SYSTEM_EVENT = 24
    KVM_EXIT_S390_STSI = 25
    KVM_EXIT_IOAPIC_EOI = 26
    KVM_EXIT_HYPERV = 27
    KVM_EXIT_ARM_NISV = 28
    KVM_EXIT_X86_RDMSR = 29
    KVM_EXIT_X86_WRMSR = 30
    KVM_EXIT_DIRTY_RING_FULL = 31
    KVM_EXIT_AP_RESET_HOLD = 32
    KVM_EXIT_X86_BUS_LOCK = 33
    KVM_EXIT_XEN = 34
    KVM_EXIT_RISCV_SBI = 35
    KVM_EXIT_RISCV_CSR = 36
    KVM_EXIT_NOTIFY = 37
    KVM_EXIT_LOONGARCH_IOCSR = 38
    KVM_EXIT_MEMORY_FAULT = 39
    KVM_EXIT_TDX = 40
    KVM_EXIT_ARM_SEA = 41
    KVM_EXIT_ARM_LDST64B = 42
    KVM_EXIT_SNP_REQ_CERTS = 43


class InternalErrorFlag(IntFlag):
    """``flags`` of the emulation_failure payload."""

    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES = 1


class InternalError(IntEnum):
    """``suberror`` of KVM_EXIT_INTERNAL_ERROR."""

    KVM_INTERNAL_ERROR_EMULATION = 1
    KVM_INTERNAL_ERROR_SIMUL_EX = 2
    KVM_INTERNAL_ERROR_DELIVERY_EV = 3
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4


class SystemEvent(IntEnum):
    """``type`` of KVM_EXIT_SYSTEM_EVENT."""

    KVM_SYSTEM_EVENT_SHUTDOWN = 1
    KVM_SYSTEM_EVENT_RESET = 2
    KVM_SYSTEM_EVENT_CRASH = 3
    KVM_SYSTEM_EVENT_WAKEUP = 4
    KVM_SYSTEM_EVENT_SUSPEND = 5
    KVM_SYSTEM_EVENT_SEV_TERM = 6
    KVM_SYSTEM_EVENT_TDX_FATAL = 7


class MsrExitReason(IntFlag):
    """Why an MSR access comes to user space (KVM_CAP_X86_USER_SPACE_MSR, KVM_EXIT_X86_RDMSR)."""

    KVM_MSR_EXIT_REASON_INVAL = 1
    KVM_MSR_EXIT_REASON_UNKNOWN = 2
    KVM_MSR_EXIT_REASON_FILTER = 4
    KVM_MSR_EXIT_REASON_VALID_MASK = 7


class NotifyFlag(IntFlag):
    """``flags`` of KVM_EXIT_NOTIFY."""

    KVM_NOTIFY_CONTEXT_INVALID = 1


class MemoryFaultFlag(IntFlag):
    """``flags`` of KVM_EXIT_MEMORY_FAULT."""

    KVM_MEMORY_EXIT_FLAG_PRIVATE = 8


class RunFlag(IntFlag):
    """``flags`` of struct kvm_run."""

    KVM_RUN_X86_SMM = 1
    KVM_RUN_X86_BUS_LOCK = 2
    KVM_RUN_X86_GUEST_MODE = 4


class SyncReg(IntFlag):
    """Register classes in the shared page (KVM_CAP_SYNC_REGS)."""

    KVM_SYNC_X86_REGS = 1
    KVM_SYNC_X86_SREGS = 2
    KVM_SYNC_X86_EVENTS = 4
    KVM_SYNC_X86_VALID_FIELDS = 7


class RunPage(IntEnum):
    """Page offsets in the mapping of a vCPU, and the size of its register area."""

    KVM_PIO_PAGE_OFFSET = 1
    KVM_COALESCED_MMIO_PAGE_OFFSET = 2
    KVM_DIRTY_LOG_PAGE_OFFSET = 64
    SYNC_REGS_SIZE_BYTES = 2048


class CoalescedLimit(IntEnum):
    """How many entries the ring of struct kvm_coalesced_mmio_ring has (one page)."""

    KVM_COALESCED_MMIO_MAX = 170
