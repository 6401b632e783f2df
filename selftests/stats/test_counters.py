# SPDX-License-Identifier: Apache-2.0
"""What the statistics of VMs and vCPUs count when guests do things."""

from __future__ import annotations

import time

import pytest

from kvmpy import (
    KVM_CAP_HALT_POLL,
    Exit,
    Gpa,
    GuestVm,
    Gva,
    Kvm,
    MakeVm,
    Msi,
    Stats,
    StatsFd,
    Ucall,
    VcpuThread,
)
from kvmpy.testing import host
from selftests.conftest import wait_until

pytestmark = pytest.mark.requires("KVM_CAP_BINARY_STATS_FD", "KVM_CAP_SPLIT_IRQCHIP")

TIMEOUT = 10.0
CUMULATIVE, INSTANT, PEAK, LINEAR, LOGARITHMIC = range(5)
VECTOR = 0x51
MMIO_GPA = Gpa(0xD000_0000)
MMIO_GVA = Gva(0x7000_0000)
PAGES = 64

GUEST = """
#include "../irq/interrupts.h"

#define VECTOR	0x51
#define MMIO	((void *)0x70000000)
#define PAGES	64
#define KVM_HC_SCHED_YIELD	11

GUEST_SHARED volatile u64 progress;
static volatile u64 nmis;
GUEST_USER_DATA static volatile u8 pages[PAGES][4096] __aligned(4096);
GUEST_USER_DATA static u8 stack[4096] __aligned(16);

/* In ring 3: hosts that emulate ring 0 need no mapping for it. */
GUEST_USER static u64 touch(u64 i)
{
	pages[i % PAGES][0] = 1;
	return 0;
}

static void nmi_handler(struct exception_frame *frame)
{
	nmis++;
}

static void one(u64 what, u64 i)
{
	switch (what) {
	case 'p':
		outb(0x10, i);
		break;
	case 'm':
		mmio_write32(MMIO, i);
		break;
	case 'h':
		apic_send_self(VECTOR);
		irq_wait(VECTOR, i + 1);
		break;
	case 'n':
		apic_send(0, APIC_DM_NMI | APIC_INT_ASSERT | APIC_DEST_SELF);
		while (nmis <= i)
			cpu_relax();
		break;
	case 'w':
		irq_wait(VECTOR, i + 1);
		break;
	case 'c':
		/* There is no such call. */
		GUEST_ASSERT_EQ(guest_hypercall(0x7fff, 0, 0, 0, 0), -1000ull);
		break;
	case 'y':
		/* To itself: nobody else is asked to run. */
		GUEST_ASSERT_EQ(guest_hypercall(KVM_HC_SCHED_YIELD, 0, 0, 0, 0), 0ull);
		break;
	case 't':
		guest_user_run(touch, i, stack + sizeof(stack));
		break;
	}
}

/* Does @what @nr times between two words, then spins. */
void guest_main(u64 what, u64 nr)
{
	u64 i;

	irq_install(VECTOR);
	guest_exception_install(NMI_VECTOR, nmi_handler);
	apic_enable();
	GUEST_SYNC('a');
	for (i = 0; i < nr; i++)
		one(what, i);
	GUEST_SYNC('b');
	for (;;)
		progress++;
}
"""


def start(make_vm: MakeVm, action: str = " ", number: int = 0, vcpus: int = 1) -> GuestVm:
    """Return a VM whose guest is about to do *what*."""
    vm = make_vm(GUEST, vcpus=vcpus)
    vm.map(MMIO_GVA, MMIO_GPA, 0x1000, private=False)
    for vcpu in vm.vcpus:
        vcpu.set_entry("guest_main", ord(action), number)
    vm.launch()
    assert vm.vcpus[0].sync().args == (ord("a"),)
    return vm


def growth(before: Stats, after: Stats, name: str) -> int:
    """Return by how much a statistic has grown; what this KVM does not count skips the test."""
    if name not in before:
        pytest.skip(f"needs the statistic {name}: this KVM has none")
    return after[name].value - before[name].value


