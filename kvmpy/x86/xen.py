# SPDX-License-Identifier: Apache-2.0
"""Numbers and layouts of Xen's interface to guests (Xen: xen/include/public).

The guest's header ``kvmpy/xen_numbers.h`` is written from here (:mod:`kvmpy.gen`).
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

CPUID_SIGNATURE = b"XenVMMXenVMM"
"""EBX, ECX and EDX of the first CPUID leaf."""


class XenCall(IntEnum):
    """Numbers of hypercalls that KVM can answer itself, and of the operations in them."""

    XEN_HYPERCALL_SET_TIMER_OP = 15
    XEN_HYPERCALL_VCPU_OP = 24
    XEN_HYPERCALL_SCHED_OP = 29
    XEN_HYPERCALL_EVENT_CHANNEL_OP = 32
    XEN_SCHEDOP_YIELD = 0
    XEN_SCHEDOP_BLOCK = 1
    XEN_SCHEDOP_POLL = 3
    XEN_EVTCHNOP_SEND = 4
    XEN_VCPUOP_SET_SINGLESHOT_TIMER = 8
    XEN_VCPUOP_STOP_SINGLESHOT_TIMER = 9


class XenTimer(IntFlag):
    """Flags of VCPUOP_set_singleshot_timer."""

    XEN_VCPU_SSHOTTMR_FUTURE = 1 << 0


class XenEvtchnType(IntEnum):
    """Kinds of event channels."""

    XEN_EVTCHNSTAT_INTERDOMAIN = 2
    XEN_EVTCHNSTAT_VIRQ = 4
    XEN_EVTCHNSTAT_IPI = 5


class XenRunState(IntEnum):
    """States of a vCPU."""

    XEN_RUNSTATE_RUNNING = 0
    XEN_RUNSTATE_RUNNABLE = 1
    XEN_RUNSTATE_BLOCKED = 2
    XEN_RUNSTATE_OFFLINE = 3


class XenLayout(IntEnum):
    """Offsets in bytes: of the shared info page in 64-bit (and COMPAT: 32-bit) layout, of a vcpu_info."""

    XEN_SHINFO_VCPU_INFO_SIZE = 64
    XEN_SHINFO_EVTCHN_PENDING = 2048
    XEN_SHINFO_EVTCHN_MASK = 2560
    XEN_SHINFO_WALLCLOCK = 3072
    XEN_COMPAT_EVTCHN_PENDING = 2048
    XEN_COMPAT_EVTCHN_MASK = 2176
    XEN_COMPAT_WALLCLOCK = 2304
    XEN_VCPU_UPCALL_PENDING = 0
    XEN_VCPU_UPCALL_MASK = 1
    XEN_VCPU_PENDING_SEL = 8
    XEN_VCPU_TIME = 32
    XEN_COMPAT_VCPU_PENDING_SEL = 4


XEN_RUNSTATE_UPDATE = 1 << 63
"""Bit of state_entry_time: KVM is writing the area."""
