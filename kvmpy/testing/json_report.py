# SPDX-License-Identifier: Apache-2.0
"""The JSON report; its fields are described in docs/reports.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvmpy import version
from kvmpy.testing.host import HostSummary
from kvmpy.testing.verdicts import TestVerdict, flaky, skips_by_reason, tally

SCHEMA = "kvmpy-report/1"


def document(
    verdicts: Sequence[TestVerdict],
    host: HostSummary,
    *,
    seed: int,
    duration: float,
    exit_status: int,
    not_run: Sequence[str] = (),
    growth: float = 0.0,
) -> dict[str, Any]:
    """Return the report as JSON-ready values; *duration* is in seconds, *growth* in bytes with every test."""
    maps: dict[str, int] = {}
    tests = [entry.as_dict() for entry in verdicts]
    for test in tests:
        test["memory_maps"] = [_told_once(entry, maps) for entry in test["memory_maps"]]
    return {
        "schema": SCHEMA,
        "kvmpy": version.exact(),
        "platform": host.platform,
        "host": host.as_dict(),
        "seed": seed,
        "duration": round(duration, 3),
        "exit_status": exit_status,
        "summary": tally(verdicts),
        "memory_growth_per_test": round(growth),
        "tests": tests,
        "memory_maps": [json.loads(text) for text in maps],
        "not_run": list(not_run),
        "flaky": [{"id": test, "verdicts": counts} for test, counts in flaky(verdicts).items()],
        "skips": [
            {"missing": what, "how": how, "tests": tests} for what, how, tests in skips_by_reason(verdicts)
        ],
    }


def _told_once(entry: Mapping[str, Any], maps: dict[str, int]) -> dict[str, Any]:
    # Most VMs of a session look alike: a map stands once in the report, whatever its VM is called.
    values = dict(entry)
    name = values.pop("vm", "vm")
    return {"vm": name, "map": maps.setdefault(json.dumps(values), len(maps))}


def json_text(values: dict[str, Any]) -> str:
    """Return the report as text."""
    return json.dumps(values, indent=2) + "\n"
