# SPDX-License-Identifier: Apache-2.0
"""A VM: the VM ioctls, gathered from their topics."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvmpy.core.address import Gpa
from kvmpy.core.caps import HasCaps
from kvmpy.core.device import DeviceAttrs, Devices
from kvmpy.core.dirty import Dirty
from kvmpy.core.enlightenments import VmHyperv, VmXen
from kvmpy.core.errors import VcpuBusyError
from kvmpy.core.io import Io
from kvmpy.core.irq import Irq, Pit
from kvmpy.core.msr_filter import VmMsrs
from kvmpy.core.sev import VmSev
from kvmpy.core.slots import VmSlots
from kvmpy.core.stats import BinaryStats
from kvmpy.core.topic import Topic, topic
from kvmpy.core.vcpu import Vcpu
from kvmpy.uapi import ffi, ioctls
from kvmpy.uapi.structs import kvm_clock_data

if TYPE_CHECKING:
    from kvmpy.core.kvm import Kvm

_numbers = itertools.count()


class VmClock(Topic):
    """Time: kvmclock, and the TSC frequency of vCPUs to come."""

    _owner: Vm

    def get(self) -> kvm_clock_data:
        """Return kvmclock's time in ns with its flags (KVM_GET_CLOCK)."""
        arg = kvm_clock_data()
        self._owner.ioctl(ioctls.KVM_GET_CLOCK, arg)
        return arg

    def set(self, data: kvm_clock_data) -> None:
        """Set kvmclock's time (KVM_SET_CLOCK)."""
        self._owner.ioctl(ioctls.KVM_SET_CLOCK, data)

    def set_tsc_khz(self, khz: int) -> None:
        """Set the TSC frequency of vCPUs created from now on (KVM_SET_TSC_KHZ on the VM)."""
        self._owner.ioctl(ioctls.KVM_SET_TSC_KHZ, khz)

    def get_tsc_khz(self) -> int:
        """Return the default TSC frequency in kHz (KVM_GET_TSC_KHZ on the VM)."""
        return self._owner.ioctl(ioctls.KVM_GET_TSC_KHZ)


class Setup(Topic):
    """What a VM fixes before its vCPUs run."""

    _owner: Vm

    def set_boot_cpu_id(self, vcpu_id: int) -> None:
        """Say which vCPU is the bootstrap processor; EBUSY once a vCPU exists (KVM_SET_BOOT_CPU_ID)."""
        self._owner.ioctl(ioctls.KVM_SET_BOOT_CPU_ID, vcpu_id)

    def set_tss_addr(self, gpa: Gpa | int) -> None:
        """Give KVM three pages of guest-physical space below 4 GiB for VMX's TSS (KVM_SET_TSS_ADDR)."""
        self._owner.ioctl(ioctls.KVM_SET_TSS_ADDR, int(gpa))

    def set_identity_map_addr(self, gpa: Gpa | int) -> None:
        """Give KVM a page below 4 GiB for an identity map that VMX needs.

        EINVAL once a vCPU exists (KVM_SET_IDENTITY_MAP_ADDR).
        """
        # lifetime: `place` lives until the ioctl is done.
        place = ffi.new("uint64_t *", int(gpa))
        self._owner.ioctl(ioctls.KVM_SET_IDENTITY_MAP_ADDR, int(ffi.cast("uintptr_t", place)))
        del place

    def set_nr_mmu_pages(self, pages: int) -> None:
        """Limit the pages of the shadow MMU (KVM_SET_NR_MMU_PAGES)."""
        self._owner.ioctl(ioctls.KVM_SET_NR_MMU_PAGES, pages)


class Vm(HasCaps, VmSlots):
    """A virtual machine; closing it closes its vCPUs, guest_memfds and memory."""

    irq = topic(Irq)
    pit = topic(Pit)
    io = topic(Io)
    dirty = topic(Dirty)
    clock = topic(VmClock)
    msrs = topic(VmMsrs)
    sev = topic(VmSev)
    devices = topic(Devices)
    attrs = topic(DeviceAttrs)
    stats = topic(BinaryStats)
    setup = topic(Setup)
    hyperv = topic(VmHyperv)
    xen = topic(VmXen)

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
        vcpu = self._make_vcpu(self.ioctl(ioctls.KVM_CREATE_VCPU, number), number)
        self._vcpus.append(vcpu)
        return vcpu

    def _make_vcpu(self, fd: int, vcpu_id: int) -> Vcpu:
        """Wrap the file descriptor of a new vCPU; subclasses return their own kind."""
        return Vcpu(self, fd, vcpu_id)

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
        self.dirty.close()
        self.devices.close()
        super().close()
        self.sev.close()
