# SPDX-License-Identifier: Apache-2.0
"""vCPUs: states, events, debugging, CPUID, extended and nested state."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class MpState(IntEnum):
    """``mp_state`` of struct kvm_mp_state."""

    KVM_MP_STATE_RUNNABLE = 0
    KVM_MP_STATE_UNINITIALIZED = 1
    KVM_MP_STATE_INIT_RECEIVED = 2
    KVM_MP_STATE_HALTED = 3
    KVM_MP_STATE_SIPI_RECEIVED = 4
    KVM_MP_STATE_STOPPED = 5
    KVM_MP_STATE_CHECK_STOP = 6
    KVM_MP_STATE_OPERATING = 7
    KVM_MP_STATE_LOAD = 8
    KVM_MP_STATE_AP_RESET_HOLD = 9
    KVM_MP_STATE_SUSPENDED = 10


class GuestDebug(IntFlag):
    """``control`` of struct kvm_guest_debug."""

    KVM_GUESTDBG_USE_SW_BP = 1 << 16
    KVM_GUESTDBG_USE_HW_BP = 1 << 17
    KVM_GUESTDBG_INJECT_DB = 1 << 18
    KVM_GUESTDBG_INJECT_BP = 1 << 19
    KVM_GUESTDBG_BLOCKIRQ = 1 << 20
    KVM_GUESTDBG_ENABLE = 1
    KVM_GUESTDBG_SINGLESTEP = 2


class VcpuEventFlag(IntFlag):
    """``flags`` of struct kvm_vcpu_events."""

    KVM_VCPUEVENT_VALID_NMI_PENDING = 1
    KVM_VCPUEVENT_VALID_SIPI_VECTOR = 2
    KVM_VCPUEVENT_VALID_SHADOW = 4
    KVM_VCPUEVENT_VALID_SMM = 8
    KVM_VCPUEVENT_VALID_PAYLOAD = 1 << 4
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT = 1 << 5


class ShadowInt(IntFlag):
    """``interrupt.shadow`` of struct kvm_vcpu_events."""

    KVM_X86_SHADOW_INT_MOV_SS = 1
    KVM_X86_SHADOW_INT_STI = 2


class X86Vector(IntEnum):
    """Exception vectors."""

    DE_VECTOR = 0
    DB_VECTOR = 1
    BP_VECTOR = 3
    OF_VECTOR = 4
    BR_VECTOR = 5
    UD_VECTOR = 6
    NM_VECTOR = 7
    DF_VECTOR = 8
    TS_VECTOR = 10
    NP_VECTOR = 11
    SS_VECTOR = 12
    GP_VECTOR = 13
    PF_VECTOR = 14
    MF_VECTOR = 16
    AC_VECTOR = 17
    MC_VECTOR = 18
    XM_VECTOR = 19
    VE_VECTOR = 20
    CP_VECTOR = 21
    HV_VECTOR = 28
    VC_VECTOR = 29
    SX_VECTOR = 30


class CpuidFlag(IntFlag):
    """``flags`` of struct kvm_cpuid_entry2."""

    KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1
    KVM_CPUID_FLAG_STATEFUL_FUNC = 2
    KVM_CPUID_FLAG_STATE_READ_NEXT = 4


class Sregs2Flag(IntFlag):
    """``flags`` of struct kvm_sregs2."""

    KVM_SREGS2_FLAGS_PDPTRS_VALID = 1


class VcpuLimit(IntEnum):
    """Sizes of vCPU structs."""

    KVM_MAX_XCRS = 16


class NestedFormat(IntEnum):
    """``format`` of struct kvm_nested_state."""

    KVM_STATE_NESTED_FORMAT_VMX = 0
    KVM_STATE_NESTED_FORMAT_SVM = 1


class NestedSize(IntEnum):
    """Sizes of the control blocks in struct kvm_nested_state."""

    KVM_STATE_NESTED_VMX_VMCS_SIZE = 0x1000
    KVM_STATE_NESTED_SVM_VMCB_SIZE = 0x1000


class NestedSmmFlag(IntFlag):
    """``hdr.vmx.smm.flags`` of struct kvm_nested_state."""

    KVM_STATE_NESTED_SMM_GUEST_MODE = 1
    KVM_STATE_NESTED_SMM_VMXON = 2


class NestedFlag(IntFlag):
    """``flags`` of struct kvm_nested_state."""

    KVM_STATE_NESTED_GUEST_MODE = 1
    KVM_STATE_NESTED_RUN_PENDING = 2
    KVM_STATE_NESTED_EVMCS = 4
    KVM_STATE_NESTED_MTF_PENDING = 8
    KVM_STATE_NESTED_GIF_SET = 1 << 8


class NestedVmxFlag(IntFlag):
    """``hdr.vmx.flags`` of struct kvm_nested_state."""

    KVM_STATE_VMX_PREEMPTION_TIMER_DEADLINE = 1


class KvmReg(IntEnum):
    """Index of a register of type KVM_X86_REG_TYPE_KVM."""

    KVM_REG_GUEST_SSP = 0


class OneRegType(IntEnum):
    """Type of an x86 register id."""

    KVM_X86_REG_TYPE_MSR = 2
    KVM_X86_REG_TYPE_KVM = 3


class OneRegSize(IntEnum):
    """Size of a register in its id."""

    KVM_REG_SIZE_SHIFT = 0x34
    KVM_REG_SIZE_MASK = 0xF0000000000000
    KVM_REG_SIZE_U8 = 0
    KVM_REG_SIZE_U16 = 0x10000000000000
    KVM_REG_SIZE_U32 = 0x20000000000000
    KVM_REG_SIZE_U64 = 0x30000000000000
    KVM_REG_SIZE_U128 = 0x40000000000000
    KVM_REG_SIZE_U256 = 0x50000000000000
    KVM_REG_SIZE_U512 = 0x60000000000000
    KVM_REG_SIZE_U1024 = 0x70000000000000
    KVM_REG_SIZE_U2048 = 0x80000000000000


class OneRegArch(IntEnum):
    """Architecture of a register in its id (KVM_GET_ONE_REG)."""

    KVM_REG_ARCH_MASK = 0xFF00000000000000
    KVM_REG_GENERIC = 0
    KVM_REG_PPC = 0x1000000000000000
    KVM_REG_X86 = 0x2000000000000000
    KVM_REG_IA64 = 0x3000000000000000
    KVM_REG_ARM = 0x4000000000000000
    KVM_REG_S390 = 0x5000000000000000
    KVM_REG_ARM64 = 0x6000000000000000
    KVM_REG_MIPS = 0x7000000000000000
    KVM_REG_RISCV = 0x8000000000000000
    KVM_REG_LOONGARCH = 0x9000000000000000
