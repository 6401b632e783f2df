# SPDX-License-Identifier: Apache-2.0
"""The version: from a release's tag, and to the commit in every report."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import kvmpy
from hatch_build import NativeBuildHook
from kvmpy import version
from kvmpy.testing import json_report
from kvmpy.testing.host import HostSummary

ROOT = Path(__file__).resolve().parents[2]
WHO = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost")


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *WHO, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one commit, of the files that a version is made from."""
    for name in ("pyproject.toml", "README.md", "ci/describe.sh", "kvmpy/__init__.py"):
        target = tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    git(tmp_path, "init", "--quiet", "checkout")
    git(tmp_path / "checkout", "add", ".")
    git(tmp_path / "checkout", "commit", "--quiet", "-m", "one")
    return tmp_path / "checkout"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(version.VARIABLE, raising=False)
    version._exact.cache_clear()


def of_the_build(folder: Path) -> str:
    pytest.importorskip("hatch_vcs", reason="hatch-vcs: pip install 'kvmpy[dev]'")
    command = [sys.executable, "-m", "hatchling", "version"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_build_has_the_version_of_the_tag(checkout: Path) -> None:
    """Without a tag it is the release of the package, later than that, with the commit."""
    commit = git(checkout, "rev-parse", "--short", "HEAD")
    assert of_the_build(checkout) == f"{kvmpy.__version__}.post1.dev1+g{commit}"
    git(checkout, "tag", f"v{kvmpy.__version__}")
    assert of_the_build(checkout) == kvmpy.__version__
    git(checkout, "commit", "--quiet", "--allow-empty", "-m", "two")
    later = of_the_build(checkout)
    assert later == f"{kvmpy.__version__}.post1.dev1+g{git(checkout, 'rev-parse', '--short', 'HEAD')}"


def test_sources_without_a_history_are_the_release(checkout: Path) -> None:
    shutil.rmtree(checkout / ".git")
    assert of_the_build(checkout) == kvmpy.__version__


def test_a_tag_of_another_release_ends_the_build() -> None:
    hook: Any = SimpleNamespace(root=str(ROOT), metadata=SimpleNamespace(version="99.0.0"))
    with pytest.raises(ValueError, match=rf"version 99\.0\.0, kvmpy/__init__\.py says {kvmpy.__version__}"):
        NativeBuildHook.initialize(hook, "standard", {})


def test_a_checkout_tells_its_commit(checkout: Path) -> None:
    """One that was changed says so; what git does not know is none."""
    commit = git(checkout, "rev-parse", "--short=12", "HEAD")
    assert version._commit(checkout) == commit
    (checkout / "README.md").write_text("changed")
    assert version._commit(checkout) == f"{commit}-dirty"
    assert version._commit(checkout.parent / "nowhere") == ""


def test_without_git_it_is_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert version.exact() == kvmpy.__version__


def test_a_wheel_knows_what_it_was_built_from(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("kvmpy._version")
    module.__dict__["version"] = "0.2.0.post1.dev7+gabc"
    monkeypatch.setitem(sys.modules, "kvmpy._version", module)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert version.exact() == "0.2.0.post1.dev7+gabc"


def test_reports_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a machine of the lab it is what the host found."""
    monkeypatch.setenv(version.VARIABLE, "0.2.0+gabc")
    host = HostSummary("7.2", "a CPU", (), "host", kvm=True)
    report = json_report.document([], host, seed=1, duration=0, exit_status=0)
    assert (report["kvmpy"], report["host"]["kvmpy"]) == ("0.2.0+gabc", "0.2.0+gabc")
    monkeypatch.delenv(version.VARIABLE)
    if (ROOT / ".git").exists() and shutil.which("git", path=os.environ["PATH"]):
        assert version.exact().startswith(f"{kvmpy.__version__}+g")
