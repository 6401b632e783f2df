# SPDX-License-Identifier: Apache-2.0
"""Which events of a trace are shown, and what they add up to."""

from __future__ import annotations

import fnmatch
from collections import Counter
from dataclasses import dataclass, field

from kvmpy.debug.decode.decoder import PARTIAL, exit_name, request_name, was_partial
from kvmpy.debug.record.events import IOCTL
from kvmpy.debug.watch.trace_events import AnyFrame, Event
from kvmpy.uapi.error_hints import errno_name
from kvmpy.uapi.ioctls import KVM_RUN

_RUN = KVM_RUN.nr
_KEYS = ("ioctl", "fd", "errno", "exit", "thread")


class FilterError(ValueError):
    """A filter that cannot be understood; the text says what is allowed."""


@dataclass(frozen=True)
class Term:
    """One condition: any of *patterns* matches *key*; or none, with *negated*."""

    key: str
    patterns: tuple[str, ...]
    negated: bool = False

    def matches(self, event: Event) -> bool:
        """Tell whether the event passes."""
        result = any(self._one(event, pattern) for pattern in self.patterns)
        return result != self.negated

    def _one(self, event: Event, pattern: str) -> bool:
        if self.key == "fd":
            return fnmatch.fnmatch(event.target.lower(), pattern)
        if self.key == "thread":
            name, _, number = event.thread.rpartition(":")
            return fnmatch.fnmatch(name.lower(), pattern) or number == pattern
        if not event.is_ioctl:
            return False
        if self.key == "errno":
            # What an ioctl left undone has no errno: it is a failure like any.
            name = errno_name(event.errno).lower() if event.errno else ""
            return event.failed and fnmatch.fnmatch(name, pattern)
        text = event.exit if self.key == "exit" else event.name.partition(" ")[0]
        prefix = "kvm_exit_" if self.key == "exit" else "kvm_"
        return bool(text) and any(
            fnmatch.fnmatch(text.lower(), wanted) for wanted in (pattern, prefix + pattern)
        )


class Filter:
    """Conditions that must all hold.

    ``[!][KEY=]PATTERN[,PATTERN...]``: KEY is ioctl (the default), fd, errno, exit or thread; a pattern may
    hold ``*`` and ``?``, in any case; ``KVM_`` and ``KVM_EXIT_`` may be left out; ``errno=*`` is any failure,
    of a part, too.  FilterError for anything else.
    """

    def __init__(self, texts: tuple[str, ...] | list[str] = ()) -> None:
        self.terms = [self._parse(text) for text in texts]

    @staticmethod
    def _parse(text: str) -> Term:
        body = text.strip()
        negated = body.startswith("!")
        body = body.removeprefix("!").strip()
        key, mark, patterns = body.partition("=")
        if not mark:
            key, patterns = "ioctl", body
        names = tuple(part.strip().lower() for part in patterns.split(",") if part.strip())
        if key.strip() not in _KEYS or not names:
            raise FilterError(
                f"filter {text!r}: expected [!][KEY=]PATTERN[,PATTERN...] with KEY one of {', '.join(_KEYS)}"
            )
        return Term(key.strip(), names, negated)

    def __call__(self, event: Event) -> bool:
        """Tell whether the event is shown; warnings always are, other remarks only without a filter."""
        if not event.is_ioctl:
            return event.warning or not self.terms
        return all(term.matches(event) for term in self.terms)


@dataclass
class _Row:
    calls: int = 0
    nanoseconds: int = 0
    longest: int = 0
    errors: Counter[str] = field(default_factory=Counter)


class Summary:
    """Counts, time and errors by ioctl, and the exits of KVM_RUN."""

    def __init__(self) -> None:
        # By request, errno (-1: done in part) and exit: calls, nanoseconds, the longest.
        self._counts: dict[tuple[int, int, str], list[int]] = {}

    def add(self, event: Event) -> None:
        """Count an event."""
        if event.is_ioctl:
            self.add_frame(event.frame)

    def add_frame(self, frame: AnyFrame) -> None:
        """Count the ioctl in a frame; nothing is decoded for that."""
        payload = frame.payload
        _, _, request, _, result, errno, _, _, _, end_ns = IOCTL.unpack_from(payload)
        reason = ""
        if request == _RUN:
            reason = exit_name(payload, result, errno)
        elif request in PARTIAL and not errno and was_partial(payload):
            errno = -1
        took = max(0, end_ns - frame.time_ns) if end_ns else 0
        row = self._counts.get((request, errno, reason))
        if row is None:
            self._counts[request, errno, reason] = [1, took, took]
            return
        row[0] += 1
        row[1] += took
        if took > row[2]:
            row[2] = took

    @property
    def rows(self) -> dict[str, _Row]:
        """What is known of each ioctl, by name."""
        rows: dict[str, _Row] = {}
        for (request, errno, _), (calls, took, longest) in self._counts.items():
            row = rows.setdefault(request_name(request), _Row())
            row.calls += calls
            row.nanoseconds += took
            row.longest = max(row.longest, longest)
            if errno:
                row.errors["in part" if errno < 0 else errno_name(errno)] += calls
        return rows

    @property
    def exits(self) -> Counter[str]:
        """How often KVM_RUN ended for which reason."""
        counts: Counter[str] = Counter()
        for (_, _, reason), (calls, _, _) in self._counts.items():
            if reason:
                counts[reason] += calls
        return counts

    def lines(self) -> list[str]:
        """Return the table, the ioctls that took longest first."""
        rows, exits = self.rows, self.exits
        total = sum(row.nanoseconds for row in rows.values()) or 1
        lines = [
            f"{'time %':>7} {'seconds':>11} {'us/call':>10} {'longest us':>11} {'calls':>9}  ioctl, errors"
        ]
        for name, row in sorted(rows.items(), key=lambda item: -item[1].nanoseconds):
            errors = ", ".join(f"{count} {text}" for text, count in row.errors.most_common())
            each = row.nanoseconds / 1000 / row.calls
            text = f"{100 * row.nanoseconds / total:7.2f} {row.nanoseconds / 1e9:11.6f} {each:10.1f}"
            text += f" {row.longest / 1000:11.1f} {row.calls:9}  {name}"
            lines.append(f"{text}  ({errors})" if errors else text)
        calls = sum(row.calls for row in rows.values())
        lines.append(f"{'':7} {total / 1e9:11.6f} {'':10} {'':11} {calls:9}  all")
        if exits:
            listed = ", ".join(f"{count} {name}" for name, count in exits.most_common())
            lines.append(f"exits of KVM_RUN: {listed}")
        return lines

    def json(self) -> dict[str, object]:
        """Return the same as JSON-ready values."""
        return {
            "ioctls": {
                name: {
                    "calls": row.calls,
                    "seconds": row.nanoseconds / 1e9,
                    "longest_us": row.longest / 1000,
                    "errors": dict(row.errors),
                }
                for name, row in self.rows.items()
            },
            "exits": dict(self.exits),
        }
