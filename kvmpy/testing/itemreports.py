# SPDX-License-Identifier: Apache-2.0
"""Around every test, in the process that runs it: requirements, errata and post-mortem.

What a report says beyond pytest's own fields travels in its attribute ``kvmpy``, through xdist and journal.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from kvmpy.testing import gate, protections
from kvmpy.testing.errata import Erratum, HostFacts, find
from kvmpy.testing.fixes import FIXES
from kvmpy.testing.fixtures import REQUIREMENTS, VMS
from kvmpy.testing.leakcheck import FAILED, RSS
from kvmpy.testing.options import Settings
from kvmpy.testing.reportfiles import UNWRITTEN
from kvmpy.testing.verdicts import Missing, once, printable, suite_id

_PACKAGE = str(Path(__file__).resolve().parent.parent)
# Names inside a MissingError's text by which KVMPY_REQUIRE can insist.
_NAMED = re.compile(r"(KVM_CAP_\w+)|protection ([\w-]+)")


def named_on_command_line(item: pytest.Item) -> bool:
    """Whether the user asked for exactly this test: a ``file::test`` argument that it belongs to."""
    path = str(item.path)
    for arg in item.config.args:
        file, separator, name = str(arg).partition("::")
        tail = once(item.nodeid).partition("::")[2]
        if separator and path.endswith(file.lstrip("./")) and (tail == name or tail.startswith(f"{name}[")):
            return True
    return False


def _is_own(path: str) -> bool:
    return path.startswith(f"{_PACKAGE}/") and not path.startswith(f"{_PACKAGE}/selftests/")


def _without_own_frames(error: BaseException) -> BaseException:
    entries, entry = [], error.__traceback__
    while entry is not None:
        entries.append(entry)
        entry = entry.tb_next
    rest: TracebackType | None = None
    for entry in reversed(entries):
        if not _is_own(entry.tb_frame.f_code.co_filename):
            rest = TracebackType(rest, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return error.with_traceback(rest)


def missing_of(error: BaseException) -> Missing | None:
    """Return what a MissingError says is missing, None for any other exception."""
    # Only looked up: whoever raised one has imported it.
    module = sys.modules.get("kvmpy.core.errors")
    if module is None or not isinstance(error, module.MissingError):
        return None
    result = _NAMED.findall(error.missing)
    return Missing(
        error.missing, error.how, tuple(capability or protection for capability, protection in result)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and what it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def postmortem_of(error: BaseException | None) -> str:
    """Return the post-mortem that an exception, or what caused it, carries."""
    for each in _chain(error):
        text = getattr(each, "postmortem", "")
        if isinstance(text, str) and text:
            return text
    return ""


def end_of_run(error: BaseException | None) -> str:
    """Return why no other test can say anything after *error*, "" where they can."""
    module = sys.modules.get("kvmpy.core.errors")
    if module is None:
        return ""
    dead = next((each for each in _chain(error) if isinstance(each, module.DeadProcessorError)), None)
    return "" if dead is None else str(dead).partition("\n")[0]


def _state_of_vms(item: pytest.Item, cause: str) -> str:
    texts = []
    for vm in item.stash.get(VMS, []):
        if vm.closed or not vm.launched or not vm.vcpus:
            continue
        try:
            vm.stop()  # the state of a vCPU that runs cannot be had
            texts.append(vm.postmortem(vm.vcpus[0], cause))
        except Exception as error:  # noqa: BLE001 - a post-mortem may not hide the failure it is about
            texts.append(f"{vm.name}: no post-mortem: {error!r}")
    return "\n\n".join(texts)


def danger_of(item: pytest.Item) -> str:
    """Return why *item* could harm this host, "" when it is not marked or the host is known to be fixed."""
    mark = item.get_closest_marker("dangerous")
    if mark is None:
        return ""
    reason, name = "dangerous: can crash an unfixed host", mark.kwargs.get("unless")
    if name is not None:
        fix = FIXES[name]
        if fix.known():
            return ""
        reason += f", and this kernel is not known to have {fix.commit} ({fix.title}; Linux {fix.versions})"
    return f"{reason}; run it in the lab or with --run-dangerous"


def promise_of(item: pytest.Item) -> str:
    """Return the first line of the test's docstring: what the test promises."""
    text = inspect.getdoc(getattr(item, "obj", None)) or ""
    return text.partition("\n")[0].strip()


def _printable(value: Any) -> Any:
    """Return *value* with every text in it printable; pytest's objects are changed in place."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_printable(entry) for entry in value)
    if isinstance(value, dict):
        return {_printable(key): _printable(entry) for key, entry in value.items()}
    if type(value).__module__.startswith("_pytest._code"):
        for name, entry in vars(value).items():
            setattr(value, name, _printable(entry))
    return value


def _clean(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Take out of a report what a terminal would obey, whether test, guest or kernel wrote it."""
    for name in ("longrepr", "wasxfail", "user_properties"):
        if hasattr(report, name):
            setattr(report, name, _printable(getattr(report, name)))
    if report.skipped:
        # pytest's summary prints a reason as it is: it may not look like lines of another report.
        if isinstance(report.longrepr, tuple):
            path, line, reason = report.longrepr
            report.longrepr = (path, line, " ".join(reason.split()))
        if isinstance(expected := getattr(report, "wasxfail", None), str):
            report.__dict__["wasxfail"] = " ".join(expected.split())
    elif (crash := getattr(report.longrepr, "reprcrash", None)) is not None:
        # So is a message where pytest sees a CI system.
        crash.message = crash.message.replace("\n", "\n| ")
    # The log's levels are coloured by pytest itself.
    report.sections = [
        (printable(title), text if title.startswith("Captured log") else printable(text))
        for title, text in report.sections
    ]


