# SPDX-License-Identifier: Apache-2.0
"""The clock of the local APIC's timer: its divider, and the frequency that user space may choose."""

from __future__ import annotations

import errno

import pytest

from kvmpy import KVM_CAP_X86_APIC_BUS_CYCLES_NS, GuestVm, Kvm, MakeVm, refused

pytestmark = pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP")
# What the timer counts is compared with the guest's TSC.
STABLE = pytest.mark.requires("KVM_CAP_GET_TSC_KHZ", "stable-tsc")

GUEST = """
#include <kvmpy/guest.h>

#define VECTOR	0x51

/* The count and the TSC beside it, within @slack. */
static u32 sample(u64 *tsc, u64 slack)
{
	u64 before, after;
	u32 left;

	do {
		before = rdtsc();
		left = apic_read(APIC_TMCCT);
		after = rdtsc();
	} while (after - before > slack);
	*tsc = before;
	return left;
}

void rate(u64 divider, u64 ticks, u64 slack)
{
	u64 started, now;
	u32 first, left;

	apic_enable();
	apic_write(APIC_TDCR, divider);
	apic_write(APIC_LVTT, APIC_LVT_MASKED | VECTOR);
	apic_write(APIC_TMICT, ~0u);
	first = sample(&started, slack);
	do {
		left = sample(&now, slack);
	} while (now - started < ticks);
	GUEST_SYNC(first - left, now - started);
}
"""


def tsc_khz(kvm: Kvm) -> int:
    """Return the frequency of a guest's TSC."""
    with kvm.create_vm() as vm:
        return vm.create_vcpu().clock.get_tsc_khz()


def rate(make_vm: MakeVm, khz: int, divider: int, *, bus_ns: int | None = None) -> float:
    """Return how many ticks a millisecond the timer makes, measured over 20 ms of the guest's TSC."""

    def before(vm: GuestVm) -> None:
        if bus_ns is not None:
            vm.enable_cap(KVM_CAP_X86_APIC_BUS_CYCLES_NS, bus_ns)

    vm = make_vm(GUEST, before_vcpus=before)
    # 20 ms, sampled within 0.2 ms: one part in a hundred.
    vm.vcpus[0].set_entry("rate", divider, 20 * khz, khz // 5)
    vm.launch()
    ticks, tsc = vm.vcpus[0].sync().args
    return ticks / (tsc / khz)


@STABLE
@pytest.mark.parametrize(("register", "divider"), [(0xB, 1), (0x0, 2), (0x3, 16), (0xA, 128)])
def test_divider(make_vm: MakeVm, kvm: Kvm, register: int, divider: int) -> None:
    """The divide configuration divides the timer's clock, which is 1 GHz unless user space says otherwise.

    Intel SDM 3A, 12.5.4 (divide configuration register); api.rst, 7.35 KVM_CAP_X86_APIC_BUS_CYCLES_NS.
    """
    measured = rate(make_vm, tsc_khz(kvm), register)
    assert measured == pytest.approx(1e6 / divider, rel=0.05)


@pytest.mark.requires("KVM_CAP_X86_APIC_BUS_CYCLES_NS")
@STABLE
@pytest.mark.parametrize("bus_ns", [10, 40])
def test_bus_clock(make_vm: MakeVm, kvm: Kvm, bus_ns: int) -> None:
    """KVM_CAP_X86_APIC_BUS_CYCLES_NS sets the timer's clock.

    Documentation/virt/kvm/api.rst, 7.35 KVM_CAP_X86_APIC_BUS_CYCLES_NS.
    """
    measured = rate(make_vm, tsc_khz(kvm), 0xB, bus_ns=bus_ns)
    assert measured == pytest.approx(1e6 / bus_ns, rel=0.05)


@pytest.mark.requires("KVM_CAP_X86_APIC_BUS_CYCLES_NS")
def test_bus_clock_errors(kvm: Kvm) -> None:
    """A clock period of 0 is EINVAL, as is one after the first vCPU; without an in-kernel APIC it is ENXIO.

    Documentation/virt/kvm/api.rst, 7.35 KVM_CAP_X86_APIC_BUS_CYCLES_NS.
    """
    with kvm.create_vm() as vm:
        with refused(errno.ENXIO):
            vm.enable_cap(KVM_CAP_X86_APIC_BUS_CYCLES_NS, 10)
        vm.irq.create_split_chip()
        with refused(errno.EINVAL):
            vm.enable_cap(KVM_CAP_X86_APIC_BUS_CYCLES_NS, 0)
        vm.enable_cap(KVM_CAP_X86_APIC_BUS_CYCLES_NS, 25)
        vm.create_vcpu()
        with refused(errno.EINVAL):
            vm.enable_cap(KVM_CAP_X86_APIC_BUS_CYCLES_NS, 10)
