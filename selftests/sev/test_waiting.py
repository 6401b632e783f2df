# SPDX-License-Identifier: Apache-2.0
"""vCPUs of SEV-ES and SNP guests that wait: HLT, AP reset hold by page and by MSR, APs created at INIT.

GHCB specification, 2.3.1 (AP reset hold by the MSR protocol), 4.1 (AP reset hold) and 4.3 (SMP booting);
sev_vcpu_deliver_sipi_vector() in Linux.
"""

from __future__ import annotations

import time

import pytest

from kvmpy import (
    KVM_MP_STATE_AP_RESET_HOLD,
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED,
    Agent,
    ApResetHoldExit,
    FailEntryExit,
    GuestVcpu,
    GuestVm,
    MakeVm,
)
from kvmpy.core.vcpu import RUN_DEADLINE, RUN_EINTR
from kvmpy.x86.ghcb import MsrInfo

with_ghcb = pytest.mark.protections("all", has_ghcb=True)
with_snp = pytest.mark.protections("all", must_validate=True)
both_ways = pytest.mark.parametrize("by_msr", [False, True], ids=["page", "msr"])

INIT, STARTUP = 0x4500, 0x4608
SVM_EXIT_ERR = 0xFFFF_FFFF
ROUND = 0.2
PATIENCE = 15.0

GUEST = """
#include <kvmpy/guest.h>

u64 nmis GUEST_SHARED;

static void on_nmi(struct exception_frame *frame)
{
	nmis++;
}

void send(u64 icr)
{
	apic_send(1, icr);
}

void guest_main(void)
{
	apic_enable();
	guest_agent();
}

/* How the hypervisor answers a hold: status and information, or the GHCB MSR. */
void hold(u64 by_msr)
{
	guest_exception_install(NMI_VECTOR, on_nmi);
	for (u64 count = 0;; count++) {
		struct ghcb_answer answer = { 0 };
		u64 msr = 0;

		GUEST_SYNC(count);
		if (by_msr) {
			msr = ghcb_msr_call(0x006);
		} else {
			struct ghcb_use use;

			ghcb_begin(&use);
			answer = ghcb_call(use.ghcb, GHCB_EXIT_AP_HLT_LOOP, 0, 0);
			ghcb_end(&use);
		}
		GUEST_SYNC(answer.status, answer.info, msr);
	}
}

void halt(void)
{
	guest_exception_install(NMI_VECTOR, on_nmi);
	for (;;) {
		GUEST_SYNC(nmis);
		hlt();
	}
}
"""


def run_for_nothing(vcpu: GuestVcpu) -> None:
    """Run *vcpu* for a while, in which it makes no ucall and no exit."""
    vcpu.set_deadline(ROUND)
    outcome = RUN_EINTR
    while outcome == RUN_EINTR:
        outcome = vcpu.run_once()
    assert outcome == RUN_DEADLINE


def wait_for(vcpu: GuestVcpu, state: int) -> None:
    """Run *vcpu*, which exits no more, until it is in the multiprocessing state."""
    end = time.monotonic() + PATIENCE
    while vcpu.get_mp_state() != state:
        assert time.monotonic() < end, f"still in state {vcpu.get_mp_state()}"
        run_for_nothing(vcpu)


def answer_of(by_msr: bool, started: bool) -> tuple[int, int, int]:
    """Return what a hold comes back with: started by a SIPI or not."""
    if by_msr:
        return 0, 0, started << 12 | MsrInfo.AP_RESET_HOLD_RESP
    return 0, int(started), 0


class Pair:
    """A VM whose vCPU 0 sends what it is told, and whose vCPU 1 waits for its first start."""

    def __init__(self, vm: GuestVm, state: int = KVM_MP_STATE_UNINITIALIZED) -> None:
        self.vm = vm
        self.target: GuestVcpu = vm.vcpus[1]
        self.agent = Agent(vm.vcpus[0])
        vm.launch()
        self.target.set_mp_state(state)

    def create(self, request: int) -> None:
        """Let vCPU 0 ask for an AP creation of vCPU 1, with the features that it has."""
        assert self.agent.call("create", request, 1) == 0

    def send(self, *icrs: int) -> None:
        """Let vCPU 0 send interprocessor interrupts to vCPU 1."""
        for icr in icrs:
            assert isinstance(self.agent.call("send", icr), int)


