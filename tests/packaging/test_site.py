# SPDX-License-Identifier: Apache-2.0
"""``make site``: every link, heading and docstring of the documentation is sound."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import kvmpy

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(300)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """It has all pages and all public names, and loads nothing from elsewhere."""
    for needed in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(needed, reason="sphinx, myst-parser, furo: pip install 'kvmpy[docs]'")
    site = tmp_path / "site"
    options = ["-W", "--keep-going", "-q", "-c", "ci/site", "-d", str(tmp_path / "trees")]
    command = [sys.executable, "-m", "sphinx", *options, ".", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    pages = {path.stem for path in (site / "docs").glob("*.html")}
    assert pages == {path.stem for path in (ROOT / "docs").glob("*.md")}
    reference = (site / "build" / "reference.html").read_text()
    # What a guest program is, for one, is told in its docstring.
    assert str(kvmpy.GuestProgram.__doc__).partition(";")[0] in reference
    for name in ("GuestProgram", "MakeVm", "refused"):
        assert f'id="kvmpy.{name}"' in reference
    outside = [line for line in reference.splitlines() if "<script" in line and "http" in line]
    assert outside == []
