# SPDX-License-Identifier: Apache-2.0
"""What the tests of records record of KVM_RUN that is interrupted, completed or drained: the ways of VMMs."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from kvmpy import Kvm
from kvmpy.core.coalesced import ENTRIES
from kvmpy.core.exits import IoExit
from kvmpy.uapi import ioctls
from kvmpy.uapi.constants import KVM_EXIT_IO
from kvmpy.uapi.structs import kvm_cpuid2
from tests.debug.record_scenarios import machine
from tests.debug.scenario import scenario

# 1: mov $0x200, %cx; loop .; inc %al; out %al, $0x10; jmp 1b
COUNTING = bytes.fromhex("b90002e2fefec0e610ebf5")
EINTR = 4


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_IO")
def completed(kvm: Kvm) -> None:
    """Every exit is completed before the next run: KVM_RUN once more, with immediate_exit."""
    with machine(kvm, COUNTING) as vm:
        vcpu = vm.vcpus[0]
        for _ in range(12):
            assert isinstance(vcpu.run(5), IoExit)
            vcpu.complete_io()


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_IO")
def immediate_twice(kvm: Kvm) -> None:
    """A flag that stays set: three runs that end at once, and one without it."""
    with machine(kvm, COUNTING) as vm:
        vcpu = vm.vcpus[0]
        vcpu.run_area.immediate_exit = 1
        assert [vcpu.ioctl_raw(ioctls.KVM_RUN) for _ in range(3)] == [(-1, EINTR)] * 3
        vcpu.run_area.immediate_exit = 0
        vcpu.ioctl(ioctls.KVM_RUN)
        assert vcpu.run_area.exit_reason == KVM_EXIT_IO


@contextmanager
def alarms(seconds: float) -> Iterator[None]:
    """Send SIGALRM every *seconds*."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        # No signal is left for the handler of before, which is that of the test's time-out.
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_IO")
def signalled(kvm: Kvm) -> None:
    """A timer interrupts runs anywhere; the program looks at the registers, and runs on."""
    with machine(kvm, COUNTING) as vm, alarms(0.002):
        vcpu = vm.vcpus[0]
        exits = interrupted = 0
        while exits < 20 or not interrupted:
            if vcpu.ioctl_raw(ioctls.KVM_RUN) == (-1, EINTR):
                interrupted += 1
                vcpu.regs.get()
            else:
                exits += 1
        while vcpu.ioctl_raw(ioctls.KVM_RUN)[1]:
            pass


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_HLT")
def coalesced(kvm: Kvm) -> None:
    """More writes to a port than the ring holds, which the host empties at every other exit."""
    # mov $400, %cx; 1: out %al, $0x30; test $0x3f, %cl; jnz 2f; out %al, $0x31; 2: loop 1b; hlt
    code = bytes.fromhex("b99001e630f6c13f7502e631e2f5f4")
    with machine(kvm, code) as vm:
        vm.io.register_coalesced_mmio(0x30, 1, pio=True)
        vcpu = vm.vcpus[0]
        ring = vcpu.vm.io.coalesced_ring(vcpu)
        drained = 0
        while isinstance(vcpu.run(5), IoExit):
            drained += len(ring.drain())
        drained += len(ring.drain())
        ring.release()
        assert drained == 400 > 2 * ENTRIES


@scenario("KVM_SET_CPUID2 on vcpu0 returns 0")
def cpuid_room(kvm: Kvm) -> None:
    """A table with more room than was filled, and one with none."""
    with kvm.create_vm() as vm:
        table = kvm_cpuid2.with_entries(128)
        kvm.ioctl(ioctls.KVM_GET_SUPPORTED_CPUID, table)
        assert 0 < table.nent < 128
        kvm.ioctl_raw(ioctls.KVM_GET_SUPPORTED_CPUID, kvm_cpuid2.with_entries(0))
        vm.create_vcpu().ioctl(ioctls.KVM_SET_CPUID2, table)


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_IO")
def kicked_before(kvm: Kvm) -> None:
    """A kick that comes before the run that it ends."""
    with machine(kvm, COUNTING) as vm:
        vcpu = vm.vcpus[0]
        vcpu.kick()
        vcpu.run_once()
        assert isinstance(vcpu.run(5), IoExit)