def holding(make_vm: MakeVm, *, by_msr: bool) -> Pair:
    """Return a VM whose vCPU 1 is to hold once it is started."""
    vm = make_vm(GUEST, vcpus=2)
    vm.vcpus[1].set_entry("hold", by_msr)
    return Pair(vm)


def held(make_vm: MakeVm, *, by_msr: bool) -> Pair:
    """Return a VM whose vCPU 1 was started, and holds for the first time."""
    pair = holding(make_vm, by_msr=by_msr)
    pair.send(INIT, STARTUP)
    assert pair.target.sync().args == (0,)
    wait_for(pair.target, KVM_MP_STATE_AP_RESET_HOLD)
    return pair


@with_ghcb
def test_the_first_start(make_vm: MakeVm) -> None:
    """The first INIT and SIPI start an AP in the state it was launched with, whatever the vector says.

    GHCB specification, 4.3: the vCPU's state is encrypted, so the vector cannot become its RIP.
    """
    pair = holding(make_vm, by_msr=False)
    run_for_nothing(pair.target)
    pair.send(INIT, STARTUP)
    assert pair.target.sync().args == (0,)
    assert pair.target.get_mp_state() == KVM_MP_STATE_RUNNABLE


@with_ghcb
@both_ways
def test_a_hold_ends_with_a_sipi(make_vm: MakeVm, by_msr: bool) -> None:
    """An AP that holds comes back when it is sent INIT and SIPI, and is told that it was: not zero.

    GHCB specification, 4.1 (AP reset hold: SW_EXITINFO2) and 2.3.1 (GHCB MSR 0x007, bits 63:12).
    """
    pair = holding(make_vm, by_msr=by_msr)
    pair.send(INIT, STARTUP)
    for count in range(2):
        assert pair.target.sync().args == (count,)
        wait_for(pair.target, KVM_MP_STATE_AP_RESET_HOLD)
        pair.send(INIT, STARTUP)
        assert pair.target.sync().args == answer_of(by_msr, started=True)


@with_ghcb
@both_ways
def test_a_hold_ends_with_an_nmi(make_vm: MakeVm, by_msr: bool) -> None:
    """What is no SIPI may end a hold, too: the guest takes the NMI, and is told zero.

    GHCB specification, 4.1 (AP reset hold): a guest that is told zero asks again.
    """
    pair = held(make_vm, by_msr=by_msr)
    pair.target.events.nmi()
    assert pair.target.sync().args == answer_of(by_msr, started=False)
    assert pair.vm.symbol("nmis").u64 == 1


@with_ghcb
@both_ways
def test_a_sipi_without_init_is_no_start(make_vm: MakeVm, by_msr: bool) -> None:
    """SIPI alone wakes an AP that holds, but does not start it: it is told zero, and holds again.

    AMD APM volume 2, 16.5: only INIT lets a processor wait for SIPI; GHCB specification, 4.1.
    """
    pair = held(make_vm, by_msr=by_msr)
    pair.send(STARTUP)
    assert pair.target.sync().args == answer_of(by_msr, started=False)
    assert pair.target.sync().args == (1,)
    wait_for(pair.target, KVM_MP_STATE_AP_RESET_HOLD)
    pair.send(INIT, STARTUP)
    assert pair.target.sync().args == answer_of(by_msr, started=True)


@with_ghcb
@both_ways
def test_a_hold_without_an_apic_in_the_kernel(make_vm: MakeVm, by_msr: bool) -> None:
    """Where user space has the local APICs a hold is KVM_EXIT_AP_RESET_HOLD, and ends with the next KVM_RUN.

    Documentation/virt/kvm/api.rst, 5 (KVM_EXIT_AP_RESET_HOLD).
    """
    vcpu = make_vm.start(GUEST, "hold", by_msr, irqchip=None).vcpus[0]
    for count in range(2):
        assert vcpu.sync().args == (count,)
        vcpu.expect(ApResetHoldExit)
        assert vcpu.sync().args == answer_of(by_msr, started=False)


@with_ghcb
def test_hlt(make_vm: MakeVm) -> None:
    """HLT needs no GHCB: the vCPU is halted at once, and goes on behind the instruction after an interrupt.

    AMD APM volume 2, 15.35.3 (automatic exits): HLT is one, and no #VC.
    """
    vcpu = make_vm.start(GUEST, "halt").vcpus[0]
    for count in range(3):
        assert vcpu.sync().args == (count,)
        wait_for(vcpu, KVM_MP_STATE_HALTED)
        vcpu.events.nmi()
    assert vcpu.sync().args == (3,)


