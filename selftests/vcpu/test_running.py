# SPDX-License-Identifier: Apache-2.0
"""KVM_RUN from outside: kicks, deadlines, signals, immediate exits, threads and other processes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from kvmpy import (
    GuestTimeoutError,
    GuestVm,
    IoExit,
    MakeVm,
    VcpuBusyError,
    VcpuKickedError,
    VcpuThread,
    Vm,
    ioctls,
    kvm_signal_mask,
    refused,
)
from kvmpy.core.vcpu import RUN_EINTR

TIMEOUT = 10.0
STORM = 40

GUEST = """
#include <kvmpy/guest.h>

GUEST_SHARED volatile u64 progress;

void count(void)
{
	u64 i;

	for (i = 1;; i++) {
		u32 spin;

		for (spin = 0; spin < 200; spin++)
			cpu_relax();
		progress = i;
		GUEST_SYNC(i);
	}
}

void spin(void)
{
	GUEST_SYNC('r');
	for (;;)
		progress++;
}

void sleep(void)
{
	cli();
	GUEST_SYNC('r');
	hlt();
}

void ask_port(void)
{
	GUEST_SYNC(inl(0x10));
	GUEST_SYNC(inl(0x10));
}
"""


def start(make_vm: MakeVm, entry: str) -> GuestVm:
    """Return a launched VM whose guest runs *entry*."""
    vm = make_vm(GUEST)
    vm.vcpus[0].set_entry(entry)
    vm.launch()
    return vm


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that another thread brings about."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, what
        os.sched_yield()


def wait_for_progress(vm: GuestVm) -> None:
    """Wait until the guest, which another thread runs, has come a bit further."""
    before = vm.symbol("progress").u64
    wait_until(lambda: vm.symbol("progress").u64 > before + 100, "the guest does not run")


def test_kick_of_running_guest(make_vm: MakeVm) -> None:
    """A kick from another thread ends KVM_RUN of a guest that never exits, and the guest can be run again.

    Documentation/virt/kvm/api.rst, struct kvm_run: immediate_exit together with a signal.
    """
    vm = start(make_vm, "spin")
    vcpu = vm.vcpus[0]
    assert tuple(vcpu.sync().args) == (ord("r"),)
    for _ in range(3):
        with VcpuThread(lambda: vcpu.run_until_kicked(TIMEOUT), vcpu=vcpu) as thread:
            wait_for_progress(vm)
            vcpu.kick()
            thread.join(TIMEOUT)


def test_kick_of_halted_guest(make_vm: MakeVm) -> None:
    """A kick ends KVM_RUN of a vCPU that is halted in the kernel with interrupts off.

    Documentation/virt/kvm/api.rst, 4.10 KVM_RUN: EINTR.
    """
    vm = start(make_vm, "sleep")
    vcpu = vm.vcpus[0]
    assert tuple(vcpu.sync().args) == (ord("r"),)
    with VcpuThread(lambda: vcpu.run_until_kicked(TIMEOUT), vcpu=vcpu) as thread:
        wait_until(lambda: vcpu.running, "KVM_RUN does not start")
        vcpu.kick()
        thread.join(TIMEOUT)


@pytest.mark.requires("KVM_CAP_IMMEDIATE_EXIT")
def test_kick_before_run(make_vm: MakeVm) -> None:
    """A kick that comes before KVM_RUN is not lost: the next run ends at once, the one after it runs.

    Documentation/virt/kvm/api.rst, struct kvm_run: immediate_exit is polled when KVM_RUN starts.
    """
    vm = start(make_vm, "count")
    vcpu = vm.vcpus[0]
    assert tuple(vcpu.sync().args) == (1,)
    for number in (2, 3):
        vcpu.kick()
        with pytest.raises(VcpuKickedError):
            vcpu.next()
        assert vm.symbol("progress").u64 == number - 1
        assert tuple(vcpu.sync().args) == (number,)


@pytest.mark.parametrize("entry", ["spin", "sleep"])
def test_deadline(make_vm: MakeVm, entry: str) -> None:
    """A guest that loops or halts for ever is stopped at its deadline, with an error that says where it was.

    Documentation/virt/kvm/api.rst, 4.10 KVM_RUN: EINTR; kvmpy's own promise that a run ends.
    """
    vm = start(make_vm, entry)
    vcpu = vm.vcpus[0]
    assert tuple(vcpu.sync().args) == (ord("r"),)
    started = time.monotonic()
    with pytest.raises(GuestTimeoutError, match="deadline"):
        vcpu.next(timeout=0.05)
    assert 0.05 <= time.monotonic() - started < TIMEOUT
    assert not vcpu.running


@pytest.mark.requires("KVM_CAP_IMMEDIATE_EXIT")
def test_immediate_exit(make_vm: MakeVm) -> None:
    """With immediate_exit KVM_RUN fails with EINTR, and the guest does not run an instruction.

    Documentation/virt/kvm/api.rst, struct kvm_run: immediate_exit.
    """
    vm = start(make_vm, "count")
    vcpu = vm.vcpus[0]
    assert tuple(vcpu.sync().args) == (1,)
    vcpu.run_area.immediate_exit = 1
    for _ in range(5):
        assert vcpu.run_once() == RUN_EINTR
        assert vcpu.run_errno == errno.EINTR
    assert vm.symbol("progress").u64 == 1
    vcpu.run_area.immediate_exit = 0
    assert tuple(vcpu.sync().args) == (2,)


@pytest.mark.requires("KVM_CAP_IMMEDIATE_EXIT")
def test_immediate_exit_completes_io(make_vm: MakeVm) -> None:
    """A run with immediate_exit completes the port access of the last exit, and nothing behind it.

    Documentation/virt/kvm/api.rst, KVM_EXIT_IO: re-enter with immediate_exit to complete pending operations.
    """
    vm = start(make_vm, "ask_port")
    if not vm.protection.traits.can_read_registers:
        pytest.skip("needs readable registers: the protection hides RAX")
    vcpu = vm.vcpus[0]
    got = vcpu.expect(IoExit)
    got.respond(0x1234_5678)
    exits = vcpu.exits
    vcpu.complete_io()
    assert vcpu.exits == exits
    assert vcpu.get_regs().rax & 0xFFFF_FFFF == 0x1234_5678
    assert tuple(vcpu.sync().args) == (0x1234_5678,)


def test_second_thread(make_vm: MakeVm) -> None:
    """A vCPU that runs in one thread refuses a second one with an error that says so; the first goes on.

    kvmpy's own promise: one thread at a time (KVM itself would let the second one wait).
    """
    vm = start(make_vm, "spin")
    vcpu = vm.vcpus[0]
    assert tuple(vcpu.sync().args) == (ord("r"),)
    with VcpuThread(lambda: vcpu.run_until_kicked(TIMEOUT), vcpu=vcpu) as thread:
        wait_until(lambda: vcpu.running, "KVM_RUN does not start")
        with pytest.raises(VcpuBusyError, match="another thread"):
            vcpu.next()
        wait_for_progress(vm)
        vcpu.kick()
        thread.join(TIMEOUT)


def test_close_while_running(make_vm: MakeVm) -> None:
    """Closing a vCPU or its VM in mid-run is refused with an error that says what to do.

    kvmpy's own promise: what a thread uses is not taken from under it.
    """
    vm = start(make_vm, "spin")
    vcpu = vm.vcpus[0]
    assert tuple(vcpu.sync().args) == (ord("r"),)
    with VcpuThread(lambda: vcpu.run_until_kicked(TIMEOUT), vcpu=vcpu) as thread:
        wait_until(lambda: vcpu.running, "KVM_RUN does not start")
        with pytest.raises(VcpuBusyError, match="kick it and join"):
            vcpu.close()
        with pytest.raises(VcpuBusyError, match="kick it and join"):
            vm.close()
        wait_for_progress(vm)
        vcpu.kick()
        thread.join(TIMEOUT)
    vm.close()
    assert vcpu.closed
    assert vm.closed


class Signals:
    """Counts a signal's arrivals in the main thread."""

    def __init__(self) -> None:
        self.count = 0

    def handle(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1


@pytest.fixture(params=[signal.SIGPROF, signal.SIGUSR1])
def storm(request: pytest.FixtureRequest) -> Iterator[Signals]:
    """A storm of signals at this thread: by setitimer() on its CPU time, or by another thread."""
    number = signal.Signals(request.param)
    counter = Signals()
    before = signal.signal(number, counter.handle)
    over = threading.Event()
    target = threading.get_ident()

    def pelt() -> None:
        while not over.wait(0.0005):
            signal.pthread_kill(target, number)

    thread = threading.Thread(target=pelt)
    try:
        if number == signal.SIGPROF:
            signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
        else:
            thread.start()
        yield counter
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        over.set()
        if thread.ident is not None:
            thread.join()
        signal.signal(number, before)


def test_signal_storm(make_vm: MakeVm, storm: Signals) -> None:
    """Signals that hit KVM_RUN again and again are handled, and cost the guest neither a step nor a word.

    Documentation/virt/kvm/api.rst, 4.10 KVM_RUN: EINTR, an unmasked signal is pending.
    """
    vm = start(make_vm, "count")
    number = 0
    while storm.count < STORM:
        number += 1
        assert tuple(vm.vcpus[0].sync().args) == (number,)
    assert vm.symbol("progress").u64 == number


def test_signal_mask(make_vm: MakeVm) -> None:
    """A signal that the thread blocks ends KVM_RUN if KVM_SET_SIGNAL_MASK lets it through; it stays pending.

    Documentation/virt/kvm/api.rst, 4.21 KVM_SET_SIGNAL_MASK.
    """
    vm = start(make_vm, "count")
    vcpu = vm.vcpus[0]
    number = signal.SIGUSR2
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        signal.pthread_kill(threading.get_ident(), number)
        assert tuple(vcpu.sync().args) == (1,)
        mask = kvm_signal_mask.with_entries(8)
        assert (mask.len, mask.entries_list()) == (8, [0] * 8)
        vcpu.ioctl(ioctls.KVM_SET_SIGNAL_MASK, mask)
        assert vcpu.run_once() == RUN_EINTR
        assert number in signal.sigpending()
    finally:
        signal.sigtimedwait({number}, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert tuple(vcpu.sync().args) == (2,)


def test_signal_mask_of_wrong_size(vm: Vm) -> None:
    """A signal mask that is not as long as the kernel's is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.21 KVM_SET_SIGNAL_MASK (len).
    """
    vcpu = vm.create_vcpu()
    with refused(errno.EINVAL):
        vcpu.ioctl(ioctls.KVM_SET_SIGNAL_MASK, kvm_signal_mask.with_entries(4))


@pytest.mark.parametrize("what", ["vm", "vcpu"])
def test_other_process(vm: Vm, what: str) -> None:
    """A VM's ioctls work in the process that created it only: another one that holds the descriptor gets EIO.

    Documentation/virt/kvm/api.rst, 1: the process that was used to create the VM.
    """
    vcpu = vm.create_vcpu()
    target, op = (vm, ioctls.KVM_CHECK_EXTENSION) if what == "vm" else (vcpu, ioctls.KVM_RUN)
    script = f"""
import errno, fcntl, sys
try:
    fcntl.ioctl({target.fd}, {op.nr}, 0)
except OSError as error:
    print(errno.errorcode[error.errno])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        pass_fds=[target.fd],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    assert done.stdout == "EIO\n"
