# SPDX-License-Identifier: Apache-2.0
"""One machine of a run: its boots, the tests it has been given, and why it has come to an end."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvmpy.lab import places, snapshots
from kvmpy.lab.errors import LabError
from kvmpy.lab.events import BadEventError, Event
from kvmpy.lab.kernels import Say
from kvmpy.lab.qemu import SHARES, Job, Machine, Options, Start, command_line, excerpt, prepare
from kvmpy.lab.root import Root
from kvmpy.owned import OwnedFolder
from kvmpy.testing.dealer import Hand, Share
from kvmpy.testing.host import ACCELERATOR_VARIABLE

_LOG_SECONDS = 5.0
# kernel/params.c
_REFUSAL = re.compile(r"invalid for parameter|too large for parameter|unknown parameter")


@dataclass(frozen=True)
class Limits:
    """Seconds: for a boot up to the first test, beyond a test's own time-out, between tests, and overall."""

    boot: float = 300.0
    grace: float = 60.0
    idle: float = 120.0
    total: float = 4 * 3600.0


def answer(job: Path, name: int | str, message: dict[str, Any]) -> None:
    """Answer what the session of the folder *job* has asked for under *name*."""
    folder = job / "work"
    folder.mkdir(exist_ok=True)
    path = folder / f".{name}"
    path.write_text(json.dumps(message), encoding="utf-8")
    os.replace(path, folder / str(name))


