# SPDX-License-Identifier: Apache-2.0
"""What is new between reports: every kind of change, what counts as worse, and bad files."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvmpy.cli.main import main
from kvmpy.testing.compare import (
    FLOOR,
    KINDS,
    SINGLE_FACTOR,
    SINGLE_FLOOR,
    ComparisonError,
    changes,
    document,
    drift,
    times,
)
from kvmpy.testing.html import ReportError
from kvmpy.testing.html.comparison import render
from kvmpy.testing.verdicts import Verdict

VERDICTS = [verdict.value for verdict in Verdict]


def entry(name: str, verdict: str = "pass", **more: Any) -> dict[str, Any]:
    values = {
        "id": f"a/test_a.py::{name}",
        "area": "a",
        "promise": "",
        "protection": None,
        "verdict": verdict,
        "reason": "" if verdict == "pass" else f"{name} {verdict}",
        "duration": 0.1,
    }
    return {**values, **more}


def report(*tests: dict[str, Any], **more: Any) -> dict[str, Any]:
    counts = {verdict: sum(test["verdict"] == verdict for test in tests) for verdict in VERDICTS}
    host = {
        "kernel": "7.2.13 x86_64",
        "cpu": "EPYC",
        "vendor_modules": [],
        "kvm": True,
        "kvm_missing": "",
        "vm_types": [],
        "protections": {},
        "accelerator": "",
    }
    values = {
        "schema": "kvmpy-report/1",
        "kvmpy": "1",
        "platform": "host",
        "host": host | more.pop("host", {}),
        "seed": 1,
        "duration": 10.0,
        "exit_status": 0,
        "summary": counts,
        "memory_growth_per_test": 0,
        "tests": list(tests),
        "not_run": [],
    }
    return {**values, **more}


LAB = {"platform": "lab", "host": {"accelerator": "tcg"}}


@pytest.fixture
def files(tmp_path: Path) -> Any:
    counter = itertools.count()

    def write(content: Any) -> str:
        path = tmp_path / f"{next(counter)}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def compared(*args: str) -> Result:
    return CliRunner().invoke(main, ["compare", *args])


# ---- verdicts

EXPECTED = {
    ("pass", "pass"): None,
    ("pass", "fail"): ("failing", True),
    ("pass", "lost"): ("lost", True),
    ("pass", "skip"): ("skipped", True),
    ("pass", "xfail"): ("expected", True),
    ("pass", ""): ("vanished", True),
    ("pass", "flaky"): ("flaky", True),
    ("fail", "pass"): ("mended", False),
    ("fail", "fail"): None,
    ("fail", "lost"): ("lost", True),
    ("fail", "skip"): ("skipped", False),
    ("fail", "xfail"): ("expected", False),
    ("fail", ""): ("vanished", True),
    ("fail", "flaky"): ("flaky", False),
    ("lost", "fail"): ("changed", False),
    ("lost", "pass"): ("mended", False),
    ("skip", "pass"): ("unskipped", False),
    ("skip", "skip"): None,
    ("skip", "fail"): ("failing", True),
    ("skip", "xfail"): ("expected", False),
    ("skip", ""): ("vanished", True),
    ("xfail", "pass"): ("mended", False),
    ("xfail", "skip"): ("skipped", True),
    ("xfail", "fail"): ("failing", True),
    ("", "pass"): ("appeared", False),
    ("", "skip"): ("appeared", False),
    ("", "fail"): ("failing", True),
    ("", "lost"): ("lost", True),
    ("", "flaky"): ("flaky", True),
    ("flaky", "flaky"): ("unsteady", False),
    ("flaky", "pass"): ("steady", False),
    ("flaky", "fail"): ("failing", True),
    ("flaky", "lost"): ("lost", True),
    ("flaky", "skip"): ("skipped", False),
    ("flaky", ""): ("vanished", True),
}


def side(state: str) -> list[dict[str, Any]]:
    if state == "flaky":
        return [entry("test_x"), entry("test_x~2", "fail"), entry("test_x~3")]
    return [entry("test_x", state)] if state else []


@pytest.mark.parametrize(("before", "after"), sorted(EXPECTED))
def test_every_change_has_its_kind(before: str, after: str) -> None:
    told = changes([[*side(before), entry("test_same")]], [[*side(after), entry("test_same")]])
    expected = EXPECTED[before, after]
    assert [(change.kind, change.worse) for change in told] == ([expected] if expected else [])
    for change in told:
        assert change.test == "a/test_a.py::test_x"
        flaky = "flaky (2 pass, 1 fail)"
        assert (change.before, change.after) == tuple(flaky if s == "flaky" else s for s in (before, after))


def test_a_change_says_why() -> None:
    missing = {"missing": ["KVM_CAP_X", "cpu flag y"], "how": ["CONFIG_X", ""]}
    before = [entry("test_a"), entry("test_b"), entry("test_c", "fail")]
    after = [entry("test_a", "skip", **missing), entry("test_b", "fail"), entry("test_c")]
    reasons = {change.kind: (change.reason, change.how) for change in changes([before], [after])}
    assert reasons == {
        "skipped": ("KVM_CAP_X; cpu flag y", "CONFIG_X"),
        "failing": ("test_b fail", ""),
        "mended": ("test_c fail", ""),
    }


def test_verdicts_that_differ_between_runs_of_a_side_are_flaky() -> None:
    told = changes([[entry("test_x")], [entry("test_x")]], [[entry("test_x", "fail")], [entry("test_x")]])
    assert [(change.kind, change.after) for change in told] == [("flaky", "flaky (1 pass, 1 fail)")]


def test_what_a_run_did_not_come_to_is_not_vanished() -> None:
    before, after = report(entry("test_x"), entry("test_y")), report()
    after["not_run"] = ["/elsewhere/selftests/a/test_a.py::test_x"]
    (column,) = document([("b", before)], [("a", after)])["columns"]
    assert {change["test"][-1]: change["kind"] for change in column["changes"]} == {
        "x": "not run",
        "y": "vanished",
    }


# ---- times


def timed(**seconds: float) -> list[dict[str, Any]]:
    return [entry(name, duration=value) for name, value in seconds.items()]


def test_one_run_each_tells_only_what_is_far_beyond_noise() -> None:
    bound = SINGLE_FACTOR * 0.5 + SINGLE_FLOOR
    for value, kinds in ((0.5, []), (bound - 0.01, []), (bound + 0.01, ["slower"])):
        told = times([timed(test_x=0.5)], [timed(test_x=value)])
        assert [(change.kind, change.worse) for change in told] == [(kind, True) for kind in kinds]
        told = times([timed(test_x=value)], [timed(test_x=0.5)])
        assert [(change.kind, change.worse) for change in told] == [("faster", False) for kind in kinds]


def test_the_spread_of_several_runs_is_the_noise() -> None:
    steady = [timed(test_x=value) for value in (0.50, 0.51, 0.52)]
    shaky = [timed(test_x=value) for value in (0.50, 0.90, 0.52)]
    slow = [timed(test_x=value) for value in (0.65, 0.66, 0.70)]
    assert [change.kind for change in times(steady, slow)] == ["slower"]
    assert times(shaky, slow) == []
    assert times(slow, shaky) == []
    # A spread that is small by chance is no proof.
    close = [timed(test_x=value) for value in (0.53, 0.53 + FLOOR - 0.02)]
    assert times(steady, close) == []
    (change,) = times(steady, slow)
    assert change.seconds == (0.51, 0.66)


def test_repetitions_tell_the_spread_too() -> None:
    def repeated(*values: float) -> list[list[dict[str, Any]]]:
        names = ("test_x", *(f"test_x~{number}" for number in range(2, len(values) + 1)))
        return [[entry(name, duration=value) for name, value in zip(names, values, strict=True)]]

    assert [change.kind for change in times(repeated(0.5, 0.5), repeated(0.8, 0.8))] == ["slower"]
    assert times(repeated(0.5, 0.8), repeated(0.8, 0.8)) == []


def test_a_machine_that_is_slower_as_a_whole_makes_no_test_slow() -> None:
    chance = random.Random(4)
    before = {f"test_{number}": chance.uniform(0.1, 4) for number in range(60)}
    after = {name: 3.5 * value for name, value in before.items()}
    ratio = drift([timed(**before)], [timed(**after)])
    assert ratio == pytest.approx(3.5)
    assert times([timed(**before)], [timed(**after)], ratio) == []
    after["test_7"] *= 10
    told = times([timed(**before)], [timed(**after)], ratio)
    assert [change.test.rpartition("_")[2] for change in told] == ["7"]


def test_a_machine_that_is_faster_as_a_whole_hides_no_slow_test() -> None:
    before = {f"test_{number}": 2.0 for number in range(60)}
    after = {name: value / 4 for name, value in before.items()} | {"test_7": 12.0}
    ratio = drift([timed(**before)], [timed(**after)])
    assert [change.kind for change in times([timed(**before)], [timed(**after)], ratio)] == ["slower"]


def test_few_tests_tell_nothing_of_the_machine() -> None:
    before = {f"test_{number}": 1.0 for number in range(5)}
    assert drift([timed(**before)], [timed(**dict.fromkeys(before, 9.0))]) == 1


def test_tests_that_did_not_pass_have_no_time() -> None:
    before = [entry("test_x", duration=0.1), entry("test_y", "skip", duration=0.1)]
    after = [entry("test_x", "fail", duration=99), entry("test_y", "skip", duration=99)]
    assert times([before], [after]) == []


def test_times_of_other_machines_are_not_compared() -> None:
    before = report(entry("test_x"), host={"cpu": "Xeon"})
    after = report(entry("test_x", duration=99.0))
    (column,) = document([("b", before)], [("a", after)])["columns"]
    assert column["times"] == "platform, accelerator or CPU differ"
    assert column["changes"] == []


# ---- columns


def test_an_emulated_platform_is_named() -> None:
    result = document([("b", report(entry("test_x")))], [("a", report(entry("test_x", "fail"), **LAB))])
    assert [column["name"] for column in result["columns"]] == ["7.2.13 on lab (tcg)"]
    assert "emulated platform" in render(result)


def test_kernels_of_matrices_are_paired_by_name(files: Any) -> None:
    def matrix(**kernels: dict[str, Any]) -> dict[str, Any]:
        return {"schema": "kvmpy-lab-matrix/1", "reports": kernels}

    good, bad = report(entry("test_x"), **LAB), report(entry("test_x", "fail"), **LAB)
    result = compared(files(matrix(old=bad, new=good)), files(matrix(new=bad, old=good)))
    assert result.exit_code == 1
    lines = result.output.splitlines()
    old, new = lines.index("old on lab (tcg): 1 tests"), lines.index("new on lab (tcg): 1 tests")
    assert "mended: 1" in lines[old:new]
    assert "newly failing: 1" in lines[new:]
    # One that did not boot.
    gone = compared(files(matrix(old=good, new=good)), files(matrix(old=good, new={})))
    assert gone.exit_code == 1
    assert "after new: no report: it did not come to its tests" in gone.output
    # One kernel before, several after.
    several = compared(files(good), files(matrix(old=good, new=bad)))
    assert several.exit_code == 1
    assert several.output.count("newly failing: 1") == 1
    # Several before, and none of them is the one after.
    other = compared(files(matrix(old=good, new=good)), files(good))
    assert other.exit_code == 3
    assert "which belong together is not known" in other.output


def test_several_kernels_after_are_columns_of_their_own() -> None:
    kernels = [
        report(entry("test_x", verdict), host={"kernel": f"6.{n} x86_64 (kvm.a=1)"})
        for n, verdict in enumerate(("pass", "fail"))
    ]
    result = document([("b", report(entry("test_x")))], [("a", kernels[0]), ("c", kernels[1])])
    assert [column["name"] for column in result["columns"]] == ["6.0 (kvm.a=1)", "6.1 (kvm.a=1)"]
    assert result["worse"] == {"failing": 1}
    with pytest.raises(ComparisonError):
        document([("a", kernels[0]), ("c", kernels[1])], [("b", report(entry("test_x")))])


# ---- the command


def test_text_json_and_page_say_the_same(files: Any, tmp_path: Path) -> None:
    before = report(*(entry(f"test_{a}_{b}", a) for a in VERDICTS for b in VERDICTS), entry("test_gone"))
    after = report(*(entry(f"test_{a}_{b}", b) for a in VERDICTS for b in VERDICTS), entry("test_new"))
    made, page = tmp_path / "out" / "c.json", tmp_path / "c.html"
    result = compared(files(before), files(after), "--json", str(made), "--html", str(page))
    assert result.exit_code == 1, result.output
    told = json.loads(made.read_text())
    assert told["schema"] == "kvmpy-comparison/1"
    html = page.read_text()
    for kind, count in told["counts"].items():
        assert f"{KINDS[kind]}: {count}\n" in result.output
        assert f"{KINDS[kind]}: {count}<" in html
    for change in told["columns"][0]["changes"]:
        assert change["test"].partition("::")[2] in result.output
        assert change["test"] in html
    again = tmp_path / "again.html"
    assert CliRunner().invoke(main, ["html", str(made), "-o", str(again)]).exit_code == 0
    assert again.read_text() == html


def test_nothing_new_is_good(files: Any) -> None:
    one = files(report(*(entry(f"test_{verdict}", verdict) for verdict in VERDICTS)))
    result = compared(one, one)
    assert result.exit_code == 0
    assert result.output.splitlines()[-1] == "nothing got worse"


def test_more_runs_before_are_asked_for_by_name(files: Any) -> None:
    first, second = (files(report(entry("test_x", verdict))) for verdict in ("pass", "fail"))
    assert "flaky before and after: 1" not in compared(first, first).output
    assert "newly failing: 1" in compared(first, second).output
    assert "newly failing: 1" in compared(first, second, "--before", second).output
    assert "flaky (1 pass, 1 fail), then fail" in compared(first, second, "--before", second).output


def test_many_changes_are_cut_and_skips_are_summed_up(files: Any) -> None:
    names = [f"test_{number}" for number in range(50)]
    skipped = {"missing": ["KVM_CAP_X"], "how": ["CONFIG_X"]}
    before = files(report(*map(entry, names)))
    gone = compared(before, files(report(entry("test_other"))))
    assert "vanished: 50" in gone.output
    assert "  ... and 30 more; --json and --html have all" in gone.output
    less = compared(before, files(report(*(entry(name, "skip", **skipped) for name in names))))
    assert "newly skipped: 50\n   50  KVM_CAP_X\n       get it: CONFIG_X\n" in less.output
    assert len(less.output.splitlines()) < 12


NOT_REPORTS = {
    "": "is not JSON",
    "{": "is not JSON",
    "[]": "is not a JSON report of kvmpy",
    "null": "is not a JSON report of kvmpy",
    '{"schema": "kvmpy-report/9"}': "this kvmpy reads kvmpy-report/1",
    '{"schema": "kvmpy-report/1"}': "cannot be shown",
    '{"schema": "kvmpy-lab-matrix/1"}': "expected a report for each kernel",
    '{"schema": "kvmpy-comparison/1"}': "is not a JSON report of kvmpy",
    '{"schema": "kvmpy-lab-matrix/1", "reports": {"a": {}}}': "has no test that ran",
    '{"schema": "kvmpy-report/1", "tests": [{"id": NaN}]}': "NaN is not a JSON number",
    json.dumps(report()): "has no test that ran",
    json.dumps(report(entry("test_x", "maybe"))): "cannot be shown",
    json.dumps(report({**entry("test_x"), "duration": -1})): "cannot be shown",
    json.dumps({**report(entry("test_x")), "summary": {}}): "the summary has no 'pass'",
}


@pytest.mark.parametrize("text", NOT_REPORTS)
def test_what_is_no_report_is_refused_in_a_line(files: Any, text: str) -> None:
    good = files(report(entry("test_x")))
    bad = files(text)
    for order in ((bad, good), (good, bad)):
        result = compared(*order)
        assert result.exit_code == 3
        assert NOT_REPORTS[text] in result.output
        assert len(result.output.splitlines()) == 1


def test_files_that_cannot_be_read_or_written(files: Any, tmp_path: Path) -> None:
    good = files(report(entry("test_x")))
    assert compared(good, str(tmp_path / "none")).exit_code == 3
    assert compared(good, str(tmp_path)).exit_code == 3
    assert compared(good, good, "--json", "/proc/none/x").exit_code == 3
    assert compared(good).exit_code == 2


def test_text_of_tests_is_no_markup_and_no_line(files: Any, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\x1b[2J\nnothing got worse"
    page = tmp_path / "page.html"
    before = files(report(entry("test_x")))
    after = files(report(entry("test_x", "fail", reason=evil)))
    result = compared(before, after, "--html", str(page))
    assert result.exit_code == 1
    assert "\x1b" not in result.output
    assert "nothing got worse" not in result.output.splitlines()
    assert "<script" not in page.read_text()


@pytest.mark.parametrize(
    "damage",
    [
        {"columns": [{}]},
        {"worse": {"fine": 1}},
        {
            "columns": [
                {"name": "x", "drift": 1, "times": "", "tests": 1, "changes": [], "before": [7], "after": []}
            ]
        },
        {"before": 3},
    ],
)
def test_a_damaged_comparison_is_refused(damage: dict[str, Any]) -> None:
    whole = document([("b", report(entry("test_x")))], [("a", report(entry("test_x", "fail")))])
    assert "newly failing" in render(whole)
    with pytest.raises(ReportError):
        render(whole | damage)


def test_a_comparison_takes_the_drift_out_of_its_times() -> None:
    before = report(*timed(**{f"test_{number}": 2.0 for number in range(60)}))
    after = report(*timed(**{f"test_{number}": 16.0 for number in range(60)}))
    (column,) = document([("b", before)], [("a", after)])["columns"]
    assert (column["drift"], column["changes"]) == (8.0, [])
