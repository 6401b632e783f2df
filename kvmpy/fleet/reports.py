# SPDX-License-Identifier: Apache-2.0
"""What a fleet's run tells at its end: a report for each column, and which hosts there were."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmpy import version
from kvmpy.lab.kernels import Say
from kvmpy.lab.matrix import SCHEMA, merge, merged_ktap, table
from kvmpy.testing import json_report, ktap
from kvmpy.testing.host import HostSummary
from kvmpy.testing.reportfiles import ReportFiles
from kvmpy.testing.results import Results
from kvmpy.testing.table import plain_console, print_report
from kvmpy.testing.verdicts import NOTHING_RAN, TestVerdict, Verdict

FAILURES, NO_REPORT = 1, 3
_WIDTH = 100


@dataclass
class HostFacts:
    """What reports say of a host. *title* is its class: hosts that are alike."""

    name: str
    summary: HostSummary
    firmware: str = ""
    microcode: str = ""
    labels: list[str] = field(default_factory=list)
    title: str = ""
    boots: list[str] = field(default_factory=list)
    deaths: int = 0
    losses: list[str] = field(default_factory=list)
    retired: str = ""

    @classmethod
    def unknown(cls, name: str) -> HostFacts:
        """Return what is known of a host that has said nothing."""
        return cls(name, HostSummary("unknown", "unknown", (), "unknown", kvm=False))

    def told(self, summary: HostSummary, about: Mapping[str, Any]) -> None:
        """Take what a host says when it joins."""
        self.summary = summary
        self.firmware, self.microcode = str(about["firmware"]), str(about["microcode"])
        if about["boot"] not in self.boots:
            self.boots.append(str(about["boot"]))

    def about(self) -> dict[str, str]:
        """Return what each verdict says of the host that gave it."""
        return {"host": self.name, "platform": self.summary.platform}

    def key(self) -> str:
        """Return what hosts that are alike have in common."""
        summary = self.summary
        same = [summary.kernel, summary.cpu, summary.platform, summary.configuration, *self.labels]
        return hashlib.sha256("\n".join(same).encode()).hexdigest()[:16]

    def title_among(self, taken: Iterable[str]) -> str:
        """Return the name of a class of hosts, another one than those *taken*."""
        words = [self.summary.kernel.partition(" ")[0], self.summary.configuration.partition(" (")[0]]
        words += [f"({self.summary.platform})"] if self.summary.platform != "host" else []
        title = " ".join(word for word in words if word)
        known, number = set(taken), 1
        while (name := title if number == 1 else f"{title} #{number}") in known:
            number += 1
        return name

    def summary_dict(self) -> dict[str, Any]:
        """Return the summary as JSON-ready values."""
        return asdict(self.summary)

    def as_dict(self) -> dict[str, Any]:
        """Return what the JSON report says of the host."""
        return {
            "name": self.name,
            "class": self.title,
            "kernel": self.summary.kernel,
            "cpu": self.summary.cpu,
            "platform": self.summary.platform,
            "configuration": self.summary.configuration,
            "firmware": self.firmware,
            "microcode": self.microcode,
            "labels": self.labels,
            "boots": max(1, len(self.boots)),
            "deaths": self.deaths,
            "lost": self.losses,
            "retired": self.retired,
        }


class Column:
    """The verdicts of a class of hosts or, without a title, of all."""

    def __init__(self, title: str, selected: Sequence[str]) -> None:
        self.title = title
        self.results = Results("unknown")
        self.results.select(selected)
        self.not_run: dict[str, str] = {}
        self._summaries: dict[str, HostSummary] = {}

    def describe(self, about: Mapping[str, Any]) -> None:
        """Take what is known of the hosts of the column."""
        summary = msgspec.convert(about["summary"], HostSummary)
        self._summaries[str(about["key"])] = summary

    def take(self, report: pytest.TestReport) -> None:
        """Take a report of a test; a lost one is all there is of it."""
        self.results.pytest_runtest_logreport(report)

    def skip(self, nodeid: str, what: str, how: str, about: Mapping[str, str]) -> list[pytest.TestReport]:
        """Skip a test for want of *what*; return the reports of that."""
        file, _, name = nodeid.partition("::")
        place = (file, None, name)
        told = {"missing": [[what, how]], **about}
        first = pytest.TestReport(nodeid, place, {}, "skipped", (file, 0, f"Skipped: {what}"), "setup")
        reports = [first, pytest.TestReport(nodeid, place, {}, "passed", None, "teardown")]
        for report in reports:
            report.__dict__["kvmpy"] = told
            self.take(report)
        return reports

    def give_up(self, ids: Iterable[str], why: str) -> None:
        """Nobody is left to run these tests."""
        self.not_run.update(dict.fromkeys(ids, why))

    def summary(self) -> HostSummary:
        """Return the one summary of its hosts; where they differ, all that they say."""
        known = list(self._summaries.values())
        if not known:
            return HostFacts.unknown("").summary
        if len(known) == 1:
            return known[0]

        def all_of(name: str) -> str:
            return "; ".join(dict.fromkeys(str(getattr(summary, name)) for summary in known))

        offered = {
            name: "" if any(not summary.protections.get(name, "-") for summary in known) else missing
            for name, missing in known[0].protections.items()
        }
        return replace(
            known[0],
            kernel=all_of("kernel"),
            cpu=all_of("cpu"),
            # One that is emulated is never left out.
            platform=all_of("platform"),
            configuration=all_of("configuration").strip("; "),
            accelerator=all_of("accelerator").strip("; "),
            protections=offered,
        )

    def verdicts(self) -> list[TestVerdict]:
        """Return the verdicts."""
        return self.results.verdicts()


@dataclass
class Outcome:
    """What became of a run; *status* is 0 where it came to its end."""

    columns: Mapping[str, Column]
    hosts: Sequence[HostFacts]
    status: int
    seed: int
    seconds: float

    def exit_status(self) -> int:
        """Return the exit status of the command."""
        verdicts = [entry.verdict for column in self.columns.values() for entry in column.verdicts()]
        if self.status:
            return self.status
        if any(verdict.bad for verdict in verdicts):
            return FAILURES
        if any(column.not_run for column in self.columns.values()):
            return NO_REPORT
        return NOTHING_RAN if all(verdict is Verdict.SKIP for verdict in verdicts) else 0

    def _document(
        self, column: Column, verdicts: Sequence[TestVerdict], summary: HostSummary
    ) -> dict[str, Any]:
        known = column.not_run
        return {
            **json_report.document(
                verdicts,
                summary,
                seed=self.seed,
                duration=self.seconds,
                exit_status=self.exit_status(),
                not_run=column.results.not_run(),
            ),
            "hosts": [
                host.as_dict() for host in self.hosts if not column.title or host.title == column.title
            ],
            "not_run_because": {why: sum(each == why for each in known.values()) for why in known.values()},
        }

    def document(self) -> dict[str, Any]:
        """Return the JSON report: one, or that of a matrix."""
        reports = {
            title: self._document(column, column.verdicts(), column.summary())
            for title, column in self.columns.items()
        }
        if "" in reports:
            return reports[""]
        return {"schema": SCHEMA, "reports": reports}

    def _ktap(self) -> str:
        texts = {}
        for title, column in self.columns.items():
            about = [f"kvmpy {version.exact()}: seed {self.seed}", *column.summary().lines()]
            about += [f"host {host.name}: {host.title}" for host in self.hosts]
            texts[title] = ktap.render(column.verdicts(), about, column.results.selected)
        return texts[""] if "" in texts else merged_ktap(texts)

    def _page(self) -> str:
        from kvmpy.testing import html

        if "" not in self.columns:
            return html.render([*self.document()["reports"].values()])
        # A column for each class of hosts, whoever ran a test.
        column = self.columns[""]
        classes: dict[str, list[TestVerdict]] = {}
        titles = {host.name: host.title for host in self.hosts}
        for entry in column.verdicts():
            classes.setdefault(titles.get(entry.host, ""), []).append(entry)
        summaries = {host.title: host.summary for host in self.hosts if host.title}
        return html.render(
            [
                self._document(column, entries, summaries.get(title, column.summary()))
                for title, entries in classes.items()
            ]
        )

    def write(self, targets: Mapping[str, Path], say: Say) -> bool:
        """Write the reports that *targets* names; return whether all of them are there."""
        make = {
            "json": lambda: json.dumps(self.document(), indent=2) + "\n",
            "ktap": self._ktap,
            "html": self._page,
        }
        files = ReportFiles()
        for name, path in targets.items():
            files.write(name, path, make[name])
        for line in files.failures:
            say(line)
        return not files.failures

    def show(self) -> None:
        """Print the table: of all, or of the columns side by side; then the hosts."""
        if "" in self.columns:
            column = self.columns[""]
            summary = column.summary()
            platform = "" if summary.platform == "host" else f", platform {summary.platform}"
            print_report(
                sys.stdout,
                column.verdicts(),
                title=f"verdicts of the fleet{platform}, seed {self.seed}",
                labels=summary.labels,
                width=shutil.get_terminal_size((_WIDTH, 24)).columns,
                color=sys.stdout.isatty(),
                not_run=len(column.results.not_run()),
                brief=True,
            )
        elif self.columns:
            reports: dict[str, dict[str, Any]] = self.document()["reports"]
            plain_console().print(table(list(reports), merge(reports)))
        for host in self.hosts:
            about = [host.title or host.summary.kernel]
            about += [f"platform {host.summary.platform}"] if host.summary.platform != "host" else []
            about += [f"died {host.deaths} times"] if host.deaths else []
            about += [host.retired] if host.retired else []
            print(f"host {host.name}: {', '.join(about)}")
        for column in self.columns.values():
            for why in dict.fromkeys(column.not_run.values()):
                number = sum(each == why for each in column.not_run.values())
                print(f"not run: {number} tests: {why}")
