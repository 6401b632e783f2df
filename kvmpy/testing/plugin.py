# SPDX-License-Identifier: Apache-2.0
"""The plugin's entry point: wires options, fixtures, item reports, results and report files together.

In a session that has nothing to do with KVM it stays silent.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest

from kvmpy import version
from kvmpy.guest import packs
from kvmpy.testing import (
    brief,
    configurations,
    differences,
    gate,
    host,
    ktap,
    naming,
    options,
    protections,
    recording,
    selection,
)
from kvmpy.testing.errata import BUILTIN, ErrataError, load
from kvmpy.testing.fixtures import (
    REQUIREMENTS,
    deadline,
    kvm,
    load_seconds,
    make_load,
    make_vm,
    rng,
    seed,
    vm,
)
from kvmpy.testing.fixtures import _protection as protection
from kvmpy.testing.itemreports import ItemReports, Needs
from kvmpy.testing.json_report import document, json_text
from kvmpy.testing.leakcheck import LeakCheck, uses_kvmpy
from kvmpy.testing.option_table import LOAD_SECONDS
from kvmpy.testing.options import SETTINGS
from kvmpy.testing.reportfiles import Junit, KtapFile, ReportFiles, SteadyStream
from kvmpy.testing.requirements import Requirements
from kvmpy.testing.results import GROWTH_FAILS, GROWTH_NOTED, Results, is_lost
from kvmpy.testing.verdicts import NOTHING_RAN, Verdict

__all__ = ["deadline", "kvm", "load_seconds", "make_load", "make_vm", "protection", "rng", "seed", "vm"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare options and ini settings."""
    options.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Read the settings and register the session's plugin objects."""
    for marker in options.MARKERS:
        config.addinivalue_line("markers", marker)
    settings = options.read_settings(config)
    config.stash[SETTINGS] = settings
    if (pack := options.chosen(config, "pack_to")) is not None:
        from kvmpy.testing import packing

        packing.attach(config, Path(pack).absolute())
        return
    _take_pack(config)
    config.stash[REQUIREMENTS] = Requirements(settings.configurations)
    try:
        errata = load([BUILTIN, *settings.errata])
        if settings.configurations:
            configurations.load(settings.configurations)
    except (ErrataError, configurations.ConfigurationError) as error:
        raise pytest.UsageError(str(error)) from error
    config.pluginmanager.register(differences, "kvmpy-differences")
    config.pluginmanager.register(LeakCheck(settings.leaks), "kvmpy-leaks")
    config.pluginmanager.register(Needs(settings), "kvmpy-needs")
    if settings.suite and host.platform_name() == "host":
        from kvmpy.testing.kernelwatch import KernelWatch

        config.pluginmanager.register(KernelWatch.of_this_host(), "kvmpy-kernel")
    if settings.evidence:
        _keep_runs(config)
    # The lab's tests are listed on the host.
    if settings.fail_allocations and not config.option.collectonly:
        from kvmpy.testing import fault_injection

        if lacking := fault_injection.missing():
            raise pytest.UsageError(f"--fail-allocations needs {lacking}")
        config.pluginmanager.register(fault_injection.EveryTest(), "kvmpy-fault-injection")
    config.pluginmanager.register(ItemReports(settings, errata, host.facts()), "kvmpy-items")
    recording.register(config)
    if settings.timeline is not None:
        from kvmpy.testing import timelines

        timelines.attach(config, settings.timeline)
    if hasattr(config, "workerinput"):
        _attach_worker(config, config.workerinput)
        return
    display = brief.Brief(config) if brief.wanted(config) else None
    if display is not None:
        config.pluginmanager.register(display, "kvmpy-brief")
    session = Session(config, settings, brief=display is not None)
    config.pluginmanager.register(session, "kvmpy-session")
    if settings.journal is not None:
        from kvmpy.testing import testprocess
        from kvmpy.testing.journal import Journal

        only = options.chosen(config, "only_report")
        journal = Journal(
            config,
            settings.journal,
            settings.seed,
            session.results,
            only,
            heartbeat=display is not None and display.heartbeat,
        )
        config.pluginmanager.register(journal, "kvmpy-journal")
        config.add_cleanup(journal.close)
        if testprocess.supervised():
            testprocess.attach(config, settings.journal)


