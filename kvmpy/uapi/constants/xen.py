# SPDX-License-Identifier: Apache-2.0
"""Xen and Hyper-V emulation."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class XenHvmFlag(IntFlag):
    """``flags`` of struct kvm_xen_hvm_config."""

    KVM_XEN_HVM_CONFIG_HYPERCALL_MSR = 1
    KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL = 2
    KVM_XEN_HVM_CONFIG_SHARED_INFO = 4
    KVM_XEN_HVM_CONFIG_RUNSTATE = 8
    KVM_XEN_HVM_CONFIG_EVTCHN_2LEVEL = 1 << 4
    KVM_XEN_HVM_CONFIG_EVTCHN_SEND = 1 << 5
    KVM_XEN_HVM_CONFIG_RUNSTATE_UPDATE_FLAG = 1 << 6
    KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE = 1 << 7
    KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA = 1 << 8


class XenAttr(IntEnum):
    """``type`` of struct kvm_xen_hvm_attr."""

    KVM_XEN_ATTR_TYPE_LONG_MODE = 0
    KVM_XEN_ATTR_TYPE_SHARED_INFO = 1
    KVM_XEN_ATTR_TYPE_UPCALL_VECTOR = 2
    KVM_XEN_ATTR_TYPE_EVTCHN = 3
    KVM_XEN_ATTR_TYPE_XEN_VERSION = 4
    KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG = 5
    KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA = 6


class XenVcpuAttr(IntEnum):
    """``type`` of struct kvm_xen_vcpu_attr."""

    KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO = 0
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO = 1
    KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR = 2
    KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT = 3
    KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA = 4
    KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST = 5
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID = 6
    KVM_XEN_VCPU_ATTR_TYPE_TIMER = 7
    KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR = 8
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA = 9


class XenEvtchnFlag(IntFlag):
    """``u.evtchn.flags`` of struct kvm_xen_hvm_attr."""

    KVM_XEN_EVTCHN_DEASSIGN = 1
    KVM_XEN_EVTCHN_UPDATE = 2
    KVM_XEN_EVTCHN_RESET = 4


class XenLimit(IntEnum):
    """MSR range and invalid addresses."""

    KVM_XEN_MSR_MIN_INDEX = 0x40000000
    KVM_XEN_MSR_MAX_INDEX = 0x4FFFFFFF
    KVM_XEN_INVALID_GFN = 0xFFFFFFFFFFFFFFFF
    KVM_XEN_INVALID_GPA = 0xFFFFFFFFFFFFFFFF


class HypervEventfd(IntFlag):
    """Parts of struct kvm_hyperv_eventfd."""

    KVM_HYPERV_CONN_ID_MASK = 0xFFFFFF
    KVM_HYPERV_EVENTFD_DEASSIGN = 1
