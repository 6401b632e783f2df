# SPDX-License-Identifier: Apache-2.0
"""Table, JSON, KTAP, JUnit and the HTML page of one session say the same."""

from __future__ import annotations

import json
import re
from collections import Counter
from xml.etree.ElementTree import Element

import pytest

from kvmpy.testing.supervisor import supervise
from tests.testing.support import Outcome, Suite, parse_ktap

FIRST = """
import os
import pytest

def test_pass():
    "It holds."

def test_fail():
    assert 1 == 2

def test_skip():
    pytest.skip("not on this host # really")

@pytest.mark.requires("tool:no-such-tool")
def test_requires():
    pass

@pytest.mark.xfail(reason="known", strict=True)
def test_xfail():
    assert 0

@pytest.mark.xfail(reason="thought to be known", strict=True)
def test_xpass():
    pass

@pytest.fixture
def bad_setup():
    raise RuntimeError("set-up")

def test_setup_error(bad_setup):
    pass

@pytest.fixture
def bad_teardown():
    yield
    raise RuntimeError("tear-down")

def test_teardown_error(bad_teardown):
    pass

def test_fails_twice(bad_teardown):
    assert 0

def test_leak():
    os.open("/dev/null", os.O_RDONLY)

@pytest.mark.timeout(1)
def test_timeout():
    import threading
    threading.Event().wait(30)

def test_lost():
    os._exit(7)

@pytest.mark.parametrize("value", ["a#b", "c d", "e[f]"])
def test_names(value):
    assert value != "c d"

@pytest.mark.protections("cbit", "none")
def test_protected(protection):
    pass
"""
SECOND = """
import os

def test_crash():
    os.kill(os.getpid(), 11)

def test_after():
    pass
"""
THIRD = "import pytest\n\ndef test_only_skips():\n    pytest.skip('nothing here')\n"

BROKEN = "import no_such_module\n"
WHOLE = "import pytest\n\npytest.skip('not today', allow_module_level=True)\n"

EXPECTED = {
    "memory/test_broken.py": "fail",
    "test_whole.py": "skip",
    "memory/test_first.py::test_pass": "pass",
    "memory/test_first.py::test_fail": "fail",
    "memory/test_first.py::test_skip": "skip",
    "memory/test_first.py::test_requires": "skip",
    "memory/test_first.py::test_xfail": "xfail",
    "memory/test_first.py::test_xpass": "fail",
    "memory/test_first.py::test_setup_error": "fail",
    "memory/test_first.py::test_teardown_error": "fail",
    "memory/test_first.py::test_fails_twice": "fail",
    "memory/test_first.py::test_leak": "fail",
    "memory/test_first.py::test_timeout": "fail",
    "memory/test_first.py::test_lost": "lost",
    "memory/test_first.py::test_names[a#b]": "pass",
    "memory/test_first.py::test_names[c d]": "fail",
    "memory/test_first.py::test_names[e[f]]": "pass",
    "memory/test_first.py::test_protected[cbit]": "skip",
    "memory/test_first.py::test_protected[none]": "skip",
    "test_second.py::test_crash": "lost",
    "test_second.py::test_after": "pass",
    "test_third.py::test_only_skips": "skip",
}


def from_ktap(text: str) -> dict[str, str]:
    kinds = {
        (True, ""): "pass",
        (False, ""): "fail",
        (False, "TIMEOUT"): "fail",
        (True, "SKIP"): "skip",
        (True, "XFAIL"): "xfail",
        (False, "ERROR"): "lost",
    }
    results = {}
    for good, file, directive, inner in parse_ktap(text).results:
        assert inner is not None
        verdicts = {
            name if name == file else f"{file}::{name}": kinds[ok, word]
            for ok, name, word, _ in inner.results
        }
        assert good is not bool({"fail", "lost"} & set(verdicts.values()))
        assert (directive == "SKIP") is (set(verdicts.values()) == {"skip"})
        results.update(verdicts)
    return results


def _junit_verdict(case: Element) -> str:
    error, failure, skipped = (case.find(kind) for kind in ("error", "failure", "skipped"))
    if error is not None and "test process" in (error.text or "") + error.get("message", ""):
        return "lost"
    if error is not None and "crashed while running" in (error.text or "") + error.get("message", ""):
        return "lost"
    if error is not None or failure is not None:
        return "fail"
    if skipped is not None:
        return "xfail" if skipped.get("type") == "pytest.xfail" else "skip"
    return "pass"


