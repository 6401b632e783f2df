# SPDX-License-Identifier: Apache-2.0
"""One or several JSON reports as one HTML page: one file, no network, and nothing of a test's text is ever
markup.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from kvmpy import __version__
from kvmpy.parsing import MalformedError, parse_json
from kvmpy.testing.configurations import DEFAULT
from kvmpy.testing.html import schema
from kvmpy.testing.json_report import SCHEMA
from kvmpy.testing.verdicts import Verdict, counted, once

_WORST = ("lost", "fail", "xfail", "skip", "pass")
MATRIX_SCHEMA = "kvmpy-lab-matrix/1"
NO_VM = "no VM"
WORDS = {
    Verdict.PASS: "passed",
    Verdict.FAIL: "failed",
    Verdict.SKIP: "skipped",
    Verdict.XFAIL: "failed as expected",
    Verdict.LOST: "lost",
}


class ReportError(ValueError):
    """A file is no report that can be shown."""


def asset(name: str) -> str:
    """Return a file of this folder."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def script_json(values: Any) -> str:
    """Return *values* as JSON for inside a script element: no character of it can end the element."""
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False)
    for character in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    # Half of a surrogate pair is no text of a page.
    return text.encode("utf-8", "backslashreplace").decode()


@functools.lru_cache(maxsize=1)
def environment() -> Environment:
    """Return the templates' environment: text is never markup."""
    # autoescape for every template: this one's name ends in .j2.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["plural"] = lambda count, word: f"{count:,} {word}{'' if count == 1 else 's'}"
    return environment


def load(file: Path) -> Any:
    """Return what a JSON file holds; ReportError with the place where it cannot be read."""
    try:
        return parse_json(file.read_bytes())
    except OSError as error:
        raise ReportError(f"{file} cannot be read: {error.strerror}") from None
    except MalformedError as error:
        raise ReportError(f"{file} is {error}") from None


def reports_in(document: Any, name: str) -> list[dict[str, Any]]:
    """Return the reports that a parsed JSON file holds: one of a run, or several of ``kvmpy lab run
    --matrix``.

    ReportError when it is neither; *name* is the file's name for the message.
    """
    kind = document.get("schema") if isinstance(document, dict) else None
    if kind == SCHEMA:
        return [_checked(document, name)]
    if kind == MATRIX_SCHEMA:
        reports = document.get("reports")
        if not isinstance(reports, dict) or not all(isinstance(entry, dict) for entry in reports.values()):
            raise ReportError(f"{name} is not a report: expected a report for each kernel - at `$.reports`")
        return [
            _checked({**report, "name": kernel}, f"{name}, {kernel}")
            for kernel, report in reports.items()
            if report.get("tests")
        ]
    if isinstance(kind, str) and kind.startswith("kvmpy-report/"):
        raise ReportError(f"{name} is a report of format {kind}; this kvmpy reads {SCHEMA}")
    raise ReportError(f"{name} is not a JSON report of kvmpy")


def _checked(report: dict[str, Any], name: str) -> dict[str, Any]:
    try:
        return schema.checked(report)
    except MalformedError as error:
        raise ReportError(f"{name} cannot be shown: {error}") from None


def base_id(identifier: str, protection: str | None) -> str:
    """Return a test's id without the parameter that names its protection: it is the same for all of them."""
    if protection is None:
        return identifier
    name = re.escape(protection)
    head, bracket, parameters = identifier.partition("[")
    if not bracket:
        return identifier
    shorter = re.sub(rf"(?:^|-){name}(?=-|$)", "", parameters.removesuffix("]"), count=1).removeprefix("-")
    return f"{head}[{shorter}]" if shorter else head


