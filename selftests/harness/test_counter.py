# SPDX-License-Identifier: Apache-2.0
"""The test that the README explains: twenty lines that run under every protection."""

from __future__ import annotations

from kvmpy import MakeVm

GUEST = """
#include <kvmpy/guest.h>

u64 counter GUEST_SHARED;

void guest_main(void)
{
	while (counter < 3)
		GUEST_SYNC(counter++);
	GUEST_DONE();
}
"""


def test_counter(make_vm: MakeVm) -> None:
    """A guest's SYNC ucalls reach the host in order with their arguments, and its shared globals by name."""
    vm = make_vm.start(GUEST, vcpus=1)
    assert [call.args[0] for call in vm.vcpus[0].syncs()] == [0, 1, 2]
    assert vm.symbol("counter").u64 == 3


ENTRIES = """
#include <kvmpy/guest.h>

u64 sums[2] GUEST_SHARED;

void add(u64 a, u64 b)
{
	sums[guest_cpu_index()] = a + b;
}
"""


def test_started_and_run(make_vm: MakeVm) -> None:
    """start() launches with every vCPU in a function, with its arguments; run() ends when all are done."""
    vm = make_vm.start(ENTRIES, "add", 3, 4, vcpus=2)
    assert list(vm.symbol("sums").view("Q")) == [0, 0]
    vm.run_all()
    assert list(vm.symbol("sums").view("Q")) == [7, 7]
    for vcpus in (1, 2):
        vm = make_vm.run(ENTRIES, "add", 5, 6, vcpus=vcpus)
        assert list(vm.symbol("sums").view("Q")) == [11] * vcpus + [0] * (2 - vcpus)
