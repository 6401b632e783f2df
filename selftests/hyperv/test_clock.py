# SPDX-License-Identifier: Apache-2.0
"""Hyper-V's time: the reference counter, the TSC page by which guests compute it, and re-enlightenment."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest

from kvmpy import KVM_CLOCK_TSC_STABLE, PAGE_SIZE, Agent, Cpuid, GuestVm, Msr, kvm_clock_data
from kvmpy.x86.hyperv import HvBits

from .conftest import MakeHyperV

pytestmark = [
    pytest.mark.requires("KVM_CAP_HYPERV_TIME", "KVM_CAP_SYS_HYPERV_CPUID"),
    pytest.mark.protections("none", "cbit"),
]

TEN_SECONDS = 10 * 10_000_000  # in units of 100 ns
COUNT, PAGE = Msr.HV_X64_MSR_TIME_REF_COUNT, Msr.HV_X64_MSR_REFERENCE_TSC

NO_PAGE = (
    "needs a host that takes its time from the TSC, as with --configuration trusted-tsc of kvmpy lab run: "
    "KVM has no TSC page here"
)

GUEST = """
#include "hyperv.h"

struct sample {
	u64 before, count, after;
} sample GUEST_SHARED;

void take(void)
{
	sample.before = rdtsc();
	sample.count = rdmsr(HV_X64_MSR_TIME_REF_COUNT);
	sample.after = rdtsc();
}

/* Until @ticks of the TSC have passed. */
void pass(u64 ticks)
{
	u64 begin = rdtsc();

	while (rdtsc() - begin < ticks)
		cpu_relax();
}

struct tsc_page {
	volatile u32 sequence;
	u32 reserved;
	volatile u64 scale;
	volatile s64 offset;
};

#define GOES	1
#define NO_PAGE	2

static u64 latest;
u64 started GUEST_SHARED;

/* All vCPUs at once, by the page and by the MSR in turn: nobody sees a time before one that another saw. */
void together(u64 gva, u64 msr, u64 rounds)
{
	struct tsc_page *page = (void *)gva;

	if (!guest_cpu_index()) {
		wrmsr(HV_X64_MSR_REFERENCE_TSC, msr);
		atomic_set(&started, page->sequence ? GOES : NO_PAGE);
	}
	while (!atomic_read(&started))
		cpu_relax();
	if (atomic_read(&started) == NO_PAGE)
		return;
	for (u64 i = 0; i < rounds; i++) {
		u64 before = atomic_read(&latest), now;

		if (i & 1)
			now = rdmsr(HV_X64_MSR_TIME_REF_COUNT);
		else
			now = (u64)((unsigned __int128)rdtsc() * page->scale >> 64) + page->offset;
		GUEST_ASSERT_GE(now, before);
		while (before < now && !atomic_cmpxchg(&latest, before, now))
			before = atomic_read(&latest);
	}
}

