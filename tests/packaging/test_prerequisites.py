# SPDX-License-Identifier: Apache-2.0
"""What a build needs and lacks is named, with the command that installs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "ci" / "prerequisites.sh"
SHELL = shutil.which("sh") or "/bin/sh"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with all that the script looks for, and nothing else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("gcc", "as", "ld", "make", "id"):
        program = shutil.which(name)
        assert program is not None
        (folder / name).symlink_to(program)
    (folder / "python3").symlink_to(sys.executable)
    return folder


def check(tools: Path, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(tools), **variables}
    return subprocess.run(
        [SHELL, str(SCRIPT), *args], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_nothing_is_missing(tools: Path) -> None:
    result = check(tools, PYTHON=sys.executable)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("tool", "what", "packages"),
    [
        ("gcc", "a C compiler (gcc)", "gcc libc6-dev"),
        ("as", "as and ld, of binutils", "binutils"),
        ("ld", "as and ld, of binutils", "binutils"),
        ("make", "make", "make"),
    ],
)
def test_a_missing_tool_is_named(tools: Path, tool: str, what: str, packages: str) -> None:
    (tools / tool).unlink()
    result = check(tools, PYTHON=sys.executable)
    assert result.returncode == 1
    assert f"\n  {what}\n" in result.stderr
    assert result.stderr.rstrip().endswith(f"apt-get install {packages}")
    assert check(tools, "--packages", PYTHON=sys.executable).stdout.strip() == packages


def test_another_compiler_may_be_named(tools: Path) -> None:
    (tools / "gcc").rename(tools / "cc-of-mine")
    assert check(tools, PYTHON=sys.executable, CC="cc-of-mine").returncode == 0


def test_where_dnf_is_the_command_is_dnf(tools: Path) -> None:
    (tools / "gcc").unlink()
    (tools / "dnf").symlink_to(tools / "id")
    assert check(tools, PYTHON=sys.executable).stderr.rstrip().endswith("dnf install gcc glibc-devel")


def test_no_python_at_all(tools: Path) -> None:
    (tools / "python3").unlink()
    result = check(tools)
    assert result.returncode == 1
    assert "python3 python3-venv python3-dev" in result.stderr


def test_an_old_python_is_named_with_its_version(tools: Path) -> None:
    old = tools / "python-old"
    old.write_text(f'#!{SHELL}\n[ "$1" = -V ] && echo "Python 3.8.2"\nexit 1\n')
    old.chmod(0o755)
    result = check(tools, PYTHON="python-old")
    assert result.returncode == 1
    assert "Python 3.10 or newer (python-old is Python 3.8.2)" in result.stderr


def test_make_help_lists_every_target() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    result = subprocess.run(
        ["make", "-C", str(ROOT), "help"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    for target in ("run", "test", "lint", "wheel", "docs", "clean"):
        assert f"  make {target} " in result.stdout
