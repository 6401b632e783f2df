# SPDX-License-Identifier: Apache-2.0
"""Virtual machines: types, memory, dirty tracking, devices, capabilities' arguments, statistics."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class Api(IntEnum):
    """The ioctl type and the API version."""

    KVM_API_VERSION = 0xC
    KVMIO = 0xAE


class VmType(IntEnum):
    """Machine types of KVM_CREATE_VM on x86."""

    KVM_X86_DEFAULT_VM = 0
    KVM_X86_SW_PROTECTED_VM = 1
    KVM_X86_SEV_VM = 2
    KVM_X86_SEV_ES_VM = 3
    KVM_X86_SNP_VM = 4
    KVM_X86_TDX_VM = 5


class S390VmType(IntEnum):
    """Machine types of KVM_CREATE_VM on s390."""

    KVM_VM_S390_UCONTROL = 1


class PpcVmType(IntEnum):
    """Machine types of KVM_CREATE_VM on PowerPC."""

    KVM_VM_PPC_HV = 1
    KVM_VM_PPC_PR = 2


class MipsVmType(IntEnum):
    """Machine types of KVM_CREATE_VM on MIPS."""

    KVM_VM_MIPS_AUTO = 0
    KVM_VM_MIPS_VZ = 1
    KVM_VM_MIPS_TE = 2


class ArmVmType(IntFlag):
    """Machine type bits of KVM_CREATE_VM on arm64."""

    KVM_VM_TYPE_ARM_IPA_SIZE_MASK = 0xFF
    KVM_VM_TYPE_ARM_PROTECTED = 1 << 31
    KVM_VM_TYPE_ARM_MASK = 0x800000FF


class MemFlag(IntFlag):
    """``flags`` of a memory slot."""

    KVM_MEM_LOG_DIRTY_PAGES = 1
    KVM_MEM_READONLY = 2
    KVM_MEM_GUEST_MEMFD = 4


class MemoryAttribute(IntFlag):
    """Attributes of KVM_SET_MEMORY_ATTRIBUTES."""

    KVM_MEMORY_ATTRIBUTE_PRIVATE = 8


class GmemFlag(IntFlag):
    """``flags`` of KVM_CREATE_GUEST_MEMFD."""

    GUEST_MEMFD_FLAG_MMAP = 1
    GUEST_MEMFD_FLAG_INIT_SHARED = 2


class DirtyLogFlag(IntFlag):
    """Arguments of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2."""

    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1
    KVM_DIRTY_LOG_INITIALLY_SET = 2


class DirtyGfnFlag(IntFlag):
    """``flags`` of struct kvm_dirty_gfn."""

    KVM_DIRTY_GFN_F_DIRTY = 1
    KVM_DIRTY_GFN_F_RESET = 2
    KVM_DIRTY_GFN_F_MASK = 3


class DisableExits(IntFlag):
    """Arguments of KVM_CAP_X86_DISABLE_EXITS."""

    KVM_X86_DISABLE_EXITS_MWAIT = 1
    KVM_X86_DISABLE_EXITS_HLT = 2
    KVM_X86_DISABLE_EXITS_PAUSE = 4
    KVM_X86_DISABLE_EXITS_CSTATE = 8
    KVM_X86_DISABLE_EXITS_APERFMPERF = 1 << 4


class Quirk(IntFlag):
    """Arguments of KVM_CAP_DISABLE_QUIRKS2."""

    KVM_X86_QUIRK_LINT0_REENABLED = 1
    KVM_X86_QUIRK_CD_NW_CLEARED = 2
    KVM_X86_QUIRK_LAPIC_MMIO_HOLE = 4
    KVM_X86_QUIRK_OUT_7E_INC_RIP = 8
    KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT = 1 << 4
    KVM_X86_QUIRK_FIX_HYPERCALL_INSN = 1 << 5
    KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS = 1 << 6
    KVM_X86_QUIRK_SLOT_ZAP_ALL = 1 << 7
    KVM_X86_QUIRK_STUFF_FEATURE_MSRS = 1 << 8
    KVM_X86_QUIRK_IGNORE_GUEST_PAT = 1 << 9
    KVM_X86_QUIRK_VMCS12_ALLOW_FREEZE_IN_SMM = 1 << 10
    KVM_X86_QUIRK_NESTED_SVM_SHARED_PAT = 1 << 11


class BusLock(IntFlag):
    """Arguments of KVM_CAP_X86_BUS_LOCK_EXIT."""

    KVM_BUS_LOCK_DETECTION_OFF = 1
    KVM_BUS_LOCK_DETECTION_EXIT = 2


class NotifyVmexit(IntFlag):
    """Arguments of KVM_CAP_X86_NOTIFY_VMEXIT."""

    KVM_X86_NOTIFY_VMEXIT_ENABLED = 1
    KVM_X86_NOTIFY_VMEXIT_USER = 2


class PmuCap(IntFlag):
    """Arguments of KVM_CAP_PMU_CAPABILITY."""

    KVM_PMU_CAP_DISABLE = 1


class PmuEvent(IntEnum):
    """``action`` of struct kvm_pmu_event_filter."""

    KVM_PMU_EVENT_ALLOW = 0
    KVM_PMU_EVENT_DENY = 1


class PmuEventFlag(IntFlag):
    """``flags`` of struct kvm_pmu_event_filter."""

    KVM_PMU_EVENT_FLAG_MASKED_EVENTS = 1
    KVM_PMU_EVENT_FLAGS_VALID_MASK = 1


class PmuMaskedEntry(IntFlag):
    """Fields of a masked event in struct kvm_pmu_event_filter."""

    KVM_PMU_MASKED_ENTRY_EVENT_SELECT = 0xF000000FF
    KVM_PMU_MASKED_ENTRY_UMASK_MASK = 0xFF00000000000000
    KVM_PMU_MASKED_ENTRY_UMASK_MATCH = 0xFF00
    KVM_PMU_MASKED_ENTRY_EXCLUDE = 1 << 55
    KVM_PMU_MASKED_ENTRY_UMASK_MASK_SHIFT = 0x38


class X2apicFlag(IntFlag):
    """Arguments of KVM_CAP_X2APIC_API."""

    KVM_X2APIC_API_USE_32BIT_IDS = 1
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK = 2
    KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST = 4
    KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST = 8


class MsrFilterFlag(IntFlag):
    """``flags`` of a range of struct kvm_msr_filter."""

    KVM_MSR_FILTER_READ = 1
    KVM_MSR_FILTER_WRITE = 2
    KVM_MSR_FILTER_RANGE_VALID_MASK = 3


class MsrFilterDefault(IntEnum):
    """``flags`` of struct kvm_msr_filter."""

    KVM_MSR_FILTER_DEFAULT_ALLOW = 0
    KVM_MSR_FILTER_DEFAULT_DENY = 1
    KVM_MSR_FILTER_VALID_MASK = 1


class MsrFilterLimit(IntEnum):
    """Limits of struct kvm_msr_filter."""

    KVM_MSR_FILTER_MAX_BITMAP_SIZE = 1536
    KVM_MSR_FILTER_MAX_RANGES = 16


class CreateDeviceFlag(IntFlag):
    """``flags`` of struct kvm_create_device."""

    KVM_CREATE_DEVICE_TEST = 1


class DeviceType(IntEnum):
    """``type`` of struct kvm_create_device."""

    KVM_DEV_TYPE_FSL_MPIC_20 = 1
    KVM_DEV_TYPE_FSL_MPIC_42 = 2
    KVM_DEV_TYPE_XICS = 3
    KVM_DEV_TYPE_VFIO = 4
    KVM_DEV_TYPE_ARM_VGIC_V2 = 5
    KVM_DEV_TYPE_FLIC = 6
    KVM_DEV_TYPE_ARM_VGIC_V3 = 7
    KVM_DEV_TYPE_ARM_VGIC_ITS = 8
    KVM_DEV_TYPE_XIVE = 9
    KVM_DEV_TYPE_ARM_PV_TIME = 10
    KVM_DEV_TYPE_RISCV_AIA = 11
    KVM_DEV_TYPE_LOONGARCH_IPI = 12
    KVM_DEV_TYPE_LOONGARCH_EIOINTC = 13
    KVM_DEV_TYPE_LOONGARCH_PCHPIC = 14
    KVM_DEV_TYPE_LOONGARCH_DMSINTC = 15
    KVM_DEV_TYPE_ARM_VGIC_V5 = 16
    KVM_DEV_TYPE_MAX = 17


class VfioGroup(IntEnum):
    """Attribute groups of the VFIO device."""

    KVM_DEV_VFIO_FILE = 1
    KVM_DEV_VFIO_GROUP = 1


class VfioAttr(IntEnum):
    """Attributes of the VFIO device."""

    KVM_DEV_VFIO_FILE_ADD = 1
    KVM_DEV_VFIO_FILE_DEL = 2
    KVM_DEV_VFIO_GROUP_ADD = 1
    KVM_DEV_VFIO_GROUP_DEL = 2
    KVM_DEV_VFIO_GROUP_SET_SPAPR_TCE = 3


class SystemGroup(IntEnum):
    """Attribute groups of /dev/kvm (KVM_CAP_SYS_ATTRIBUTES)."""

    KVM_X86_GRP_SYSTEM = 0
    KVM_X86_GRP_SEV = 1


class SystemAttr(IntEnum):
    """Attributes of KVM_X86_GRP_SYSTEM."""

    KVM_X86_XCOMP_GUEST_SUPP = 0


class SevAttr(IntEnum):
    """Attributes of KVM_X86_GRP_SEV."""

    KVM_X86_SEV_VMSA_FEATURES = 0
    KVM_X86_SNP_POLICY_BITS = 1
    KVM_X86_SEV_SNP_REQ_CERTS = 2


class VcpuGroup(IntEnum):
    """Attribute groups of a vCPU."""

    KVM_VCPU_TSC_CTRL = 0


class VcpuTscAttr(IntEnum):
    """Attributes of KVM_VCPU_TSC_CTRL."""

    KVM_VCPU_TSC_OFFSET = 0


class StatsField(IntEnum):
    """Position of the parts of ``flags`` of struct kvm_stats_desc."""

    KVM_STATS_TYPE_SHIFT = 0
    KVM_STATS_TYPE_MASK = 0xF
    KVM_STATS_UNIT_SHIFT = 4
    KVM_STATS_UNIT_MASK = 0xF0
    KVM_STATS_BASE_SHIFT = 8
    KVM_STATS_BASE_MASK = 0xF00


class StatsType(IntEnum):
    """Type of a statistic."""

    KVM_STATS_TYPE_CUMULATIVE = 0
    KVM_STATS_TYPE_INSTANT = 1
    KVM_STATS_TYPE_PEAK = 2
    KVM_STATS_TYPE_LINEAR_HIST = 3
    KVM_STATS_TYPE_LOG_HIST = 4
    KVM_STATS_TYPE_MAX = 4


class StatsUnit(IntEnum):
    """Unit of a statistic."""

    KVM_STATS_UNIT_NONE = 0
    KVM_STATS_UNIT_BYTES = 0x10
    KVM_STATS_UNIT_SECONDS = 0x20
    KVM_STATS_UNIT_CYCLES = 0x30
    KVM_STATS_UNIT_BOOLEAN = 0x40
    KVM_STATS_UNIT_MAX = 0x40


class StatsBase(IntEnum):
    """Base of the exponent of a statistic."""

    KVM_STATS_BASE_POW10 = 0
    KVM_STATS_BASE_POW2 = 0x100
    KVM_STATS_BASE_MAX = 0x100


class S390Keyop(IntEnum):
    """``operation`` of KVM_S390_KEYOP."""

    KVM_S390_KEYOP_ISKE = 1
    KVM_S390_KEYOP_RRBE = 2
    KVM_S390_KEYOP_SSKE = 3


class S390(IntEnum):
    """Further arguments of s390 ioctls."""

    KVM_S390_GET_SKEYS_NONE = 1
    KVM_S390_SKEYS_MAX = 0x100000
    KVM_S390_SIE_PAGE_OFFSET = 1
    KVM_S390_STORE_STATUS_NOADDR = 0xFFFFFFFFFFFFFFFF
    KVM_S390_STORE_STATUS_PREFIXED = 0xFFFFFFFFFFFFFFFE


class PpcMmu(IntEnum):
    """``mmu_type`` of the PowerPC software TLB."""

    KVM_MMU_FSL_BOOKE_NOHV = 0
    KVM_MMU_FSL_BOOKE_HV = 1