def from_junit(root: Element) -> dict[str, str]:
    by_name: dict[str, str] = {}
    for case in root.iter("testcase"):
        classname = case.get("classname", "")
        file = classname.replace(".", "/") + ".py"
        # What was not collected has no class, and a name with dots.
        name = f"{file}::{case.get('name')}" if classname else f"{case.get('name', '').replace('.', '/')}.py"
        verdict = _junit_verdict(case)
        # pytest writes a test that failed in two phases as two cases.
        if by_name.get(name, "pass") in ("pass", verdict):
            by_name[name] = verdict
    return by_name


def from_table(text: str) -> dict[str, Counter[str]]:
    """Verdict counts by area, from the printed table."""
    rows: dict[str, Counter[str]] = {}
    area = ""
    words = ("pass", "fail", "skip", "xfail", "lost")
    lines = text[text.rindex("verdicts, seed") :].splitlines()
    heading = next(line for line in lines if line.split()[:2] == ["area", "protection"])
    second = heading.index("protection")
    pattern = re.compile(r"\S+(?: \*)?((?:\s+(?:\d+|\.)){5})\s+\d+\.\d\s*")
    for line in lines:
        match = pattern.fullmatch(line[second:])
        if match is None:
            continue
        area = line[:second].strip() or area
        numbers = [0 if word == "." else int(word) for word in match[1].split()]
        rows.setdefault(area, Counter()).update(dict(zip(words, numbers, strict=True)))
    return rows


def check(outcome: Outcome) -> None:
    assert {test["id"]: test["verdict"] for test in outcome.report["tests"]} == EXPECTED
    assert outcome.report["summary"] == {
        **dict.fromkeys(("pass", "fail", "skip", "xfail", "lost"), 0),
        **Counter(EXPECTED.values()),
    }
    assert outcome.report["exit_status"] == outcome.status == 1
    assert outcome.report["not_run"] == []
    # '#' cannot stand in a KTAP description.
    assert from_ktap(outcome.ktap) == {name.replace("#", "_"): verdict for name, verdict in EXPECTED.items()}
    assert from_junit(outcome.junit) == EXPECTED
    by_area: dict[str, Counter[str]] = {}
    for test in outcome.report["tests"]:
        by_area.setdefault(test["area"], Counter())[test["verdict"]] += 1
    table = from_table(outcome.text)
    assert {area: +counts for area, counts in table.items()} == by_area
    for test in outcome.report["tests"]:
        if test["verdict"] in ("fail", "lost"):
            assert f"{test['verdict']:<5} {test['id']}: {test['reason']}" in outcome.text
        if test["verdict"] == "xfail":
            assert f"    1  {test['reason']}\n       {test['id']}" in outcome.text
    for group in outcome.report["skips"]:
        assert f"{len(group['tests']):5}  {group['missing']}" in outcome.text


def from_page(text: str) -> dict[str, str]:
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    return {cell["id"]: cell["v"] for row in data["rows"] for cell in row["cells"]}


def write(suite: Suite) -> None:
    suite.add("memory/test_first.py", FIRST)
    suite.add("test_second.py", SECOND)
    suite.add("test_third.py", THIRD)
    suite.add("memory/test_broken.py", BROKEN)
    suite.add("test_whole.py", WHOLE)


def test_all_four_agree_with_xdist(suite: Suite) -> None:
    write(suite)
    outcome = suite.run("-n2", "--kvmpy-html=out.html")
    check(outcome)
    assert from_page((suite.folder / "out.html").read_text(encoding="utf-8")) == EXPECTED
    assert "crashed while running" in next(
        test["reason"] for test in outcome.report["tests"] if test["id"].endswith("test_lost")
    )


def test_all_four_agree_under_the_supervisor(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write(suite)
    monkeypatch.chdir(suite.folder)
    said: list[str] = []
    status = supervise([*suite.arguments(), "--kvmpy-html=out.html"], said.append)
    outcome = suite.outcome(status, capfd.readouterr().out)
    check(outcome)
    assert from_page((suite.folder / "out.html").read_text(encoding="utf-8")) == EXPECTED
    assert [line.partition(", in ")[0] for line in said] == [
        "kvmpy run: the test process ended itself with status 7",
        "kvmpy run: the test process was killed by SIGSEGV",
    ]
    reasons = {test["id"]: test["reason"] for test in outcome.report["tests"]}
    assert reasons["test_second.py::test_crash"] == "the test process was killed by SIGSEGV"