def done(vm: GuestVm) -> tuple[Stats, Stats]:
    """Let the guest do its work, passing over exits; return the statistics before and after."""
    vcpu = vm.vcpus[0]
    before = vcpu.stats.get()
    got: Ucall | Exit = vcpu.next()
    while not isinstance(got, Ucall):
        got = vcpu.next()
    assert got.args == (ord("b"),)
    return before, vcpu.stats.get()


def test_fresh_vcpu(make_vm: MakeVm) -> None:
    """A vCPU that never ran has counted no exits, halts and injections.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD: cumulative counts.
    """
    stats = make_vm(GUEST).vcpus[0].stats.get()
    for name in ("exits", "io_exits", "mmio_exits", "halt_exits", "irq_injections", "nmi_injections"):
        assert stats[name].value == 0, name


def test_vcpus_count_for_themselves(make_vm: MakeVm) -> None:
    """What one vCPU does is not counted for another.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD (vcpu ioctl).
    """
    vm = start(make_vm, "p", 10, vcpus=2)
    before, after = done(vm)
    assert growth(before, after, "exits") >= 10
    assert vm.vcpus[1].stats.get()["exits"].value == 0


def test_cumulative_never_shrinks(make_vm: MakeVm) -> None:
    """Counts, peaks and the buckets of histograms never get smaller, whatever the guest does.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD: the value of data can only be increased.
    """
    vm = start(make_vm, "h", 5)
    vm_before = vm.stats.get()
    before, after = done(vm)
    for old, new in ((before, after), (vm_before, vm.stats.get())):
        rising = [one for one in old.values() if int(one.type) != INSTANT]
        assert rising
        for one in rising:
            pairs = zip(one.values, new[one.name].values, strict=True)
            assert all(now >= then for then, now in pairs), one.name


# Of each pair the first counts some of what the second counts.
PARTS = (
    ("halt_successful_poll", "halt_attempted_poll"),
    ("halt_poll_invalid", "halt_successful_poll"),
    ("halt_poll_success_ns", "halt_poll_success_hist"),
    ("halt_poll_fail_ns", "halt_poll_fail_hist"),
    ("halt_wait_ns", "halt_wait_hist"),
    ("directed_yield_successful", "directed_yield_attempted"),
    ("remote_tlb_flush", "remote_tlb_flush_requests"),
    ("nx_lpage_splits", "pages_4k"),
)


def check_laws(stats: Stats) -> None:
    """Check what holds between the statistics of one object whenever it rests."""
    for part, whole in PARTS:
        if part not in stats or whole not in stats:
            continue
        if not stats[whole].is_histogram:
            assert stats[part].value <= stats[whole].value, f"{stats[part]}, {stats[whole]}"
            continue
        # Samples, each within its bucket, are the time beside the histogram.
        buckets, total = stats[whole].buckets(), stats[part].value
        assert sum(bucket.low * bucket.count for bucket in buckets) <= total, f"{stats[part]}, {stats[whole]}"
        if not buckets[-1].count:
            most = sum(((bucket.high or 0) - 1) * bucket.count for bucket in buckets)
            assert total <= most, f"{stats[part]}, {stats[whole]}"
    if "halt_attempted_poll" in stats and "halt_poll_fail_hist" in stats:
        attempted, successful = stats["halt_attempted_poll"].value, stats["halt_successful_poll"].value
        assert stats["halt_poll_success_hist"].total == successful
        assert stats["halt_poll_fail_hist"].total == attempted - successful


@pytest.mark.parametrize("what", "pmhnt")
def test_they_agree(make_vm: MakeVm, what: str) -> None:
    """What is a part of another count is never more, and the samples of a histogram are the time beside it.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD (histograms); virt/kvm/kvm_main.c
    (update_halt_poll_stats(), kvm_vcpu_block(), kvm_flush_remote_tlbs()).
    """
    vm = start(make_vm, what, 10)
    _, after = done(vm)
    check_laws(after)
    check_laws(vm.stats.get())


