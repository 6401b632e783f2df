# SPDX-License-Identifier: Apache-2.0
"""A VM: the VM ioctls, gathered from their topics."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvmpy.core.coalesced import VmCoalesced
from kvmpy.core.device import VmDevices
from kvmpy.core.dirty import VmDirty
from kvmpy.core.errors import VcpuBusyError
from kvmpy.core.irq import VmIrq
from kvmpy.core.msr_filter import VmMsrFilter
from kvmpy.core.sev import VmSev
from kvmpy.core.slots import VmSlots
from kvmpy.core.stats import HasStats
from kvmpy.core.vcpu import Vcpu
from kvmpy.uapi import ioctls
from kvmpy.uapi.structs import kvm_clock_data

if TYPE_CHECKING:
    from kvmpy.core.kvm import Kvm

_numbers = itertools.count()


class Vm(VmSev, VmDirty, VmIrq, VmCoalesced, VmMsrFilter, VmDevices, HasStats, VmSlots):
    """A virtual machine; closing it closes its vCPUs, guest_memfds and memory."""

    def __init__(self, kvm: Kvm, fd: int, vm_type: int = 0) -> None:
        super().__init__(fd, f"vm{next(_numbers)}")
        self.kvm = kvm
        self.vm_type = int(vm_type)
        self._vcpus: list[Vcpu] = []

    @property
    def vcpus(self) -> Sequence[Vcpu]:
        """The vCPUs in the order of their creation."""
        return self._vcpus

    def create_vcpu(self, vcpu_id: int | None = None) -> Vcpu:
        """Create a vCPU with *vcpu_id*, by default the number of vCPUs so far (KVM_CREATE_VCPU)."""
        number = len(self._vcpus) if vcpu_id is None else vcpu_id
        vcpu = self.make_vcpu(self.ioctl(ioctls.KVM_CREATE_VCPU, number), number)
        self._vcpus.append(vcpu)
        return vcpu

    def make_vcpu(self, fd: int, vcpu_id: int) -> Vcpu:
        """Wrap the file descriptor of a new vCPU; subclasses return their own kind."""
        return Vcpu(self, fd, vcpu_id)

    def get_clock(self) -> kvm_clock_data:
        """Return kvmclock's time in ns with its flags (KVM_GET_CLOCK)."""
        arg = kvm_clock_data()
        self.ioctl(ioctls.KVM_GET_CLOCK, arg)
        return arg

    def set_clock(self, data: kvm_clock_data) -> None:
        """Set kvmclock's time (KVM_SET_CLOCK)."""
        self.ioctl(ioctls.KVM_SET_CLOCK, data)

    def set_nr_mmu_pages(self, pages: int) -> None:
        """Limit the pages of the shadow MMU (KVM_SET_NR_MMU_PAGES)."""
        self.ioctl(ioctls.KVM_SET_NR_MMU_PAGES, pages)

    def set_tsc_khz(self, khz: int) -> None:
        """Set the TSC frequency of vCPUs created from now on (KVM_SET_TSC_KHZ on the VM)."""
        self.ioctl(ioctls.KVM_SET_TSC_KHZ, khz)

    def get_tsc_khz(self) -> int:
        """Return the default TSC frequency in kHz (KVM_GET_TSC_KHZ on the VM)."""
        return self.ioctl(ioctls.KVM_GET_TSC_KHZ)

    def stop(self, timeout: float = 5.0) -> None:
        """Stop the vCPUs for good; VcpuBusyError when one still runs in a thread after *timeout* seconds.

        Threads that run them, or are about to, get VcpuKickedError.  Any thread may call it.
        """
        end = time.monotonic() + timeout
        running = [vcpu for vcpu in self._vcpus if vcpu.stop()]
        while running:
            if time.monotonic() > end:
                raise VcpuBusyError(f"{running[0].name} still runs {timeout} s after it was kicked")
            # Whoever runs it needs the interpreter to find out.
            time.sleep(0.001)
            running = [vcpu for vcpu in running if vcpu.stop()]

    def close(self) -> None:
        """Close the vCPUs, the VM and all that belongs to it; VcpuBusyError, with nothing done, while a vCPU
        runs.

        A thread that is between two runs of one gets VcpuKickedError or ClosedError at the next.
        """
        for vcpu in self._vcpus:
            if vcpu.running:
                vcpu.close()  # which says why not
        self.stop()
        for vcpu in self._vcpus:
            vcpu.close()
        super().close()
