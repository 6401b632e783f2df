# SPDX-License-Identifier: Apache-2.0
"""Which events of a trace are shown, and what they add up to."""

from __future__ import annotations

import fnmatch
from collections import Counter
from dataclasses import dataclass, field

from kvmpy.debug.trace_events import Event
from kvmpy.uapi.error_hints import errno_name

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
        found = any(self._one(event, pattern) for pattern in self.patterns)
        return found != self.negated

    def _one(self, event: Event, pattern: str) -> bool:
        ioctl, decoded = event.ioctl, event.decoded
        if self.key == "fd":
            return fnmatch.fnmatch(event.target.lower(), pattern)
        if self.key == "thread":
            name, _, number = event.thread.rpartition(":")
            return fnmatch.fnmatch(name.lower(), pattern) or number == pattern
        if ioctl is None or decoded is None:
            return False
        if self.key == "errno":
            return bool(ioctl.errno) and fnmatch.fnmatch(errno_name(ioctl.errno).lower(), pattern)
        text = decoded.exit.partition(" ")[0] if self.key == "exit" else decoded.name.partition(" ")[0]
        prefix = "kvm_exit_" if self.key == "exit" else "kvm_"
        return bool(text) and any(
            fnmatch.fnmatch(text.lower(), wanted) for wanted in (pattern, prefix + pattern)
        )


class Filter:
    """Conditions that must all hold.

    ``[!][KEY=]PATTERN[,PATTERN...]``: KEY is ioctl (the default), fd, errno, exit or thread; a pattern may
    hold ``*`` and ``?``, in any case; ``KVM_`` and ``KVM_EXIT_`` may be left out; ``errno=*`` is any failure.
    FilterError for anything else.
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
        if event.ioctl is None:
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
        self.rows: dict[str, _Row] = {}
        self.exits: Counter[str] = Counter()

    def add(self, event: Event) -> None:
        """Count an event."""
        if event.ioctl is None or event.decoded is None:
            return
        row = self.rows.setdefault(event.decoded.name, _Row())
        row.calls += 1
        row.nanoseconds += event.duration_ns
        row.longest = max(row.longest, event.duration_ns)
        if event.ioctl.errno:
            row.errors[errno_name(event.ioctl.errno)] += 1
        if event.decoded.exit:
            self.exits[event.decoded.exit.partition(" ")[0]] += 1

    def lines(self) -> list[str]:
        """Return the table, the ioctls that took longest first."""
        total = sum(row.nanoseconds for row in self.rows.values()) or 1
        lines = [
            f"{'time %':>7} {'seconds':>11} {'us/call':>10} {'longest us':>11} {'calls':>9}  ioctl, errors"
        ]
        for name, row in sorted(self.rows.items(), key=lambda item: -item[1].nanoseconds):
            errors = ", ".join(f"{count} {text}" for text, count in row.errors.most_common())
            each = row.nanoseconds / 1000 / row.calls
            text = f"{100 * row.nanoseconds / total:7.2f} {row.nanoseconds / 1e9:11.6f} {each:10.1f}"
            text += f" {row.longest / 1000:11.1f} {row.calls:9}  {name}"
            lines.append(f"{text}  ({errors})" if errors else text)
        calls = sum(row.calls for row in self.rows.values())
        lines.append(f"{'':7} {total / 1e9:11.6f} {'':10} {'':11} {calls:9}  all")
        if self.exits:
            lines.append(
                "exits of KVM_RUN: "
                + ", ".join(f"{count} {name}" for name, count in self.exits.most_common())
            )
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
