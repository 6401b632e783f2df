# SPDX-License-Identifier: Apache-2.0
"""``kvmpy export --kcidb``: what KCIDB is told of each verdict, valid by its own schema."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.cli.main import main
from kvmpy.testing import json_report, kcidb
from kvmpy.testing.host import HostSummary
from kvmpy.testing.verdicts import TestVerdict, Verdict

# Of KCIDB's schema.
PATH = re.compile(r"([a-zA-Z0-9_-]+(\.[a-zA-Z0-9_-]+)*)?")
LONGEST = 16384


def entry(name: str, verdict: Verdict, **more: Any) -> TestVerdict:
    return TestVerdict(name, name, "area", verdict, more.pop("platform", "host"), **more)


ENTRIES = [
    entry(
        "m/test_a.py::test_pass[cbit-1]", Verdict.PASS, promise="It holds.", protection="cbit", duration=0.5
    ),
    entry(
        "m/test_a.py::test_fail",
        Verdict.FAIL,
        reason="1 is not 2",
        details="E 1 is not 2",
        postmortem="rip 0",
    ),
    entry("m/test_a.py::test_skip", Verdict.SKIP, reason="needs X", missing=("X",), how=("buy it",)),
    entry("m/test_a.py::test_xfail", Verdict.XFAIL, reason="errata: known"),
    entry("m/test_a.py::test_xfail_too", Verdict.XFAIL, reason="errata: known"),
    entry("m/test_a.py::test_lost", Verdict.LOST, reason="killed by SIGSEGV"),
]


def report(*entries: TestVerdict, seed: int = 1, **summary: Any) -> dict[str, Any]:
    given = {"kernel": "7.2.0 x86_64", "cpu": "a CPU", "vendor_modules": ("kvm_amd",), "platform": "host"}
    host = HostSummary(**{**given, "kvm": True, **summary})
    values = json_report.document(
        entries or ENTRIES,
        host,
        seed=seed,
        duration=1.0,
        exit_status=1,
        not_run=["selftests/m/test_b.py::test_no"],
    )
    values["host"]["protections"] = {"cbit": {"available": True, "missing": "", "label": "emulated bit"}}
    return values


def submitted(*reports: dict[str, Any], build: str = "") -> dict[str, Any]:
    """Return the submission, which KCIDB's own library takes, and links between its objects that hold."""
    submission = kcidb.Submission("my_ci", build)
    for each in reports:
        submission.add(each)
    document: dict[str, Any] = json.loads(json.dumps(submission.document()))
    library = pytest.importorskip("kcidb_io", reason="kcidb-io: pip install 'kvmpy[dev]'")
    latest = library.schema.LATEST
    assert document["version"] == {"major": latest.major, "minor": latest.minor}
    latest.validate(json.loads(json.dumps(document)))
    ids = {kind: [each["id"] for each in document.get(kind, [])] for kind in document if kind != "version"}
    assert all(len(set(known)) == len(known) for known in ids.values())
    assert {each["build_id"] for each in document["tests"]} <= {*ids.get("builds", []), build}
    for incident in document.get("incidents", []):
        assert incident["issue_id"] in ids["issues"]
        assert incident["test_id"] in ids["tests"]
    return document


