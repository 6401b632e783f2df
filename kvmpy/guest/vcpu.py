# SPDX-License-Identifier: Apache-2.0
"""A vCPU that runs a guest program: ucalls in, typed exits out, failures with a post-mortem."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from kvmpy.core.address import Gpa, Gva
from kvmpy.core.errors import KvmError
from kvmpy.core.exits import (
    Exit,
    HypercallExit,
    InternalErrorExit,
    IoExit,
    ShutdownExit,
    SystemEventExit,
    read_exit,
)
from kvmpy.core.vcpu import (
    RUN_DEADLINE,
    RUN_EINTR,
    RUN_EXIT,
    RUN_UCALL,
    Vcpu,
    VcpuKickedError,
)
from kvmpy.guest import layout, ucall
from kvmpy.guest.errors import (
    GuestAssertionError,
    GuestError,
    GuestExceptionError,
    GuestTimeoutError,
    LaunchError,
    UnexpectedExitError,
)
from kvmpy.guest.postmortem import where
from kvmpy.guest.ucall import Ucall
from kvmpy.uapi.constants import KVM_SYSTEM_EVENT_SEV_TERM
from kvmpy.x86.ghcb import termination_words

if TYPE_CHECKING:
    from kvmpy.guest.vm import GuestVm

_E = TypeVar("_E", bound=Exit)


class GuestVcpu(Vcpu):
    """A vCPU of a :class:`~kvmpy.guest.vm.GuestVm`."""

    vm: GuestVm
    # Takes a KVM_RUN that failed without an exit; returns True if it may be tried again.
    on_error: Callable[[KvmError], bool] | None = None

    def __init__(self, vm: GuestVm, fd: int, vcpu_id: int, index: int) -> None:
        # First: the base class closes this object when it cannot be completed.
        self._slots = memoryview(b"")
        super().__init__(vm, fd, vcpu_id)
        self.index = index
        self.entry: Gva | None = None
        self.args: tuple[int, ...] = ()
        self.stack_top = Gva(0)
        self.percpu = Gva(0)
        self.percpu_gpa = Gpa(0)
        self.ghcb_gpa: Gpa | None = None
        # Its struct guest_l2, 0 without one: written to the guest by launch().
        self.l2_gva = Gva(0)
        self.done = False

    # Before launch.

    def set_entry(self, where: str | Gva, *args: int) -> None:
        """Let this vCPU start in function *where* with up to six arguments, instead of ``guest_main``;
        before launch() only.
        """
        if self.vm.launched:
            raise LaunchError(f"{self.name}: set_entry() after launch(): the initial state is frozen")
        if len(args) > 6:
            raise ValueError(f"{len(args)} arguments: a guest function takes at most six here")
        self.entry = self.vm.program.symbol(where).gva if isinstance(where, str) else where
        self.args = args

    def attach_ucalls(self, gpa: Gpa, page: memoryview) -> None:
        """Tell the run loop where this vCPU's ucall slots are; called when the VM is built."""
        self._slots = page
        native = self._native
        native.ucall_hva = self.vm.memory.hva(gpa, private=False)
        native.ucall_first = self.index * layout.UCALL_SLOTS
        native.ucall_count = layout.UCALL_SLOTS - 1  # the last slot takes the calls that find none

    # Running.

    def next(self, timeout: float | None = None) -> Ucall | Exit:
        """Run until the guest has something to say: a ucall (SYNC, DONE, user-defined) or an exit.

        PRINTF ucalls go to ``vm.console``.  A failed assertion, an unexpected exception and a passed
        deadline raise a GuestError with a post-mortem.  *timeout* in seconds, by default the VM's deadline.
        """
        if not self.vm.launched:
            raise LaunchError(f"{self.name}: call vm.launch() before the vCPU runs")
        self.set_deadline(self.vm.deadline if timeout is None else timeout)
        return self._next()

    def _next(self) -> Ucall | Exit:
        run_once = self.run_once
        # Once: another thread may close the vCPU between a run and the look at what it came back with.
        run, native = self._run, self._native
        if native is None:
            raise self._closed()
        while True:
            outcome = run_once()
            if outcome == RUN_UCALL:
                try:
                    call = ucall.read(self._slots, native.ucall_slot, self.index)
                except ValueError:  # the view of the slots was released
                    raise self._closed() from None
                cmd = call.cmd
                if cmd == ucall.SYNC or cmd >= ucall.USER:
                    return call
                if cmd == ucall.PRINTF:
                    self.vm._console.append(call.text)
                    continue
                if cmd == ucall.DONE:
                    self.done = True
                    return call
                raise self._failure(call)
            if outcome == RUN_EXIT:
                exit_ = read_exit(run, 0)
                if isinstance(exit_, IoExit) and exit_.port == layout.UCALL_PORT:
                    raise self._bad_ucall(exit_)
                if isinstance(exit_, HypercallExit) and self.vm.private.answer_hypercall(self, exit_):
                    continue
                if self.vm.protection.answer_exit(self.vm, exit_):
                    continue
                return exit_
            if outcome == RUN_EINTR:
                continue
            if outcome == RUN_DEADLINE:
                raise self._timeout()
            try:
                return self._ended(outcome, run)
            except KvmError as error:
                self._run_failed(error)

    def _run_failed(self, error: KvmError) -> None:
        if self.on_error is None or not self.on_error(error):
            message = str(error)
            raise GuestError(message, self.vm.postmortem(self, message)) from error

    def _timeout(self) -> GuestTimeoutError:
        self.vm._halt_others(self)
        message = f"{self.name} was still running at its deadline{self._standing()}"
        # Who waits is not who is to blame.
        others = [vcpu for vcpu in self.vm.vcpus if vcpu is not self]
        message += "".join(f"\n  {vcpu.name}: {where(self.vm, vcpu) or 'unknown'}" for vcpu in others[:16])
        return GuestTimeoutError(message, self.vm.postmortem(self, "deadline passed"))

    def _failure(self, call: Ucall) -> GuestError:
        if call.cmd == ucall.ABORT:
            message = ucall.assertion_text(call, self.vm.program)
            return GuestAssertionError(message, self.vm.postmortem(self, message, call))
        if call.cmd == ucall.EXCEPTION:
            message = ucall.exception_text(call, self.vm.program)
            vector, error_code = ucall.padded(call.args)[:2]
            return GuestExceptionError(message, self.vm.postmortem(self, message, call), vector, error_code)
        message = f"{self.name}: ucall with the unknown command {call.cmd:#x}"
        return UnexpectedExitError(message, self.vm.postmortem(self, message, call), call)

    def _bad_ucall(self, exit_: IoExit) -> GuestError:
        call = None
        if exit_.value == layout.UCALL_NO_SLOT:
            message = f"{self.name}: ucalls nested deeper than {layout.UCALL_SLOTS - 1}"
            # The last slot takes it all the same, and says what went wrong in the end.
            call = ucall.read(self._slots, layout.UCALL_SLOTS - 1, self.index)
            if call.cmd == ucall.EXCEPTION:
                message += f", the innermost an {ucall.exception_text(call, self.vm.program)}\n "
            else:
                message += f", the innermost {call!r}"
            message += self._standing(call)
        else:
            message = (
                f"{self.name}: port {layout.UCALL_PORT:#x} is the ucall port, "
                f"but {exit_.value:#x} (size {exit_.size}) names no "
                f"slot of this vCPU"
            )
        return UnexpectedExitError(message, self.vm.postmortem(self, message, call), exit_)

    def _standing(self, call: Ucall | None = None) -> str:
        place = where(self.vm, self, call)
        return f" in {place}" if place else ""

    def unexpected(self, got: Ucall | Exit, wanted: str) -> UnexpectedExitError:
        """Return the error for *got* where *wanted* was waited for, with its post-mortem."""
        message = f"{self.name}: expected {wanted}, got {got!r}"
        if isinstance(got, ShutdownExit):
            message += " (triple fault)"
        elif isinstance(got, InternalErrorExit):
            message += f" ({got.name})"
        elif isinstance(got, SystemEventExit) and got.type == KVM_SYSTEM_EVENT_SEV_TERM:
            message += f" (the guest ended itself: {termination_words(got.data)})"
        return UnexpectedExitError(
            message, self.vm.postmortem(self, message, got if isinstance(got, Ucall) else None), got
        )

    def syncs(self, timeout: float | None = None) -> Iterator[Ucall]:
        """Yield SYNC and user-defined ucalls until DONE; *timeout* in seconds covers the guest's whole run.

        Anything else the guest does is an UnexpectedExitError.
        """
        if not self.vm.launched:
            raise LaunchError(f"{self.name}: call vm.launch() before the vCPU runs")
        if self.done:
            raise LaunchError(f"{self.name} said DONE before: there is nothing to wait for")
        self.set_deadline(self.vm.deadline if timeout is None else timeout)
        while True:
            got = self._next()
            if not isinstance(got, Ucall):
                raise self.unexpected(got, "SYNC or DONE")
            if got.cmd == ucall.DONE:
                return
            yield got

    def sync(self, timeout: float | None = None) -> Ucall:
        """Run to the next SYNC or user-defined ucall and return it; anything else is an
        UnexpectedExitError.
        """
        got = self.next(timeout)
        if isinstance(got, Ucall) and got.cmd != ucall.DONE:
            return got
        raise self.unexpected(got, "a SYNC")

    def expect(self, kind: type[_E], timeout: float | None = None) -> _E:
        """Run to the next exit and return it, which must be of class *kind*; anything else is an
        UnexpectedExitError.
        """
        got = self.next(timeout)
        if isinstance(got, kind):
            return got
        raise self.unexpected(got, kind.__name__)

    def run_to_done(
        self,
        timeout: float | None = None,
        *,
        on_exit: Callable[[Exit], bool] | None = None,
        on_sync: Callable[[Ucall], None] | None = None,
    ) -> None:
        """Run until DONE.

        SYNCs go to *on_sync* (else they are passed over); exits to *on_exit*, which returns True for those
        it dealt with.
        """
        if not self.vm.launched:
            raise LaunchError(f"{self.name}: call vm.launch() before the vCPU runs")
        self.set_deadline(self.vm.deadline if timeout is None else timeout)
        while True:
            got = self._next()
            if isinstance(got, Ucall):
                if got.cmd == ucall.DONE:
                    return
                if on_sync is not None:
                    on_sync(got)
            elif on_exit is None or not on_exit(got):
                raise self.unexpected(got, "DONE")

    def run_until_kicked(self, timeout: float | None = None) -> None:
        """Run until another thread kicks this vCPU; a ucall or exit before that is an UnexpectedExitError."""
        try:
            got = self.next(timeout)
        except VcpuKickedError:
            return
        raise self.unexpected(got, "a kick")

    def trail(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """Return the last 16 exits, oldest first: exit reason, ucall command (-1 for none), data words (of a
        ucall: its arguments).
        """
        native = self._native
        if native is None:
            return []
        entries = []
        for number in range(max(0, native.trail_next - 16), native.trail_next):
            entry = native.trail[number % 16]
            command, data = -1, tuple(entry.data)
            if entry.what:
                command, data = entry.what & 0xFFFF, data[: entry.what >> layout.UCALL_NARGS_SHIFT & 0xFF]
            entries.append((int(entry.exit_reason), command, data))
        return entries

    def last_exit(self) -> tuple[str, dict[str, object]]:
        """Return name and main numbers of the exit that the last KVM_RUN ended with; a ucall by its name."""
        native = self._native
        if native is not None and native.trail_next:
            entry = native.trail[(native.trail_next - 1) % 16]
            if entry.what:
                count = entry.what >> layout.UCALL_NARGS_SHIFT & 0xFF
                words = [hex(entry.data[number]) for number in range(min(count, 4))]
                return f"ucall {ucall.command_name(entry.what & 0xFFFF)}", {"args": words}
        return super().last_exit()

    def close(self) -> None:
        """Let the ucall page go and close."""
        super().close()
        self._slots.release()