def _take_pack(config: pytest.Config) -> None:
    """Have guest programs come from the pack that is named, here and in what the tests start."""
    named = options.chosen(config, "pack")
    if named is None:
        return
    os.environ[packs.VARIABLE] = os.path.abspath(named)
    try:
        packs.verify_chosen()
    except packs.PackError as error:
        raise pytest.UsageError(str(error)) from None


def _attach_worker(config: pytest.Config, given: Mapping[str, Any]) -> None:
    from kvmpy.testing.journal import WORKER_DONE, WORKER_JOURNAL, WORKER_KEPT, WorkerJournal

    if WORKER_JOURNAL not in given:
        return
    from kvmpy.testing import testprocess

    path = Path(given[WORKER_JOURNAL])
    journal = WorkerJournal(config, path, given[WORKER_DONE], kept=given[WORKER_KEPT])
    config.pluginmanager.register(journal, "kvmpy-journal")
    config.add_cleanup(journal.close)
    testprocess.attach(config, path)


def _keep_runs(config: pytest.Config) -> None:
    from kvmpy.core import recent

    recent.keeps_runs = True
    config.add_cleanup(lambda: setattr(recent, "keeps_runs", False))


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Name a test file the same wherever the session's root is, where somebody wants that."""
    here = options.chosen(parent.config, "ids_from")
    if here is None:
        return None
    name = naming.identifier(module_path, Path(here))
    module: pytest.Module = pytest.Module.from_parent(parent, path=module_path, nodeid=name)
    return module


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one item for each protection."""
    protections.parametrize(metafunc)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Repeat the tests, apply ``--protection``, and give tests with a long deadline a longer time-out."""
    if (times := options.chosen(config, "repeat")) is not None:
        from kvmpy.testing.repeat import repeat

        repeat(items, times)
    for item in items:
        options.widen_timeout(item)
    if (chosen := options.chosen(config, "select")) is not None:
        try:
            selection.deselect_others(config, items, selection.read(Path(chosen)))
        except selection.SelectionError as error:
            raise pytest.UsageError(str(error)) from None
    wanted = config.stash[SETTINGS].protections
    if wanted is not None:
        protections.deselect_others(config, items, wanted)


