# SPDX-License-Identifier: Apache-2.0
"""Interfaces of other hypervisors that KVM offers to guests: Hyper-V's and Xen's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.core.eventfd import EventFd, fd_number
from kvmpy.core.topic import Topic
from kvmpy.uapi import ioctls
from kvmpy.uapi.constants import KVM_HYPERV_EVENTFD_DEASSIGN
from kvmpy.uapi.structs import (
    kvm_hyperv_eventfd,
    kvm_irq_routing_xen_evtchn,
    kvm_xen_hvm_attr,
    kvm_xen_hvm_config,
    kvm_xen_vcpu_attr,
)

if TYPE_CHECKING:
    from kvmpy.core.vcpu_state import VcpuState
    from kvmpy.core.vm import Vm

_TWO_LEVEL = 0xFFFF_FFFF


class VmHyperv(Topic):
    """Hyper-V's interface."""

    _owner: Vm

    def eventfd(self, fd: EventFd | int, conn_id: int, *, deassign: bool = False, flags: int = 0) -> None:
        """Signal the eventfd at each HvSignalEvent for a connection (KVM_HYPERV_EVENTFD).

        *conn_id* has 24 bits. *deassign* takes the connection back, whatever *fd* is. EEXIST: it has an
        eventfd already; ENOENT: it has none to take back.
        """
        flags |= KVM_HYPERV_EVENTFD_DEASSIGN if deassign else 0
        arg = kvm_hyperv_eventfd(conn_id=conn_id, fd=fd_number(fd), flags=flags)
        self._owner.ioctl(ioctls.KVM_HYPERV_EVENTFD, arg)


class VmXen(Topic):
    """Xen's interface."""

    _owner: Vm

    def config(self, flags: int, msr: int = 0, *, blob: tuple[int, int, int, int] | None = None) -> None:
        """Set the hypercall page's MSR and what KVM does for Xen guests; flags 0 and MSR 0: nothing.

        *blob*: host address and number of pages of user space's own hypercall pages, for 32-bit and then for
        64-bit guests (KVM_XEN_HVM_CONFIG, api.rst section 4.28).
        """
        arg = kvm_xen_hvm_config(flags=flags, msr=msr)
        if blob is not None:
            arg.blob_addr_32, arg.blob_size_32, arg.blob_addr_64, arg.blob_size_64 = blob
        self._owner.ioctl(ioctls.KVM_XEN_HVM_CONFIG, arg)

    def get_attr(self, kind: int) -> kvm_xen_hvm_attr:
        """Return an attribute of the VM, a KVM_XEN_ATTR_TYPE (KVM_XEN_HVM_GET_ATTR)."""
        arg = kvm_xen_hvm_attr(type=kind)
        self._owner.ioctl(ioctls.KVM_XEN_HVM_GET_ATTR, arg)
        return arg

    def set_attr(self, attr: kvm_xen_hvm_attr) -> None:
        """Set the attribute of the VM that ``attr.type`` names (KVM_XEN_HVM_SET_ATTR)."""
        self._owner.ioctl(ioctls.KVM_XEN_HVM_SET_ATTR, attr)

    def evtchn_send(self, port: int, vcpu: int, priority: int = _TWO_LEVEL) -> None:
        """Deliver an event to *port* of the vCPU with id *vcpu*, masked or not (KVM_XEN_HVM_EVTCHN_SEND).

        EINVAL for a port that the guest's layout lacks, and for a *priority* other than that of 2-level event
        channels.
        """
        arg = kvm_irq_routing_xen_evtchn(port=port, vcpu=vcpu, priority=priority)
        self._owner.ioctl(ioctls.KVM_XEN_HVM_EVTCHN_SEND, arg)


class VcpuXen(Topic):
    """Xen's interface of one vCPU."""

    _owner: VcpuState

    def get_attr(self, kind: int) -> kvm_xen_vcpu_attr:
        """Return an attribute of the vCPU, a KVM_XEN_VCPU_ATTR_TYPE (KVM_XEN_VCPU_GET_ATTR)."""
        arg = kvm_xen_vcpu_attr(type=kind)
        self._owner.ioctl(ioctls.KVM_XEN_VCPU_GET_ATTR, arg)
        return arg

    def set_attr(self, attr: kvm_xen_vcpu_attr) -> None:
        """Set the attribute of the vCPU that ``attr.type`` names (KVM_XEN_VCPU_SET_ATTR)."""
        self._owner.ioctl(ioctls.KVM_XEN_VCPU_SET_ATTR, attr)
