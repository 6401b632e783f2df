# SPDX-License-Identifier: Apache-2.0
"""No irqchip in the kernel: user space hands in every interrupt with KVM_INTERRUPT."""

from __future__ import annotations

import errno

from kvmpy import AGENT, Agent, GuestVm, HltExit, IrqWindowOpenExit, MakeVm, Vm, refused
from selftests.conftest import said

VECTOR = 0x51

GUEST = """
#include <kvmpy/guest.h>

static volatile u32 count;

static void handler(struct exception_frame *frame)
{
	count++;
	GUEST_SYNC('h', frame->vector);
}

void guest_main(void)
{
	guest_exception_install(0x51, handler);
	GUEST_SYNC('c', count);
	for (;;) {
		irq_window();
		GUEST_SYNC('i', count);
	}
}
"""

HALTING = """
#include <kvmpy/guest.h>

static volatile u32 count;

static void handler(struct exception_frame *frame)
{
	count++;
}

void guest_main(void)
{
	guest_exception_install(0x51, handler);
	while (!count)
		sti_hlt();
	GUEST_SYNC(count);
}
"""


def start(make_vm: MakeVm) -> GuestVm:
    """Return a VM without irqchip, its guest with interrupts off."""
    vm = make_vm.start(GUEST, irqchip=None)
    assert said(vm) == ("c", 0)
    return vm


def test_interrupt_window(make_vm: MakeVm) -> None:
    """With request_interrupt_window KVM_RUN ends as soon as the guest can take an interrupt.

    Documentation/virt/kvm/api.rst, 4.16 KVM_INTERRUPT and KVM_EXIT_IRQ_WINDOW_OPEN.
    """
    vm = start(make_vm)
    vcpu = vm.vcpus[0]
    area = vcpu.run_area
    assert (area.if_flag, area.ready_for_interrupt_injection) == (0, 0)
    area.request_interrupt_window = 1
    vcpu.expect(IrqWindowOpenExit)
    area.request_interrupt_window = 0
    assert (area.if_flag, area.ready_for_interrupt_injection) == (1, 1)
    vcpu.events.interrupt(VECTOR)
    assert said(vm) == ("h", VECTOR)
    assert said(vm) == ("i", 1)


def test_halt_is_left_to_user_space(make_vm: MakeVm) -> None:
    """Without a local APIC in the kernel HLT ends KVM_RUN, and KVM_INTERRUPT lets the guest go on.

    Documentation/virt/kvm/api.rst, KVM_EXIT_HLT and 4.16 KVM_INTERRUPT.
    """
    vm = make_vm.start(HALTING, irqchip=None)
    vm.vcpus[0].expect(HltExit)
    vm.vcpus[0].events.interrupt(VECTOR)
    assert vm.vcpus[0].sync().args == (1,)


def test_task_priority_is_shared(make_vm: MakeVm) -> None:
    """kvm_run's cr8 is the guest's CR8 in both directions.

    Documentation/virt/kvm/api.rst, struct kvm_run: cr8 is input and output without an in-kernel local APIC.
    """
    agent = Agent(make_vm(AGENT, irqchip=None).vcpus[0])
    agent.start()
    agent.vcpu.run_area.cr8 = 5
    assert agent.read_cr(8) == 5
    assert agent.write_cr(8, 9) is None
    assert agent.read_cr(8) == 9
    assert agent.vcpu.run_area.cr8 == 9


def test_vector_out_of_range(vm: Vm) -> None:
    """Vectors above 255 are refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.16 KVM_INTERRUPT.
    """
    vcpu = vm.create_vcpu()
    with refused(errno.EINVAL):
        vcpu.events.interrupt(256)


def test_pic_in_kernel(vm: Vm) -> None:
    """With the PICs in the kernel KVM_INTERRUPT fails with ENXIO.

    Documentation/virt/kvm/api.rst, 4.16 KVM_INTERRUPT: "-ENXIO if the PIC is in the kernel".
    """
    vm.irq.create_chip()
    vcpu = vm.create_vcpu()
    with refused(errno.ENXIO):
        vcpu.events.interrupt(VECTOR)
