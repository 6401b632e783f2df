# SPDX-License-Identifier: Apache-2.0
"""Record a VM that exists: what made it is told first, from the state that KVM and kvmpy know."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvmpy.core.errors import KvmError
from kvmpy.core.gmem import GuestMemfd
from kvmpy.core.vcpu_state import VcpuState
from kvmpy.uapi import ioctls
from kvmpy.uapi.constants import KVM_CAP_SPLIT_IRQCHIP
from kvmpy.uapi.structs import (
    Struct,
    kvm_create_guest_memfd,
    kvm_enable_cap,
    kvm_irqchip,
    kvm_lapic_state,
    kvm_msrs,
    kvm_run,
    kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
)

if TYPE_CHECKING:
    from kvmpy.core.slots import MemorySlot
    from kvmpy.core.vcpu import Vcpu
    from kvmpy.core.vm import Vm
    from kvmpy.debug.record.recorder import Recorder

_MMAP = 1  # GUEST_MEMFD_FLAG_MMAP
_PINS = 24


@contextmanager
def record(vm: Vm, path: str | os.PathLike[str]) -> Iterator[Recorder]:
    """Record this process's KVM objects into *path* for the length of a with block, *vm* from its making on.

    What KVM cannot be asked about is missing: enabled capabilities, interrupt routes, eventfds, filters.
    """
    from kvmpy.debug.record.recorder import Recorder

    with Recorder(path) as recorder:
        with recorder.introducing():
            _introduce(recorder, vm)
        yield recorder


def _introduce(recorder: Recorder, vm: Vm) -> None:
    recorder.fd_opened(vm.kvm)
    recorder.tell(vm.kvm, ioctls.KVM_CREATE_VM, vm.vm_type, vm.fd)
    recorder.fd_opened(vm)
    if vm.ioctl_raw(ioctls.KVM_GET_IRQCHIP, kvm_irqchip())[1] == 0:
        recorder.tell(vm, ioctls.KVM_CREATE_IRQCHIP, None)
    elif vm.vcpus and vm.vcpus[0].ioctl_raw(ioctls.KVM_GET_LAPIC, kvm_lapic_state())[1] == 0:
        split = kvm_enable_cap(cap=KVM_CAP_SPLIT_IRQCHIP, args=[_PINS])
        recorder.tell(vm, ioctls.KVM_ENABLE_CAP, split)
    told: set[GuestMemfd] = set()
    for slot in vm.slots.values():
        _slot(recorder, vm, slot, told)
    for vcpu in vm.vcpus:
        recorder.tell(vm, ioctls.KVM_CREATE_VCPU, vcpu.vcpu_id, vcpu.fd)
        recorder.fd_opened(vcpu)
        try:
            state = vcpu.save()
        except (KvmError, RuntimeError) as error:
            recorder.note(missing=f"the state of {vcpu.name}: {str(error).splitlines()[0]}")
            continue
        _Teller(vcpu, recorder).restore(state)


def _slot(recorder: Recorder, vm: Vm, slot: MemorySlot, told: set[GuestMemfd]) -> None:
    gmem = slot.gmem
    if gmem is None:
        arg: Struct = kvm_userspace_memory_region(
            slot=slot.slot,
            flags=slot.flags,
            guest_phys_addr=slot.gpa,
            memory_size=slot.size,
            userspace_addr=slot.hva,
        )
        recorder.tell(vm, ioctls.KVM_SET_USER_MEMORY_REGION, arg)
        return
    if gmem not in told:
        told.add(gmem)
        made = kvm_create_guest_memfd(size=gmem.size, flags=gmem.flags)
        recorder.tell(vm, ioctls.KVM_CREATE_GUEST_MEMFD, made, gmem.fd)
        recorder.fd_opened(gmem)
        if gmem.flags & _MMAP:
            recorder.mapped(gmem, slot.mapping.hva, slot.mapping.size, slot.mapping.offset)
    arg = kvm_userspace_memory_region2(
        slot=slot.slot,
        flags=slot.flags,
        guest_phys_addr=slot.gpa,
        memory_size=slot.size,
        userspace_addr=slot.hva,
        guest_memfd_offset=slot.gmem_offset,
        guest_memfd=gmem.fd,
    )
    recorder.tell(vm, ioctls.KVM_SET_USER_MEMORY_REGION2, arg)


class _Teller(VcpuState):
    """Takes a vCPU's state as restore() gives it and tells the recorder, in place of KVM."""

    def __init__(self, vcpu: Vcpu, recorder: Recorder) -> None:
        # No descriptor of its own: what is asked goes to the vCPU, what is set to the recorder.
        self._vcpu = vcpu
        self._recorder = recorder
        self._fd = vcpu.fd
        self.name = vcpu.name
        self.vm = vcpu.vm

    @property
    def run_area(self) -> kvm_run:
        """The vCPU's own: what is written there is in it already."""
        return self._vcpu.run_area

    def ioctl_raw(self, op: ioctls.Ioctl, arg: Struct | int | None = None) -> tuple[int, int]:
        """Issue what asks, tell what sets."""
        if "_SET_" not in op.name:
            return self._vcpu.ioctl_raw(op, arg)
        if isinstance(arg, kvm_msrs):
            # One by one: KVM may refuse some, and would not look at those behind.
            for entry in arg.entries_list():
                self._recorder.tell(self._vcpu, op, kvm_msrs.of([entry]), 1)
            return len(arg), 0
        self._recorder.tell(self._vcpu, op, arg)
        return 0, 0
