# SPDX-License-Identifier: Apache-2.0
"""Taking a running guest into a new VM: by value (``move``), or as text that a test changes (``mover``)."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable

import pytest

from kvmpy import PAGE_SIZE, Gpa, GuestProgram, GuestVm, Gva, MakeVm, VcpuSnapshot

HOLE = Gva(0x6000_0000)

Move = Callable[[GuestVm], GuestVm]


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


def _copy_memory(source: GuestVm, target: GuestVm) -> None:
    for old, new in zip(source.memory.segments(), target.memory.segments(), strict=True):
        target.memory.shared_view(new.gpa, new.size)[:] = source.memory.shared_view(old.gpa, old.size)
        if new.private is not None and new.private is not new.shared:
            target.memory.private_view(new.gpa, new.size)[:] = source.memory.private_view(old.gpa, old.size)


@pytest.fixture
def move(make_vm: MakeVm) -> Move:
    """Return a function that brings a guest into a new VM, closes the old one, and returns the new one.

    The vCPUs must have stopped. Tests are skipped where the host may not see what it would copy.
    """

    def moved(source: GuestVm) -> GuestVm:
        traits = source.protection.traits
        if not (traits.can_read_registers and traits.host_sees_private):
            pytest.skip("needs a host that reads registers and private memory; this protection hides them")
        target = make_vm(source.program, vcpu_ids=[vcpu.vcpu_id for vcpu in source.vcpus])
        for old, new in zip(source.vcpus, target.vcpus, strict=True):
            new.entry, new.args = old.entry, old.args
        target.launch()
        # What goes over the wire is a value, not an object of this process.
        snapshots = pickle.dumps([vcpu.save() for vcpu in source.vcpus])
        clock = source.clock.get()
        _copy_memory(source, target)
        source.close()
        clock.flags = 0
        target.clock.set(clock)
        for vcpu, snapshot in zip(target.vcpus, pickle.loads(snapshots), strict=True):  # noqa: S301
            vcpu.restore(snapshot)
        return target

    return moved
