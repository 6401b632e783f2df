# SPDX-License-Identifier: Apache-2.0
"""A launch whose comparison is dropped says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpy.coco.sev_prediction import PredictedLaunch
from tests.testing.support import SUITE_INI


def test_a_platform_that_exports_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the Diffie-Hellman key cannot be had, a warning says that nothing is compared, and why."""
    monkeypatch.setenv("KVMPY_DEV_SEV", str(tmp_path / "none"))
    with pytest.warns(UserWarning, match="compared with no prediction: .*none does not exist"):
        assert PredictedLaunch.of(0) is None
    (tmp_path / "none").touch()
    with pytest.warns(UserWarning, match="compared with no prediction: SEV_PDH_CERT_EXPORT on .* ENOTTY"):
        assert PredictedLaunch.of(0) is None


def test_the_suite_shows_it(pytester: pytest.Pytester) -> None:
    """A run shows the warning, and does not fail of it as of any other one."""
    pytester.makepyfile(
        "from kvmpy.coco.sev_prediction import PredictedLaunch\n"
        "def test_a(monkeypatch):\n"
        "    monkeypatch.setenv('KVMPY_DEV_SEV', '/nonexistent/sev')\n"
        "    assert PredictedLaunch.of(0) is None\n"
    )
    result = pytester.runpytest_subprocess("-c", str(SUITE_INI), f"--rootdir={pytester.path}", timeout=100)
    result.assert_outcomes(passed=1, warnings=1)
    result.stdout.fnmatch_lines(["*the launch is compared with no prediction: /nonexistent/sev does not*"])
