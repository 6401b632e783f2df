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
from kvmpy.uapi.constants import KVM_MEMORY_ATTRIBUTE_PRIVATE
from kvmpy.uapi.links import link_of
from kvmpy.uapi.structs import (
    Struct,
    kvm_create_guest_memfd,
    kvm_memory_attributes,
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
_PAGE_SHIFT = 12


@contextmanager
def record(vm: Vm, path: str | os.PathLike[str]) -> Iterator[Recorder]:
    """Record this process's KVM objects to *path* until the with block ends, *vm* from its creation on.

    What KVM cannot be asked about (enabled capabilities, interrupt routes, eventfds, filters) is what was set
    through this VM's objects.  A note says what is missing: private memory that the host does not see, vCPU
    state that cannot be read.
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
    early: list[tuple[ioctls.Ioctl, Struct | int | None]] = []
    late: list[tuple[ioctls.Ioctl, Struct | int | None]] = []
    for call in vm.settings.calls():
        lasting = call[0].lasting
        (late if lasting is not None and lasting.late else early).append(call)
    for op, arg in early:
        recorder.tell(vm, op, arg)
    told: set[GuestMemfd] = set()
    for slot in vm.slots.values():
        _slot(recorder, vm, slot, told)
    _attributes(recorder, vm)
    for vcpu in vm.vcpus:
        recorder.tell(vm, ioctls.KVM_CREATE_VCPU, vcpu.vcpu_id, vcpu.fd)
        recorder.fd_opened(vcpu)
        for op, arg in vcpu.settings.calls():
            recorder.tell(vcpu, op, arg)
        try:
            state = vcpu.save()
        except (KvmError, RuntimeError) as error:
            recorder.note(missing=f"the state of {vcpu.name}: {str(error).splitlines()[0]}")
            continue
        _Teller(vcpu, recorder).restore(state)
    for op, arg in late:
        if not op.fd_fields or _is_eventfd(getattr(arg, "fd", -1)):
            recorder.tell(vm, op, arg)
    if vm.msrs.filter is not None:
        recorder.tell(vm, ioctls.KVM_X86_SET_MSR_FILTER, vm.msrs.filter.argument())


def _attributes(recorder: Recorder, vm: Vm) -> None:
    """Tell which pages are private, a call for each stretch."""
    stretches: list[list[int]] = []
    for gfn in vm.private_attributes:
        if stretches and stretches[-1][1] == gfn:
            stretches[-1][1] = gfn + 1
        else:
            stretches.append([gfn, gfn + 1])
    for first, end in stretches:
        arg = kvm_memory_attributes(
            address=first << _PAGE_SHIFT,
            size=(end - first) << _PAGE_SHIFT,
            attributes=KVM_MEMORY_ATTRIBUTE_PRIVATE,
        )
        recorder.tell(vm, ioctls.KVM_SET_MEMORY_ATTRIBUTES, arg)
    if stretches:
        recorder.note(missing="the content of private memory")


def _is_eventfd(number: int) -> bool:
    # Its owner may have closed it, and KVM keeps using it; the number may be another file's by now.
    try:
        return link_of(os.readlink(f"/proc/self/fd/{number}")).kind == "eventfd"
    except OSError:
        return False


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
        guest_memfd = kvm_create_guest_memfd(size=gmem.size, flags=gmem.flags)
        recorder.tell(vm, ioctls.KVM_CREATE_GUEST_MEMFD, guest_memfd, gmem.fd)
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

    def __del__(self) -> None:
        """Close nothing: the descriptor is the vCPU's."""

    @property
    def run_area(self) -> kvm_run:
        """The vCPU's own: what is written there is in it already."""
        return self._vcpu.run_area

    def ioctl_raw(self, op: ioctls.Ioctl, arg: Struct | int | None = None) -> tuple[int, int]:
        """Issue what asks, tell what sets."""
        if op.asks:
            return self._vcpu.ioctl_raw(op, arg)
        if isinstance(arg, kvm_msrs):
            # One by one: KVM may refuse some, and would not look at those behind.
            for entry in arg.entries_list():
                self._recorder.tell(self._vcpu, op, kvm_msrs.of([entry]), 1)
            return len(arg), 0
        self._recorder.tell(self._vcpu, op, arg)
        return 0, 0