class Session:
    """Plugin object of the controlling process: header, results, report files, table."""

    def __init__(self, config: pytest.Config, settings: options.Settings, *, brief: bool = False) -> None:
        self._config = config
        self._brief = brief
        self._settings = settings
        self._started = time.monotonic()
        self._summary: host.HostSummary | None = None
        self._files = ReportFiles()
        self._ktap = KtapFile(self._files, settings.ktap) if settings.ktap is not None else None
        self._junit = Junit(config)
        self._output: SteadyStream | None = None
        self._streams = True
        self._concerned = (
            settings.suite or settings.table or bool(settings.json or settings.ktap or settings.html)
        )
        self.results = Results(host.platform_name())
        config.pluginmanager.register(self.results, "kvmpy-results")

    @property
    def summary(self) -> host.HostSummary:
        """The host's summary, looked up once."""
        if self._summary is None:
            self._summary = host.summarize()
        return self._summary

    def describe(self, summary: host.HostSummary) -> None:
        """Report *summary* in place of this host's: the tests run on another kernel."""
        self._summary = summary
        # It may have other tests than those that are selected by now.
        self._streams = False

    def header(self) -> list[str]:
        """Return what header and KTAP say about host and session."""
        settings = self._settings
        about = f"kvmpy {version.exact()}: seed {settings.seed}, deadline {settings.deadline:g} s"
        if settings.load_seconds != LOAD_SECONDS:
            about += f", load {settings.load_seconds:g} s"
        if settings.fail_allocations:
            about += ", each allocation of an ioctl fails once"
        if settings.protections is not None:
            about += f", only protection {', '.join(settings.protections)}"
        lines = [about, *settings.about_protections, *self.summary.lines()]
        watch: Any = self._config.pluginmanager.get_plugin("kvmpy-kernel")
        if watch is not None and watch.missing:
            lines.append(f"the kernel's log is not watched: {watch.missing}")
        required = gate.required_names()
        if required:
            lines.append(f"{gate.VARIABLE}: {', '.join(sorted(required))} may not be missing")
        return lines

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Give an xdist worker this session's seed."""
        node.workerinput[options.WORKER_SEED] = self._settings.seed

    def pytest_report_header(self) -> list[str]:
        """Describe the host."""
        return self.header() if self._concerned else []

    @pytest.hookimpl(trylast=True)
    def pytest_report_collectionfinish(self, items: list[pytest.Item]) -> list[str]:
        """Print the seed where there is no header but tests that use it."""
        if self._concerned or not any(uses_kvmpy(item) for item in items):
            return []
        return [f"kvmpy: seed {self._settings.seed} (repeat with --kvmpy-seed {self._settings.seed})"]

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionstart(self) -> Generator[None, object, object]:
        """Outlive whoever reads the terminal's output."""
        reporter: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            self._output = reporter._tw._file = SteadyStream(reporter._tw._file)
            self._config.add_cleanup(self._output.finish)
        return (yield)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write a verdict into the KTAP report as soon as there is one."""
        if self._ktap is not None and self._streams and (report.when == "teardown" or is_lost(report)):
            self._ktap.add(self.results.verdict(report.nodeid), self._new_stream)

    def _new_stream(self) -> ktap.Stream:
        return ktap.Stream(self.results.selected, self.results.uncollected(), self.header())

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        """Judge the session and write the report files, whatever becomes of the terminal's summary."""
        self._junit.divert()
        try:
            return (yield)
        finally:
            if session.exitstatus == pytest.ExitCode.OK:
                if self._incomplete():
                    session.exitstatus = pytest.ExitCode.TESTS_FAILED
                elif self._nothing_ran():
                    session.exitstatus = NOTHING_RAN
            self._write(int(session.exitstatus))
            if (failures := self._failures()) and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
            for line in failures:
                with contextlib.suppress(OSError):
                    print(f"kvmpy: {line}", file=sys.stderr, flush=True)

    def _failures(self) -> list[str]:
        output = self._output.lost if self._output is not None else ""
        return [*self._files.failures, *self.results.unwritten(), *([output] if output else [])]

    def _write(self, exit_status: int) -> None:
        settings, write = self._settings, self._files.write
        if settings.json is not None:
            write("json", settings.json, lambda: json_text(self._document(exit_status)))
        if self._ktap is not None:
            verdicts = self.results.verdicts()
            self._ktap.end(verdicts, lambda: ktap.render(verdicts, self.header(), self.results.selected))
        if settings.html is not None:
            write("html", settings.html, lambda: self._html(exit_status))
        self._junit.write(self._files)

    def _html(self, exit_status: int) -> str:
        from kvmpy.testing import html

        return html.render([self._document(exit_status)])

    def _incomplete(self) -> bool:
        """Whether a session that pytest calls good is none: something was lost, or leaked all the time."""
        if self._config.option.collectonly:
            return False
        results = self.results
        lost = any(entry.verdict is Verdict.LOST for entry in results.verdicts())
        # xdist gives up after many dead workers, and calls what it did not run no failure.
        given_up = self._config.getoption("dist", "no") != "no" and bool(results.not_run())
        return lost or given_up or results.growth() >= GROWTH_FAILS

    def _nothing_ran(self) -> bool:
        """Whether every test of the suite was skipped: nothing is known of KVM then."""
        settings = self._settings
        # A machine of the lab has a share of the tests only.
        is_share = settings.journal is not None and not settings.journal.is_file()
        verdicts = self.results.verdicts() if settings.suite and not is_share else []
        return bool(verdicts) and all(entry.verdict is Verdict.SKIP for entry in verdicts)

    def _document(self, exit_status: int) -> dict[str, Any]:
        return document(
            self.results.verdicts(),
            self.summary,
            seed=self._settings.seed,
            duration=time.monotonic() - self._started,
            exit_status=exit_status,
            not_run=self.results.not_run(),
            growth=self.results.growth(),
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the verdict table and what else there is to know."""
        self._junit.restore()
        verdicts = self.results.verdicts()
        if self._settings.table and verdicts:
            from kvmpy.testing.table import print_report

            writer = terminalreporter._tw
            summary = self.summary
            platform = (
                ""
                if summary.platform == "host"
                else f", platform {summary.platform} ({summary.accelerator or 'emulated'})"
            )
            if summary.configuration:
                platform += f", configuration {summary.configuration}"
            print_report(
                writer._file,
                verdicts,
                title=f"verdicts{platform}, seed {self._settings.seed}",
                labels=self.summary.labels,
                width=writer.fullwidth,
                color=writer.hasmarkup,
                not_run=len(self.results.not_run()),
                brief=self._brief,
            )
        growth = self.results.growth()
        if growth >= GROWTH_NOTED:
            text = f"kvmpy: the test process grew by {growth / 1024:.0f} KiB with every test: something leaks"
            terminalreporter.write_line(text, red=True)
