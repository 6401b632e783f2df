# SPDX-License-Identifier: Apache-2.0
"""A process that sets parameters of KVM's modules, outlives kvmpy, and puts them back.

It waits for the end of a pipe, which comes however kvmpy ends. Were it killed itself, a file still tells what
was changed, and the next start puts it back. The file is in memory, as the parameters are: both are gone
after a reboot.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from kvmpy.owned import write_atomically
from kvmpy.parsing import MalformedError, conform, parse_json
from kvmpy.testing.module_settings import Modules, Plan, SettingError, State, apply, plan, restore

FOLDER = Path("/run/kvmpy")
_STATE, _LOCK = "parameters.json", "parameters.lock"
_KEPT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

Say = Callable[[str], None]


class Guardian:
    """Sets parameters on this host for the time of a ``with`` block; *folder* holds the file about them."""

    def __init__(self, modules: Modules | None = None, folder: Path = FOLDER) -> None:
        self._modules = modules or Modules()
        self._folder = folder

    # ---- what a killed one has left

    def recover(self, say: Say) -> None:
        """Put back what a run has changed that was killed with its guardian; without one nothing happens.

        SettingError where that fails.
        """
        if not os.path.exists(self._folder / _STATE):  # nor is it there for whom the folder is closed
            return
        lock = self._lock()
        if lock is None:
            say("another kvmpy run has set parameters of KVM's modules, and they hold for this one, too")
            return
        try:
            state = self._load()
            if state is None:
                return
            names = ", ".join(f"{name}={value}" for name, value in state.before.items())
            say(f"a run that was killed has changed parameters: they become {names} again")
            self._put_back(state)
        finally:
            os.close(lock)

    def _load(self) -> State | None:
        try:
            return conform(parse_json((self._folder / _STATE).read_bytes()), State)
        except FileNotFoundError:
            return None
        except (OSError, MalformedError) as error:
            raise SettingError(
                f"{self._folder / _STATE} does not say what a killed run has changed ({error}): remove it, "
                "and load KVM's modules anew"
            ) from None

    def _put_back(self, state: State) -> None:
        complaints = restore(self._modules, state)
        if complaints and state.loaded and self._modules.busy():
            raise SettingError(f"{'; '.join(complaints)}; the next kvmpy run tries again")
        (self._folder / _STATE).unlink(missing_ok=True)
        if complaints:
            raise SettingError("; ".join(complaints))

    # ---- a run

    @contextlib.contextmanager
    def parameters(self, words: Sequence[str], *, reload: bool) -> Iterator[None]:
        """Set the parameters *words* (``kvm.halt_poll_ns=0``); they are as before at the end of the block.

        SettingError where one cannot be set, in which case none stays set, or cannot be put back.
        """
        plan(self._modules, words, reload=reload)  # what cannot be is told before root is asked for
        lock = self._lock()
        if lock is None:
            raise SettingError("another kvmpy run has set parameters of KVM's modules: wait for its end")
        try:
            todo = plan(self._modules, words, reload=reload)
            if todo.written or todo.reloaded:
                with self._guarded(todo):
                    yield
            else:
                yield
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def _guarded(self, todo: Plan) -> Iterator[None]:
        end, ours = os.pipe()
        answers, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ours)
            os.close(answers)
            # Nobody's child: what ends the run's processes does not end this one.
            if os.fork():
                os._exit(0)
            self._serve(todo, end, theirs)
        os.close(end)
        os.close(theirs)
        os.waitpid(child, 0)
        with open(answers, encoding="utf-8") as stream:
            try:
                self._answer(stream.readline())
                yield
            finally:
                os.close(ours)
                self._answer(stream.readline())

    @staticmethod
    def _answer(line: str) -> None:
        said = json.loads(line) if line else "the process that was to put parameters back is gone"
        if said:
            raise SettingError(said)

    def _serve(self, todo: Plan, end: int, answers: int) -> NoReturn:
        """Be the guardian: set, say so, wait for the end, put back, say so."""
        os.setsid()
        for number in _KEPT:
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        try:
            failure = self._set(todo)
            self._tell(answers, failure)
            while os.read(end, 1):
                pass
            failure = ""
            if (state := self._load()) is not None:
                try:
                    self._put_back(state)
                except SettingError as error:
                    failure = str(error)
            self._tell(answers, failure)
        finally:
            os._exit(0)

    def _set(self, todo: Plan) -> str:
        try:
            apply(self._modules, todo, self._keep)
        except (SettingError, OSError) as error:
            return str(error)
        return ""

    @staticmethod
    def _tell(answers: int, text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(answers, json.dumps(text).encode() + b"\n")

    def _keep(self, state: State) -> None:
        write_atomically(self._folder / _STATE, json.dumps(asdict(state)))

    def _lock(self) -> int | None:
        """Return a file descriptor that holds the lock as long as a process has it; None: somebody has it."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(
                self._folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
        except OSError as error:
            raise SettingError(f"setting parameters needs root: {self._folder}: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor
