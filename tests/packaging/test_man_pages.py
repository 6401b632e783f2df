# SPDX-License-Identifier: Apache-2.0
"""``make man``: a page for each command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvmpy.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


def test_every_command_has_a_page(tmp_path: Path) -> None:
    pytest.importorskip("click_man", reason="click-man: pip install 'kvmpy[docs]'")
    command = [sys.executable, str(ROOT / "ci" / "man_pages.py"), str(tmp_path / "man")]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    pages = {path.stem for path in (tmp_path / "man").iterdir()}
    assert {"kvmpy", "kvmpy-lab-run", "kvmpy-coverage-diff", *(f"kvmpy-{name}" for name in COMMANDS)} <= pages
    text = (tmp_path / "man" / "kvmpy-lab-run.1").read_text().replace("\\-", "-")
    assert "--soft-sev" in text
    assert "--kvmpy" not in text
