# SPDX-License-Identifier: Apache-2.0
"""Taking a running guest into a new VM: by value (``move``), or as text that a test changes (``mover``)."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable

import pytest

from kvmpy import PAGE_SIZE, Gpa, GuestProgram, GuestVm, Gva, MakeVm, VcpuSnapshot

HOLE = Gva(0x6000_0000)


class Mover:
    """Makes VMs with one guest program, and moves its run from one to the next."""

    def __init__(self, make_vm: MakeVm) -> None:
        self._make_vm = make_vm

    def start(self, program: str | GuestProgram, *, vcpus: int = 1) -> GuestVm:
        """Make a VM and launch it; behind :data:`HOLE` it has neither memory nor a device."""
        vm = self._make_vm(program, vcpus=vcpus, memory=8 << 20)
        vm.map(HOLE, Gpa(0x2000_0000), 2 * PAGE_SIZE, nx=True, private=False)
        vm.launch()
        return vm

    def move(self, vm: GuestVm, change: Callable[[VcpuSnapshot], VcpuSnapshot] | None = None) -> GuestVm:
        """Save every vCPU of *vm*, close it, and return a new VM in which the guest is at the same point.

        The states travel as JSON inside a pickle, as to another process. *change* may alter them on the way.
        """
        travelling = pickle.dumps([json.dumps(vcpu.save().as_dict()) for vcpu in vm.vcpus])
        copies = []
        for segment in vm.memory.segments():
            copies.append(bytes(segment.shared.view(segment.shared_offset, segment.size)))
            if segment.private is not None and segment.private is not segment.shared:
                copies.append(bytes(segment.private.view(segment.private_offset, segment.size)))
        program, vcpus = vm.program, len(vm.vcpus)
        vm.close()
        new = self.start(program, vcpus=vcpus)
        for segment in new.memory.segments():
            segment.shared.view(segment.shared_offset, segment.size)[:] = copies.pop(0)
            if segment.private is not None and segment.private is not segment.shared:
                segment.private.view(segment.private_offset, segment.size)[:] = copies.pop(0)
        states = [VcpuSnapshot.from_dict(json.loads(text)) for text in pickle.loads(travelling)]  # noqa: S301
        for vcpu, state in zip(new.vcpus, states, strict=True):
            vcpu.restore(state if change is None else change(state))
        return new


@pytest.fixture
def mover(make_vm: MakeVm, open_registers: None, protection: str) -> Mover:
    """Moves guests from VM to VM; skips where the host sees neither registers nor private memory."""
    from kvmpy.coco import ladder

    if not ladder.get(protection).traits.host_sees_private:
        pytest.skip(f"protection {protection} keeps private memory from the host")
    return Mover(make_vm)
