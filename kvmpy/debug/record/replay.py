# SPDX-License-Identifier: Apache-2.0
"""Carry a record out again: the same ioctls in the same order, threads too, results compared."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from kvmpy.debug.record.compare import Difference, Outcome, differences, recorded_outcome
from kvmpy.debug.record.script import Script, Step
from kvmpy.debug.record.world import PATIENCE_NS, ReplayError, World

__all__ = ["Played", "Replay", "ReplayError", "Result"]


@dataclass(frozen=True)
class Played:
    """An ioctl that was issued again."""

    step: Step
    then: Outcome
    now: Outcome
    differences: tuple[Difference, ...]


@dataclass
class Result:
    """How a replay went: every ioctl in the order in which it ended, and what stopped it early."""

    played: list[Played] = field(default_factory=list)
    stopped: str = ""

    @property
    def first_difference(self) -> Played | None:
        """The first ioctl that ended otherwise than recorded."""
        different = [each for each in self.played if each.differences]
        return min(different, key=lambda each: each.step.index, default=None)

    @property
    def last(self) -> Played | None:
        """The ioctl that comes last in the record."""
        return max(self.played, key=lambda each: each.step.index, default=None)


class Replay:
    """Replays *script* up to step *until* (exclusive); *each* is told of every ioctl.

    A run of a vCPU that takes *patience* seconds longer than it did is ended.  With
    *probe* every run is followed by a look at the guest's RIP.
    """

    def __init__(
        self,
        script: Script,
        *,
        until: int | None = None,
        stop_on_difference: bool = False,
        each: Callable[[Played], None] | None = None,
        device: str = "/dev/kvm",
        patience: float = PATIENCE_NS / 1e9,
        probe: bool = False,
    ) -> None:
        self._script = script
        self._steps = script.steps if until is None else script.steps[:until]
        self._stop = stop_on_difference
        self._each = each
        self._device = device
        self._probe = probe
        self._patience_ns = int(patience * 1e9)
        self._begun = [False] * len(script.steps)
        self._ended = [False] * len(script.steps)
        self._turn = threading.Condition()
        self._halt = False
        self.result = Result()

    def run(self) -> Result:
        """Carry all steps out and return what happened; OSError when KVM cannot be opened."""
        world = World(self._script, self._device, self._patience_ns, probe=self._probe)
        try:
            self._all(world)
        finally:
            world.close()
        return self.result

    def _all(self, world: World) -> None:
        lanes: list[list[Step]] = [[] for _ in self._script.threads]
        for step in self._steps:
            lanes[step.thread].append(step)
        threads = [
            threading.Thread(target=self._lane, args=(world, lane), daemon=True, name=f"replay-{number}")
            for number, lane in enumerate(lanes)
            if number and lane
        ]
        for thread in threads:
            thread.start()
        if lanes:
            self._lane(world, lanes[0])
        for thread in threads:
            thread.join()

    def _lane(self, world: World, steps: list[Step]) -> None:
        try:
            for step in steps:
                if not self._await(step):
                    return
                self._begin(world, step)
                outcome = world.do(step)
                self._end(step, outcome)
        except (ReplayError, OSError) as error:
            self._abort(str(error))

    def _await(self, step: Step) -> bool:
        limit = 4 * PATIENCE_NS / 1e9
        with self._turn:
            ready = self._turn.wait_for(
                lambda: (
                    self._halt
                    or (
                        all(self._ended[other] for other in step.after if other < len(self._steps))
                        and all(self._begun[other] for other in step.during if other < len(self._steps))
                    )
                ),
                timeout=limit,
            )
            if not ready:
                self._fail(f"step {step.index} waited {limit:g} s for another thread")
            return not self._halt

    def _begin(self, world: World, step: Step) -> None:
        world.prepare(step)
        with self._turn:
            self._begun[step.index] = True
            self._turn.notify_all()

    def _end(self, step: Step, outcome: Outcome | None) -> None:
        with self._turn:
            self._ended[step.index] = True
            self._turn.notify_all()
            if outcome is None:
                return
            then = recorded_outcome(step)
            played = Played(step, then, outcome, tuple(differences(step, then, outcome)))
            self.result.played.append(played)
            if self._each is not None:
                self._each(played)
            if played.differences and self._stop:
                self._fail("stopped at the first difference")

    def _abort(self, why: str) -> None:
        with self._turn:
            self._fail(why)

    def _fail(self, why: str) -> None:
        self._halt = True
        self.result.stopped = self.result.stopped or why
        self._turn.notify_all()