def halted(vm: GuestVm, stats: StatsFd, number: int) -> None:
    """Let the guest halt *number* times, and wake it once it blocks."""
    first = stats.read()["halt_exits"].value
    with VcpuThread(vm.vcpus[0].sync, vcpu=vm.vcpus[0]) as thread:
        for count in range(1, number + 1):

            def blocks(count: int = count) -> bool:
                now = stats.read()
                return now["halt_exits"].value >= first + count and now["blocking"].value == 1

            wait_until(blocks, "the vCPU does not block")
            vm.irq.signal_msi(Msi.to(0, VECTOR))
        thread.join(TIMEOUT)


@pytest.mark.requires("KVM_CAP_HALT_POLL")
@pytest.mark.parametrize("limit", [0, 1_000_000_000], ids=["never", "up to a second"])
def test_polls_of_a_halt(make_vm: MakeVm, limit: int) -> None:
    """KVM polls before it blocks a halted vCPU, as long as the VM's limit allows, and never with 0.

    Documentation/virt/kvm/api.rst, KVM_CAP_HALT_POLL; Documentation/virt/kvm/halt-polling.rst (a vCPU begins
    to poll after its first short halt); virt/kvm/kvm_main.c, update_halt_poll_stats().
    """
    vm = start(make_vm, "w", 6)
    vm.enable_cap(KVM_CAP_HALT_POLL, limit)
    with vm.vcpus[0].stats.get_fd() as stats:
        before = stats.read()
        if "blocking" not in before:
            pytest.skip("needs the statistic blocking: this KVM has none")
        halted(vm, stats, 6)
        after = stats.read()
    # Nobody woke it before it blocked: each poll failed.
    polls = growth(before, after, "halt_attempted_poll")
    assert growth(before, after, "halt_successful_poll") == 0
    assert (polls > 0) == (limit > 0)
    assert (growth(before, after, "halt_poll_fail_ns") > 0) == (limit > 0)
    assert after["halt_wait_hist"].total - before["halt_wait_hist"].total >= 6
    check_laws(after)


def kvm_delivers_interrupts(_kvm: Kvm) -> str | None:
    """Tell when hardware delivers interrupts without KVM's doing."""
    for module, parameter in (("kvm_amd", "avic"), ("kvm_intel", "enable_apicv")):
        if host.ModuleParameters(module).get(parameter) == "Y":
            return f"interrupts that KVM injects itself: {module}.{parameter}=N"
    return None


injected_by_kvm = pytest.mark.requires("kvm", kvm_delivers_interrupts)


# An injection may be repeated when its delivery is interrupted.
@pytest.mark.parametrize(
    ("name", "what", "number", "most"),
    [
        ("exits", "p", 25, None),
        ("io_exits", "p", 25, None),
        ("halt_exits", "h", 10, None),
        ("nmi_injections", "n", 8, 79),
        pytest.param("irq_injections", "h", 10, 99, marks=injected_by_kvm),
        ("hypercalls", "c", 7, 7),
        ("hypercalls", "y", 7, 7),
        ("directed_yield_attempted", "y", 7, 7),
    ],
)
def test_each_is_counted(make_vm: MakeVm, name: str, what: str, number: int, most: int | None) -> None:
    """Every port access is an exit and an I/O exit; every halt, NMI, interrupt that KVM injects and every
    hypercall, also an unknown one, is counted.

    arch/x86/kvm (++vcpu->stat.exits and so on); Documentation/virt/kvm/x86/hypercalls.rst.
    """
    before, after = done(start(make_vm, what, number))
    grown = growth(before, after, name)
    assert number <= grown
    assert most is None or grown <= most


@pytest.mark.requires("trait:exits_in_place")
def test_mmio_exits(make_vm: MakeVm) -> None:
    """Every MMIO access that user space has to serve is one in mmio_exits, and an emulated instruction.

    arch/x86/kvm/x86.c: ++vcpu->stat.mmio_exits, ++vcpu->stat.insn_emulation.
    """
    before, after = done(start(make_vm, "m", 25))
    assert growth(before, after, "mmio_exits") == 25
    assert growth(before, after, "insn_emulation") >= 25


