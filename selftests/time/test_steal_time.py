# SPDX-License-Identifier: Apache-2.0
"""Steal time: how long a vCPU wanted to run and did not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy import GuestVm, MakeVm

pytestmark = pytest.mark.requires("KVM_CAP_STEAL_TIME", "msr:0x4b564d03")

TIMEOUT = 15.0

GUEST = """
#include "pvclock.h"

struct steal_time {
	u64 steal;
	u32 version;
	u32 flags;
	u8 preempted;
	u8 pad8[3];
	u32 pad[11];
};

static u64 steal_read(volatile struct steal_time *time)
{
	u32 version;
	u64 steal;

	do {
		do
			version = time->version;
		while (version & 1);
		barrier();
		steal = time->steal;
		barrier();
	} while (time->version != version);
	return steal;
}

/* Tell the stolen time, after some work of @ticks. */
void work(u64 gva, u64 gpa, u64 ticks)
{
	volatile struct steal_time *time = (void *)(uintptr_t)gva;
	u64 last = 0;

	wrmsr(MSR_KVM_STEAL_TIME, gpa | 1);
	GUEST_ASSERT_EQ(rdmsr(MSR_KVM_STEAL_TIME), gpa | 1);
	for (;;) {
		u64 until = rdtsc() + ticks;
		u64 steal = steal_read(time);

		GUEST_ASSERT_EQ(time->flags, 0u);
		GUEST_ASSERT_EQ(time->preempted & 1, 0);
		GUEST_ASSERT_GE(steal, last);
		last = steal;
		GUEST_SYNC(steal, time->version);
		while (rdtsc() < until)
			cpu_relax();
	}
}

void switched_off(u64 gva, u64 gpa)
{
	volatile struct steal_time *time = (void *)(uintptr_t)gva;

	wrmsr(MSR_KVM_STEAL_TIME, gpa | 1);
	/* KVM writes when it enters the guest. */
	GUEST_SYNC(0);
	GUEST_SYNC(time->version);
	wrmsr(MSR_KVM_STEAL_TIME, 0);
	time->version = 0x5eed0;
	GUEST_SYNC(time->version);
	GUEST_SYNC(time->version);
}
"""


def prepare(make_vm: MakeVm, entry: str, *args: int, **options: object) -> GuestVm:
    """Return a VM whose guest will run *entry* with the address of memory that it shares with the host."""
    vm = make_vm(GUEST, **options)  # type: ignore[arg-type]
    page = vm.alloc(4096, private=False)
    vm.vcpus[0].set_entry(entry, int(page), int(vm.gva_to_gpa(page)), *args)
    return vm


@pytest.fixture
def rival() -> Iterator[None]:
    """A process that wants the same host CPU as this thread, all the time."""
    before = os.sched_getaffinity(0)
    cpu = min(before)
    command = [sys.executable, "-c", "while True: pass"]
    os.sched_setaffinity(0, {cpu})
    try:
        with subprocess.Popen(command) as process:
            try:
                yield
            finally:
                process.kill()
                process.wait(TIMEOUT)
    finally:
        os.sched_setaffinity(0, before)


def test_grows_with_a_rival(make_vm: MakeVm, rival: None) -> None:
    """While another process has the vCPU's host CPU, steal time grows, and the version with it.

    Documentation/virt/kvm/x86/msr.rst, MSR_KVM_STEAL_TIME.
    """
    vm = prepare(make_vm, "work", 5_000_000)
    vm.launch()
    vcpu = vm.vcpus[0]
    # KVM writes when it enters the guest, so the first reading is one of nothing.
    vcpu.sync()
    first, version = vcpu.sync().args
    assert version % 2 == 0
    end = time.monotonic() + TIMEOUT
    while True:
        steal, now = vcpu.sync().args
        assert now % 2 == 0
        if steal > first + 1_000_000:
            break
        assert time.monotonic() < end, "no steal time beside a process that takes half of the CPU"
    assert now > version


def test_is_plausible(make_vm: MakeVm, rival: None) -> None:
    """Steal time is not more than the time that went by.

    Documentation/virt/kvm/x86/msr.rst, MSR_KVM_STEAL_TIME: nanoseconds in which the vCPU did not run.
    """
    vm = prepare(make_vm, "work", 5_000_000)
    vm.launch()
    vcpu = vm.vcpus[0]
    vcpu.sync()
    before = time.monotonic_ns()
    first = vcpu.sync().args[0]
    for _ in range(30):
        last = vcpu.sync().args[0]
    assert 0 <= last - first <= time.monotonic_ns() - before


def run_delay() -> int:
    """Return how long this thread has waited for a CPU, in nanoseconds."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1])


@pytest.mark.skipif(
    not Path("/proc/thread-self/schedstat").exists(), reason="no schedstat: CONFIG_SCHED_INFO"
)
def test_is_the_threads_delay(make_vm: MakeVm, rival: None) -> None:
    """Between two entries of the guest its steal time grows by as much as the thread's run delay.

    Documentation/virt/kvm/x86/msr.rst, MSR_KVM_STEAL_TIME; Documentation/scheduler/sched-stats.rst.
    """
    vm = prepare(make_vm, "work", 5_000_000)
    vm.launch()
    vcpu = vm.vcpus[0]
    vcpu.sync()
    before_first = run_delay()
    first = vcpu.sync().args[0]
    after_first = run_delay()
    for _ in range(30):
        before_last = run_delay()
        last = vcpu.sync().args[0]
    assert before_last - after_first <= last - first <= run_delay() - before_first


def test_switched_off(make_vm: MakeVm) -> None:
    """Once the guest has cleared the enable bit, KVM leaves its memory alone.

    Documentation/virt/kvm/x86/msr.rst, MSR_KVM_STEAL_TIME.
    """
    vm = prepare(make_vm, "switched_off")
    vm.launch()
    _, version, *off = [call.args[0] for call in vm.vcpus[0].syncs()]
    assert version % 2 == 0
    assert version > 0
    assert off == [0x5EED0, 0x5EED0]
