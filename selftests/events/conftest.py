# SPDX-License-Identifier: Apache-2.0
"""A guest that notes what comes in over its IDT while it goes from SYNC to SYNC."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from kvmpy import KVM_CAP_MULTI_ADDRESS_SPACE, Gpa, GuestVcpu, GuestVm, MakeVm, MissingError

# SMM has its own address space, and starts 0x8000 above SMBASE in a kind of real mode.
SMM_ADDRESS_SPACE = 1
SMM_BASE, SMM_SIZE = Gpa(0x3_0000), 0x1_0000
SMM_ENTRY = SMM_BASE + 0x8000
SMM_PORT, SMM_VALUE = 0x43, 0x5A
SMM_CODE = bytes([0xB0, SMM_VALUE, 0xE6, SMM_PORT, 0x0F, 0xAA])  # mov al; out port, al; rsm

# Ring 0 only.  The host may change "interrupts" between two SYNCs.
GUEST = """
#include <kvmpy/guest.h>

#define VECTORS	96

GUEST_SHARED struct {
	u64 count, error_code, rip, cr2, dr6;
} seen[VECTORS];

GUEST_SHARED u64 interrupts;

static void note(struct exception_frame *frame)
{
	u64 vector = frame->vector;

	seen[vector].count++;
	seen[vector].error_code = frame->error_code;
	seen[vector].rip = frame->rip;
	seen[vector].cr2 = read_cr2();
	seen[vector].dr6 = read_dr6();
}

/* Hosts that emulate ring 0 look for events every so many instructions only. */
static void stay_open(void)
{
	sti();
	for (int i = 0; i < 600; i++)
		cpu_relax();
}

/* A trap that returns with IRET, which lets NMIs in again. */
static void skip_ud2(struct exception_frame *frame)
{
	note(frame);
	frame->rip += 2;
}

void guest_main(u64 with_iret)
{
	for (int vector = 0; vector < VECTORS; vector++)
		guest_exception_install(vector, note);
	if (with_iret)
		guest_exception_install(UD_VECTOR, skip_ud2);
	for (u64 round = 0;; round++) {
		if (interrupts)
			stay_open();
		else
			cli();
		GUEST_SYNC(round);
		if (with_iret && round)
			asm volatile("ud2");
	}
}
"""


class Seen(NamedTuple):
    """How often a vector came, and what the last one was like."""

    times: int
    error_code: int
    rip: int
    cr2: int
    dr6: int


class EventGuest:
    """The guest, standing at a SYNC between two instructions."""

    def __init__(self, vm: GuestVm, *, interrupts: bool = False, with_iret: bool = False) -> None:
        self.vm = vm
        self.vcpu: GuestVcpu = vm.vcpus[0]
        self.vcpu.set_entry("guest_main", int(with_iret))
        vm.launch()
        self.allow_interrupts(interrupts)
        self.go_on()

    def allow_interrupts(self, on: bool) -> None:
        """Let the guest have its interrupt flag set (or clear) from its next round on."""
        self.vm.symbol("interrupts").u64 = int(on)

    def go_on(self) -> int:
        """Run to the next SYNC and stand behind it; return its number."""
        number = self.vcpu.sync().args[0]
        self.vcpu.complete_io()
        return int(number)

    @property
    def rip(self) -> int:
        """Where the guest stands."""
        return int(self.vcpu.regs.get().rip)

    def seen(self, vector: int) -> Seen:
        """Return what came in at *vector* so far."""
        return Seen(*self.vm.symbol("seen").view("Q")[5 * vector : 5 * vector + 5])

    def counts(self) -> dict[int, int]:
        """Return how often each vector came, those that did."""
        words = self.vm.symbol("seen").view("Q")
        return {vector: words[5 * vector] for vector in range(len(words) // 5) if words[5 * vector]}


EventGuestMaker = Callable[..., EventGuest]


@pytest.fixture
def event_guest(make_vm: MakeVm) -> EventGuestMaker:
    """Make the guest; *cap* is enabled with 1 before its vCPU exists."""

    def make(
        *,
        cap: int | None = None,
        irqchip: str | None = "split",
        interrupts: bool = False,
        with_iret: bool = False,
    ) -> EventGuest:
        def before_vcpus(vm: GuestVm) -> None:
            if cap is not None:
                vm.enable_cap(cap, 1)

        vm = make_vm(GUEST, irqchip=irqchip, before_vcpus=before_vcpus)
        return EventGuest(vm, interrupts=interrupts, with_iret=with_iret)

    return make


def with_smm_handler(event_guest: EventGuestMaker, **options: bool) -> EventGuest:
    """Return a guest whose SMM handler writes to a port and resumes."""
    guest = event_guest(**options)
    vm = guest.vm
    if vm.check_extension(KVM_CAP_MULTI_ADDRESS_SPACE) < 2:
        # kvm_arch_nr_memslot_as_ids(): one for VMs with private memory, which have no SMM.
        raise MissingError("an address space of its own for SMM", "a VM type without private memory in KVM")
    vm.memory.shared_view(SMM_ENTRY, len(SMM_CODE))[:] = SMM_CODE
    # lifetime: the slot shows guest memory, which the VM keeps.
    vm.set_user_memory_region(
        SMM_ADDRESS_SPACE << 16, SMM_BASE, SMM_SIZE, vm.memory.hva(SMM_BASE, private=False)
    )
    return guest