def by_name(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {test["path"].rpartition(".test_a.")[2]: test for test in document["tests"]}


def test_each_verdict_has_its_status() -> None:
    """What died says nothing, what fails as expected is a known issue, what did not start is missed."""
    document = submitted(report())
    tests = by_name(document)
    assert {name: test["status"] for name, test in tests.items()} == {
        "test_pass.cbit-1": "PASS",
        "test_fail": "FAIL",
        "test_skip": "SKIP",
        "test_xfail": "FAIL",
        "test_xfail_too": "FAIL",
        "test_lost": "ERROR",
        "kvmpy.m.test_b.test_no": "MISS",
    }
    (issue,) = document["issues"]
    assert issue["comment"] == "errata: known"
    excused = {incident["test_id"] for incident in document["incidents"]}
    assert excused == {tests["test_xfail"]["id"], tests["test_xfail_too"]["id"]}
    assert tests["test_fail"]["log_excerpt"] == "E 1 is not 2\n\nrip 0"
    assert tests["test_skip"]["misc"]["missing"] == ["X"]
    assert tests["test_pass.cbit-1"]["duration"] == 0.5


def test_a_submission_twice_is_one_and_runs_are_apart() -> None:
    """Ids come from what a report says."""
    once = submitted(report())
    assert submitted(report(), report()) == once
    assert len(submitted(report(), report(seed=2))["tests"]) == 2 * len(once["tests"])


def test_emulation_cannot_be_taken_for_hardware() -> None:
    hardware = submitted(report())["tests"][0]
    lab = report(
        entry("m/test_a.py::t", Verdict.PASS, platform="lab, software AMD-SP"),
        platform="lab, software AMD-SP",
        accelerator="tcg",
        configuration="shadow-paging (kvm_amd.npt=0)",
    )
    emulated = submitted(lab)["tests"][0]
    assert hardware["environment"]["misc"]["emulated"] is False
    assert hardware["environment"]["comment"] == "a CPU"
    misc = emulated["environment"]["misc"]
    assert (misc["emulated"], misc["platform"], misc["accelerator"]) == (True, "lab, software AMD-SP", "tcg")
    assert misc["configuration"] == "shadow-paging (kvm_amd.npt=0)"
    assert "says nothing of hardware" in emulated["environment"]["comment"]
    # So is a protection that encrypts nothing.
    assert hardware["misc"]["protection_is"] == "emulated bit"


def test_a_fleet_names_the_host() -> None:
    values = report(entry("m/test_a.py::t", Verdict.PASS, host="milan"), cpu="Milan; Genoa")
    about = {
        "kernel": "7.2.0 x86_64",
        "cpu": "Milan",
        "firmware": "1.0",
        "microcode": "0xa",
        "labels": ["snp"],
    }
    values["hosts"] = [{"name": "genoa", "cpu": "Genoa"}, {"name": "milan", "class": "7.2.0", **about}]
    misc = submitted(values)["tests"][0]["environment"]["misc"]
    assert (misc["host"], misc["cpu"], misc["microcode"], misc["labels"]) == (
        "milan",
        "Milan",
        "0xa",
        ["snp"],
    )


def test_a_build_that_is_known_is_named() -> None:
    document = submitted(report(), build="maestro:42")
    assert {test["build_id"] for test in document["tests"]} == {"maestro:42"}
    assert "builds" not in document
    (build,) = submitted(report())["builds"]
    assert (build["architecture"], build["comment"]) == ("x86_64", "7.2.0 x86_64")


def test_any_text_is_taken() -> None:
    text = "\0" + "long " * LONGEST
    values = report(entry("m/test_a.py::t", Verdict.FAIL, reason=text, details=text))
    assert len(submitted(values)["tests"][0]["log_excerpt"]) == LONGEST


@given(st.text())
def test_any_name_has_a_path(name: str) -> None:
    assert PATH.fullmatch(kcidb.path_of(name))


def test_a_path_is_that_of_the_test() -> None:
    assert kcidb.path_of("m/n/test_a.py::test_b~2[none-1.5 x]") == "kvmpy.m.n.test_a.test_b.none-1_5_x"
    assert kcidb.path_of("m/test_broken.py") == "kvmpy.m.test_broken"


def test_the_command(tmp_path: Path) -> None:
    """Several reports become one document; whatever is wrong is one line."""
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text(json.dumps(report()))
    two.write_text(json.dumps({"schema": "kvmpy-lab-matrix/1", "reports": {"7.2": report(seed=2)}}))
    run = CliRunner().invoke
    done = run(main, ["export", "--kcidb", "my_ci", str(one), str(two)])
    assert done.exit_code == 0
    assert len(json.loads(done.stdout)["tests"]) == 14
    written = run(main, ["export", "--kcidb", "my_ci", "-o", str(tmp_path / "out.json"), str(one), str(two)])
    assert written.stdout == ""
    assert (tmp_path / "out.json").read_text() == done.stdout
    for words, message in (
        (["--kcidb", "My-CI", str(one)], "small letters, digits and underscores"),
        (["--kcidb", "my_ci", "--build", "x", str(one)], "a build's id is ORIGIN:ID"),
        (["--kcidb", "my_ci", str(tmp_path / "none.json")], "none.json cannot be read: No such file"),
        (["--kcidb", "my_ci", str(tmp_path)], "cannot be read: Is a directory"),
        ([str(one)], "Missing option '--kcidb'"),
    ):
        wrong = run(main, ["export", *words])
        assert wrong.exit_code in (1, 2)
        assert message in " ".join(wrong.stderr.split())
