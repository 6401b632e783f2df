# SPDX-License-Identifier: Apache-2.0
"""Names and counts that every report is made from."""

from __future__ import annotations

import pytest

from kvmpy.testing.verdicts import TestVerdict, Verdict, area_of, skips_by_reason, suite_id, tally


def entry(name: str, verdict: Verdict, **more: object) -> TestVerdict:
    identifier = suite_id(name)
    return TestVerdict(name, identifier, area_of(identifier), verdict, "host", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nodeid", "expected"),
    [
        ("selftests/memory/test_a.py::test_b[none]", "memory/test_a.py::test_b[none]"),
        ("memory/test_a.py::test_b", "memory/test_a.py::test_b"),
        ("../lib/kvmpy/selftests/test_c.py::T::test_d", "test_c.py::T::test_d"),
        ("tests/x86/test_p.py::test_q", "tests/x86/test_p.py::test_q"),
    ],
)
def test_suite_id_is_the_same_wherever_the_suite_lies(nodeid: str, expected: str) -> None:
    assert suite_id(nodeid) == expected


@pytest.mark.parametrize(
    ("identifier", "expected"),
    [("memory/test_a.py::t", "memory"), ("test_clock.py::t", "clock"), ("a/b/test_c.py::t", "a/b")],
)
def test_area(identifier: str, expected: str) -> None:
    assert area_of(identifier) == expected


def test_tally_names_every_verdict() -> None:
    counts = tally(
        [entry("a.py::a", Verdict.PASS), entry("a.py::b", Verdict.LOST), entry("a.py::c", Verdict.PASS)]
    )
    assert counts == {"pass": 2, "fail": 0, "skip": 0, "xfail": 0, "lost": 1}


def test_only_fail_and_lost_are_bad() -> None:
    assert [verdict for verdict in Verdict if verdict.bad] == [Verdict.FAIL, Verdict.LOST]


def test_skips_are_grouped_by_the_missing_thing() -> None:
    cap = {"missing": ("KVM_CAP_X",), "how": ("a newer kernel",)}
    both = {"missing": ("KVM_CAP_X", "root"), "how": ("a newer kernel", "sudo")}
    groups = skips_by_reason(
        [
            entry("a.py::one", Verdict.SKIP, **cap),
            entry("a.py::two", Verdict.SKIP, **both),
            entry("a.py::three", Verdict.SKIP, reason="not today"),
            entry("a.py::four", Verdict.PASS),
        ]
    )
    assert groups == [
        ("KVM_CAP_X", "a newer kernel", ["a.py::one", "a.py::two"]),
        ("not today", "", ["a.py::three"]),
        ("root", "sudo", ["a.py::two"]),
    ]


def test_as_dict_is_json_ready() -> None:
    values = entry("m/test_a.py::b", Verdict.SKIP, missing=("x",), how=("y",), duration=0.12345678).as_dict()
    assert values["verdict"] == "skip"
    assert values["missing"] == ["x"]
    assert values["duration"] == 0.123457
