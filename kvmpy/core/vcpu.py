# SPDX-License-Identifier: Apache-2.0
"""A vCPU: running it, with a deadline and kicks; its state is in :mod:`kvmpy.core.vcpu_state`."""

from __future__ import annotations

import contextlib
import errno
import mmap
from typing import TYPE_CHECKING, Any

from kvmpy.core import observe, recent
from kvmpy.core.errors import ClosedError, MissingError, VcpuBusyError, errno_name
from kvmpy.core.exits import Exit, read_exit
from kvmpy.core.vcpu_state import VcpuState
from kvmpy.uapi import ffi, ioctls, lib
from kvmpy.uapi.constants import ExitReason
from kvmpy.uapi.structs import kvm_run

if TYPE_CHECKING:
    from kvmpy.core.vm import Vm

RUN_EXIT = lib.KVMPY_RUN_EXIT
RUN_UCALL = lib.KVMPY_RUN_UCALL
RUN_KICKED = lib.KVMPY_RUN_KICKED
RUN_DEADLINE = lib.KVMPY_RUN_DEADLINE
RUN_EINTR = lib.KVMPY_RUN_EINTR
RUN_BUSY = lib.KVMPY_RUN_BUSY
RUN_STOPPED = lib.KVMPY_RUN_STOPPED
RUN_CLOSED = lib.KVMPY_RUN_CLOSED
RUN_NO_TIMER = lib.KVMPY_RUN_NO_TIMER
RUN_ERROR = lib.KVMPY_RUN_ERROR

_EXIT_NAMES = {int(reason): reason.name.removeprefix("KVM_EXIT_") for reason in ExitReason}
_IO, _MMIO = int(ExitReason.KVM_EXIT_IO), int(ExitReason.KVM_EXIT_MMIO)
_MEMORY_FAULT = int(ExitReason.KVM_EXIT_MEMORY_FAULT)
EHWPOISON = 133  # not in the errno module before Python 3.14


class VcpuKickedError(RuntimeError):
    """KVM_RUN was left because another thread called :meth:`Vcpu.kick`, or not begun after a stop()."""


class VcpuTimeoutError(TimeoutError):
    """The deadline of a run passed while the guest was still running."""


