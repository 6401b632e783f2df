# SPDX-License-Identifier: Apache-2.0
"""The scheduler's plugin: carries what hosts and the run say to each other.

What a host says is answered when the run's journal has it: a test begins only then. The order is that of
arrival, so that a host's end comes after its last word. ``kvmpy fleet serve`` is a scheduler with this.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed import Scheduler
from distributed.diagnostics.plugin import SchedulerPlugin

from kvmpy.fleet import wire
from kvmpy.fleet.errors import FleetError
from kvmpy.owned import write_atomically

if TYPE_CHECKING:
    from kvmpy.lab.kernels import Say

# How long the run waits at most for something to happen, in seconds; hosts for tests.
TURN = 0.25
PATIENCE = 20.0


class _Run:
    """The run that has the fleet: what was said and it has not acknowledged, what it answered."""

    def __init__(self, client: str) -> None:
        self.client = client
        self.said: deque[tuple[int, dict[str, Any]]] = deque()
        self.acked = 0
        self.last = 0
        self.answers: dict[str, list[Any]] = {}
        self.news = asyncio.Event()
        self._changed: dict[str, asyncio.Event] = {}

    def add(self, message: dict[str, Any]) -> int:
        self.last += 1
        self.said.append((self.last, message))
        self.news.set()
        return self.last

    def changed(self, lane: str) -> asyncio.Event:
        return self._changed.setdefault(lane, asyncio.Event())

    def wake(self, lanes: Sequence[str]) -> None:
        """Let those look again who wait for these lanes."""
        for lane in lanes:
            if (event := self._changed.get(lane)) is not None:
                event.set()

    def over(self, lane: str) -> None:
        self.answers.pop(lane, None)
        self.wake([lane])

    def acknowledge(self, number: int) -> None:
        self.acked = max(self.acked, number)
        lanes = []
        while self.said and self.said[0][0] <= self.acked:
            lanes.append(self.said.popleft()[1].get("lane", ""))
        self.wake(lanes)


class Desk(SchedulerPlugin):
    """Who has joined, and the run that they work for."""

    name = "kvmpy"

    def __init__(self) -> None:
        self._hosts: dict[str, dict[str, Any]] = {}
        self._run: _Run | None = None
        self._scheduler: Any = None

    async def start(self, scheduler: Scheduler) -> None:
        """Answer what hosts and runs call."""
        self._scheduler = scheduler
        calls: Mapping[str, Callable[..., Any]] = {
            "hello": self.hello,
            "say": self.say,
            "listen": self.listen,
            "begin": self.begin,
            "open": self.open,
            "exchange": self.exchange,
            "finish": self.finish,
            "hosts": self.hosts,
            "dismiss": self.dismiss,
        }
        scheduler.handlers.update({f"kvmpy_{name}": call for name, call in calls.items()})

    # ---- hosts

    async def hello(self, address: str, about: dict[str, Any]) -> dict[str, Any]:
        """A host has joined; one that was there under its name is gone."""
        for old, known in list(self._hosts.items()):
            if known["name"] == about["name"] and old != address:
                await self.dismiss(old)
        self._hosts[address] = about
        if self._run is not None:
            self._run.add({"host": address, "about": about})
        return {}

    def remove_worker(self, scheduler: Scheduler, worker: str, **_: object) -> None:
        """A host is gone: told after all that it said."""
        del scheduler
        if self._hosts.pop(worker, None) is not None and self._run is not None:
            self._run.add({"gone": worker})

    async def dismiss(self, address: str) -> dict[str, Any]:
        """Let a host go, and take nothing from it any more."""
        await self._scheduler.remove_worker(address, stimulus_id="kvmpy-dismiss", close=True)
        return {}

    async def say(self, lane: str, lines: list[bytes], ended: dict[str, Any] | None = None) -> dict[str, Any]:
        """Take what a session says; the answer comes when the run has it. ``over``: nobody wants it."""
        run = self._run
        if run is None or lane not in run.answers:
            return {"over": True}
        number = run.add({"lane": lane, "lines": lines, "ended": ended})
        changed = run.changed(lane)
        while run is self._run and run.acked < number and lane in run.answers:
            changed.clear()
            await changed.wait()
        return {"over": run is not self._run or lane not in run.answers}

    async def listen(self, lane: str) -> dict[str, Any]:
        """Return what the run has answered a session, after a while nothing."""
        run = self._run
        if run is None or lane not in run.answers:
            return {"over": True}
        if not run.answers[lane]:
            with contextlib.suppress(asyncio.TimeoutError):
                changed = run.changed(f"{lane}?")
                changed.clear()
                await asyncio.wait_for(changed.wait(), PATIENCE)
        if run is not self._run or lane not in run.answers:
            return {"over": True}
        answers, run.answers[lane] = run.answers[lane], []
        return {"answers": answers}

    # ---- the run

    async def begin(self, client: str) -> dict[str, Any]:
        """A run takes the fleet; it is refused while there is another."""
        if self._run is not None:
            return {"refused": "another run has this fleet"}
        self._run = _Run(client)
        return {"hosts": self._hosts}

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """A run is gone: its sessions hear of it."""
        del scheduler
        run = self._run
        if run is not None and run.client == client:
            self._run = None
            for lane in list(run.answers):
                run.over(lane)
                run.wake([f"{lane}?"])

    async def open(self, lane: str) -> dict[str, Any]:
        """The run is about to start a session."""
        if self._run is not None:
            self._run.answers[lane] = []
        return {}

    async def exchange(self, acked: int, answers: list[tuple[str, Any]], over: list[str]) -> dict[str, Any]:
        """Take the run's answers and who is over; return what was said since, after TURN seconds nothing."""
        run = self._run
        if run is None:
            return {"refused": "the run has lost this fleet"}
        for lane, message in answers:
            if lane in run.answers:
                run.answers[lane].append(message)
                run.wake([f"{lane}?"])
        for lane in over:
            run.over(lane)
            run.wake([f"{lane}?"])
        run.acknowledge(acked)
        if not run.said:
            run.news.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(run.news.wait(), TURN)
        return {"said": list(run.said)}

    async def finish(self, client: str) -> dict[str, Any]:
        """The run needs the fleet no longer."""
        self.remove_client(self._scheduler, client)
        return {}

    async def hosts(self) -> dict[str, Any]:
        """Return who has joined, and whether a run has them."""
        return {"hosts": self._hosts, "run": self._run is not None}


def serve(place: Path, listen: str, port: int, say: Say) -> int:
    """Serve a fleet until a signal; its certificate and address go into *place*."""
    certificate = place / wire.CERTIFICATE
    if not certificate.exists():
        wire.make(certificate)
    security = wire.security(certificate)

    async def work() -> int:
        try:
            scheduler = await Scheduler(
                host=listen,
                port=port,
                protocol="tls",
                security=security,
                dashboard=False,
                dashboard_address="127.0.0.1:0",
                plugins=[Desk()],
            )
        except OSError as error:
            raise FleetError(f"{listen}:{port}: {error.strerror or error}") from None
        write_atomically(place / wire.ADDRESS, f"{scheduler.address}\n")
        say(f"serving at {scheduler.address}; who joins needs {certificate}")
        say(f"on each host: kvmpy fleet join {scheduler.address} --certificate {wire.CERTIFICATE}")
        ends = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, ends.set)
        parent = os.getppid()
        while not ends.is_set() and os.getppid() == parent:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(ends.wait(), 5.0)
        with contextlib.suppress(OSError):
            (place / wire.ADDRESS).unlink()
        await scheduler.close()
        return 0

    return asyncio.run(work())