CREATE = """
#include <kvmpy/guest.h>

#define VMSA_MXCSR	0x408
#define MXCSR_OF_OURS	0x1f00

u8 vmsa_pages[2][4096] __attribute__((aligned(4096)));

/* As launched: MXCSR has its initial value. */
void ap_main(void)
{
	u32 mxcsr;

	asm volatile("stmxcsr %0" : "=m"(mxcsr));
	for (;;)
		GUEST_SYNC(mxcsr);
}

extern void _start(void);

static u8 *vmsa;

u64 create(u64 request, u64 features)
{
	return snp_ap_create(request, 1, guest_translate(vmsa, NULL), features);
}

void send(u64 icr)
{
	apic_send(1, icr);
}

void guest_main(u64 cpu1, u64 stack, u64 features)
{
	/* Not at the start of a 2 MiB page, which hosts refuse. */
	vmsa = (guest_translate(vmsa_pages[0], NULL) & 0x1fffff) ? vmsa_pages[0] : vmsa_pages[1];
	snp_vmsa_init(vmsa, (u64)_start, stack, cpu1, cpu1, features);
	*(u32 *)(vmsa + VMSA_MXCSR) = MXCSR_OF_OURS;
	GUEST_ASSERT_EQ(rmpadjust(vmsa, false, 1 | RMPADJUST_VMSA), 0);
	apic_enable();
	guest_agent();
}
"""
CREATE_ON_INIT, CREATE_NOW, DESTROY = range(3)
LAUNCHED, OURS = 0x1F80, 0x1F00


def with_vmsa(make_vm: MakeVm, state: int = KVM_MP_STATE_UNINITIALIZED) -> Pair:
    """Return a VM whose vCPU 0 has made a VMSA for vCPU 1, and asks for its creation as it is told."""
    vm = make_vm(CREATE, vcpus=2)
    first, second = vm.vcpus
    first.set_entry("guest_main", int(second.percpu), int(second.stack_top), 1)
    second.set_entry("ap_main")
    return Pair(vm, state)


@with_snp
@pytest.mark.parametrize(
    "state", [KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED], ids=["runnable", "uninitialized"]
)
def test_an_ap_that_is_created_at_once(make_vm: MakeVm, state: int) -> None:
    """AP_CREATE starts the vCPU in the state of the guest's own VMSA, without INIT or SIPI.

    GHCB specification, 4.1.9 (SNP AP creation, request 1).
    """
    pair = with_vmsa(make_vm, state)
    pair.create(CREATE_NOW)
    assert pair.target.sync(3).args == (OURS,)


@with_snp
def test_an_ap_that_is_created_at_init(make_vm: MakeVm) -> None:
    """AP_CREATE_ON_INIT leaves the vCPU alone until INIT and SIPI, and then uses the guest's own VMSA.

    GHCB specification, 4.1.9 (SNP AP creation, request 0).
    """
    pair = with_vmsa(make_vm)
    pair.create(CREATE_ON_INIT)
    run_for_nothing(pair.target)
    assert pair.target.get_mp_state() == KVM_MP_STATE_UNINITIALIZED
    pair.send(INIT, STARTUP)
    assert pair.target.sync().args == (OURS,)


@with_snp
@pytest.mark.parametrize("own", [False, True], ids=["launched", "created"])
def test_an_ap_that_is_destroyed(make_vm: MakeVm, own: bool) -> None:
    """AP_DESTROY halts the vCPU and takes its state: it cannot be entered when user space makes it runnable.

    GHCB specification, 4.1.9 (SNP AP creation, request 2); pre_sev_run() in Linux, which keeps
    an invalid VMSA out: KVM_EXIT_FAIL_ENTRY.
    """
    pair = with_vmsa(make_vm, KVM_MP_STATE_RUNNABLE)
    if own:
        pair.create(CREATE_NOW)
    assert pair.target.sync().args == (OURS if own else LAUNCHED,)
    pair.create(DESTROY)
    run_for_nothing(pair.target)
    assert pair.target.get_mp_state() == KVM_MP_STATE_HALTED
    pair.target.set_mp_state(KVM_MP_STATE_RUNNABLE)
    got = pair.target.run(3)
    assert isinstance(got, FailEntryExit), f"it runs: {got}"
    # -1, of which Linux 6.12 gives 32 bits and 7.2 gives 64.
    assert got.hardware_entry_failure_reason & 0xFFFF_FFFF == SVM_EXIT_ERR
