# SPDX-License-Identifier: Apache-2.0
"""KTAP version 1, as the kernel's Documentation/dev-tools/ktap.rst defines it.

One nested test for each test file, one case for each test in it. Pure: no KVM, no pytest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from kvmpy.testing.verdicts import TestVerdict, Verdict, counted, flaky

INDENT = "  "


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _description(text: str) -> str:
    # A description is any text without '#' and newline.
    return _one_line(text.replace("#", "_"))


def _result(number: int, entry: TestVerdict) -> str:
    good = "not ok" if entry.verdict.bad else "ok"
    line = f"{good} {number} {_description(entry.name)}"
    if entry.verdict is Verdict.SKIP:
        return f"{line} # SKIP {_one_line(entry.reason)}".rstrip()
    if entry.verdict is Verdict.XFAIL:
        return f"{line} # XFAIL {_one_line(entry.reason)}".rstrip()
    if entry.verdict is Verdict.LOST:
        return f"{line} # ERROR lost: {_one_line(entry.reason)}".rstrip()
    if entry.verdict is Verdict.FAIL and entry.reason.startswith("Timeout"):
        return f"{line} # TIMEOUT {_one_line(entry.reason)}"
    return line


def _on(entry: TestVerdict) -> str:
    return f"on {entry.host}" if entry.host else ""


def _diagnostics(entry: TestVerdict) -> Iterator[str]:
    about = [entry.platform if entry.platform != "host" else "", entry.protection or "", _on(entry)]
    label = f"{_description(entry.name)} ({', '.join(word for word in about if word)})" if any(about) else ""
    if entry.verdict.bad:
        yield f"# {label or _description(entry.name)}: {_one_line(entry.reason)}"
        for text in (entry.details, entry.postmortem or ""):
            for line in text.splitlines():
                yield f"# {line}".rstrip()
    elif label and (entry.platform != "host" or entry.host):
        yield f"# {label}"


def _file(name: str, verdicts: Sequence[TestVerdict]) -> Iterator[str]:
    yield "KTAP version 1"
    yield f"# Subtest: {_description(name)}"
    yield f"1..{len(verdicts)}"
    for number, entry in enumerate(verdicts, 1):
        yield from _diagnostics(entry)
        yield _result(number, entry)


def lines(verdicts: Iterable[TestVerdict], header: Sequence[str] = (), not_run: int = 0) -> Iterator[str]:
    """Yield a KTAP document; *header* becomes diagnostic lines, *not_run* counts tests never started."""
    files: dict[str, list[TestVerdict]] = {}
    verdicts = list(verdicts)
    for entry in verdicts:
        files.setdefault(entry.file, []).append(entry)
    yield "KTAP version 1"
    for text in header:
        yield f"# {_one_line(text)}"
    yield f"1..{len(files)}"
    for number, (name, entries) in enumerate(files.items(), 1):
        for line in _file(name, entries):
            yield INDENT + line
        if any(entry.verdict.bad for entry in entries):
            yield f"not ok {number} {_description(name)}"
        elif all(entry.verdict is Verdict.SKIP for entry in entries):
            yield f"ok {number} {_description(name)} # SKIP all of its tests were skipped"
        else:
            yield f"ok {number} {_description(name)}"
    for test, counts in flaky(verdicts).items():
        yield f"# flaky: {_one_line(test)}: {counted(counts)}"
    if not_run:
        yield f"# {not_run} selected tests were not started"


def render(verdicts: Iterable[TestVerdict], header: Sequence[str] = (), not_run: int = 0) -> str:
    """Return the KTAP document as text."""
    return "\n".join(lines(verdicts, header, not_run)) + "\n"
