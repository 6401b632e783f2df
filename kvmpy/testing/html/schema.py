# SPDX-License-Identifier: Apache-2.0
"""What a page needs of a JSON report (docs/reports.md), checked before anything of it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from kvmpy.parsing import MalformedError, conform
from kvmpy.testing.verdicts import Verdict

_LARGEST = 1 << 53  # what a page's script can hold

Count = Annotated[int, msgspec.Meta(ge=0, le=_LARGEST)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]


class Protection(msgspec.Struct):
    """A protection of a host."""

    available: bool
    missing: str
    label: str


class Host(msgspec.Struct):
    """The host of a run."""

    kernel: str
    cpu: str
    vendor_modules: list[str]
    kvm: bool
    kvm_missing: str
    vm_types: list[str]
    protections: dict[str, Protection]
    accelerator: str = ""
    configuration: str = ""


class MapOf(msgspec.Struct):
    """Which memory map a VM had."""

    vm: str
    map: Count


class Test(msgspec.Struct):
    """One test's verdict."""

    id: str
    area: str
    promise: str
    protection: str | None
    verdict: Verdict
    reason: str = ""
    details: str = ""
    postmortem: str | None = None
    missing: list[str] = []
    how: list[str] = []
    duration: Seconds = 0.0
    ioctls: list[dict[str, Any]] = []
    memory_maps: list[MapOf] = []


class Report(msgspec.Struct):
    """A report of one run."""

    kvmpy: str
    platform: str
    host: Host
    seed: Count
    duration: Seconds
    exit_status: Annotated[int, msgspec.Meta(ge=-255, le=255)]
    summary: dict[Literal["pass", "fail", "skip", "xfail", "lost"], Count]
    memory_growth_per_test: Count
    tests: list[Test]
    not_run: list[str]
    memory_maps: list[dict[str, Any]] = []
    name: str | None = None


def checked(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a page needs of a report, defaults included; raises MalformedError with the place."""
    parsed = conform(report, Report)
    if lacking := [entry.value for entry in Verdict if entry.value not in parsed.summary]:
        raise MalformedError(f"the summary has no {lacking[0]!r} - at `$.summary`")
    for number, test in enumerate(parsed.tests):
        place = f"at `$.tests[{number}]`"
        if len(test.missing) != len(test.how):
            raise MalformedError(
                f"{len(test.missing)} things are missing, {len(test.how)} ways to get them - {place}"
            )
        if any(entry.map >= len(parsed.memory_maps) for entry in test.memory_maps):
            raise MalformedError(f"a memory map that is not there - {place}")
    values: dict[str, Any] = msgspec.to_builtins(parsed)
    return values
