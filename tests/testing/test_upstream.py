# SPDX-License-Identifier: Apache-2.0
"""How ci/upstream_kvm.py puts two suites side by side: what belongs together, and what is a disagreement."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def upstream() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("upstream_kvm", ROOT / "ci" / "upstream_kvm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def report(platform: str = "host", **verdicts: str) -> dict[str, Any]:
    """Return a report of tests by name: the verdict, and behind a colon the reason."""
    tests = [
        {"id": name, "verdict": text.partition(":")[0], "reason": text.partition(":")[2]}
        for name, text in verdicts.items()
    ]
    return {"platform": platform, "host": {"module": "kvm_amd"}, "tests": tests}


def theirs(verdict: str) -> dict[str, Any]:
    """Return a report of one program of theirs."""
    return report(**{"test_upstream.py::test_upstream[x86/a_test]": verdict})


TESTS = {"x86/a_test": ["io/test_a.py", "io/test_b.py"]}


def test_each_row_of_the_table_names_tests_that_exist(upstream: ModuleType) -> None:
    found = upstream.counterparts(upstream.TABLE.read_text(encoding="utf-8"))
    assert len(found) > 50
    missing = [test for tests in found.values() for test in tests if not (ROOT / "selftests" / test).exists()]
    assert missing == []
    assert found["x86/msrs_test"][-1] == "regs/test_reg_list.py"


def test_a_file_without_a_folder_is_in_the_one_before(upstream: ModuleType) -> None:
    text = "| `x86/a_test` | `io/test_a.py`, `test_b.py`, `vcpu/test_c.py` | part: of it |\n| `no row` |\n"
    assert upstream.counterparts(text) == {"x86/a_test": ["io/test_a.py", "io/test_b.py", "vcpu/test_c.py"]}


@pytest.mark.parametrize(
    ("their", "ours", "word", "is_open"),
    [
        ("pass", ["pass", "skip"], "agree", False),
        ("fail:errno 5", ["pass", "xfail:erratum"], "agree", False),
        ("fail:errno 5", ["pass", "pass"], "disagree", True),
        ("pass", ["pass", "xfail:erratum"], "kvmpy sees more", False),
        ("pass", ["fail:boom", "pass"], "disagree", True),
        ("fail:errno 5", ["fail:boom", "pass"], "agree", True),
        ("lost", ["lost", "pass"], "agree", True),
        ("skip:no CPU", ["pass", "pass"], "only kvmpy", False),
        ("skip:no CPU", ["fail:boom", "pass"], "only kvmpy", True),
        ("pass", ["skip", "skip"], "only upstream", False),
        ("skip", ["skip", "skip"], "neither ran", False),
    ],
)
def test_what_is_a_disagreement(
    upstream: ModuleType, their: str, ours: list[str], word: str, is_open: bool
) -> None:
    mine = report(
        **{f"io/test_{letter}.py::test_x[none]": verdict for letter, verdict in zip("ab", ours, strict=True)}
    )
    [line] = upstream.compare(theirs(their), mine, TESTS, [])
    assert (line.word, line.open) == (word, is_open)


@pytest.mark.parametrize(
    ("platform", "program", "known"),
    [
        ("host", "x86/a_test", True),
        ("lab, software AMD-SP", "x86/a_test", False),
        ("host", "x86/b_test", False),
    ],
)
def test_what_is_understood_is_not_open(
    upstream: ModuleType, platform: str, program: str, known: bool
) -> None:
    difference = upstream.Difference(program, "kvm_a*", "the compiler's choice")
    mine = report(platform, **{"io/test_a.py::test_x": "pass"})
    [line] = upstream.compare(theirs("fail"), mine, TESTS, [difference])
    assert (line.word, line.open) == ("disagree", not known)


def test_programs_without_tests_and_tests_without_programs(upstream: ModuleType) -> None:
    mine = report(**{"io/test_a.py::test_x": "pass", "io/test_other.py::test_y": "fail:boom"})
    lines = upstream.compare(report(**{"t.py::test_upstream[x86/b_test]": "pass"}), mine, TESTS, [])
    assert [(line.program, line.word) for line in lines] == [
        ("x86/a_test", "only kvmpy"),
        ("x86/b_test", "only upstream"),
    ]


def test_the_list_of_differences_can_be_read(upstream: ModuleType) -> None:
    known = set(upstream.counterparts(upstream.TABLE.read_text(encoding="utf-8")))
    assert [entry.program for entry in upstream.differences() if entry.program not in known] == []