class Vcpu(VcpuState):
    """A virtual CPU; one thread at a time may run it, a second one gets VcpuBusyError.

    Any thread may call :meth:`kick`, :meth:`stop` and :meth:`close` at any time, whatever the others do; who
    runs it afterwards gets VcpuKickedError or ClosedError.  The other ioctls are for the thread that runs it.
    """

    kind = "vcpu"

    def __init__(self, vm: Vm, fd: int, vcpu_id: int) -> None:
        self._native: Any = None
        self._run: Any = None
        self._area: mmap.mmap | None = None
        super().__init__(fd, f"{vm.name}/vcpu{vcpu_id}")
        self.vm = vm
        self.vcpu_id = vcpu_id
        try:
            self._area = self.mmap(vm.kvm.vcpu_mmap_size)
        except OSError:
            self.close()
            raise
        # lifetime: the mapping stays as long as somebody holds this, or an exit that was read from it.
        self._run = ffi.from_buffer("struct kvm_run *", self._area)
        native = lib.kvmpy_vcpu_new(fd, self._run)
        if native == ffi.NULL:
            self.close()
            raise OSError(errno.ENOMEM, "no memory for the vCPU's run state")
        # lifetime: a thread that is about to run it may hold it when close() is over.
        self._native = ffi.gc(native, lib.kvmpy_vcpu_free)

    @property
    def run_area(self) -> kvm_run:
        """The shared ``struct kvm_run``; it dies with the vCPU."""
        run = self._run
        if run is None:
            raise self._closed()
        return kvm_run.wrap(run, self)

    @property
    def area(self) -> mmap.mmap:
        """The whole mapping of the vCPU: kvm_run, the PIO data page, the coalesced ring, the dirty ring
        behind.
        """
        area = self._area
        if area is None:
            raise self._closed()
        return area

    def _closed(self) -> ClosedError:
        return ClosedError(f"{self.name} is closed")

    def set_deadline(self, timeout: float | None) -> None:
        """Let runs from now on end with VcpuTimeoutError once *timeout* seconds have passed; None lifts the
        deadline.
        """
        native = self._native
        if native is None:
            raise self._closed()
        if timeout is not None and timeout <= 0:
            raise ValueError(f"timeout {timeout} is not positive")
        ns = 0 if timeout is None else max(1, int(timeout * 1e9))
        lib.kvmpy_vcpu_deadline(native, ns)
        for observer in observe.host:
            observer.deadline_set(self, ns)

    def run_once(self) -> int:
        """Issue one KVM_RUN and return how it ended, one of the ``RUN_*`` numbers (the ``RUN_ERROR`` errno
        is in ``run_errno``).

        The lowest way to run a vCPU; a signal shows as RUN_EINTR.
        """
        native, run = self._native, self._run
        if native is None:
            raise self._closed()
        if not observe.active and not recent.keeps_runs and not observe.interposers:
            return int(lib.kvmpy_vcpu_run(native, ffi.NULL))
        for observer in observe.active:
            observer.ioctl_enter(self, ioctls.KVM_RUN, None)
        ran = ffi.new("struct kvmpy_ran *")
        if observe.interposers:
            outcome = observe.interposers[0].run(self, lambda: int(lib.kvmpy_vcpu_run(native, ran)))
        else:
            outcome = int(lib.kvmpy_vcpu_run(native, ran))
        if recent.keeps_runs and ran.issued:
            recent.remember_run(self._label, run, ran.result, ran.error)
        for observer in observe.active:
            if ran.issued:
                observer.ioctl_exit(self, ioctls.KVM_RUN, None, ran.result, ran.error)
            else:
                observer.ioctl_dropped(self, ioctls.KVM_RUN)
        return outcome

    @property
    def run_errno(self) -> int:
        """The errno of the last KVM_RUN, 0 when it succeeded."""
        native = self._native
        return 0 if native is None else int(native.err)

    def run(self, timeout: float | None = None) -> Exit:
        """Run until the next exit to user space and return it (KVM_RUN).

        Signals are handled in between.  VcpuTimeoutError after *timeout* seconds (or the deadline set
        before), VcpuKickedError after :meth:`kick` or :meth:`stop`, VcpuBusyError while another thread runs
        the vCPU, ClosedError once it is closed.  Memory-fault exits are returned, with their errno; any other
        failure of KVM_RUN is a KvmError.
        """
        if timeout is not None:
            self.set_deadline(timeout)
        run = self._run
        while True:
            ending = self.run_once()
            if ending in (RUN_EXIT, RUN_UCALL):
                return read_exit(run, 0)
            if ending != RUN_EINTR:
                return self._ended(ending, run)

    def _ended(self, outcome: int, run: Any) -> Exit:
        if outcome == RUN_KICKED:
            raise VcpuKickedError(f"{self.name} was kicked")
        if outcome == RUN_DEADLINE:
            raise VcpuTimeoutError(f"{self.name} was still running in the guest at its deadline")
        if outcome == RUN_BUSY:
            raise VcpuBusyError(
                f"{self.name} is running in another thread: a vCPU belongs to one thread at a time"
            )
        if outcome == RUN_STOPPED:
            raise VcpuKickedError(f"{self.name} was stopped: it runs no more")
        if outcome == RUN_CLOSED:
            raise self._closed()
        number = self.run_errno
        if outcome == RUN_NO_TIMER:
            raise MissingError(
                f"no timer for the deadline of {self.name} (timer_create: {errno_name(number)})",
                "signals that wait and timers have used RLIMIT_SIGPENDING up: ulimit -i, LimitSIGPENDING=",
            )
        # KVM fills the exit in and fails with EFAULT or EHWPOISON.
        if number in (errno.EFAULT, EHWPOISON) and run.exit_reason == _MEMORY_FAULT:
            return read_exit(run, number)
        raise self.error(ioctls.KVM_RUN, number)

    def kick(self) -> None:
        """Make the running or the next KVM_RUN return at once, from any thread; it is never lost."""
        native = self._native
        if native is None:
            raise self._closed()
        for observer in observe.host:
            running = self.running
            observer.kicked(self, self.thread_id if running else 0, lib.kvmpy_kick_signal() if running else 0)
        if lib.kvmpy_vcpu_kick(native):
            raise self._closed()

    def stop(self) -> bool:
        """Let no run begin from now on, kick one that goes on, and return whether there is one.

        Runs end with VcpuKickedError then, those of a thread that is between two of them included.
        """
        native = self._native
        if native is None:
            return False
        lib.kvmpy_vcpu_stop(native)
        if not self.running:
            return False
        with contextlib.suppress(ClosedError):
            self.kick()
        return True

    def complete_io(self) -> None:
        """Finish the instruction that ended in an exit (PIO, MMIO, MSR...) without running guest code.

        KVM completes it at the next KVM_RUN; do this before saving or changing registers
        (Documentation/virt/kvm/api.rst, KVM_EXIT_IO).
        """
        run = self._run
        if run is None:
            raise self._closed()
        run.immediate_exit = 1
        try:
            outcome = self.run_once()
        finally:
            run.immediate_exit = 0  # a kick that came meanwhile is seen by its flag
        if outcome in (RUN_EXIT, RUN_UCALL):
            # A REP string instruction, or an access in several parts, came to its next exit.
            raise RuntimeError(
                f"{self.name}: the instruction goes on with {read_exit(run, 0)}: answer that first"
            )
        if outcome == RUN_KICKED:
            self.kick()  # it was meant for the next run
        elif outcome not in (RUN_EINTR, RUN_DEADLINE):  # a deadline is about guest code, and none ran
            self._ended(outcome, run)

    def last_exit(self) -> tuple[str, dict[str, object]]:
        """Return name and main numbers of the exit that the last KVM_RUN ended with.

        For observers, which hear of every exit: cheaper than a typed one.
        """
        run = self._run
        if run is None:
            raise self._closed()
        reason = int(run.exit_reason)
        name = _EXIT_NAMES.get(reason, f"exit {reason}")
        if reason == _IO:
            way = "out" if run.io.direction else "in"
            return name, {"port": hex(run.io.port), "direction": way, "size": int(run.io.size)}
        if reason == _MMIO:
            way = "write" if run.mmio.is_write else "read"
            return name, {"gpa": hex(run.mmio.phys_addr), "access": way, "size": int(run.mmio.len)}
        return name, {}

    @property
    def running(self) -> bool:
        """Whether a thread is inside KVM_RUN with this vCPU now."""
        native = self._native
        return native is not None and bool(native.busy & 1)

    @property
    def thread_id(self) -> int:
        """The kernel's id of the thread that ran this vCPU last, 0 before the first run."""
        native = self._native
        return 0 if native is None else int(native.tid)

    @property
    def exits(self) -> int:
        """How many times this vCPU came back from KVM_RUN with an exit."""
        native = self._native
        return 0 if native is None else int(native.exits)

    def close(self) -> None:
        """Unmap and close; VcpuBusyError, with nothing done, while another thread runs the vCPU (stop it
        first).
        """
        native = self._native
        if native is not None and lib.kvmpy_vcpu_close(native):
            raise VcpuBusyError(
                f"{self.name} cannot be closed while it runs: kick it and join its thread first, or stop() it"
            )
        self._native = None
        self._run = None
        area, self._area = self._area, None
        if area is not None:
            try:
                area.close()
            except BufferError:
                # Somebody holds a view, such as an exit.  A mapping would keep the vCPU in the kernel, and so
                # the VM with its memory and its ASID.
                lib.kvmpy_map_keep(ffi.from_buffer(area), len(area))
        super().close()