def _run(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    host = report["host"]
    return {
        "name": name,
        "kernel": host["kernel"],
        "cpu": host["cpu"],
        "modules": host["vendor_modules"],
        "platform": report["platform"],
        "accelerator": host.get("accelerator", ""),
        "configuration": host.get("configuration", ""),
        "kvm": "" if host["kvm"] else host["kvm_missing"],
        "types": host["vm_types"],
        "protections": [{"name": key, **value} for key, value in host["protections"].items()],
        "kvmpy": report["kvmpy"],
        "seed": report["seed"],
        "duration": report["duration"],
        "status": report["exit_status"],
        "summary": report["summary"],
        "not_run": report["not_run"],
        "growth": report["memory_growth_per_test"],
    }


def _names(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    names: list[str] = []
    for report in reports:
        kernel = str(report["host"]["kernel"]).partition(" ")[0]
        short = str(report["host"].get("configuration", "")).partition(" (")[0]
        if len(reports) > 1 and short not in ("", DEFAULT):
            kernel = f"{kernel} {short}"
        name = str(report.get("name") or kernel)
        if report["platform"] != "host" and len(reports) > 1:
            name = f"{name} ({report['platform']})"
        again = sum(known == name or known.startswith(f"{name} #") for known in names)
        names.append(f"{name} #{again + 1}" if again else name)
    return names


def _cell(test: Mapping[str, Any], column: int, maps: Mapping[int, int]) -> dict[str, Any]:
    cell: dict[str, Any] = {
        "c": column,
        "v": test["verdict"],
        "d": round(test["duration"], 4),
        "id": once(test["id"]),
    }
    for short, key in (("reason", "reason"), ("details", "details"), ("pm", "postmortem"), ("io", "ioctls")):
        if test.get(key):
            cell[short] = test[key]
    if test.get("missing"):
        cell["missing"] = list(zip(test["missing"], test["how"], strict=True))
    if test.get("memory_maps"):
        cell["maps"] = [[entry["vm"], maps[entry["map"]]] for entry in test["memory_maps"]]
    return cell


def _by_test(tests: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the entries of each test by its id: several where it was repeated."""
    entries: dict[str, list[dict[str, Any]]] = {}
    for test in tests:
        entries.setdefault(once(test["id"]), []).append(test)
    return entries


def _shown(repetitions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the repetition that is shown: the first of those with the worst verdict."""
    return min(repetitions, key=lambda test: _WORST.index(test["verdict"]))


def _repeated(repetitions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if len(repetitions) == 1:
        return {}
    verdicts = Counter(test["verdict"] for test in repetitions)
    told = counted({verdict.value: verdicts[verdict.value] for verdict in Verdict if verdicts[verdict.value]})
    return {"rep": told, "flaky": len(verdicts) > 1, "d": round(_mean(repetitions), 4)}


def _mean(repetitions: Sequence[dict[str, Any]]) -> float:
    return float(sum(test["duration"] for test in repetitions)) / len(repetitions)


def page_data(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the page's script shows: runs, columns (run and protection), and a row for each test."""
    runs = [_run(report, name) for report, name in zip(reports, _names(reports), strict=True)]
    columns: list[dict[str, Any]] = []
    for number, report in enumerate(reports):
        used = {test["protection"] for test in report["tests"]}
        known = [None, *reversed(list(report["host"]["protections"]))]
        others = sorted(name for name in used if name not in known)
        for protection in [name for name in [*known, *others] if name in used]:
            about = report["host"]["protections"].get(protection, {})
            columns.append(
                {
                    "run": number,
                    "protection": protection,
                    "name": protection or NO_VM,
                    "label": about.get("label", ""),
                }
            )
    place = {(column["run"], column["protection"]): index for index, column in enumerate(columns)}
    rows: dict[str, dict[str, Any]] = {}
    maps: dict[str, int] = {}
    for number, report in enumerate(reports):
        told = report.get("memory_maps", [])
        renumbered = {
            index: maps.setdefault(json.dumps(entry), len(maps)) for index, entry in enumerate(told)
        }
        for identifier, repetitions in _by_test(report["tests"]).items():
            test = _shown(repetitions)
            identifier = base_id(identifier, test["protection"])
            row = rows.setdefault(
                identifier, {"id": identifier, "area": test["area"], "promise": test["promise"], "cells": []}
            )
            cell = _cell(test, place[number, test["protection"]], renumbered)
            row["cells"].append(cell | _repeated(repetitions))
    return {
        "runs": runs,
        "columns": columns,
        "rows": list(rows.values()),
        "maps": [json.loads(text) for text in maps],
    }


def _headline(totals: Mapping[str, int]) -> tuple[str, str]:
    bad = totals["fail"] + totals["lost"]
    if bad:
        return "bad", f"{bad:,} did not hold"
    if totals["pass"]:
        return "good", "everything that ran held"
    return "none", "nothing was shown to hold"


def render(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return the page for *reports* (documents of :mod:`kvmpy.testing.json_report`), the first one's columns
    first.

    The page loads nothing, and its policy (CSP) lets no script run but its own.
    """
    if not reports:
        raise ReportError("there is no report to show")
    data = page_data(reports)
    totals = {
        verdict.value: sum(report["summary"][verdict.value] for report in reports) for verdict in Verdict
    }
    script = asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    bad = [
        (data["columns"][cell["c"]], cell)
        for row in data["rows"]
        for cell in row["cells"]
        if cell["v"] in ("fail", "lost")
    ]
    tone, headline = _headline(totals)
    template = environment().from_string(asset("page.html.j2"))
    return template.render(
        version=__version__,
        runs=data["runs"],
        totals=totals,
        words={verdict.value: word for verdict, word in WORDS.items()},
        tests=sum(totals.values()),
        tone=tone,
        headline=headline,
        bad=bad,
        # Markup by hand: style and script are kvmpy's own files, the data cannot leave its element.
        css=asset("page.css"),
        script=script,
        script_hash=digest,
        data=script_json(data),
    )