void guest_main(void)
{
	guest_agent();
}
"""


@dataclass(frozen=True)
class TscPage:
    """The reference TSC page."""

    sequence: int
    scale: int
    offset: int

    def time(self, tsc: int) -> int:
        """Return the reference time at a TSC, in 100 ns."""
        return ((tsc * self.scale >> 64) + self.offset) % (1 << 64)


class Clock:
    """A guest that reads the counter between two readings of the TSC."""

    def __init__(self, vm: GuestVm) -> None:
        self.vm = vm
        self.gva = vm.alloc(PAGE_SIZE, private=False)
        self.gpa = int(vm.gva_to_gpa(self.gva))
        self.agent = Agent(vm.vcpus[0])

    def enable(self) -> None:
        """Let KVM fill the page; skip the test where it cannot."""
        assert self.agent.wrmsr(PAGE, self.gpa | 1) is None
        assert self.agent.rdmsr(PAGE) == self.gpa | 1
        if not self.vm.clock.get().flags & KVM_CLOCK_TSC_STABLE:
            pytest.skip(NO_PAGE)

    def page(self) -> TscPage:
        """Read the page."""
        sequence, _, scale, offset = struct.unpack("<IIQq", self.vm.read(self.gva, 24))
        return TscPage(sequence, scale, offset)

    def sample(self) -> tuple[int, int, int]:
        """Return the TSC, the counter, and the TSC again."""
        self.agent.call("take")
        sample = self.vm.symbol("sample").value
        return sample.before, sample.count, sample.after

    def move(self, ticks: int) -> None:
        """Move kvmclock by *ticks* of 100 ns."""
        self.vm.clock.set(kvm_clock_data(clock=self.vm.clock.get().clock + 100 * ticks))

    def check(self) -> int:
        """The counter is what the page makes of the TSC at that moment; return it."""
        before, count, after = self.sample()
        page = self.page()
        assert page.sequence not in (0, 0xFFFF_FFFF)
        assert page.time(before) <= count <= page.time(after)
        return count


@pytest.fixture
def clock(make_hyperv: MakeHyperV) -> Clock:
    """One vCPU."""
    return Clock(make_hyperv(GUEST))


def test_rate(clock: Clock) -> None:
    """The counter goes at 10 MHz, which the TSC and its frequency confirm to one percent.

    TLFS, reference time: 100 ns units.
    """
    khz = clock.vm.vcpus[0].clock.get_tsc_khz()
    assert clock.agent.rdmsr(Msr.HV_X64_MSR_TSC_FREQUENCY) == 1000 * khz
    first = clock.sample()
    clock.agent.call("pass", 50 * khz)
    second = clock.sample()
    least = (second[0] - first[2]) * 10_000 // khz
    most = (second[2] - first[0]) * 10_000 // khz
    assert least * 99 // 100 <= second[1] - first[1] <= most * 101 // 100


def test_page(clock: Clock) -> None:
    """The page gives the counter's value at every TSC, exactly, and its scale is the TSC's frequency.

    TLFS, reference time: (TSC * scale >> 64) + offset.
    """
    clock.enable()
    for _ in range(20):
        clock.check()
    khz = clock.vm.vcpus[0].clock.get_tsc_khz()
    expected = (10_000 << 64) // khz
    assert abs(clock.page().scale - expected) < expected // 1000


def test_page_is_no_more_than_that(clock: Clock) -> None:
    """KVM writes the 24 bytes of the structure, without the reserved word, and nothing behind it.

    TLFS, reference time: the structure; the rest of the page is the guest's as before.
    """
    clock.vm.write(clock.gva, b"\xaa" * PAGE_SIZE)
    clock.enable()
    assert clock.vm.read(clock.gva + 24, PAGE_SIZE - 24) == b"\xaa" * (PAGE_SIZE - 24)


@pytest.mark.parametrize("ticks", [TEN_SECONDS, -TEN_SECONDS // 1000], ids=["forward", "back"])
def test_set_clock(clock: Clock, ticks: int) -> None:
    """KVM_SET_CLOCK moves the counter, and the page with it: a new sequence, the same scale.

    Documentation/virt/kvm/api.rst, 4.30 KVM_SET_CLOCK.
    """
    clock.enable()
    clock.agent.call("pass", 20 * clock.vm.vcpus[0].clock.get_tsc_khz())
    old_count, old = clock.check(), clock.page()
    began = clock.vm.clock.get().clock
    clock.move(ticks)
    count, page = clock.check(), clock.page()
    elapsed = (clock.vm.clock.get().clock - began) // 100 - ticks + 1
    assert page.sequence != old.sequence
    assert page.scale == old.scale
    assert old_count + ticks <= count <= old_count + ticks + elapsed + 10_000_000


def test_disabled(clock: Clock) -> None:
    """A disabled page is left alone, the counter goes on, and enabled again the page is right.

    TLFS, reference time.
    """
    clock.enable()
    before = clock.check()
    old = clock.page()
    assert clock.agent.wrmsr(PAGE, clock.gpa) is None
    clock.move(TEN_SECONDS)
    assert clock.sample()[1] >= before + TEN_SECONDS
    assert clock.page() == old
    clock.enable()
    assert clock.check() >= before + TEN_SECONDS
    assert clock.page().sequence != old.sequence


def test_moved_page(clock: Clock) -> None:
    """The page can be moved: the new one is filled, the old one stays as it was.

    TLFS, reference time.
    """
    clock.enable()
    old_gva, old = clock.gva, clock.vm.read(clock.gva, 24)
    clock.gva = clock.vm.alloc(PAGE_SIZE, private=False)
    clock.gpa = int(clock.vm.gva_to_gpa(clock.gva))
    clock.enable()
    clock.check()
    clock.move(TEN_SECONDS)
    clock.check()
    assert clock.vm.read(old_gva, 24) == old


def test_no_memory(clock: Clock) -> None:
    """A page where there is no memory is lost, but not the counter.

    TLFS, reference time: the counter is always there.
    """
    assert clock.agent.wrmsr(PAGE, 1 << 38 | 1) is None
    first = clock.sample()[1]
    clock.move(TEN_SECONDS)
    assert clock.sample()[1] >= first + TEN_SECONDS


def test_emulated_tsc(clock: Clock) -> None:
    """While the guest has TSC emulation asked for, the page stays as it is, whatever the host's clock does.

    TLFS, reference time: the guest is told before it must take new values.
    """
    clock.enable()
    clock.check()
    assert clock.agent.wrmsr(Msr.HV_X64_MSR_REENLIGHTENMENT_CONTROL, 1 << 16 | 0xEE) is None
    assert clock.agent.wrmsr(Msr.HV_X64_MSR_TSC_EMULATION_CONTROL, 1) is None
    old = clock.vm.read(clock.gva, PAGE_SIZE)
    clock.move(TEN_SECONDS)
    clock.check()
    assert clock.vm.read(clock.gva, PAGE_SIZE) == old
    assert clock.agent.rdmsr(Msr.HV_X64_MSR_REENLIGHTENMENT_CONTROL) == 1 << 16 | 0xEE
    assert clock.agent.rdmsr(Msr.HV_X64_MSR_TSC_EMULATION_STATUS) == 0
    # Back at home, it is the host's clock again.
    assert clock.agent.wrmsr(Msr.HV_X64_MSR_TSC_EMULATION_CONTROL, 0) is None
    clock.move(TEN_SECONDS)
    clock.check()
    assert clock.vm.read(clock.gva, PAGE_SIZE) != old


def test_all_vcpus(make_hyperv: MakeHyperV) -> None:
    """On all vCPUs at once, time by page and time by MSR are one clock that never goes back.

    TLFS, reference time: the counter is the partition's, and monotonic.
    """
    vm = make_hyperv(GUEST, vcpus=2)
    gva = vm.alloc(PAGE_SIZE, private=False)
    for vcpu in vm.vcpus:
        vcpu.set_entry("together", int(gva), int(vm.gva_to_gpa(gva)) | 1, 2000)
    vm.launch()
    vm.run_all()
    if vm.symbol("started").u64 == 2:
        pytest.skip(NO_PAGE)


def test_invariant_tsc(make_hyperv: MakeHyperV) -> None:
    """The invariant TSC's CPUID bit is hidden until the guest has asked for it.

    TLFS, HV_X64_MSR_TSC_INVARIANT_CONTROL; CPUID 0x80000007 EDX bit 8.
    """

    def invariant(cpuid: Cpuid) -> None:
        cpuid.ensure(0x8000_0007).edx |= 1 << 8

    agent = Agent(make_hyperv(GUEST, edit=invariant).vcpus[0])
    assert not agent.cpuid(0x8000_0007)[3] & 1 << 8
    expose = int(HvBits.HV_EXPOSE_INVARIANT_TSC)
    assert agent.wrmsr(Msr.HV_X64_MSR_TSC_INVARIANT_CONTROL, expose) is None
    assert agent.cpuid(0x8000_0007)[3] & 1 << 8
    without = make_hyperv(GUEST, features=["HV_MSR_HYPERCALL_AVAILABLE"], edit=invariant)
    assert Agent(without.vcpus[0]).cpuid(0x8000_0007)[3] & 1 << 8


def test_run_time(clock: Clock) -> None:
    """A vCPU's run time goes on, from what the host sets.

    TLFS, reference time, HV_X64_MSR_VP_RUNTIME; it is what migration takes along.
    """
    value = 1 << 40
    clock.agent.start()
    clock.vm.vcpus[0].msrs.set(Msr.HV_X64_MSR_VP_RUNTIME, value)
    times = [clock.agent.rdmsr(Msr.HV_X64_MSR_VP_RUNTIME)]
    clock.agent.call("pass", 50 * clock.vm.vcpus[0].clock.get_tsc_khz())
    times.append(clock.agent.rdmsr(Msr.HV_X64_MSR_VP_RUNTIME))
    assert all(isinstance(each, int) and value <= each < value + TEN_SECONDS * 6 for each in times)
    assert times[0] != times[1]
