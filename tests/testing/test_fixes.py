# SPDX-License-Identifier: Apache-2.0
"""Which kernels are known to have a fix, and what a dangerous test makes of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmpy.testing.fixes import FIXES
from tests.testing.support import Suite

# The stable history: Debian's changelog of 7.1.3-1; reviews of 6.12.83, 6.12.95, 6.18.24, 6.18.38 and 7.0.1.
KNOWN = [
    ("sev-dbg-page", "7.2.13-amd64", True),
    ("sev-dbg-page", "7.1.3+deb14-amd64", True),
    ("sev-dbg-page", "7.1.2", False),
    ("sev-dbg-page", "7.0.12", False),
    ("sev-dbg-page", "6.18.38", True),
    ("sev-dbg-page", "6.18.37", False),
    ("sev-dbg-page", "6.12.117+deb13-amd64", True),
    ("sev-dbg-page", "6.12.94", False),
    ("sev-dbg-page", "6.14.0-27-generic", False),
    ("sev-dbg-page", "6.12.0-55.el10.x86_64", False),
    ("snp-finish-twice", "6.12.83", True),
    ("snp-finish-twice", "6.12.82", False),
    ("snp-finish-twice", "7.0.0-rc3", False),
    ("snp-finish-twice", "7.1.0-rc2", False),
    ("snp-finish-twice", "7.2-rc1", True),
    ("sev-dbg-page", "7.2.0-rc1", False),
    ("sev-dbg-page", "7.3.0-rc1", True),
    ("snp-finish-race", "6.12.117", False),
    ("snp-finish-race", "6.18.24", True),
    ("sev-region-race", "7.0.1", True),
    ("sev-region-race", "6.17.9", False),
]


@pytest.mark.parametrize(("name", "release", "known"), KNOWN)
def test_a_kernel_is_known_by_its_series(name: str, release: str, known: bool) -> None:
    assert FIXES[name].known(release) is known


@pytest.mark.parametrize("name", FIXES)
def test_a_fix_says_where_it_is(name: str) -> None:
    fix = FIXES[name]
    assert fix.versions.split(", ")[0] in ("7.1", "7.2")
    assert len(fix.versions.split(", ")) == len(fix.kernels)


HARDWARE = Path(__file__).parents[2] / "docs" / "hardware.md"
SOURCE = """
import pytest
from kvmpy.testing.fixes import FIXES, Fix
FIXES["here"] = Fix("c0ffee", "KVM: Fix it", "it breaks", (">=%s",))

@pytest.mark.dangerous(unless="here")
def test_a(): pass

@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.dangerous(unless="here"))])
def test_b(n): pass
"""


def test_a_dangerous_test_runs_on_a_fixed_kernel(suite: Suite) -> None:
    suite.add("test_a.py", SOURCE % os.uname().release.partition("-")[0])
    assert suite.run().verdicts() == {"test_a": "pass", "test_b[1]": "pass", "test_b[2]": "pass"}


def test_a_dangerous_test_says_which_fix_is_missing(suite: Suite) -> None:
    suite.add("test_a.py", SOURCE % "99.1")
    outcome = suite.run()
    assert outcome.verdicts() == {"test_a": "skip", "test_b[1]": "pass", "test_b[2]": "skip"}
    assert "not known to have c0ffee (KVM: Fix it; Linux 99.1)" in outcome.reason("test_a")
    assert suite.run("--run-dangerous").verdicts() == dict.fromkeys(outcome.verdicts(), "pass")


@pytest.mark.parametrize("name", FIXES)
def test_the_documentation_names_every_fix(name: str) -> None:
    fix = FIXES[name]
    [row] = [row for row in HARDWARE.read_text("utf-8").splitlines() if row.startswith(f"| {fix.commit}")]
    assert row.split(" | ")[1] == fix.versions
