# SPDX-License-Identifier: Apache-2.0
"""VMs that are stopped and closed at any moment, whatever their threads do, and what their lives leave."""

from __future__ import annotations

import collections
import threading
from typing import TYPE_CHECKING

import pytest

from kvmpy.core.errors import ClosedError, VcpuBusyError
from kvmpy.guest.program import GuestProgram

if TYPE_CHECKING:
    from kvmpy.coco.kvm import Kvm
    from kvmpy.guest.vcpu import GuestVcpu
    from tests.torture.conftest import Torture

SYNCS = """
#include <kvmpy/guest.h>
void guest_main(void)
{
	for (;;)
		GUEST_SYNC(1);
}
"""
# What a thread may get whose vCPU is taken away.
EXPECTED = {"VcpuKickedError", "ClosedError"}


def test_a_vm_is_stopped_and_closed_under_its_threads(kvm: Kvm, torture: Torture) -> None:
    """Threads run vCPUs from ucall to ucall while the VM is stopped, closed or both at a random moment.

    They end with an error that says so, the VM is closed, and nobody is left behind.
    """
    program = GuestProgram.from_c(SYNCS)
    ends: collections.Counter[str] = collections.Counter()
    closed = refused = 0

    def run(vcpu: GuestVcpu) -> None:
        try:
            for _ in vcpu.syncs(timeout=30):
                pass
        except Exception as error:  # noqa: BLE001 - counted: which they are is the question
            ends[type(error).__name__] += 1

    for _ in torture.rounds(least=3):
        vm = kvm.create_vm(program, vcpus=torture.random.randint(1, 3), protection="none")
        vm.launch()
        threads = [threading.Thread(target=run, args=(vcpu,), daemon=True) for vcpu in vm.vcpus]
        for thread in threads:
            thread.start()
        exits = torture.random.randrange(60)
        while vm.vcpus[0].exits < exits:
            threads[0].join(0.0001)
        if torture.random.random() < 0.6:
            vm.stop()
        while not vm.closed:
            try:
                vm.close()
            except VcpuBusyError:
                refused += 1
                threads[0].join(0.0001)
        closed += 1
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive(), f"{thread} still runs"
        for vcpu in vm.vcpus:
            for call in (vcpu.kick, vcpu.next, vcpu.run_once):
                with pytest.raises(ClosedError):
                    call()
    assert set(ends) <= EXPECTED, dict(ends)
    torture.figure("VMs closed under their threads", closed)
    torture.figure("closings refused in mid-run", refused)
