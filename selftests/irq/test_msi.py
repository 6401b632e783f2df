# SPDX-License-Identifier: Apache-2.0
"""KVM_SIGNAL_MSI: messages from user space to the guest's local APICs."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    KVM_CAP_X2APIC_API,
    KVM_X2APIC_API_USE_32BIT_IDS,
    GuestVm,
    KvmError,
    MakeVm,
    Msi,
    Vm,
    refused,
)

pytestmark = pytest.mark.requires("KVM_CAP_SIGNAL_MSI")

VECTOR = 0x51
LOWEST_PRIORITY = 1
DELIVER_NMI = 4

# Each vCPU enables its APIC as its argument says (0: not, 1: xAPIC, 2: x2APIC), then answers with its counts.
GUEST = """
#include "interrupts.h"

#define VECTOR	0x51

static volatile u32 nmis[INTERRUPTS_CPUS];

static void nmi_handler(struct exception_frame *frame)
{
	nmis[guest_cpu_index()]++;
}

void guest_main(u64 mode, u64 ldr)
{
	irq_install(VECTOR);
	guest_exception_install(NMI_VECTOR, nmi_handler);
	if (mode == 1)
		apic_enable();
	if (mode == 2)
		x2apic_enable();
	if (mode == 1 && ldr)
		apic_write(APIC_LDR, ldr << 24);
	for (;;) {
		GUEST_SYNC(irq_count(VECTOR), nmis[guest_cpu_index()]);
		irq_window();
	}
}
"""


def start(
    make_vm: MakeVm,
    vcpus: int = 1,
    *,
    mode: int = 1,
    ids: list[int] | None = None,
    format_32bit: bool = False,
) -> GuestVm:
    """Return a VM whose vCPUs have set up their APICs."""

    def before(vm: GuestVm) -> None:
        if format_32bit:
            vm.enable_cap(KVM_CAP_X2APIC_API, KVM_X2APIC_API_USE_32BIT_IDS)

    vm = make_vm(GUEST, vcpus=vcpus, vcpu_ids=ids, before_vcpus=before)
    for vcpu in vm.vcpus:
        vcpu.set_entry("guest_main", mode, 1 << vcpu.index)
    vm.launch()
    assert counts(vm) == [(0, 0)] * len(vm.vcpus)
    return vm


def counts(vm: GuestVm) -> list[tuple[int, ...]]:
    """Return each vCPU's number of interrupts and NMIs after it had a chance to take what is pending."""
    return [vcpu.sync().args for vcpu in vm.vcpus]


@pytest.mark.parametrize(
    ("message", "mode", "expected"),
    [
        # Documentation/virt/kvm/api.rst, 4.71 KVM_SIGNAL_MSI: above 0 on delivery.
        pytest.param(Msi.to(1, VECTOR), 1, [(0, 0), (1, 0), (0, 0)], id="fixed"),
        # Intel SDM 3A, 12.6.2.1 (physical destination mode): everybody, in xAPIC mode.
        pytest.param(Msi.to(0xFF, VECTOR), 1, [(1, 0)] * 3, id="broadcast"),
        # 12.11.1 (message address) and 12.6.2.2 (flat model): who has a bit of the logical id in common.
        pytest.param(Msi.to(0b101, VECTOR, logical=True), 1, [(1, 0), (0, 0), (1, 0)], id="logical"),
        # 12.11.2 (message data): an NMI, whatever the vector.
        pytest.param(Msi.to(1, VECTOR, delivery_mode=DELIVER_NMI), 1, [(0, 0), (0, 1), (0, 0)], id="nmi"),
        # api.rst 4.71: "0 if guest blocked the MSI", here by an APIC that it has not enabled by software.
        pytest.param(Msi.to(0, VECTOR), 0, [(0, 0)] * 3, id="disabled-apic"),
    ],
)
def test_delivery(make_vm: MakeVm, message: Msi, mode: int, expected: list[tuple[int, int]]) -> None:
    """A message reaches the vCPUs that its destination names, as its delivery mode says, and no other; the
    result is their number.

    Documentation/virt/kvm/api.rst, 4.71 KVM_SIGNAL_MSI.
    """
    vm = start(make_vm, 3, mode=mode)
    assert vm.irq.signal_msi(message) == sum(map(sum, expected))
    assert counts(vm) == expected


