# SPDX-License-Identifier: Apache-2.0
"""Multiprocessing states as user space reads and writes them, and HLT behind them."""

from __future__ import annotations

import errno
import os
import time

import pytest

from kvmpy import (
    KVM_CAP_X86_DISABLE_EXITS,
    KVM_MP_STATE_AP_RESET_HOLD,
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_OPERATING,
    KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_STOPPED,
    KVM_MP_STATE_UNINITIALIZED,
    GuestVcpu,
    GuestVm,
    Kvm,
    MakeVm,
    Msi,
    VcpuKickedError,
    VcpuThread,
    Vm,
    refused,
)

pytestmark = pytest.mark.requires("KVM_CAP_MP_STATE", "KVM_CAP_SPLIT_IRQCHIP")

TIMEOUT = 10.0
VECTOR = 0x51
NMI = Msi.to(0, 0, delivery_mode=4)

GUEST = """
#include "../irq/interrupts.h"

#define VECTOR	0x51

static volatile u32 nmis;

static void nmi_handler(struct exception_frame *frame)
{
	nmis++;
}

static void setup(void)
{
	irq_install(VECTOR);
	guest_exception_install(NMI_VECTOR, nmi_handler);
	apic_enable();
	GUEST_SYNC('r');
}

void wait_for_interrupt(void)
{
	setup();
	irq_wait(VECTOR, 1);
	GUEST_SYNC(irq_count(VECTOR), nmis);
}

/* Interrupts are off: the one that is pending must not end the halt. */
void wait_for_nmi(void)
{
	setup();
	hlt();
	GUEST_SYNC(irq_count(VECTOR), nmis);
	irq_wait(VECTOR, 1);
	GUEST_SYNC(irq_count(VECTOR), nmis);
}
"""


def statistic_blocking(kvm: Kvm) -> str | None:
    """Tell when KVM has no statistic that says whether a vCPU is halted."""
    with kvm.create_vm() as vm:
        known = "blocking" in vm.create_vcpu().stats.get()
    return None if known else "the vCPU statistic `blocking` (Linux 6.0 or newer)"


BLOCKING = pytest.mark.requires("KVM_CAP_BINARY_STATS_FD", statistic_blocking)


def start(make_vm: MakeVm, entry: str) -> GuestVm:
    """Return a VM whose guest is ready to halt."""
    vm = make_vm.start(GUEST, entry)
    assert vm.vcpus[0].sync().args == (ord("r"),)
    return vm


class Sleeper:
    """Runs the guest to its next word in a thread of its own, and tells whether it sleeps."""

    def __init__(self, vcpu: GuestVcpu) -> None:
        # Opened first: KVM_GET_STATS_FD waits for a running vCPU.
        self._stats = vcpu.stats.get_fd()
        self._thread = VcpuThread(vcpu.sync, vcpu=vcpu)

    def __enter__(self) -> Sleeper:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            self._thread.stop()
        except VcpuKickedError:
            pass
        finally:
            self._stats.close()

    def wait_until(self, name: str) -> None:
        """Wait until statistic *name* is not 0: ``blocking`` while the vCPU is halted in the kernel."""
        end = time.monotonic() + TIMEOUT
        while not self._stats.read()[name].value:
            assert time.monotonic() < end, f"{name} is still 0: the vCPU does not halt"
            os.sched_yield()

    def said(self) -> tuple[int, ...]:
        """Return what the guest says once it is awake."""
        call = self._thread.join(TIMEOUT)
        assert call is not None
        return call.args

    def kicked(self, vcpu: GuestVcpu) -> None:
        """Kick the vCPU out of KVM_RUN."""
        vcpu.kick()
        with pytest.raises(VcpuKickedError):
            self._thread.join(TIMEOUT)


def wake(vm: GuestVm, msi: Msi) -> tuple[int, ...]:
    """Run the guest, which halts, and wake it with *msi*; return what it says then."""
    with Sleeper(vm.vcpus[0]) as sleeper:
        sleeper.wait_until("blocking")
        vm.irq.signal_msi(msi)
        return sleeper.said()


@BLOCKING
def test_halt_ends_with_interrupt(make_vm: MakeVm) -> None:
    """With an in-kernel local APIC HLT does not end KVM_RUN: the vCPU sleeps until an interrupt comes.

    Documentation/virt/kvm/api.rst, 4.38 KVM_GET_MP_STATE: HALTED waits for an interrupt.
    """
    vm = start(make_vm, "wait_for_interrupt")
    assert wake(vm, Msi.to(0, VECTOR)) == (1, 0)


@BLOCKING
def test_halted_state_is_seen(make_vm: MakeVm) -> None:
    """A halted vCPU that is kicked out of KVM_RUN is in state HALTED, and sleeps on when run again.

    Documentation/virt/kvm/api.rst, 4.38 KVM_GET_MP_STATE.
    """
    vm = start(make_vm, "wait_for_interrupt")
    vcpu = vm.vcpus[0]
    assert vcpu.get_mp_state() == KVM_MP_STATE_RUNNABLE
    for _ in range(2):
        with Sleeper(vcpu) as sleeper:
            sleeper.wait_until("blocking")
            sleeper.kicked(vcpu)
        assert vcpu.get_mp_state() == KVM_MP_STATE_HALTED
    assert wake(vm, Msi.to(0, VECTOR)) == (1, 0)
    assert vcpu.get_mp_state() == KVM_MP_STATE_RUNNABLE


