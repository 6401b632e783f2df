# SPDX-License-Identifier: Apache-2.0
"""Numbers of Hyper-V's interface to guests (Hypervisor Top-Level Functional Specification; Linux: hvgdk).

MSRs are in :mod:`kvmpy.x86.msr_numbers`, feature bits in :mod:`kvmpy.x86.cpuid_features`.  The guest's header
``kvmpy/hyperv_numbers.h`` is written from here (:mod:`kvmpy.gen`).
"""

from __future__ import annotations

from enum import IntEnum, IntFlag


class HvLeaf(IntEnum):
    """CPUID leaves; the signature of the interface is :data:`SIGNATURE`."""

    HYPERV_CPUID_VENDOR_AND_MAX_FUNCTIONS = 0x4000_0000
    HYPERV_CPUID_INTERFACE = 0x4000_0001
    HYPERV_CPUID_VERSION = 0x4000_0002
    HYPERV_CPUID_FEATURES = 0x4000_0003
    HYPERV_CPUID_ENLIGHTMENT_INFO = 0x4000_0004
    HYPERV_CPUID_IMPLEMENT_LIMITS = 0x4000_0005
    HYPERV_CPUID_NESTED_FEATURES = 0x4000_000A
    HYPERV_CPUID_SYNDBG_VENDOR_AND_MAX_FUNCTIONS = 0x4000_0080
    HYPERV_CPUID_SYNDBG_INTERFACE = 0x4000_0081
    HYPERV_CPUID_SYNDBG_PLATFORM_CAPABILITIES = 0x4000_0082


SIGNATURE = 0x3123_7648
"""EAX of the leaf HYPERV_CPUID_INTERFACE: "Hv#1"."""


class HvCall(IntEnum):
    """Codes of hypercalls, the low 16 bits of the control word."""

    HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE = 0x2
    HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST = 0x3
    HVCALL_NOTIFY_LONG_SPIN_WAIT = 0x8
    HVCALL_SEND_IPI = 0xB
    HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX = 0x13
    HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX = 0x14
    HVCALL_SEND_IPI_EX = 0x15
    HVCALL_POST_MESSAGE = 0x5C
    HVCALL_SIGNAL_EVENT = 0x5D
    HVCALL_POST_DEBUG_DATA = 0x69
    HVCALL_RETRIEVE_DEBUG_DATA = 0x6A
    HVCALL_RESET_DEBUG_SESSION = 0x6B
    HV_EXT_CALL_QUERY_CAPABILITIES = 0x8001
    HV_EXT_CALL_GET_BOOT_ZEROED_MEMORY = 0x8002


class HvStatus(IntEnum):
    """Results of hypercalls, the low 16 bits."""

    HV_STATUS_SUCCESS = 0
    HV_STATUS_INVALID_HYPERCALL_CODE = 2
    HV_STATUS_INVALID_HYPERCALL_INPUT = 3
    HV_STATUS_INVALID_ALIGNMENT = 4
    HV_STATUS_INVALID_PARAMETER = 5
    HV_STATUS_ACCESS_DENIED = 6
    HV_STATUS_OPERATION_DENIED = 8
    HV_STATUS_INVALID_PORT_ID = 0x11
    HV_STATUS_INVALID_CONNECTION_ID = 0x12
    HV_STATUS_INSUFFICIENT_BUFFERS = 0x13


class HvControl(IntEnum):
    """Parts of the control word: a bit, and where the fields begin."""

    HV_HYPERCALL_FAST_BIT = 1 << 16
    HV_HYPERCALL_VARHEAD_OFFSET = 17
    HV_HYPERCALL_REP_COMP_OFFSET = 32
    HV_HYPERCALL_REP_START_OFFSET = 48


class HvFlush(IntFlag):
    """Flags of the calls that flush the TLB."""

    HV_FLUSH_ALL_PROCESSORS = 1 << 0
    HV_FLUSH_ALL_VIRTUAL_ADDRESS_SPACES = 1 << 1
    HV_FLUSH_NON_GLOBAL_MAPPINGS_ONLY = 1 << 2
    HV_FLUSH_USE_EXTENDED_RANGE_FORMAT = 1 << 3


class HvVpSet(IntEnum):
    """Formats of a set of virtual processors."""

    HV_GENERIC_SET_SPARSE_4K = 0
    HV_GENERIC_SET_ALL = 1


class HvSint(IntFlag):
    """Bits of a synthetic interrupt source; the vector is in bits 7:0."""

    HV_SYNIC_SINT_MASKED = 1 << 16
    HV_SYNIC_SINT_AUTO_EOI = 1 << 17
    HV_SYNIC_SINT_POLLING = 1 << 18


class HvStimer(IntFlag):
    """Bits of a timer's configuration; the vector is in bits 11:4, the interrupt source in 19:16."""

    HV_STIMER_ENABLE = 1 << 0
    HV_STIMER_PERIODIC = 1 << 1
    HV_STIMER_LAZY = 1 << 2
    HV_STIMER_AUTOENABLE = 1 << 3
    HV_STIMER_DIRECT = 1 << 12


class HvMessage(IntEnum):
    """Types of messages, and the size of a slot in the message page in bytes."""

    HVMSG_NONE = 0
    HVMSG_TIMER_EXPIRED = 0x8000_0010
    HV_MESSAGE_SIZE = 256


class HvBits(IntFlag):
    """Bits of other MSRs."""

    HV_CRASH_CTL_CRASH_NOTIFY_MSG = 1 << 62
    HV_CRASH_CTL_CRASH_NOTIFY = 1 << 63
    HV_EXPOSE_INVARIANT_TSC = 1 << 0
    HV_SYNDBG_OPTION_USE_HCALLS = 1 << 2


def control(code: int, *, fast: bool = False, variable: int = 0, reps: int = 0, start: int = 0) -> int:
    """Return a hypercall's control word.

    *variable*: 8-byte words of a variable header, *reps*: elements of the list, *start*: the first of them to
    be done.
    """
    word = int(code) | variable << HvControl.HV_HYPERCALL_VARHEAD_OFFSET
    word |= HvControl.HV_HYPERCALL_FAST_BIT if fast else 0
    word |= reps << HvControl.HV_HYPERCALL_REP_COMP_OFFSET
    return word | start << HvControl.HV_HYPERCALL_REP_START_OFFSET
