# SPDX-License-Identifier: Apache-2.0
"""MSR filters that change beside vCPUs that access MSRs all the time."""

from __future__ import annotations

import time

import pytest

from kvmpy import GuestVm, MakeVm, Msr, MsrFilter, MsrRange, VcpuThread
from kvmpy.core.msr_filter import READ, WRITE
from selftests.conftest import turns

pytestmark = [
    # An SEV-ES guest's own MSRs are in its VMSA, or KVM's where they are intercepted: two values.
    pytest.mark.protections("none", "sw-protected", "sev"),
    pytest.mark.requires("KVM_CAP_X86_MSR_FILTER"),
]

LSTAR, CSTAR = int(Msr.MSR_LSTAR), int(Msr.MSR_CSTAR)
DENY_BOTH = MsrFilter((MsrRange(LSTAR, 2, READ | WRITE, b"\0"),))

# Writes an MSR that counts up and reads it, each of which works or is #GP.  @seen: what worked (bit 0: read,
# bit 1: write) since the host cleared it.
GUEST = """
#include <kvmpy/guest.h>

GUEST_SHARED volatile u64 stop, seen[8], rounds[8];

static void check(struct guest_fault fault)
{
	GUEST_ASSERT_EQ(fault.vector, GP_VECTOR);
	GUEST_ASSERT_EQ(fault.error_code, 0);
}

void guest_main(u64 msr)
{
	u32 me = guest_cpu_index();
	u64 last = 0x1000, next;

	wrmsr(msr, last);
	while (!stop) {
		struct guest_fault fault;
		u64 value;

		next = last + 0x1000;
		fault = wrmsr_safe(msr, next);
		if (fault.faulted)
			check(fault);
		else
			last = next;
		atomic_or(&seen[me], fault.faulted ? 4 : 2);
		fault = rdmsr_safe(msr, &value);
		if (fault.faulted)
			check(fault);
		else
			GUEST_ASSERT_EQ(value, last);
		atomic_or(&seen[me], fault.faulted ? 8 : 1);
		rounds[me]++;
	}
}
"""


def wait_rounds(vm: GuestVm, threads: list[VcpuThread[None]], more: int = 2) -> None:
    """Wait until each vCPU has gone round."""
    rounds = vm.symbol("rounds").view("Q")
    wanted = [rounds[index] + more for index in range(len(threads))]
    end = time.monotonic() + vm.deadline
    while any(rounds[index] < count for index, count in enumerate(wanted)):
        assert all(thread.alive for thread in threads), [thread.stop() for thread in threads]
        assert time.monotonic() < end, "the guest does not go on"


def test_filters_change_under_load(make_vm: MakeVm, load_seconds: float) -> None:
    """Beside changes of the filter each access works or is #GP(0); a change that is over holds for all vCPUs.

    Documentation/virt/kvm/api.rst, 4.97 KVM_X86_SET_MSR_FILTER.
    """
    vm = make_vm(GUEST, vcpus=2)
    for vcpu, msr in zip(vm.vcpus, (LSTAR, CSTAR), strict=True):
        vcpu.set_entry("guest_main", msr)
    vm.launch()
    seen = vm.symbol("seen").view("Q")
    filters = [
        (MsrFilter(), 1 | 2),
        (DENY_BOTH, 4 | 8),
        (MsrFilter((MsrRange(LSTAR, 2, READ, b"\0"),)), 2 | 8),
        (MsrFilter((MsrRange(LSTAR, 2, WRITE, b"\0"),)), 1 | 4),
        (MsrFilter((MsrRange(LSTAR, 2, READ | WRITE, b"\3"),), default_deny=True), 1 | 2),
    ]
    threads = [VcpuThread(vcpu.run_to_done, vcpu=vcpu).start() for vcpu in vm.vcpus]
    try:
        wait_rounds(vm, threads)
        for turn in turns(load_seconds):
            for _ in range(20):
                vm.msrs.set_filter(DENY_BOTH)
                vm.msrs.set_filter(MsrFilter())
            chosen, expected = filters[turn % len(filters)]
            vm.msrs.set_filter(chosen)
            # What was under way when it returned is over.
            wait_rounds(vm, threads)
            seen[0] = seen[1] = 0
            wait_rounds(vm, threads)
            assert (seen[0], seen[1]) == (expected, expected), f"with filter {turn % len(filters)}"
    finally:
        vm.symbol("stop").u64 = 1
    vm.msrs.set_filter(MsrFilter())
    for thread in threads:
        thread.join(vm.deadline)