class Lane:
    """A machine that boots as often as needed; *number* tells it from the others of the run."""

    def __init__(
        self, number: int, options: Options, job: Job, folder: Path, limits: Limits, say: Say
    ) -> None:
        self.number = number
        self._say = say
        # The folder of a snapshot that is made, and its name.
        self._fresh: tuple[OwnedFolder, str] | None = None
        self._resumed: Path | None = None
        self.options = options
        self.folder = folder
        self.boots = 0
        self.hand = Hand()
        self.retired = False
        self._job = job
        self._limits = limits
        self.machine: Machine | None = None
        self._reset()

    def _reset(self) -> None:
        self.hand.anew()
        self.finished = False
        self.ended = False
        self.exit: int | None = None
        self.nonsense = ""
        self._spoke = False
        self._heard = time.monotonic()

    # ---- the machine

    def boot(self) -> None:
        """Start QEMU; what an earlier boot said is kept beside it."""
        self.stop()
        if self.boots:
            console = self.folder / "console"
            if console.exists():
                shutil.copy(console, self.folder / f"console-{self.boots}")
        shutil.rmtree(self.folder / "job", ignore_errors=True)  # with the answers of an earlier boot
        self.boots += 1
        if self.resumed_in_vain:
            self._say("a snapshot that is resumed does not run: it is removed")
            self._remove_snapshot()
        self._start()

    def _remove_snapshot(self) -> None:
        """Remove the snapshot that this boot resumed, if it did: the next run takes another."""
        if self._resumed is not None:
            snapshots.remove(self._resumed)

    @property
    def resumed_in_vain(self) -> bool:
        """Whether this boot resumed a snapshot, and its session has said nothing."""
        return self._resumed is not None and not self._spoke

    def _start(self) -> None:
        """Start QEMU: resume a snapshot, or boot a machine that is to become one, or that runs the job."""
        self._reset()
        self._resumed = None
        environment = {
            **self._job.environment,
            ACCELERATOR_VARIABLE: self.options.accel,
            places.SEED_VARIABLE: secrets.token_hex(32),
        }
        prepare(self.folder, replace(self._job, environment=environment))
        root = self._job.root
        if self.options.snapshots and len(root.shares) <= SHARES:
            try:
                self._start_session(root)
                return
            except (LabError, OSError) as error:
                # Nothing of it is needed for a run.
                self._say(f"without a snapshot: {error}")
                self.stop()
                self._remove_snapshot()
                self.options = replace(self.options, snapshots=False)
                self._start()
                return
        start = Start(self.folder / snapshots.INITRAMFS)
        snapshots.write_initramfs(start.initramfs, root, session=False)
        self.machine = Machine(self.options, self.folder, root, start)

    def _start_session(self, root: Root) -> None:
        # Of what is there now: kvmpy may change before the machine has booted.
        name = self._snapshot()
        folder = self._resumed = snapshots.find(name)
        if folder is None:
            fresh = snapshots.begin()
            self._fresh = fresh, name
            folder = fresh.path
            snapshots.write_initramfs(folder / snapshots.INITRAMFS, root, session=True)
        else:
            # What the kernel said when it booted goes before what it says now.
            shutil.copy(folder / snapshots.CONSOLE, self.folder)
        start = Start(folder / snapshots.INITRAMFS, folder, self._resumed is not None)
        self.machine = Machine(self.options, self.folder, root, start)

    def _snapshot(self) -> str:
        # The same for all runs, wherever the kernel lies.
        here = Path("/")
        command = command_line(self.options, here, Root(here, ()), Start(here, here))
        command.remove(str(self.options.kernel.image))
        return snapshots.key(self.options.kernel.sha256, command, self._job.root)

    def freeze(self) -> None:
        """Keep the machine, which waits for its run, as a snapshot, and resume that for this run."""
        if self.machine is None or self._fresh is None:
            raise BadEventError("a machine that does not become a snapshot is frozen")
        fresh, name = self._fresh
        try:
            self.machine.save()
            self.machine.stop()
            shutil.copy(self.folder / snapshots.CONSOLE, fresh.path)
            snapshots.keep(fresh, name)
        except (LabError, OSError) as error:
            self._say(f"no snapshot could be kept: {error}")
            self.options = replace(self.options, snapshots=False)
        self.stop()
        self._start()

    def stop(self) -> None:
        """End QEMU, if it runs."""
        if self.machine is not None:
            self.machine.stop()
        if self._fresh is not None:
            self._fresh[0].close()
            self._fresh = None

    def events(self) -> Iterator[Event]:
        """Yield what the session inside has said since the last call; nothing once it said what is no event.

        BadEventError for that one.
        """
        machine = self.machine
        if machine is None or self.nonsense:
            return
        for event in machine.events():
            self._spoke = True
            self._heard = time.monotonic()
            yield event
            if self.machine is not machine:
                return  # its journal is another's now

    # ---- shares

    def give(self, share: Share, done: Collection[str]) -> None:
        """Answer the wish for more tests."""
        answer(self.folder / "job", self.hand.asked, share.message(done))

    def dismiss(self) -> None:
        """Answer that there are no more tests."""
        self.finished = True
        answer(self.folder / "job", self.hand.asked, {"end": True})

    # ---- the end

    def why(self) -> str:
        """Return why this boot is over or must end, empty while all is well."""
        if self.machine is None:
            return "there is no machine"
        if self.nonsense:
            return f"the session inside is not to be trusted: {self.nonsense}; QEMU was ended"
        return (
            self._why_over(self.machine) if self.machine.status is not None else self._why_stop(self.machine)
        )

    def _why_over(self, machine: Machine) -> str:
        if machine.trouble():
            return machine.trouble()
        if self.exit is not None:
            if self.exit > 128:
                return f"the test process was killed by signal {self.exit - 128}"
            return f"the test process ended itself with status {self.exit}"
        if machine.status:
            return f"QEMU ended with status {machine.status}: {machine.complaints() or 'no message'}"
        return "the kernel stopped, and its console does not say why"

    def _why_stop(self, machine: Machine) -> str:
        trouble = machine.trouble()
        if trouble:
            # A panic ends QEMU by itself, with all of its text.
            machine.wait(_LOG_SECONDS)
            return trouble
        if flood := machine.flood():
            return f"{flood}; QEMU was ended"
        silence = time.monotonic() - self._heard
        if self.ended:
            return "the kernel did not end" if silence > self._limits.grace else ""
        if self.hand.running is not None:
            if silence > self.hand.running.limit + self._limits.grace:
                return f"hung: no sign of life for {silence:.0f} s; QEMU was ended"
        elif silence > (self._limits.idle if self.hand.last else self._limits.boot):
            return f"no test began for {silence:.0f} s; QEMU was ended"
        return ""

    def evidence(self) -> str:
        """Return what the console says about the end."""
        console = excerpt(self.machine.console()) if self.machine is not None else ""
        return f"console:\n{console}" if console else "the console is empty"

    def console_about(self, names: Iterable[str]) -> list[str]:
        """Return the lines of the console that speak of parameters which the kernel does not take."""
        lines = self.machine.console().splitlines() if self.machine is not None else []
        ends = tuple(name.rpartition(".")[2] for name in names)
        return [
            f"the kernel says: {line.strip()}"
            for line in lines
            if _REFUSAL.search(line) and any(end in line for end in ends)
        ]

    def output(self) -> str:
        """Return what the command inside has printed."""
        return self.machine.output() if self.machine is not None else ""
