# SPDX-License-Identifier: Apache-2.0
"""KVM_RUN from outside: kicks, deadlines, signals, immediate exits, threads and other processes."""

from __future__ import annotations

import errno
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

import pytest

from kvmpy import (
    Exit,
    GuestTimeoutError,
    GuestVm,
    IoExit,
    MakeVm,
    MissingError,
    VcpuBusyError,
    VcpuKickedError,
    VcpuThread,
    Vm,
    ioctls,
    kvm_signal_mask,
    refused,
)
from kvmpy.core.vcpu import RUN_EINTR, VcpuTimeoutError
from selftests.conftest import wait_until

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

void read_for_ever(void)
{
	static u8 place[1 << 20];
	u8 *at = place;
	u64 left = 1 << 20;

	asm volatile("rep insb" : "+D"(at), "+c"(left) : "d"(0x10) : "memory");
}
"""


def wait_for_progress(vm: GuestVm) -> None:
    """Wait until the guest, which another thread runs, has come a bit further."""
    before = vm.symbol("progress").u64
    wait_until(lambda: vm.symbol("progress").u64 > before + 100, "the guest does not run")


def test_kick_of_running_guest(make_vm: MakeVm) -> None:
    """A kick from another thread ends KVM_RUN of a guest that never exits, and the guest can be run again.

    Documentation/virt/kvm/api.rst, struct kvm_run: immediate_exit together with a signal.
    """
    vm = make_vm.start(GUEST, "spin")
    vcpu = vm.vcpus[0]
    assert vcpu.sync().args == (ord("r"),)
    for _ in range(3):
        with VcpuThread(lambda: vcpu.run_until_kicked(TIMEOUT), vcpu=vcpu) as thread:
            wait_for_progress(vm)
            vcpu.kick()
            thread.join(TIMEOUT)


def test_kick_of_halted_guest(make_vm: MakeVm) -> None:
    """A kick ends KVM_RUN of a vCPU that is halted in the kernel with interrupts off.

    Documentation/virt/kvm/api.rst, 4.10 KVM_RUN: EINTR.
    """
    vcpu = make_vm.start(GUEST, "sleep").vcpus[0]
    assert vcpu.sync().args == (ord("r"),)
    with VcpuThread(lambda: vcpu.run_until_kicked(TIMEOUT), vcpu=vcpu) as thread:
        wait_until(lambda: vcpu.running, "KVM_RUN does not start")
        vcpu.kick()
        thread.join(TIMEOUT)


@pytest.mark.requires("KVM_CAP_IMMEDIATE_EXIT")
def test_kick_before_run(make_vm: MakeVm) -> None:
    """A kick that comes before KVM_RUN is not lost: the next run ends at once, the one after it runs.

    Documentation/virt/kvm/api.rst, struct kvm_run: immediate_exit is polled when KVM_RUN starts.
    """
    vm = make_vm.start(GUEST, "count")
    vcpu = vm.vcpus[0]
    assert vcpu.sync().args == (1,)
    for number in (2, 3):
        vcpu.kick()
        with pytest.raises(VcpuKickedError):
            vcpu.next()
        assert vm.symbol("progress").u64 == number - 1
        assert vcpu.sync().args == (number,)


@pytest.mark.parametrize("entry", ["spin", "sleep"])
def test_deadline(make_vm: MakeVm, entry: str) -> None:
    """A guest that loops or halts for ever is stopped at its deadline, with an error that says where it was.

    Documentation/virt/kvm/api.rst, 4.10 KVM_RUN: EINTR; kvmpy's own promise that a run ends.
    """
    vcpu = make_vm.start(GUEST, entry).vcpus[0]
    assert vcpu.sync().args == (ord("r"),)
    started, own = time.monotonic(), time.thread_time()
    vcpu.set_deadline(0.05)
    with pytest.raises(VcpuTimeoutError):
        vcpu.run()
    # At a busy moment the thread waits for a CPU, as long as it takes; it may not use up much.
    assert time.thread_time() - own < 1
    assert time.monotonic() - started >= 0.05
    with pytest.raises(GuestTimeoutError, match="deadline"):
        vcpu.next(timeout=0.05)
    assert not vcpu.running


def pass_time(seconds: float) -> None:
    """Be busy outside of KVM_RUN."""
    end = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() > end, "the clock stands still")


def test_deadline_between_two_runs(make_vm: MakeVm) -> None:
    """A deadline that passes while the host deals with an exit ends the next run before the guest goes on.

    kvmpy's own promise that a run ends at its deadline, whatever the host does meanwhile.
    """
    vm = make_vm.start(GUEST, "count")
    calls = vm.vcpus[0].syncs(timeout=0.05)
    assert next(calls).args == (1,)
    pass_time(0.06)
    with pytest.raises(GuestTimeoutError, match="deadline"):
        next(calls)
    assert vm.symbol("progress").u64 == 1
    # With a new deadline it goes on where it was.
    assert vm.vcpus[0].sync().args == (2,)


def test_deadline_of_a_string_instruction(make_vm: MakeVm) -> None:
    """A REP INS whose every exit the host answers ends at the deadline, in the middle of the instruction.

    Documentation/virt/kvm/api.rst, struct kvm_run: immediate_exit; x86_emulate_insn() ends each bundle.
    """
    vm = make_vm.start(GUEST, "read_for_ever")
    if not vm.protection.traits.has_string_io:
        pytest.skip("needs INS: the protection has no string I/O")
    answers = 0

    def answer(got: Exit) -> bool:
        nonlocal answers
        assert isinstance(got, IoExit)
        got.respond(bytes(got.size * got.count))
        answers += 1
        if answers == 3:
            pass_time(0.06)
        return True

    with pytest.raises(GuestTimeoutError, match="deadline"):
        vm.vcpus[0].run_to_done(0.05, on_exit=answer)
    assert 3 <= answers <= 4


@pytest.mark.requires("KVM_CAP_IMMEDIATE_EXIT")
def test_deadline_does_not_touch_the_completion_of_an_exit(make_vm: MakeVm) -> None:
    """The completion of a port access runs no guest code: a deadline that has passed does not keep it off.

    Documentation/virt/kvm/api.rst, KVM_EXIT_IO: re-enter with immediate_exit to complete pending operations.
    """
    vcpu = make_vm.start(GUEST, "ask_port").vcpus[0]
    got = vcpu.expect(IoExit, timeout=0.05)
    got.respond(7)
    pass_time(0.06)
    vcpu.complete_io()
    assert vcpu.sync().args == (7,)


def test_deadline_without_a_timer(make_vm: MakeVm) -> None:
    """Where RLIMIT_SIGPENDING leaves no timer, a run with a deadline is refused; a kick works all the same.

    timer_create(2): EAGAIN, kernel/signal.c: __sigqueue_alloc().
    """
    vm = make_vm.start(GUEST, "spin")
    vcpu = vm.vcpus[0]
    exits = vcpu.exits
    before = resource.getrlimit(resource.RLIMIT_SIGPENDING)
    resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, before[1]))
    try:

        def run() -> None:
            # In this thread: where launch() runs the vCPU, the timer of that one is there already.
            with pytest.raises(MissingError, match="RLIMIT_SIGPENDING"):
                vcpu.next()
            assert vcpu.exits == exits
            vcpu.set_deadline(None)
            vcpu.run()  # to the SYNC
            with pytest.raises(VcpuKickedError):
                vcpu.run()

        with VcpuThread(run, vcpu=vcpu) as thread:
            wait_for_progress(vm)
            vcpu.kick()
            thread.join(TIMEOUT)
    finally:
        resource.setrlimit(resource.RLIMIT_SIGPENDING, before)


@pytest.mark.requires("KVM_CAP_IMMEDIATE_EXIT")
def test_immediate_exit(make_vm: MakeVm) -> None:
    """With immediate_exit KVM_RUN fails with EINTR, and the guest does not run an instruction.

    Documentation/virt/kvm/api.rst, struct kvm_run: immediate_exit.
    """
    vm = make_vm.start(GUEST, "count")
    vcpu = vm.vcpus[0]
    assert vcpu.sync().args == (1,)
    vcpu.run_area.immediate_exit = 1
    for _ in range(5):
        assert vcpu.run_once() == RUN_EINTR
        assert vcpu.run_errno == errno.EINTR
    assert vm.symbol("progress").u64 == 1
    vcpu.run_area.immediate_exit = 0
    assert vcpu.sync().args == (2,)


@pytest.mark.requires("KVM_CAP_IMMEDIATE_EXIT")
def test_immediate_exit_completes_io(make_vm: MakeVm) -> None:
    """A run with immediate_exit completes the port access of the last exit, and nothing behind it.

    Documentation/virt/kvm/api.rst, KVM_EXIT_IO: re-enter with immediate_exit to complete pending operations.
    """
    vm = make_vm.start(GUEST, "ask_port")
    if not vm.protection.traits.can_read_registers:
        pytest.skip("needs readable registers: the protection hides RAX")
    vcpu = vm.vcpus[0]
    got = vcpu.expect(IoExit)
    got.respond(0x1234_5678)
    exits = vcpu.exits
    vcpu.complete_io()
    assert vcpu.exits == exits
    assert vcpu.regs.get().rax & 0xFFFF_FFFF == 0x1234_5678
    assert vcpu.sync().args == (0x1234_5678,)


def test_second_thread(make_vm: MakeVm) -> None:
    """A vCPU that runs in one thread refuses a second one with an error that says so; the first goes on.

    kvmpy's own promise: one thread at a time (KVM itself would let the second one wait).
    """
    vm = make_vm.start(GUEST, "spin")
    vcpu = vm.vcpus[0]
    assert vcpu.sync().args == (ord("r"),)
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
    vm = make_vm.start(GUEST, "spin")
    vcpu = vm.vcpus[0]
    assert vcpu.sync().args == (ord("r"),)
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
    vm = make_vm.start(GUEST, "count")
    number = 0
    while storm.count < STORM:
        number += 1
        assert vm.vcpus[0].sync().args == (number,)
    assert vm.symbol("progress").u64 == number


def test_signal_mask(make_vm: MakeVm) -> None:
    """A signal that the thread blocks ends KVM_RUN if KVM_SET_SIGNAL_MASK lets it through; it stays pending.

    Documentation/virt/kvm/api.rst, 4.21 KVM_SET_SIGNAL_MASK.
    """
    vcpu = make_vm.start(GUEST, "count").vcpus[0]
    number = signal.SIGUSR2
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        signal.pthread_kill(threading.get_ident(), number)
        assert vcpu.sync().args == (1,)
        mask = kvm_signal_mask.with_entries(8)
        assert (mask.len, mask.entries_list()) == (8, [0] * 8)
        vcpu.ioctl(ioctls.KVM_SET_SIGNAL_MASK, mask)
        assert vcpu.run_once() == RUN_EINTR
        assert number in signal.sigpending()
    finally:
        signal.sigtimedwait({number}, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert vcpu.sync().args == (2,)


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
