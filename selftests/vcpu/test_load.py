# SPDX-License-Identifier: Apache-2.0
"""vCPU threads that move between CPUs, vCPUs that are created in a race, processes that die under way."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import signal
import sys
import threading
import warnings

from kvmpy import GuestProgram, Kvm, KvmError, MakeLoad, MakeVm, MissingError, VcpuThread, Vm
from kvmpy.core.threads import allowed_cpus
from selftests.conftest import UNDER_LOAD, Beside, turns

SYS_GETCPU, ARCH_GET_FS, SYS_ARCH_PRCTL = 309, 0x1003, 158
libc = ctypes.CDLL(None, use_errno=True)

# Leaves all the time.
EXITS = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	for (;;)
		GUEST_SYNC();
}
"""
# Never leaves.
SPINS = """
#include <kvmpy/guest.h>

static GUEST_USER u64 spin(u64 arg)
{
	for (;;)
		barrier();
	return arg;
}

static u64 stacks[8][64] GUEST_USER_DATA;

void guest_main(void)
{
	u32 me = guest_cpu_index();

	guest_user_run(spin, 0, stacks[me] + ARRAY_SIZE(stacks[me]));
}
"""


class Rseq:
    """The restartable sequences area of the calling thread, which glibc registers (rseq(2))."""

    def __init__(self) -> None:
        try:
            offset = ctypes.c_ssize_t.in_dll(libc, "__rseq_offset").value
            size = ctypes.c_uint.in_dll(libc, "__rseq_size").value
        except ValueError:
            size = 0
        if not size:
            raise MissingError(
                "rseq of glibc", "glibc 2.35 or newer, CONFIG_RSEQ=y, GLIBC_TUNABLES without it off"
            )
        base = ctypes.c_ulong()
        assert libc.syscall(SYS_ARCH_PRCTL, ARCH_GET_FS, ctypes.byref(base)) == 0
        # struct rseq: cpu_id_start, cpu_id.
        self.words = (ctypes.c_uint32 * 2).from_address(base.value + offset)

    @property
    def cpu(self) -> int:
        """The CPU that the kernel wrote down when it returned to this thread last."""
        return self.words[1]


def current_cpu() -> int:
    """Return the CPU that the kernel knows."""
    cpu = ctypes.c_uint()
    assert libc.syscall(SYS_GETCPU, ctypes.byref(cpu), None, None) == 0
    return cpu.value


@UNDER_LOAD
def test_rseq_follows_the_vcpu_thread(make_vm: MakeVm, load_seconds: float) -> None:
    """After KVM_RUN of a thread that was moved meanwhile its rseq area names the CPU that it runs on.

    rseq(2); virt/kvm: work that is done before the guest is entered is not lost for user space.
    """
    cpus = allowed_cpus()
    if len(cpus) < 2:
        raise MissingError("two CPUs", "a host with more, or taskset")
    vm = make_vm.start(EXITS)
    vcpu = vm.vcpus[0]
    moves = [0]
    compared = [0]
    stop = threading.Event()

    def body() -> None:
        rseq = Rseq()
        while not stop.is_set():
            vcpu.sync()
            before = moves[0]
            told, real = rseq.cpu, current_cpu()
            # An odd number: a move is under way.
            if before % 2 == 0 and moves[0] == before:
                assert told == real, f"rseq says CPU {told}, the thread is on CPU {real}"
                compared[0] += 1

    thread = VcpuThread(body, vcpu=vcpu)

    def migrate(turn: int) -> None:
        moves[0] += 1
        with contextlib.suppress(ProcessLookupError):  # it has failed: the join says how
            thread.pin([cpus[turn % len(cpus)]])
        moves[0] += 1
        before = compared[0]
        while compared[0] < before + 2 and thread.alive:
            os.sched_yield()

    with thread:
        for turn in turns(load_seconds):
            migrate(turn)
        stop.set()
        thread.join(vm.deadline)
    assert compared[0]


@UNDER_LOAD
def test_vcpus_move_between_cpus(make_load: MakeLoad, ring: int, rng: random.Random) -> None:
    """vCPU threads that are moved from CPU to CPU lose nothing that they wrote.

    Documentation/virt/kvm/api.rst 4.10 KVM_RUN: any CPU will do.
    """
    region = make_load(pages=60, ring=ring, execute=region_may_execute(make_load))
    cpus = allowed_cpus()
    with region.load as load:
        for _ in load.turns():
            for vcpu in region.vm.vcpus:
                os.sched_setaffinity(vcpu.thread_id, {rng.choice(cpus)})
            region.check()
    region.check()


def region_may_execute(make_load: MakeLoad) -> bool:
    """Whether shared memory may be executed under the protection of this run."""
    return make_load.make_vm.traits.emulator_reads_private


def test_the_boot_processor_is_chosen_before_any_vcpu(kvm: Kvm, load_seconds: float) -> None:
    """KVM_SET_BOOT_CPU_ID beside the creation of vCPUs works or is EBUSY, and is EBUSY once one is there.

    Documentation/virt/kvm/api.rst 4.41 KVM_SET_BOOT_CPU_ID.
    """
    for turn in turns(load_seconds):
        with kvm.create_vm() as vm:
            vm.irq.create_chip()
            results: list[int] = []

            def choose(number: int, vm: Vm = vm, results: list[int] = results) -> None:
                try:
                    vm.setup.set_boot_cpu_id(number % 4)
                except KvmError as error:
                    results.append(error.errno or -1)
                else:
                    results.append(0)

            with Beside(choose) as beside:
                while beside.count < turn % 3:
                    os.sched_yield()
                for vcpu_id in range(4):
                    vm.create_vcpu(vcpu_id)
            choose(0)
            choose(1)
        assert set(results) <= {0, errno.EBUSY}, results
        assert results[-2:] == [errno.EBUSY] * 2
        assert results == sorted(results), "chosen after it was EBUSY"


def test_processes_die_with_running_vcpus(kvm: Kvm, load_seconds: float, rng: random.Random) -> None:
    """Processes that are killed at any time with vCPUs in the guest leave a host that goes on making VMs.

    virt/kvm/kvm_main.c, kvm_destroy_vm() and the hardware's disabling with the last VM.
    """
    del kvm
    program = GuestProgram.from_c(SPINS)
    for _ in turns(load_seconds):
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
            child = os.fork()
        if not child:
            run_and_wait(program, writer)
        try:
            os.close(writer)
            early = rng.random() < 0.3
            if not early:
                assert os.read(reader, 1) == b"1"
            # Some die in the middle of making the VM.
            for _spin in range(rng.randrange(20_000)):
                pass
        finally:
            os.kill(child, signal.SIGKILL)
            os.close(reader)
            _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    with Kvm() as again, again.create_vm(GuestProgram.from_c(EXITS), protection="none") as vm:
        vm.launch()
        vm.vcpus[0].sync()


def run_and_wait(program: GuestProgram, told: int) -> None:
    """In the child: run a VM of four vCPUs, in threads, until killed."""
    try:
        kvm = Kvm()
        vm = kvm.create_vm(program, vcpus=4, protection="none", deadline=60.0)
        vm.launch()
        threads = [VcpuThread(vcpu.next, vcpu=vcpu).start() for vcpu in vm.vcpus]
        while not all(vcpu.running for vcpu in vm.vcpus):
            os.sched_yield()
        os.write(told, b"1")
        for thread in threads:
            thread.join(60)
    finally:
        sys.stdout.flush()
        os._exit(3)
