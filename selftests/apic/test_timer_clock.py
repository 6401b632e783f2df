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

void rates(u64 x2apic, u64 ticks, u64 slack)
{
	if (x2apic)
		x2apic_enable();
	else
		apic_enable();
	apic_write(APIC_LVTT, APIC_LVT_MASKED | VECTOR);
	for (u32 i = 0; i < 8; i++) {
		u64 started, now;
		u32 first, left;

		/* Bit 2 is reserved. */
		apic_write(APIC_TDCR, (i & 4) << 1 | (i & 3));
		apic_write(APIC_TMICT, ~0u);
		first = sample(&started, slack);
		do {
			left = sample(&now, slack);
		} while (now - started < ticks);
		GUEST_SYNC(first - left, now - started);
	}
	GUEST_DONE();
}
"""

# The dividers of the configurations 0 to 3 and 8 to 11.
DIVIDERS = (2, 4, 8, 16, 32, 64, 128, 1)


def tsc_khz(kvm: Kvm) -> int:
    """Return the frequency of a guest's TSC."""
    with kvm.create_vm() as vm:
        return vm.create_vcpu().clock.get_tsc_khz()


@STABLE
@pytest.mark.parametrize("x2apic", [False, True], ids=["xapic", "x2apic"])
@pytest.mark.parametrize(
    "bus_ns",
    [
        pytest.param(None, id="1ns"),
        *(
            pytest.param(ns, id=f"{ns}ns", marks=pytest.mark.requires("KVM_CAP_X86_APIC_BUS_CYCLES_NS"))
            for ns in (10, 40)
        ),
    ],
)
def test_dividers(make_vm: MakeVm, kvm: Kvm, bus_ns: int | None, x2apic: bool) -> None:
    """Each divide configuration divides the timer's clock: 1 GHz, or what user space has chosen.

    Intel SDM 3A, 12.5.4 (divide configuration
    register); api.rst, 7.35 KVM_CAP_X86_APIC_BUS_CYCLES_NS.
    """

    def before(vm: GuestVm) -> None:
        if bus_ns is not None:
            vm.enable_cap(KVM_CAP_X86_APIC_BUS_CYCLES_NS, bus_ns)

    khz = tsc_khz(kvm)
    vm = make_vm(GUEST, before_vcpus=before)
    # 10 ms each, sampled within 0.1 ms: one part in a hundred.
    vm.vcpus[0].set_entry("rates", int(x2apic), 10 * khz, khz // 10)
    vm.launch()
    measured = [call.args[0] / (call.args[1] / khz) for call in vm.vcpus[0].syncs()]
    expected = [1e6 / (bus_ns or 1) / divider for divider in DIVIDERS]
    assert measured == [pytest.approx(rate, rel=0.05) for rate in expected]


@pytest.mark.requires("KVM_CAP_X86_APIC_BUS_CYCLES_NS")
def test_bus_clock_is_told(kvm: Kvm) -> None:
    """KVM_CHECK_EXTENSION of a VM returns the period that it was given, before that 1 ns; of /dev/kvm 1.

    Documentation/virt/kvm/api.rst, 7.35 KVM_CAP_X86_APIC_BUS_CYCLES_NS.
    """
    with kvm.create_vm() as vm, kvm.create_vm() as other:
        vm.irq.create_split_chip()
        before = vm.check_extension(KVM_CAP_X86_APIC_BUS_CYCLES_NS)
        vm.enable_cap(KVM_CAP_X86_APIC_BUS_CYCLES_NS, 40)
        answers = [asked.check_extension(KVM_CAP_X86_APIC_BUS_CYCLES_NS) for asked in (vm, other, kvm)]
    assert (before, answers) == (1, [40, 1, 1])


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
