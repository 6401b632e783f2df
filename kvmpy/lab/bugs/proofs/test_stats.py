# SPDX-License-Identifier: Apache-2.0
"""Proofs of the bugs of statistics."""

from __future__ import annotations

import time

import pytest

from kvmpy import KVM_CAP_HALT_POLL, L1, L2, MakeVm, Msi, VcpuThread

pytestmark = pytest.mark.protections("none")

VECTOR = 0x51

HALTING = """
#include <kvmpy/guest.h>

static void woken(struct exception_frame *frame)
{
	apic_eoi();
}

void guest_main(void)
{
	guest_exception_install(0x51, woken);
	apic_enable();
	GUEST_SYNC(0);
	sti_hlt();
	GUEST_SYNC(1);
}
"""


@pytest.mark.bug(200)
def test_nested_run(make_vm: MakeVm) -> None:
    l2 = L2(make_vm(L1).vcpus[0])
    l2.reset()
    l2.vmcb["asid"] = 0
    before = l2.vcpu.stats.get()["nested_run"].value
    l2.agent.must(b"\x0f\x01\xd8", rax=l2.pa(l2.vmcb_gva))
    assert l2.vcpu.stats.get()["nested_run"].value == before


@pytest.mark.bug(201)
def test_polling(make_vm: MakeVm) -> None:
    vm = make_vm(HALTING)
    vm.enable_cap(KVM_CAP_HALT_POLL, 0)
    vm.launch()
    vcpu = vm.vcpus[0]
    vcpu.sync()
    with vcpu.stats.get_fd() as stats, VcpuThread(vcpu.sync, vcpu=vcpu) as thread:
        end = time.monotonic() + 5
        while stats.read()["blocking"].value != 1 and time.monotonic() < end:
            pass
        vm.irq.signal_msi(Msi.to(0, VECTOR))
        thread.join(10)
        assert stats.read()["halt_attempted_poll"].value == 0
