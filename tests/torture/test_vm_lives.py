# SPDX-License-Identifier: Apache-2.0
"""VMs that are stopped and closed at any moment, whatever their threads do, and what their lives leave."""

from __future__ import annotations

import collections
import gc
import os
import threading
from pathlib import Path

import pytest

from kvmpy import record
from kvmpy.coco.kvm import Kvm
from kvmpy.core.errors import ClosedError, VcpuBusyError
from kvmpy.guest.program import GuestProgram
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
    closed = refused = left = 0

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
            left += thread.is_alive()
        for vcpu in vm.vcpus:
            for call in (vcpu.kick, vcpu.next, vcpu.run_once):
                with pytest.raises(ClosedError):
                    call()
    other = {name: count for name, count in ends.items() if name not in EXPECTED}
    torture.figure("VMs closed under their threads", closed)
    torture.figure("closings refused in mid-run", refused)
    torture.figure("threads left", left)
    torture.figure("other errors", sum(other.values()))
    assert (left, other) == (0, {})


def rss_kib() -> int:
    """Return what this process holds of physical memory."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 10


@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recorded"])
def test_lives_of_vms_leave_nothing(kvm: Kvm, torture: Torture, tmp_path: Path, recorded: bool) -> None:
    """VM after VM is made, run and closed, each with a record of its own or without: nothing adds up."""
    program = GuestProgram.from_c(SYNCS)

    def live() -> None:
        with kvm.create_vm(program, vcpus=torture.random.randint(1, 2), protection="none") as vm:
            vm.launch()
            if not recorded:
                vm.vcpus[0].sync()
                return
            with record(vm, tmp_path / "a.rec"):
                vm.vcpus[0].sync()

    for _ in range(20):  # what is loaded and cached once
        live()
    before, descriptors, lives = rss_kib(), len(os.listdir("/proc/self/fd")), 0
    for _ in torture.rounds(least=60):
        live()
        lives += 1
    grown = (rss_kib() - before) / lives
    leaked = len(os.listdir("/proc/self/fd")) - descriptors
    torture.figure("lives", lives)
    torture.figure("descriptors leaked", leaked)
    torture.figure("RSS for 1,000 VMs", grown * 1000, "KiB")
    assert leaked == 0
    # A recorder that stays is 115 KiB, a vCPU's run area 12.
    assert grown < 10, f"{grown:.1f} KiB for each of {lives} VMs"
