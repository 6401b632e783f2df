# SPDX-License-Identifier: Apache-2.0
"""Guest writes that end in no exit: eventfds that they signal, and writes that KVM collects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpy.core.address import PAGE_SIZE, Gpa
from kvmpy.core.coalesced import CoalescedRing
from kvmpy.core.eventfd import EventFd, fd_number
from kvmpy.core.topic import Topic
from kvmpy.uapi import ioctls
from kvmpy.uapi.constants import (
    KVM_COALESCED_MMIO_PAGE_OFFSET,
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    KVM_IOEVENTFD_FLAG_DEASSIGN,
    KVM_IOEVENTFD_FLAG_PIO,
)
from kvmpy.uapi.structs import kvm_coalesced_mmio_zone, kvm_hyperv_eventfd, kvm_ioeventfd

if TYPE_CHECKING:
    from kvmpy.core.vcpu import Vcpu
    from kvmpy.core.vm import Vm


class Io(Topic):
    """Guest writes to ports and MMIO that KVM takes without an exit."""

    _owner: Vm

    def ioeventfd(
        self,
        fd: EventFd | int,
        addr: Gpa | int,
        size: int,
        *,
        pio: bool = False,
        datamatch: int | None = None,
        deassign: bool = False,
        flags: int = 0,
    ) -> None:
        """Signal the eventfd when the guest writes to *addr*, without an exit (KVM_IOEVENTFD, api.rst 4.59).

        *size* is that of the access, 1, 2, 4 or 8 bytes; 0 takes any and, for MMIO, the fast path that does
        not decode the instruction. With *datamatch* only that value counts. EEXIST: an equal one is
        registered; ENOENT: nothing to deassign.
        """
        flags |= KVM_IOEVENTFD_FLAG_PIO if pio else 0
        flags |= 0 if datamatch is None else KVM_IOEVENTFD_FLAG_DATAMATCH
        flags |= KVM_IOEVENTFD_FLAG_DEASSIGN if deassign else 0
        arg = kvm_ioeventfd(datamatch=datamatch or 0, addr=int(addr), len=size, fd=fd_number(fd), flags=flags)
        self._owner.ioctl(ioctls.KVM_IOEVENTFD, arg)

    def hyperv_eventfd(self, fd: EventFd | int, conn_id: int, *, flags: int = 0) -> None:
        """Signal the eventfd at the guest's HvCallSignalEvent on a connection (KVM_HYPERV_EVENTFD)."""
        arg = kvm_hyperv_eventfd(conn_id=conn_id, fd=fd_number(fd), flags=flags)
        self._owner.ioctl(ioctls.KVM_HYPERV_EVENTFD, arg)

    def register_coalesced_mmio(self, addr: Gpa | int, size: int, *, pio: bool | int = False) -> None:
        """Collect guest writes to *size* bytes at *addr*, a port with *pio* (KVM_REGISTER_COALESCED_MMIO)."""
        arg = kvm_coalesced_mmio_zone(addr=int(addr), size=size, pio=int(pio))
        self._owner.ioctl(ioctls.KVM_REGISTER_COALESCED_MMIO, arg)

    def unregister_coalesced_mmio(self, addr: Gpa | int, size: int, *, pio: bool | int = False) -> None:
        """Remove every zone that contains the whole range.

        No zone is no error (KVM_UNREGISTER_COALESCED_MMIO).
        """
        arg = kvm_coalesced_mmio_zone(addr=int(addr), size=size, pio=int(pio))
        self._owner.ioctl(ioctls.KVM_UNREGISTER_COALESCED_MMIO, arg)

    def coalesced_ring(self, vcpu: Vcpu) -> CoalescedRing:
        """Map the VM's ring of coalesced writes by *vcpu*, any of the VM.  Release it when done."""
        return CoalescedRing(memoryview(vcpu.mmap(PAGE_SIZE, KVM_COALESCED_MMIO_PAGE_OFFSET * PAGE_SIZE)))
