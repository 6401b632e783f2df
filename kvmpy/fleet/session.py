# SPDX-License-Identifier: Apache-2.0
"""A session of tests on a host, as a task of distributed: pytest in a process, or in a machine of the lab.

It asks for shares, and says what it does. Before a test begins it waits until the run knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

import kvmpy
from kvmpy import caches
from kvmpy.fleet.errors import FleetError
from kvmpy.lab import events, programs
from kvmpy.lab.errors import LabError
from kvmpy.lab.events import MAX_LINE
from kvmpy.lab.inside import BEGUN
from kvmpy.lab.lane import Lane, Limits, answer
from kvmpy.owned import OwnedFolder, dies_with_parent, end_descendants
from kvmpy.testing import naming
from kvmpy.testing.dealer import DealError
from kvmpy.testing.option_table import pytest_arguments
from kvmpy.testing.verdicts import SUITE_FOLDER

if TYPE_CHECKING:
    from kvmpy.lab.qemu import Options

JOB_VARIABLE = "KVMPY_FLEET_JOB"
_START = b'{"event": "start"'
_SHOWN_LINES = 40
_POLL = 0.02
_FOREVER = 1e9


class Here:
    """What this process is: a host, or what boots the machine of *options*."""

    options: Options | None = None


async def session(spec: dict[str, Any]) -> None:
    """Run the tests that the run hands out, until it says that there are no more.

    *spec* has ``lane``, ``paths`` (of the suite, or files on this machine), ``here`` (the run's folder),
    ``arguments`` for pytest, and ``dangerous``.
    """
    from distributed import get_worker

    scheduler = get_worker().scheduler
    ended: Mapping[str, Any] = {}
    with OwnedFolder("session") as folder:
        talk = _Talk(scheduler, spec)
        try:
            if Here.options is None:
                ended = await _process(talk, folder)
            else:
                ended = await _machine(talk, folder, Here.options)
        except (OSError, FleetError, LabError, naming.NamingError) as error:
            ended = {"reason": f"no session can run: {error}", "evidence": ""}
        finally:
            # Its tests may have left processes behind.
            await asyncio.to_thread(end_descendants)
    with contextlib.suppress(OSError):
        await scheduler.kvmpy_say(lane=spec["lane"], lines=[], ended=dict(ended))


class _Talk:
    """What a session and the run say to each other; *job* is where the session finds its answers."""

    def __init__(self, scheduler: Any, spec: Mapping[str, Any]) -> None:
        self._scheduler = scheduler
        self._lane = spec["lane"]
        self._suite = naming.suite_folder()
        self._said: list[bytes] = []
        self._more = asyncio.Event()
        self._begun = 0
        self._over = False
        self.spec = spec
        self.here = Path(spec["here"])
        self.job = Path()

    def arguments(self) -> list[str]:
        """Return pytest's arguments for the tests of the run."""
        if self._suite is None:
            raise FleetError("this kvmpy has no selftests: neither in the package nor beside it")
        chosen = naming.targets(self.spec["paths"], self._suite, self.here)
        settings = Path(kvmpy.__file__).parent / "testing" / "suite.ini"
        words = ["-c", str(settings), "--rootdir", str(chosen.root), *chosen.arguments]
        return [*words, *self.spec["arguments"], *pytest_arguments({"ids_from": self.here})]

    def hear(self, lines: Sequence[bytes]) -> None:
        """Take what the session says."""
        self._said += [line for line in lines if line]
        if self._said:
            self._more.set()

    async def until(self, ends: Awaitable[Mapping[str, str]]) -> Mapping[str, str]:
        """Talk until the session has ended, and return why; nothing when the run wants it no longer."""
        talking = [asyncio.ensure_future(work()) for work in (self._tell, self._listen)]
        ended = asyncio.ensure_future(ends)
        try:
            await asyncio.wait({ended, *talking}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                return {"reason": "", "evidence": ""}
            reason = await ended
            await self._say_rest()
            return reason
        finally:
            for each in (ended, *talking):
                each.cancel()
            await asyncio.gather(ended, *talking, return_exceptions=True)

    async def _tell(self) -> None:
        while not self._over:
            await self._more.wait()
            await self._say_rest()

    async def _say_rest(self) -> None:
        self._more.clear()
        lines, self._said = self._said, []
        if not lines or self._over:
            return
        try:
            reply = await self._scheduler.kvmpy_say(lane=self._lane, lines=lines)
        except OSError:
            reply = {"over": True}
        self._over = reply["over"]
        for _ in (line for line in lines if line.startswith(_START)):
            self._begun += 1
            answer(self.job, f"{BEGUN}{self._begun}", {"end": True} if self._over else {})

    async def _listen(self) -> None:
        number = 0
        while not self._over:
            try:
                reply = await self._scheduler.kvmpy_listen(lane=self._lane)
            except OSError:
                return
            if reply.get("over"):
                return
            for message in reply["answers"]:
                number += 1
                answer(self.job, number, self._placed(message))

    def _placed(self, message: dict[str, Any]) -> dict[str, Any]:
        """Name the files as they are called here."""
        if "args" not in message:
            return message
        return {**message, "args": [str(self._place(name)) for name in message["args"]]}

    def _place(self, name: str) -> Path:
        if self._suite is not None and Path(name).parts[:1] == (SUITE_FOLDER,):
            return self._suite.parent / name
        return self.here / name


# ---- in a process of this host


async def _process(talk: _Talk, folder: Path) -> Mapping[str, str]:
    pipe, output = folder / "journal", folder / "output"
    plugins = ["-p", "kvmpy.fleet.inside", "-p", "no:xdist", "-p", "no:cacheprovider"]
    own = pytest_arguments({"journal": pipe, "dangerous": talk.spec["dangerous"]})
    command = [sys.executable, "-m", "pytest", *plugins, *talk.arguments(), *own]
    talk.job = folder
    environment = {**os.environ, JOB_VARIABLE: str(folder)}
    # Compiled tests are kept out of the installed package.
    if (cache := caches.own("pycache")) is not None:
        environment.setdefault("PYTHONPYCACHEPREFIX", str(cache))
    os.mkfifo(pipe)
    # Both ends: whoever writes may come and go.
    fd = os.open(pipe, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    rest = b""

    def read() -> None:
        nonlocal rest
        data = rest
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(fd, 1 << 16):
                data += chunk
        *lines, rest = data.split(b"\n")
        if len(rest) > MAX_LINE:
            rest = b""  # what comes of it is half a line, which says nothing
        talk.hear(lines)

    loop = asyncio.get_running_loop()
    loop.add_reader(fd, read)
    try:
        with output.open("wb") as stream:
            child = await asyncio.create_subprocess_exec(
                *command,
                cwd=talk.here if talk.here.is_dir() else folder,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=stream,
                stderr=asyncio.subprocess.STDOUT,
                preexec_fn=dies_with_parent(),
            )

        async def ends() -> Mapping[str, str]:
            status = await child.wait()
            read()
            how = f"was killed by signal {-status}" if status < 0 else f"ended itself with status {status}"
            text = output.read_text(encoding="utf-8", errors="replace")
            lines = text.strip().splitlines()[-_SHOWN_LINES:]
            return {"reason": f"the test process {how}", "evidence": "\n".join(lines)}

        try:
            return await talk.until(ends())
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)


# ---- in a machine of the lab


async def _machine(talk: _Talk, folder: Path, options: Options) -> Mapping[str, str]:
    from kvmpy.lab.runs import job_of, listing_command, session_command

    arguments = talk.arguments()
    job = job_of(options, session_command(listing_command(arguments)), folder, arguments)
    # Who hangs is for the run to say.
    limits = Limits(_FOREVER, _FOREVER, _FOREVER, _FOREVER)
    said: list[str] = []
    lane = Lane(0, options, job, folder / "machine", limits, said.append)
    talk.job = lane.folder / "job"
    loop = asyncio.get_running_loop()
    over = threading.Event()

    def drive() -> Mapping[str, str]:
        """Boot, and pass on what comes, until it is over; in a thread, which the machine dies with."""
        try:
            lane.boot()
            while not over.is_set():
                why = lane.why()
                try:
                    lines = [line for event in lane.events() if (line := _passed_on(lane, event, options))]
                except DealError as error:
                    lines, why = [], str(error)
                loop.call_soon_threadsafe(talk.hear, lines)
                if why or lane.ended:
                    evidence = [*said, lane.output().strip(), lane.evidence()]
                    return {"reason": why, "evidence": "\n".join(text for text in evidence if text)}
                time.sleep(_POLL)
            return {"reason": "", "evidence": ""}
        finally:
            lane.stop()

    driven = asyncio.ensure_future(asyncio.to_thread(drive))
    try:
        return await talk.until(asyncio.shield(driven))
    finally:
        over.set()
        await asyncio.gather(driven, return_exceptions=True)


def _passed_on(lane: Lane, event: events.Event, options: Options) -> bytes:
    """Do what is this machine's to do; return what is said to the run."""
    if isinstance(event, events.Frozen):
        lane.freeze()
    elif isinstance(event, events.Program):
        programs.answer(lane.folder / "job" / "programs", event.key, event.recipe)
    elif isinstance(event, events.End):
        lane.ended = True
    elif isinstance(event, events.Exit):
        lane.exit = event.status
    elif isinstance(event, events.Host) and (refused := event.refused(options)):
        raise DealError("; ".join(refused))
    else:
        values = {"event": type(event).__name__.lower(), **msgspec.to_builtins(event)}
        return json.dumps(values).encode()
    return b""
