# SPDX-License-Identifier: Apache-2.0
"""A guest that notes what comes in over its IDT while it goes from SYNC to SYNC."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from kvmpy import GuestVcpu, GuestVm, MakeVm

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
