# SPDX-License-Identifier: Apache-2.0
"""KTAP version 1, as the kernel's Documentation/dev-tools/ktap.rst defines it.

One nested test for each test file, one case for each test in it. Pure: no KVM, no pytest.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence

from kvmpy.testing.verdicts import TestVerdict, Verdict, counted, flaky, suite_id

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


def file_of(nodeid: str) -> str:
    """Return the name of the nested test that the test *nodeid* belongs to."""
    return suite_id(nodeid).partition("::")[0]


class Stream:
    """A document that grows: :meth:`add` and :meth:`end` yield the lines that can be written by then.

    Its plan is of *selected*, the node ids in the order of collection, and of the *files* that were not
    collected. Results come in that order, whatever order verdicts come in: the same verdicts give the same
    document, which is cut off somewhere if the run is. *header* becomes diagnostic lines.
    """

    def __init__(
        self, selected: Iterable[str], files: Sequence[TestVerdict] = (), header: Sequence[str] = ()
    ) -> None:
        self._files: dict[str, list[str]] = {entry.file: [entry.nodeid] for entry in files}
        for nodeid in dict.fromkeys(selected):
            self._files.setdefault(file_of(nodeid), []).append(nodeid)
        self._known = {entry.nodeid: entry for entry in files}
        self._header = header
        self._lines = self._document()
        self._over = False

    def add(self, entry: TestVerdict) -> Iterator[str]:
        """Take a verdict, and yield what can be written now."""
        self.take(entry)
        yield from self._next()

    def take(self, entry: TestVerdict) -> None:
        """Take a verdict."""
        self._known[entry.nodeid] = entry

    def end(self) -> Iterator[str]:
        """No verdict will come any more."""
        self._over = True
        yield from self._next()

    def _next(self) -> Iterator[str]:
        for line in self._lines:
            if line is None:
                return
            yield line

    def _document(self) -> Iterator[str | None]:
        """Yield all lines, and None wherever a verdict has not come yet."""
        yield "KTAP version 1"
        for text in self._header:
            yield f"# {_one_line(text)}"
        yield f"1..{len(self._files)}"
        for number, (name, nodeids) in enumerate(self._files.items(), 1):
            # Nothing is said of a file before one of its tests has an end.
            while not self._over and nodeids[0] not in self._known:
                yield None
            entries = yield from self._file(name, nodeids)
            if any(entry is None or entry.verdict.bad for entry in entries):
                yield f"not ok {number} {_description(name)}"
            elif all(entry is not None and entry.verdict is Verdict.SKIP for entry in entries):
                yield f"ok {number} {_description(name)} # SKIP all of its tests were skipped"
            else:
                yield f"ok {number} {_description(name)}"
        while not self._over:
            yield None
        planned = {nodeid for nodeids in self._files.values() for nodeid in nodeids}
        for entry in self._known.values():
            if entry.nodeid not in planned:
                yield f"# {_one_line(entry.id)}: {entry.verdict.value}, without having been selected"
        for test, counts in flaky(self._known.values()).items():
            yield f"# flaky: {_one_line(test)}: {counted(counts)}"
        if missing := len(planned - set(self._known)):
            yield f"# {missing} selected tests were not started"

    def _file(
        self, name: str, nodeids: Sequence[str]
    ) -> Generator[str | None, None, list[TestVerdict | None]]:
        for line in ("KTAP version 1", f"# Subtest: {_description(name)}", f"1..{len(nodeids)}"):
            yield INDENT + line
        entries = []
        for number, nodeid in enumerate(nodeids, 1):
            while not self._over and nodeid not in self._known:
                yield None
            entry = self._known.get(nodeid)
            entries.append(entry)
            if entry is None:
                test = suite_id(nodeid).partition("::")[2] or nodeid
                yield f"{INDENT}not ok {number} {_description(test)} # ERROR not started"
                continue
            for line in (*_diagnostics(entry), _result(number, entry)):
                yield INDENT + line
        return entries


def render(verdicts: Iterable[TestVerdict], header: Sequence[str] = (), selected: Sequence[str] = ()) -> str:
    """Return the document of a run that is over; *selected* are the node ids of all that was to run."""
    known = list(verdicts)
    files = [entry for entry in known if "::" not in entry.nodeid]
    tests = [entry for entry in known if "::" in entry.nodeid]
    stream = Stream([*selected, *(entry.nodeid for entry in tests)], files, header)
    for entry in tests:
        stream.take(entry)
    return "\n".join(stream.end()) + "\n"
