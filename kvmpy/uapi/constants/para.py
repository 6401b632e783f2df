# SPDX-License-Identifier: Apache-2.0
"""The paravirtual interface that a guest sees: CPUID leaves, MSRs, hypercalls."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class ParaCpuid(IntEnum):
    """CPUID leaves of KVM."""

    KVM_CPUID_SIGNATURE = 0x40000000
    KVM_CPUID_FEATURES = 0x40000001


class ParaFeature(IntEnum):
    """Bit numbers in KVM_CPUID_FEATURES.EAX."""

    KVM_FEATURE_CLOCKSOURCE = 0
    KVM_FEATURE_NOP_IO_DELAY = 1
    KVM_FEATURE_MMU_OP = 2
    KVM_FEATURE_CLOCKSOURCE2 = 3
    KVM_FEATURE_ASYNC_PF = 4
    KVM_FEATURE_STEAL_TIME = 5
    KVM_FEATURE_PV_EOI = 6
    KVM_FEATURE_PV_UNHALT = 7
    KVM_FEATURE_PV_TLB_FLUSH = 9
    KVM_FEATURE_ASYNC_PF_VMEXIT = 10
    KVM_FEATURE_PV_SEND_IPI = 11
    KVM_FEATURE_POLL_CONTROL = 12
    KVM_FEATURE_PV_SCHED_YIELD = 13
    KVM_FEATURE_ASYNC_PF_INT = 14
    KVM_FEATURE_MSI_EXT_DEST_ID = 15
    KVM_FEATURE_HC_MAP_GPA_RANGE = 16
    KVM_FEATURE_MIGRATION_CONTROL = 17
    KVM_FEATURE_CLOCKSOURCE_STABLE_BIT = 24


class ParaHint(IntEnum):
    """Bit numbers in KVM_CPUID_FEATURES.EDX."""

    KVM_HINTS_REALTIME = 0


class ParaMsr(IntEnum):
    """MSR numbers."""

    MSR_KVM_WALL_CLOCK = 0x11
    MSR_KVM_SYSTEM_TIME = 0x12
    MSR_KVM_WALL_CLOCK_NEW = 0x4B564D00
    MSR_KVM_SYSTEM_TIME_NEW = 0x4B564D01
    MSR_KVM_ASYNC_PF_EN = 0x4B564D02
    MSR_KVM_STEAL_TIME = 0x4B564D03
    MSR_KVM_PV_EOI_EN = 0x4B564D04
    MSR_KVM_POLL_CONTROL = 0x4B564D05
    MSR_KVM_ASYNC_PF_INT = 0x4B564D06
    MSR_KVM_ASYNC_PF_ACK = 0x4B564D07
    MSR_KVM_MIGRATION_CONTROL = 0x4B564D08


class ParaMsrFlag(IntFlag):
    """The enable bit of most MSRs."""

    KVM_MSR_ENABLED = 1


class StealTime(IntEnum):
    """Layout of MSR_KVM_STEAL_TIME."""

    KVM_STEAL_ALIGNMENT_BITS = 5
    KVM_STEAL_VALID_BITS = 0xFFFFFFFFFFFFFFC0
    KVM_STEAL_RESERVED_MASK = 0x3E


class Preempted(IntFlag):
    """``preempted`` of struct kvm_steal_time."""

    KVM_VCPU_PREEMPTED = 1
    KVM_VCPU_FLUSH_TLB = 2


class ClockPairing(IntEnum):
    """Clock types of KVM_HC_CLOCK_PAIRING."""

    KVM_CLOCK_PAIRING_WALLCLOCK = 0


class AsyncPf(IntFlag):
    """Bits of MSR_KVM_ASYNC_PF_EN and MSR_KVM_ASYNC_PF_INT."""

    KVM_ASYNC_PF_ENABLED = 1
    KVM_ASYNC_PF_SEND_ALWAYS = 2
    KVM_ASYNC_PF_DELIVERY_AS_PF_VMEXIT = 4
    KVM_ASYNC_PF_DELIVERY_AS_INT = 8
    KVM_ASYNC_PF_VEC_MASK = 0xFF


class PvReason(IntEnum):
    """Why an asynchronous page fault was delivered."""

    KVM_PV_REASON_PAGE_NOT_PRESENT = 1
    KVM_PV_REASON_PAGE_READY = 2


class PvEoi(IntEnum):
    """Bits of the end-of-interrupt word."""

    KVM_PV_EOI_BIT = 0
    KVM_PV_EOI_MASK = 1
    KVM_PV_EOI_ENABLED = 1
    KVM_PV_EOI_DISABLED = 0


class MigrationControl(IntFlag):
    """Bits of MSR_KVM_MIGRATION_CONTROL."""

    KVM_MIGRATION_READY = 1


class Hypercall(IntEnum):
    """Hypercall numbers."""

    KVM_HC_VAPIC_POLL_IRQ = 1
    KVM_HC_MMU_OP = 2
    KVM_HC_FEATURES = 3
    KVM_HC_PPC_MAP_MAGIC_PAGE = 4
    KVM_HC_KICK_CPU = 5
    KVM_HC_MIPS_GET_CLOCK_FREQ = 6
    KVM_HC_MIPS_EXIT_VM = 7
    KVM_HC_MIPS_CONSOLE_OUTPUT = 8
    KVM_HC_CLOCK_PAIRING = 9
    KVM_HC_SEND_IPI = 10
    KVM_HC_SCHED_YIELD = 11
    KVM_HC_MAP_GPA_RANGE = 12


class HypercallError(IntEnum):
    """Results of hypercalls (to be negated)."""

    KVM_ENOSYS = 1000
    KVM_EFAULT = 14
    KVM_EINVAL = 22
    KVM_E2BIG = 7
    KVM_EPERM = 1
    KVM_EOPNOTSUPP = 95


class MapGpaPageSize(IntEnum):
    """Page size in the attributes of KVM_HC_MAP_GPA_RANGE."""

    KVM_MAP_GPA_RANGE_PAGE_SZ_4K = 0
    KVM_MAP_GPA_RANGE_PAGE_SZ_2M = 1
    KVM_MAP_GPA_RANGE_PAGE_SZ_1G = 2


class MapGpaStatus(IntEnum):
    """Encryption status in the attributes of KVM_HC_MAP_GPA_RANGE."""

    KVM_MAP_GPA_RANGE_ENCRYPTED = 16
    KVM_MAP_GPA_RANGE_DECRYPTED = 0


class MmuOp(IntEnum):
    """Operations of KVM_HC_MMU_OP."""

    KVM_MAX_MMU_OP_BATCH = 32
    KVM_MMU_OP_WRITE_PTE = 1
    KVM_MMU_OP_FLUSH_TLB = 2
    KVM_MMU_OP_RELEASE_PT = 3
