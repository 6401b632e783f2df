# SPDX-License-Identifier: Apache-2.0
"""A guest with labelled instructions in both rings, for breakpoints and steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmpy import DebugExit, GuestVcpu, GuestVm, Gva, MakeVm, Missing, Ucall
from kvmpy.testing.gate import refuse
from kvmpy.testing.host import platform_name

# RAX counts: 1 at ring_b, 2 at ring_write, 3 at ring_read and at the end.
GUEST = """
#include <kvmpy/guest.h>

#define LINE(ring, data)							\\
({										\\
	u64 rax;								\\
										\\
	asm volatile("xorl %%eax, %%eax\\n"					\\
		     ".globl " ring "_a, " ring "_b, " ring "_write, " ring "_c\\n" \\
		     ".globl " ring "_read, " ring "_d, " ring "_end\\n"		\\
		     ring "_a:	incq %%rax\\n"					\\
		     ring "_b:	incq %%rax\\n"					\\
		     ring "_write: movq %%rax, %1\\n"				\\
		     ring "_c:	incq %%rax\\n"					\\
		     ring "_read: movq %1, %%rdx\\n"				\\
		     ring "_d:	nop\\n"						\\
		     ring "_end: nop\\n"						\\
		     : "=&a"(rax), "+m"(data) : : "rdx", "memory");		\\
	rax;									\\
})

u64 kernel_data[4];
GUEST_USER_DATA u64 user_data[4];
GUEST_USER_DATA u8 stack[4096];

static volatile u64 taken[32];
static volatile u64 taken_rip;

static void count(struct exception_frame *frame)
{
	taken[frame->vector]++;
	taken_rip = frame->rip;
}

static __noinline u64 kernel_line(void)
{
	return LINE("kernel", kernel_data[1]);
}

static GUEST_USER u64 user_line(u64 unused)
{
	return LINE("user", user_data[1]);
}

void guest_main(u64 user)
{
	guest_exception_install(DB_VECTOR, count);
	guest_exception_install(NMI_VECTOR, count);
	guest_exception_install(BP_VECTOR, count);
	GUEST_SYNC(0);
	if (user) {
		struct guest_user_exit exit = guest_user_run(user_line, 0, stack + sizeof(stack));

		GUEST_SYNC(exit.value, taken[DB_VECTOR], taken[NMI_VECTOR], taken[BP_VECTOR], taken_rip);
	} else {
		GUEST_SYNC(kernel_line(), taken[DB_VECTOR], taken[NMI_VECTOR], taken[BP_VECTOR], taken_rip);
	}
}
"""


class Line:
    """A vCPU that stands before the labelled instructions of *ring*."""

    def __init__(self, vm: GuestVm, ring: str) -> None:
        self.vm = vm
        self.ring = ring
        self.vcpu: GuestVcpu = vm.vcpus[0]
        self.vcpu.set_entry("guest_main", int(ring == "user"))
        vm.launch()
        self.vcpu.sync()
        self.vcpu.complete_io()

    def at(self, label: str) -> Gva:
        """Return the address of a label."""
        return self.vm.program.address_of(f"{self.ring}_{label}")

    @property
    def data(self) -> Gva:
        """The variable that the line writes and reads; nobody touches its neighbours."""
        return self.vm.program.address_of(f"{self.ring}_data") + 8

    def hit(self) -> DebugExit:
        """Run to the next debug exit."""
        return self.vcpu.expect(DebugExit)

    def step(self, control: int) -> DebugExit:
        """Run one instruction; *control* is given again each time, as it counts for the next run."""
        self.vcpu.debug.set(control)
        return self.hit()

    def finish(self) -> tuple[int, ...]:
        """Run to the end; return RAX, how many #DB, NMIs and #BP the guest took, and the last one's RIP."""
        got = self.vcpu.next()
        if not isinstance(got, Ucall):
            raise self.vcpu.unexpected(got, "the end of the line")
        return got.args


LineMaker = Callable[..., Line]


@pytest.fixture
def debug_registers(request: pytest.FixtureRequest) -> None:
    """Skip where a guest's debug registers are not the CPU's: what is armed there may hit another guest."""
    if platform_name() != "host":
        what, how = (
            "debug registers for guests",
            "a CPU that virtualises: QEMU alone does not load them at VMRUN",
        )
        refuse(request.node, [Missing(what, how, ("debug-registers",))])


@pytest.fixture
def line(make_vm: MakeVm) -> LineMaker:
    """Make the guest, standing before its line in ring 0 ("kernel") or 3 ("user")."""

    def make(ring: str = "kernel") -> Line:
        return Line(make_vm(GUEST), ring)

    return make
