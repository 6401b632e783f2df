# SPDX-License-Identifier: Apache-2.0
"""What the tests of nested SVM share: an L1 that runs the host's code in an L2."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from kvmpy import L1, L2, Cpuid, MakeVm, SvmExit, VmExit


@pytest.fixture(params=[False, True], ids=["shadow", "npt"])
def npt(request: pytest.FixtureRequest) -> bool:
    """Whether L2 has nested page tables: KVM runs it on its own copy of those, else on L1's tables."""
    return bool(request.param)


@pytest.fixture
def l2(make_vm: MakeVm, npt: bool) -> L2:
    """The L2 of a VM with one vCPU."""
    return L2(make_vm(L1).vcpus[0], npt=npt)


def offered(l2: L2, feature: str) -> bool:
    """Tell whether L1's CPUID has a feature."""
    return Cpuid.from_struct(l2.vcpu.cpuid.get()).has(feature)


# An L1 whose handlers note what arrives, in L1 and in L2.
NOTING = (
    L1
    + """
#include <kvmpy/guest.h>

struct note {
	u64 count, error_code, rip, cr2, in_l2;
};

GUEST_SHARED struct note notes[256];
static u64 pended;	/* the vector of L1's local APIC */
GUEST_SHARED volatile u64 *device;	/* what a handler reads, if anything */

static void note(struct exception_frame *frame)
{
	struct note *mine = &notes[frame->vector];

	mine->count++;
	mine->error_code = frame->error_code;
	mine->rip = frame->rip;
	mine->cr2 = read_cr2();
	mine->in_l2 = frame->rsp - (uintptr_t)guest_l2()->stack_top + 0x4000 <= 0x4000;
	if (device)
		mine->error_code = *device;
	if (pended && frame->vector == pended)
		apic_eoi();
}

u64 note_all(void)
{
	for (int vector = 0; vector < 256; vector++)
		guest_exception_install(vector, note);
	return 0;
}

/* An interrupt for L1 itself, which is not let in yet. */
u64 pend_interrupt(u64 vector)
{
	apic_enable();
	pended = vector;
	apic_send_self(vector);
	return 0;
}

/* Run L2 with L1's interrupt flag set, but behind CLGI. */
u64 run_open(struct guest_l2 *l2)
{
	clgi();
	sti();
	u64 code = l2_run(l2);
	cpu_relax();
	cli();
	return code;
}

void *const noting_calls[] = { note_all, pend_interrupt, run_open };
"""
)


class Note(NamedTuple):
    """How often a vector arrived, and what the last one was like."""

    times: int
    error_code: int
    rip: int
    cr2: int
    in_l2: int


class Notes:
    """An L2 under the noting L1."""

    def __init__(self, l2: L2) -> None:
        self.l2 = l2
        self.call("note_all")
        l2.reset()
        # What a delivery touches is in place then. QEMU without KVM takes an interrupt whose delivery
        # faulted for an exception.
        assert l2.run(b"\xcd\x40").code == SvmExit.VMMCALL
        assert list(self.take()) == [0x40]
        l2.reset()

    def call(self, function: str, *arguments: int) -> int:
        """Let L1 call a function of its program."""
        result = self.l2.agent.call(function, *arguments)
        assert isinstance(result, int), str(result)
        return result

    def take(self) -> dict[int, Note]:
        """Return what arrived since the last look, by vector."""
        words = self.l2.vm.symbol("notes").view("Q")
        seen = {at: Note(*words[5 * at : 5 * at + 5]) for at in range(256) if words[5 * at]}
        for at in range(len(words)):
            words[at] = 0
        return seen

    def run_open(self) -> VmExit:
        """Run L2 with L1's interrupt flag set."""
        self.call("run_open", int(self.l2.gva))
        return self.l2.last_exit


@pytest.fixture
def notes(make_vm: MakeVm, npt: bool) -> Notes:
    """An L2 whose handlers, and L1's, note what arrives."""
    return Notes(L2(make_vm(NOTING).vcpus[0], npt=npt))
