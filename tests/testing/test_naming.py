# SPDX-License-Identifier: Apache-2.0
"""The ids of tests are the same however a test is named on the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvmpy.testing import naming
from kvmpy.testing.naming import NamingError, identifier, targets


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    folder = tmp_path / "site" / "selftests"
    for name in ("dirty", "io"):
        (folder / name).mkdir(parents=True)
        (folder / name / "test_a.py").write_text("")
    return folder


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    for name in ("dirty", "io", "own"):
        (folder / name).mkdir(parents=True)
    for name in ("dirty", "own"):
        (folder / name / "test_a.py").write_text("")
    (folder / "test_mine.py").write_text("")
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("own", "home/own"),
        ("test_mine.py::test_x[a::b]", "home/test_mine.py::test_x[a::b]"),
        (".", "home"),
        ("./dirty", "home/dirty"),
        ("../home/dirty", "home/dirty"),
        ("dirty", "home/dirty"),
        ("selftests/dirty", "site/selftests/dirty"),
        ("dirty/test_a.py", "home/dirty/test_a.py"),
        ("io", "site/selftests/io"),
        ("io/test_a.py::test_x", "site/selftests/io/test_a.py::test_x"),
    ],
)
def test_what_a_name_means(suite: Path, here: Path, tmp_path: Path, name: str, expected: str) -> None:
    chosen = targets([name], suite, here)
    assert chosen.arguments == [f"{tmp_path}/{expected}"]
    # Nothing is chosen silently where two have the name.
    assert bool(chosen.remarks) == (name.startswith("dirty"))


def test_an_absolute_path_is_that_file(suite: Path, here: Path) -> None:
    assert targets([str(suite / "dirty")], suite, here).arguments == [str(suite / "dirty")]
    assert targets([str(here / "own")], suite, here).arguments == [str(here / "own")]


@pytest.mark.parametrize("name", ["nowhere", "./io/test_a.py", "selftests/nowhere"])
def test_a_name_of_nothing(suite: Path, here: Path, name: str) -> None:
    with pytest.raises(NamingError, match=f"{name} is neither in the suite"):
        targets([name], suite, here)


def test_ids_of_files(suite: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "suite_folder", lambda: suite)
    assert identifier(suite / "io" / "test_a.py", here) == "selftests/io/test_a.py"
    assert identifier(here / "own" / "test_a.py", here) == "own/test_a.py"
    assert identifier(Path("/elsewhere/test_b.py"), here) == "/elsewhere/test_b.py"


def _ids(folder: Path, *names: str) -> set[str]:
    result = subprocess.run(
        [sys.executable, "-m", "kvmpy", "run", "--lab", "never", "--list", *names],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return {line for line in result.stdout.splitlines() if "::" in line}


@pytest.mark.timeout(600)
def test_ids_are_the_same_beside_own_tests(tmp_path: Path) -> None:
    for name in ("test_mine.py", "dirty/test_mine.py", "io/test_mine.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("def test_own(): pass\n")
    alone = _ids(tmp_path, "stats")
    assert alone
    assert all(name.startswith("stats/") for name in alone)
    assert _ids(tmp_path, "test_mine.py", "stats") == {*alone, "test_mine.py::test_own"}
    assert _ids(tmp_path, ".") == {
        "test_mine.py::test_own",
        "dirty/test_mine.py::test_own",
        "io/test_mine.py::test_own",
    }
