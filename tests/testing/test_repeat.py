# SPDX-License-Identifier: Apache-2.0
"""A test that is repeated is run as several, and called flaky where they differ."""

from __future__ import annotations

import pytest

from kvmpy.testing.html import page_data
from kvmpy.testing.verdicts import once, repetition
from tests.testing.support import Suite, parse_ktap

FLAKY = """
import pytest
calls = []

def test_good(): pass

def test_flaky():
    calls.append(1)
    assert len(calls) != 2

@pytest.mark.parametrize("value", ["a[1]", "b~2"])
def test_parameter(value, request): assert request.node.callspec.params["value"] == value

class TestOwn:
    @pytest.fixture(autouse=True)
    def clean(self):
        assert not hasattr(self, "used")
        self.used = True

    def test_method(self): assert self.used

@pytest.mark.requires("KVM_CAP_IRQCHIP")
def test_skipped(): pass

@pytest.mark.timeout(77)
def test_mark(request): assert request.node.get_closest_marker("timeout").args == (77,)
"""


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["one process", "xdist"])
def test_a_flaky_test_is_told_as_such(suite: Suite, workers: tuple[str, ...]) -> None:
    suite.add("test_a.py", FLAKY)
    outcome = suite.run("--kvmpy-repeat", "3", "--dist=loadfile", *workers)
    assert outcome.status == 1
    assert outcome.report["summary"] == {"pass": 17, "fail": 1, "skip": 3, "xfail": 0, "lost": 0}
    assert outcome.report["flaky"] == [{"id": "test_a.py::test_flaky", "verdicts": {"pass": 2, "fail": 1}}]
    ids = [test["id"] for test in outcome.report["tests"]]
    assert len(set(ids)) == 21
    assert {once(identifier) for identifier in ids} == {
        f"test_a.py::{name}"
        for name in (
            "test_good",
            "test_flaky",
            "test_parameter[a[1]]",
            "test_parameter[b~2]",
            "TestOwn::test_method",
            "test_skipped",
            "test_mark",
        )
    }
    assert "flaky, by the verdicts of their repetitions:" in outcome.text
    assert "test_a.py::test_flaky: 2 pass, 1 fail" in outcome.text
    assert "# flaky: test_a.py::test_flaky: 2 pass, 1 fail" in outcome.ktap
    parse_ktap(outcome.ktap)


def test_without_repetitions_nothing_is_flaky(suite: Suite) -> None:
    suite.add("test_a.py", FLAKY)
    outcome = suite.run("--kvmpy-repeat", "1")
    assert outcome.report["flaky"] == []
    assert len(outcome.report["tests"]) == 7
    assert "flaky, by" not in outcome.text
    assert "# flaky" not in outcome.ktap


def test_repetitions_follow_their_test(suite: Suite) -> None:
    suite.add("test_a.py", "def test_a(): pass\ndef test_b(): pass\n")
    outcome = suite.run("--kvmpy-repeat", "2")
    assert list(outcome.verdicts()) == ["test_a", "test_a~2", "test_b", "test_b~2"]


def test_an_erratum_is_of_all_repetitions(suite: Suite) -> None:
    suite.add("test_a.py", "def test_a(): assert 1 == 2\n")
    errata = suite.add(
        "errata.toml",
        '[[erratum]]\ntest = "test_a.py::test_a"\nwhen = {platform = "host"}\nreason = "x"\norigin = "y"\n',
    )
    outcome = suite.run("--kvmpy-repeat", "2", "--kvmpy-errata", str(errata))
    assert outcome.report["summary"]["xfail"] == 2, outcome.text


def test_a_page_has_one_cell_for_a_test(suite: Suite) -> None:
    suite.add("test_a.py", FLAKY)
    report = suite.run("--kvmpy-repeat", "3").report
    rows = {row["id"]: row["cells"] for row in page_data([report])["rows"]}
    assert len(rows) == 7
    assert all(len(cells) == 1 for cells in rows.values())
    (cell,) = rows["test_a.py::test_flaky"]
    assert (cell["v"], cell["rep"], cell["flaky"]) == ("fail", "2 pass, 1 fail", True)
    assert cell["id"] == "test_a.py::test_flaky"
    (cell,) = rows["test_a.py::test_good"]
    assert (cell["v"], cell["rep"], cell["flaky"]) == ("pass", "3 pass", False)


@pytest.mark.parametrize("times", ["0", "-1", "x"])
def test_no_times_are_refused(suite: Suite, times: str) -> None:
    suite.add("test_a.py", "def test_a(): pass\n")
    result = suite.pytester.runpytest_subprocess(*suite.arguments(), f"--kvmpy-repeat={times}", timeout=100)
    assert int(result.ret) == 4


@pytest.mark.parametrize(
    "identifier", ["a/test_b.py::test_c", "test_b.py::TestX::test_c", "test[1].py::test_c"]
)
@pytest.mark.parametrize("parameters", ["", "[cbit-0x10]", "[x~3]", "[a::b~2[c]~4]"])
def test_a_repetition_is_its_test(identifier: str, parameters: str) -> None:
    assert once(identifier + parameters) == identifier + parameters
    assert once(repetition(identifier, 12) + parameters) == identifier + parameters
