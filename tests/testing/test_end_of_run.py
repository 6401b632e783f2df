# SPDX-License-Identifier: Apache-2.0
"""What makes every test that is left meaningless ends the run."""

from __future__ import annotations

import pytest

from tests.testing.support import Suite

SOURCE = """
import pytest
from kvmpy.core.errors import DeadProcessorError

def test_a(): pass

def test_b():
    try:
        raise DeadProcessorError("LAUNCH_START came back with EBUSY")
    except DeadProcessorError as error:
        raise ValueError("a test's own words") from error

def test_c(): pass
"""


@pytest.mark.parametrize("workers", [[], ["-n1"]], ids=["here", "xdist"])
def test_the_run_ends(suite: Suite, workers: list[str]) -> None:
    """No test runs after one that met a dead processor, whatever the test made of it."""
    suite.add("test_a.py", SOURCE)
    outcome = suite.run(*workers)
    assert outcome.status == pytest.ExitCode.INTERRUPTED
    assert outcome.verdicts() == {"test_a": "pass", "test_b": "fail"}
    assert "the secure processor does not answer; reboot" in outcome.text