@BLOCKING
def test_interrupts_off(make_vm: MakeVm) -> None:
    """With interrupts off a pending interrupt does not end HLT, an NMI does; the interrupt is taken later.

    Intel SDM 2A, HLT (an enabled interrupt or an NMI resumes execution).
    """
    vm = start(make_vm, "wait_for_nmi")
    vm.irq.signal_msi(Msi.to(0, VECTOR))
    assert wake(vm, NMI) == (0, 1)
    assert vm.vcpus[0].sync().args == (1, 1)


@BLOCKING
def test_set_halted(make_vm: MakeVm) -> None:
    """A vCPU that user space puts into HALTED does not run until an event comes for it.

    Documentation/virt/kvm/api.rst, 4.39 KVM_SET_MP_STATE.
    """
    vm = start(make_vm, "wait_for_nmi")
    vm.vcpus[0].set_mp_state(KVM_MP_STATE_HALTED)
    # The first NMI ends the state that was set, so the guest's own HLT needs another one.
    with Sleeper(vm.vcpus[0]) as sleeper:
        sleeper.wait_until("blocking")
        vm.irq.signal_msi(NMI)
        sleeper.wait_until("halt_exits")
        sleeper.wait_until("blocking")
        vm.irq.signal_msi(NMI)
        assert sleeper.said() == (0, 2)


@BLOCKING
def test_set_runnable_ends_halt(make_vm: MakeVm) -> None:
    """A halted vCPU that user space makes RUNNABLE goes on behind its HLT, without any event.

    Documentation/virt/kvm/api.rst, 4.39 KVM_SET_MP_STATE.
    """
    vcpu = start(make_vm, "wait_for_nmi").vcpus[0]
    with Sleeper(vcpu) as sleeper:
        sleeper.wait_until("blocking")
        sleeper.kicked(vcpu)
    vcpu.set_mp_state(KVM_MP_STATE_RUNNABLE)
    assert vcpu.sync().args == (0, 0)


@pytest.mark.parametrize(
    "state",
    [
        KVM_MP_STATE_UNINITIALIZED,
        KVM_MP_STATE_INIT_RECEIVED,
        KVM_MP_STATE_HALTED,
        KVM_MP_STATE_AP_RESET_HOLD,
        KVM_MP_STATE_RUNNABLE,
    ],
)
def test_state_is_kept(vm: Vm, state: int) -> None:
    """Every state of x86 that is written is read back.

    Documentation/virt/kvm/api.rst, 4.38 KVM_GET_MP_STATE and 4.39 KVM_SET_MP_STATE.
    """
    vm.irq.create_split_chip()
    vcpu = vm.create_vcpu()
    vcpu.set_mp_state(state)
    assert vcpu.get_mp_state() == state


@pytest.mark.parametrize("state", [KVM_MP_STATE_STOPPED, KVM_MP_STATE_OPERATING, 99])
def test_states_of_others(vm: Vm, state: int) -> None:
    """States that x86 does not have are refused with EINVAL, and the state stays.

    Documentation/virt/kvm/api.rst, 4.38 KVM_GET_MP_STATE (which state belongs to which architecture).
    """
    vm.irq.create_split_chip()
    vcpu = vm.create_vcpu()
    with refused(errno.EINVAL):
        vcpu.set_mp_state(state)
    assert vcpu.get_mp_state() == KVM_MP_STATE_RUNNABLE


@pytest.mark.parametrize("state", [KVM_MP_STATE_UNINITIALIZED, KVM_MP_STATE_HALTED])
def test_without_irqchip(vm: Vm, state: int) -> None:
    """Without an in-kernel irqchip the state is user space's: KVM takes RUNNABLE only, others are EINVAL.

    Documentation/virt/kvm/api.rst, 4.39 KVM_SET_MP_STATE.
    """
    vcpu = vm.create_vcpu(1)
    assert vcpu.get_mp_state() == KVM_MP_STATE_RUNNABLE
    with refused(errno.EINVAL):
        vcpu.set_mp_state(state)
    vcpu.set_mp_state(KVM_MP_STATE_RUNNABLE)


@pytest.mark.requires("KVM_CAP_X86_DISABLE_EXITS")
def test_disabled_exits_are_checked(vm: Vm) -> None:
    """Exits that KVM cannot disable are refused with EINVAL, and all once a vCPU exists.

    Documentation/virt/kvm/api.rst, 7.13 KVM_CAP_X86_DISABLE_EXITS.
    """
    offered = vm.check_extension(KVM_CAP_X86_DISABLE_EXITS)
    with refused(errno.EINVAL):
        vm.enable_cap(KVM_CAP_X86_DISABLE_EXITS, 1 << 31)
    vm.enable_cap(KVM_CAP_X86_DISABLE_EXITS, offered)
    vm.create_vcpu()
    with refused(errno.EINVAL):
        vm.enable_cap(KVM_CAP_X86_DISABLE_EXITS, offered)