def test_lowest_priority(make_vm: MakeVm) -> None:
    """A message with lowest-priority delivery reaches exactly one of its logical destinations.

    Intel SDM 3A, 12.6.2.4 (lowest priority delivery mode).
    """
    vm = start(make_vm, 3)
    message = Msi.to(0b110, VECTOR, logical=True, delivery_mode=LOWEST_PRIORITY)
    assert vm.irq.signal_msi(message) == 1
    got = counts(vm)
    assert got[0] == (0, 0)
    assert sorted(got[1:]) == [(0, 0), (1, 0)]


def test_pending_message_is_not_counted_twice(make_vm: MakeVm) -> None:
    """Two messages of one vector before the guest takes it are one interrupt.

    Intel SDM 3A, 12.8.4: the IRR has one bit a vector.
    """
    vm = start(make_vm)
    vm.irq.signal_msi(Msi.to(0, VECTOR))
    vm.irq.signal_msi(Msi.to(0, VECTOR))
    assert counts(vm) == [(1, 0)]
    assert counts(vm) == [(1, 0)]


def test_destination_that_does_not_exist(make_vm: MakeVm) -> None:
    """A message to an APIC id that no vCPU has is not reported as delivered, and no vCPU takes it.

    Documentation/virt/kvm/api.rst, 4.71 KVM_SIGNAL_MSI: above 0 means delivery; 0 and -1 are both seen here.
    """
    vm = start(make_vm, 2)
    try:
        delivered = vm.irq.signal_msi(Msi.to(77, VECTOR))
    except KvmError as error:
        assert error.errno == errno.EPERM  # noqa: PT017 - the other legal answer is below
        delivered = 0
    assert delivered == 0
    assert counts(vm) == [(0, 0)] * 2


@pytest.mark.requires(f"KVM_CAP_X2APIC_API&{KVM_X2APIC_API_USE_32BIT_IDS:d}", "KVM_CAP_MAX_VCPU_ID>=1024")
@pytest.mark.parametrize(("format_32bit", "reached"), [(True, 2), (False, 1)], ids=["32bit", "default"])
def test_upper_half_of_the_address(make_vm: MakeVm, format_32bit: bool, reached: int) -> None:
    """With KVM_X2APIC_API_USE_32BIT_IDS the upper address half holds bits 31-8 of the destination id; without
    it, it is ignored.

    Documentation/virt/kvm/api.rst, 4.71 KVM_SIGNAL_MSI and 7.7 KVM_CAP_X2APIC_API.
    """
    vm = start(make_vm, mode=2, ids=[0, 0x2C, 0x12C], format_32bit=format_32bit)
    assert vm.irq.signal_msi(Msi.to(0x12C, VECTOR)) == 1
    assert counts(vm) == [(int(index == reached), 0) for index in range(3)]


@pytest.mark.requires(f"KVM_CAP_X2APIC_API&{KVM_X2APIC_API_USE_32BIT_IDS:d}")
def test_low_bits_of_upper_half(vm: Vm) -> None:
    """With KVM_X2APIC_API_USE_32BIT_IDS bits 7-0 of the upper address half must be zero: EINVAL.

    Documentation/virt/kvm/api.rst, 4.71 KVM_SIGNAL_MSI.
    """
    vm.irq.create_chip()
    vm.enable_cap(KVM_CAP_X2APIC_API, KVM_X2APIC_API_USE_32BIT_IDS)
    vm.create_vcpu()
    message = Msi.to(0, VECTOR)
    with refused(errno.EINVAL):
        vm.irq.signal_msi(Msi(message.address | 1 << 32, message.data))


def test_unknown_flag(vm: Vm) -> None:
    """Flags other than KVM_MSI_VALID_DEVID are refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.71 KVM_SIGNAL_MSI.
    """
    vm.irq.create_chip()
    vm.create_vcpu()
    with refused(errno.EINVAL):
        vm.irq.signal_msi(Msi.to(0, VECTOR), flags=2)


def test_needs_irqchip(vm: Vm) -> None:
    """Without an in-kernel interrupt controller messages are refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.71 KVM_SIGNAL_MSI: "only valid with in-kernel irqchip".
    """
    vm.create_vcpu()
    with refused(errno.EINVAL):
        vm.irq.signal_msi(Msi.to(0, VECTOR))