def test_signal_exits(make_vm: MakeVm) -> None:
    """Every KVM_RUN that a signal ends while the guest runs is one in signal_exits.

    arch/x86/kvm/x86.c: ++vcpu->stat.signal_exits.
    """
    vm = start(make_vm)
    vcpu = vm.vcpus[0]
    assert vcpu.sync().args == (ord("b"),)
    before = vcpu.stats.get()
    for _ in range(3):
        seen = vm.symbol("progress").u64
        with VcpuThread(lambda: vcpu.run_until_kicked(TIMEOUT), vcpu=vcpu) as thread:
            wait_until(lambda seen=seen: vm.symbol("progress").u64 > seen + 10, "the guest does not run")  # type: ignore[misc]
            vcpu.kick()
            thread.join(TIMEOUT)
    assert growth(before, vcpu.stats.get(), "signal_exits") >= 3


def halt_for(vm: GuestVm, stats: StatsFd, seconds: float) -> None:
    """Run the guest until it halts, leave it there for *seconds*, and wake it."""
    vcpu = vm.vcpus[0]
    with VcpuThread(vcpu.sync, vcpu=vcpu) as thread:
        wait_until(lambda: stats.read()["blocking"].value == 1, "the vCPU does not block")
        end = time.monotonic() + seconds
        wait_until(lambda: time.monotonic() > end, "the clock stands still")
        vm.irq.signal_msi(Msi.to(0, VECTOR))
        thread.join(TIMEOUT)


def test_blocking(make_vm: MakeVm) -> None:
    """The boolean `blocking` is 1 exactly while the vCPU is halted in the kernel.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD: an instantaneous value, 0 or 1.
    """
    vm = start(make_vm, "w", 1)
    with vm.vcpus[0].stats.get_fd() as stats:
        if "blocking" not in stats.read():
            pytest.skip("needs the statistic blocking: this KVM has none")
        assert stats.read()["blocking"].value == 0
        halt_for(vm, stats, 0.001)
        assert stats.read()["blocking"].value == 0


def test_halt_times(make_vm: MakeVm) -> None:
    """The time of a halt is in halt_wait_ns, the halt in the histogram beside it, its end in halt_wakeup.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD (logarithmic histograms); virt/kvm/kvm_main.c.
    """
    vm = start(make_vm, "w", 1)
    with vm.vcpus[0].stats.get_fd() as stats:
        before = stats.read()
        if "halt_wait_hist" not in before or "blocking" not in before:
            pytest.skip("needs the statistics halt_wait_hist and blocking: this KVM has none")
        started = time.monotonic_ns()
        halt_for(vm, stats, 0.02)
        elapsed = time.monotonic_ns() - started
        after = stats.read()
    waited = growth(before, after, "halt_wait_ns")
    # Some of it may have been spent polling.
    assert 15_000_000 <= waited + growth(before, after, "halt_poll_fail_ns") <= elapsed
    assert growth(before, after, "halt_wakeup") >= 1
    samples = zip(before["halt_wait_hist"].values, after["halt_wait_hist"].values, strict=True)
    new = [now - then for then, now in samples]
    assert sum(new) >= 1
    # Bucket N holds what is at least 2^(N-1) and below 2^N; the longest sample is in the last that grew.
    last = max(number for number, grown in enumerate(new) if grown)
    assert 1 << (last - 1) <= waited
    assert last == len(new) - 1 or waited < sum(new) << last


def test_not_nested(make_vm: MakeVm) -> None:
    """A guest that runs no guest of its own is never in guest_mode.

    arch/x86/kvm/x86.c: guest_mode is a boolean of now.
    """
    before, after = done(start(make_vm, "p", 3))
    if "guest_mode" not in before:
        pytest.skip("needs the statistic guest_mode: this KVM has none")
    assert (before["guest_mode"].value, after["guest_mode"].value) == (0, 0)


def test_mapped_pages(make_vm: MakeVm) -> None:
    """Pages that the guest has touched are among those that the VM's statistics count as mapped.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD (instantaneous values); arch/x86/kvm/mmu/mmu.c.
    """
    vm = start(make_vm, "t", PAGES)
    if "pages_4k" not in vm.stats.get():
        pytest.skip("needs the statistic pages_4k: this KVM has none")
    done(vm)
    after = vm.stats.get()
    mapped = after["pages_4k"].value + (after["pages_2m"].value << 9) + (after["pages_1g"].value << 18)
    assert mapped >= PAGES
