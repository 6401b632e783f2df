# SPDX-License-Identifier: Apache-2.0
"""The interrupt shadow: no interrupt comes between STI, or a load of SS, and the end of the next instruction.

Intel SDM volume 3, 6.8.3; AMD APM volume 2, 15.21.5 (the shadow as part of a VMCB).
"""

from __future__ import annotations

import pytest

from kvmpy import (
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_VCPUEVENT_VALID_SHADOW,
    DebugExit,
    GuestTimeoutError,
    IoExit,
    IrqWindowOpenExit,
    MakeVm,
    ShadowInt,
)
from kvmpy.testing.host import platform_name
from selftests.events.conftest import SMM_PORT, EventGuest, EventGuestMaker, with_smm_handler

VECTOR = 0x45
# QEMU without KVM forgets the shadow at VMRUN: there it is lost where the host's timer comes between the two
# instructions, which is seldom. A KVM that lets the interrupt in does so each time.
TRIES = 3 if platform_name().startswith("lab") else 1
SHADOWS = {"sti": ShadowInt.KVM_X86_SHADOW_INT_STI, "mov-ss": ShadowInt.KVM_X86_SHADOW_INT_MOV_SS}

GUEST = """
#include <kvmpy/guest.h>

#define VECTOR	0x45

GUEST_SHARED u64 came_at, allowed;
static volatile u64 store;

static void note(struct exception_frame *frame)
{
	came_at = frame->rip;
	apic_eoi();
}

void guest_main(void)
{
	u32 index = MSR_IA32_APICBASE;

	guest_exception_install(VECTOR, note);
	x2apic_enable();
	cli();
	apic_send_self(VECTOR);
	asm volatile("lea 1f(%%rip), %%rax; mov %%rax, %[allowed]; mov $0, %%eax; mov $0, %%edx;"
		     "sti; @INSTRUCTION@; 1: nop"
		     : [allowed] "=m"(allowed), [store] "=m"(store), "+c"(index)
		     : : "rax", "rbx", "rdx");
	irq_window();
}
"""

INSTRUCTIONS = {"nop": "nop", "store": "movq $1, %[store]", "cpuid": "cpuid", "rdmsr": "rdmsr", "hlt": "hlt"}


def shadowed(guest: EventGuest, kind: str) -> int:
    """Stand with interrupts on in a shadow of *kind*; return where."""
    events = guest.vcpu.events.get()
    events.interrupt.shadow, events.flags = SHADOWS[kind], KVM_VCPUEVENT_VALID_SHADOW
    guest.vcpu.events.set(events)
    return guest.rip


@pytest.mark.usefixtures("open_registers")
@pytest.mark.parametrize("kind", SHADOWS)
def test_interrupt_waits(event_guest: EventGuestMaker, kind: str) -> None:
    """An interrupt of KVM_INTERRUPT comes behind the first instruction in a shadow that user space set.

    Documentation/virt/kvm/api.rst, 4.32 KVM_SET_VCPU_EVENTS, KVM_VCPUEVENT_VALID_SHADOW.
    """
    guest = event_guest(interrupts=True)
    where = shadowed(guest, kind)
    guest.vcpu.events.interrupt(VECTOR)
    guest.go_on()
    assert guest.counts() == {VECTOR: 1}
    assert guest.seen(VECTOR).rip != where


@pytest.mark.usefixtures("open_registers")
@pytest.mark.requires("KVM_CAP_X86_SMM", "KVM_CAP_MULTI_ADDRESS_SPACE>=2")
@pytest.mark.parametrize("kind", [None, *SHADOWS], ids=["none", *SHADOWS])
def test_kept_over_an_smi(event_guest: EventGuestMaker, kind: str | None) -> None:
    """An SMI within a shadow leaves it as it was: the handler has none, and RSM brings it back.

    AMD APM volume 2, 10.3.3 (SMM_Intr_Shadow in the SMRAM image): SMM is not seen by the program below it.
    """
    guest = with_smm_handler(event_guest, interrupts=True)
    where = guest.rip if kind is None else shadowed(guest, kind)
    vcpu = guest.vcpu
    vcpu.events.smi()
    assert vcpu.expect(IoExit).port == SMM_PORT
    vcpu.complete_io()
    inside = vcpu.events.get()
    assert (inside.smi.smm, inside.interrupt.shadow) == (1, 0), "the handler stands in a shadow itself"
    vcpu.debug.set(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP)
    vcpu.expect(DebugExit)
    vcpu.debug.set(0)
    outside = vcpu.events.get()
    assert (outside.smi.smm, guest.rip) == (0, where)
    assert bool(outside.interrupt.shadow) == (kind is not None), (
        f"the shadow before the SMI was {kind}, after RSM it is {outside.interrupt.shadow}"
    )


@pytest.mark.usefixtures("open_registers")
@pytest.mark.parametrize("kind", SHADOWS)
def test_window_waits(event_guest: EventGuestMaker, kind: str) -> None:
    """The interrupt window that user space asked for opens behind the first instruction in a shadow.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, request_interrupt_window.
    """
    guest = event_guest(irqchip=None, interrupts=True)
    where = shadowed(guest, kind)
    guest.vcpu.run_area.request_interrupt_window = 1
    guest.vcpu.expect(IrqWindowOpenExit)
    assert guest.rip != where


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_behind_sti(make_vm: MakeVm, instruction: str) -> None:
    """An interrupt that is pending at STI comes behind the next instruction, also where that one exits."""
    for left in reversed(range(TRIES)):
        vm = make_vm.start(GUEST.replace("@INSTRUCTION@", INSTRUCTIONS[instruction]), "guest_main")
        try:
            vm.vcpus[0].run_to_done()
        except GuestTimeoutError:
            # A HLT that the interrupt came before waits for ever.
            if instruction == "hlt" and left:
                continue
            raise
        came, allowed = vm.symbol("came_at").u64, vm.symbol("allowed").u64
        if came >= allowed or not left:
            break
    assert came >= allowed > 0
