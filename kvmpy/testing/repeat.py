# SPDX-License-Identifier: Apache-2.0
"""Runs each test several times in one session, as tests of their own, so that a flaky one shows itself."""

from __future__ import annotations

from typing import Any

import pytest

from kvmpy.testing.verdicts import repetition


def _again(item: pytest.Function, number: int) -> pytest.Item:
    name = repetition(item.originalname, number)
    parent: Any = item.parent
    owner = parent.newinstance() if hasattr(parent, "newinstance") else parent.obj
    again: pytest.Item = type(item).from_parent(
        parent,
        name=name + item.name.removeprefix(item.originalname),
        callobj=getattr(owner, item.originalname),
        callspec=getattr(item, "callspec", None),
        fixtureinfo=item._fixtureinfo,
        # Of this, or of the name, pytest makes the node id.
        originalname=name,
    )
    return again


def repeat(items: list[pytest.Item], times: int) -> None:
    """Let each test function be followed by its repetitions, so that it runs *times* times."""
    repeated = []
    for item in items:
        repeated.append(item)
        if isinstance(item, pytest.Function):
            repeated += [_again(item, number) for number in range(2, times + 1)]
    items[:] = repeated