class Needs:
    """Plugin object that checks what a test needs before its fixtures are set up.

    No wrapper: pytest's own wrappers must have started, as their teardown runs after a skip too.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Skip what is dangerous and what this host lacks."""
        danger = danger_of(item)
        if danger and not self._settings.run_dangerous and not named_on_command_line(item):
            raise pytest.skip.Exception(danger, _use_item_location=True)
        wanted = [need for mark in item.iter_markers("requires") for need in mark.args]
        if not wanted:
            return
        try:
            missing = item.config.stash[REQUIREMENTS].missing(protections.check_traits(item, wanted))
        except ValueError as error:
            pytest.fail(f"marker requires: {error}", pytrace=False)
        if missing:
            gate.refuse(item, missing)


class ItemReports:
    """Plugin object of every process that runs tests."""

    def __init__(
        self,
        settings: Settings,
        errata: Sequence[Erratum],
        facts: HostFacts,
    ) -> None:
        self._settings = settings
        self._errata = errata
        self._facts = facts

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        """Turn a MissingError that leaves a fixture into a skip with its reason."""
        recent = sys.modules.get("kvmpy.core.recent")
        if recent is not None:
            recent.clear()
        return (yield from self._or_missing(item))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Turn a MissingError that leaves the test into a skip with its reason."""
        return (yield from self._or_missing(item))

    def _or_missing(self, item: pytest.Item) -> Generator[None, object, object]:
        try:
            return (yield)
        except RuntimeError as error:
            missing = missing_of(error)
            if missing is None:
                raise
            gate.refuse(item, [missing])

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Attach promise, protection, missing things and post-mortem to the report; apply the errata."""
        self._hide_own_frames(item, call)
        reason = end_of_run(call.excinfo.value) if call.excinfo is not None else ""
        if reason:
            item.session.shouldstop = reason
        report = yield
        data: dict[str, Any] = {"promise": promise_of(item), "protection": protections.of_item(item)}
        if report.failed:
            item.stash[FAILED] = True
            self._postmortem(item, call, report, data)
            if self._settings.evidence:
                from kvmpy.core import recent

                data["ioctls"] = recent.entries(recent.taken())
        if call.when == "call" and (report.failed or self._settings.evidence) and item.stash.get(VMS, []):
            from kvmpy.testing.evidence import maps_of

            data["memory_maps"] = maps_of(item.stash[VMS])
        if report.skipped:
            data["missing"] = [[entry.what, entry.how] for entry in item.stash.get(gate.MISSING_KEY, [])]
        if report.skipped and not hasattr(report, "wasxfail"):
            self._insist(item, report)
        if call.when != "teardown":
            self._apply_errata(item, report)
        elif RSS in item.stash:
            data |= {"rss": item.stash[RSS], "pid": os.getpid()}
        if UNWRITTEN in item.stash:
            data["unwritten"] = item.stash[UNWRITTEN]
        _clean(report)
        report.__dict__["kvmpy"] = _printable(data)
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_make_collect_report(self) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """Keep what a terminal would obey out of the reports of files, too."""
        report = yield
        _clean(report)
        return report

    def _hide_own_frames(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        # kvmpy's errors say what is wrong in words: its source would stand between them and the test's line.
        info = call.excinfo
        if info is None or call.when != "call" or item.config.getoption("fulltrace"):
            return
        if type(info.value).__module__.startswith("kvmpy."):
            call.excinfo = pytest.ExceptionInfo.from_exception(_without_own_frames(info.value))

    def _postmortem(
        self,
        item: pytest.Item,
        call: pytest.CallInfo[None],
        report: pytest.TestReport,
        data: dict[str, Any],
    ) -> None:
        error = call.excinfo.value if call.excinfo is not None else None
        text = postmortem_of(error)
        if not text and call.when == "call":
            text = _state_of_vms(item, "the test failed on the host's side")
        if text:
            data["postmortem"] = text
            if text not in str(error):
                report.sections.append(("post-mortem", text))

    def _insist(self, item: pytest.Item, report: pytest.TestReport) -> None:
        # Skips that come from pytest.skip() in a test have no name; only "all" forbids them.
        dangerous = item.get_closest_marker("dangerous") is not None and "dangerous:" in str(report.longrepr)
        if "all" in gate.required_names() and not dangerous:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            report.outcome = "failed"
            report.longrepr = f"{reason} ({gate.VARIABLE}=all insists on it)"

    def _apply_errata(self, item: pytest.Item, report: pytest.TestReport) -> None:
        if report.skipped or (report.passed and report.when != "call"):
            return
        entry = find(self._errata, once(suite_id(item.nodeid)), self._facts, protections.of_item(item))
        if entry is None:
            return
        if report.passed:
            report.outcome = "failed"
            report.longrepr = (
                f"errata entry is stale: {entry.source} says that this test fails here "
                f"({entry.reason}; {entry.origin}), but it passed"
            )
        elif entry.explains(report.longreprtext):
            report.outcome = "skipped"
            report.wasxfail = f"errata: {entry.reason} ({entry.origin})"
        else:
            text = f"{entry.source} expects another failure here, one that says {entry.message!r}"
            report.sections.append(("errata", text))
