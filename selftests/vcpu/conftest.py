# SPDX-License-Identifier: Apache-2.0
"""Moving a whole guest, memory and vCPUs, into a new VM in mid-run."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest

from kvmpy.guest.vm import GuestVm
from kvmpy.testing.fixtures import MakeVm

Move = Callable[[GuestVm], GuestVm]


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
        clock = source.get_clock()
        _copy_memory(source, target)
        source.close()
        clock.flags = 0
        target.set_clock(clock)
        for vcpu, snapshot in zip(target.vcpus, pickle.loads(snapshots), strict=True):  # noqa: S301
            vcpu.restore(snapshot)
        return target

    return moved
