# SPDX-License-Identifier: Apache-2.0
"""What kvm_run tells of a guest's interrupt flag where KVM cannot read its registers."""

from __future__ import annotations

import pytest

from kvmpy import Agent, MakeVm, SystemEventExit

pytestmark = pytest.mark.protections("all", has_ghcb=True)

GUEST = """
#include <kvmpy/guest.h>

/* Ask without a handler, which would turn interrupts off. */
void ask(u64 request, u64 open)
{
	wrmsr(MSR_SEV_ES_GHCB, request);
	if (open)
		asm volatile("sti; nop; rep; vmmcall; cli");
	else
		asm volatile("cli; nop; rep; vmmcall");
}

void guest_main(void)
{
	guest_agent();
}
"""
TERMINATE = 0x100


@pytest.mark.parametrize("is_open", [False, True], ids=["cli", "sti"])
def test_at_an_exit(make_vm: MakeVm, is_open: bool) -> None:
    """At an exit if_flag is the guest's interrupt flag, as the processor tells it beside the encrypted state.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure; AMD APM volume 2, 15.21.5 (GUEST_INTERRUPT_MASK).
    """
    agent = Agent(make_vm(GUEST).vcpus[0])
    agent.start()
    agent.begin_call("ask", TERMINATE, int(is_open))
    agent.vcpu.expect(SystemEventExit)
    flag = agent.vcpu.run_area.if_flag
    assert flag == int(is_open), f"the guest's interrupt flag is {int(is_open)}, kvm_run tells {flag}"
