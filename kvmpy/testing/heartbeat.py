# SPDX-License-Identifier: Apache-2.0
"""What a run shows while it lasts: what runs now and since when, failures at once, everything else as sums.

On a terminal one line that is renewed in place, elsewhere a line from time to time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from kvmpy.testing.verdicts import Verdict, printable, suite_id

# Seconds between two looks of a terminal's line, and between two lines elsewhere.
LIVE_SECONDS = 0.5
LINE_SECONDS = 30.0
ERASE = "\r\x1b[2K"
_SHOWN_TESTS = 3
_COLORS = {Verdict.FAIL: "\x1b[1;31m", Verdict.LOST: "\x1b[1;35m"}
_WORDS = {
    Verdict.FAIL: "failed",
    Verdict.LOST: "lost",
    Verdict.SKIP: "skipped",
    Verdict.XFAIL: "failed as expected",
}


def _clock(seconds: float) -> str:
    whole = int(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class Stream(Protocol):
    """What a heartbeat needs of the stream that it writes to."""

    def write(self, text: str, /) -> int:
        """Write text."""

    def flush(self) -> None:
        """Write out what is buffered."""


class Heartbeat:
    """Counts verdicts and knows what runs; writes to *stream*, whose reader may leave.

    *columns* gives the width of a terminal, None where the stream is none.
    """

    def __init__(
        self,
        stream: Stream,
        columns: Callable[[], int] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._columns = columns
        self._clock = clock
        self._began = clock()
        self._last = self._began
        self._total = 0
        self._verdicts: dict[str, Verdict] = {}
        self._running: dict[str, tuple[str, float]] = {}
        self._live = False

    # ---- what happens

    def selected(self, total: int) -> None:
        """So many tests are to run."""
        self._total = total

    def begins(self, lane: str, nodeid: str) -> None:
        """A test begins in the process or machine *lane*."""
        self._running[lane] = (nodeid, self._clock())

    def idle(self, lane: str | None = None) -> None:
        """Nothing runs in *lane* any more, or nowhere."""
        if lane is None:
            self._running.clear()
        else:
            self._running.pop(lane, None)

    def judged(self, nodeid: str, verdict: Verdict, reason: str, *, told: bool = False) -> None:
        """A test has its verdict; a bad one is shown at once, unless it is *told* already."""
        self._verdicts[nodeid] = verdict
        if verdict.bad and not told:
            color = _COLORS[verdict] if self._columns is not None else ""
            word = f"{color}{verdict.value.upper():<5}{color and chr(27) + '[0m'}"
            self.say(f"{word} {suite_id(nodeid)}: {' '.join(printable(reason).split())}")

    # ---- what is shown

    def line(self) -> str:
        """Return how far the run is."""
        now = self._clock()
        counts = [
            f"{count:,} {word}"
            for verdict, word in _WORDS.items()
            if (count := sum(known is verdict for known in self._verdicts.values()))
        ]
        text = f"{len(self._verdicts):,} of {self._total:,} tests in {_clock(now - self._began)}"
        if counts:
            text += f": {', '.join(counts)}"
        running = sorted(self._running.values(), key=lambda entry: entry[1])
        if running:
            tests = [f"{suite_id(nodeid)} for {now - since:.0f} s" for nodeid, since in running]
            more = f", and {len(tests) - _SHOWN_TESTS} more" if len(tests) > _SHOWN_TESTS else ""
            text += f"; now {', '.join(tests[:_SHOWN_TESTS])}{more}"
        return text

    def tick(self) -> None:
        """Show how far the run is, when it is time."""
        if not self._total:
            return
        every = LINE_SECONDS if self._columns is None else LIVE_SECONDS
        if self._clock() - self._last < every:
            return
        self._last = self._clock()
        if self._columns is None:
            self._write(f"kvmpy: {self.line()}\n")
        else:
            text, width = self.line(), max(self._columns() - 1, 20)
            self._write(ERASE + (text if len(text) <= width else f"{text[: width - 1]}…"))
            self._live = True

    def clear(self) -> None:
        """Take the live line away, for somebody else's text."""
        if self._live:
            self._live = False
            self._write(ERASE)

    def gone(self) -> None:
        """Somebody else has taken the live line away."""
        self._live = False

    def say(self, text: str) -> None:
        """Write a line that stays."""
        self.clear()
        self._write(f"{text}\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
