# SPDX-License-Identifier: Apache-2.0
"""What a failed comparison of dicts says."""

from __future__ import annotations

import enum

import pytest

from kvmpy.testing import differences


class Register(enum.IntEnum):
    """Keys with a name."""

    CONFIG = 0x4000_00B0


def test_only_what_differs() -> None:
    got, expected = {"a": 1, "b": 2, Register.CONFIG: 3}, {"a": 1, "b": 7, Register.CONFIG: 4}
    assert differences.of(got, expected) == ["2 of 3 entries differ: b: 2, expected 7; CONFIG: 3, expected 4"]


def test_an_entry_of_one_side() -> None:
    assert differences.of({"a": 1}, {"b": 2}) == [
        "2 of 2 entries differ: b: nothing, expected 2; a: 1, expected nothing"
    ]


def test_many() -> None:
    lines = differences.of(dict.fromkeys(range(20), 0), dict.fromkeys(range(20), 1))
    assert lines[0].startswith("20 of 20 entries differ: 0: 0, expected 1; ")
    assert lines[0].endswith("; and 12 more")
    assert len(lines) == 13


@pytest.mark.parametrize(("op", "left", "right"), [("!=", {}, {}), ("==", [1], [2]), ("==", {}, [1])])
def test_other_comparisons_are_pytests(op: str, left: object, right: object) -> None:
    assert differences.pytest_assertrepr_compare(op, left, right) is None


def test_in_a_report(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_a():\n    assert {'x': 1, 'y': 2} == {'x': 1, 'y': 3}\n")
    result = pytester.runpytest_subprocess()
    result.stdout.fnmatch_lines(["*assert 1 of 2 entries differ: y: 2, expected 3*"])
