# SPDX-License-Identifier: Apache-2.0
"""What a failed comparison of two dicts says: the entries that differ, as got and as expected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_SHOWN = 8
_ABSENT = "nothing"


def _name(key: object) -> str:
    return str(getattr(key, "name", None) or key)


def _entries(got: Mapping[object, object], expected: Mapping[object, object]) -> Iterator[str]:
    for key in dict.fromkeys([*expected, *got]):
        mine = repr(got[key]) if key in got else _ABSENT
        wanted = repr(expected[key]) if key in expected else _ABSENT
        if mine != wanted and not (key in got and key in expected and got[key] == expected[key]):
            yield f"{_name(key)}: {mine}, expected {wanted}"


def of(got: Mapping[object, object], expected: Mapping[object, object]) -> list[str]:
    """Return the lines; the first names as many entries as have room, and how many there are."""
    entries = list(_entries(got, expected))
    count = len(dict.fromkeys([*expected, *got]))
    left = len(entries) - _SHOWN
    shown = "; ".join(entries[:_SHOWN]) + (f"; and {left} more" if left > 0 else "")
    return [f"{len(entries)} of {count} entries differ: {shown}", *entries[_SHOWN:]]


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Explain ``assert got == expected`` of two dicts."""
    if op != "==" or not isinstance(left, Mapping) or not isinstance(right, Mapping):
        return None
    return of(left, right)
