# SPDX-License-Identifier: Apache-2.0
"""The wheel, installed in a new virtual environment, works in an empty directory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.version import Version

import kvmpy
from kvmpy import gen
from kvmpy.testing.host import kvm_missing

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(600)


def run(
    command: Sequence[str | Path], folder: Path, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    # Neither the checkout nor this environment may be on the path of what is tested.
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("PYTHONPATH", "VIRTUAL_ENV", "KVMPY_REQUIRE")
    }
    environment["PYTHONPYCACHEPREFIX"] = str(folder.parent / "pycache")
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    result = run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT], folder
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = folder.glob("*.whl")
    return built


@dataclass
class Installed:
    """A virtual environment with the wheel in it."""

    folder: Path

    @property
    def command(self) -> Path:
        return self.folder / "bin" / "kvmpy"

    @property
    def packages(self) -> Path:
        (only,) = self.folder.glob("lib/python*/site-packages")
        return only


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    root = Installed(tmp_path_factory.mktemp("installed") / "venv")
    venv.create(root.folder, with_pip=True, symlinks=True)
    work = tmp_path_factory.mktemp("pip")
    result = run([root.folder / "bin" / "python", "-m", "pip", "install", "--quiet", wheel], work)
    if result.returncode != 0 and "No matching distribution found" in result.stderr:
        pytest.skip(f"needs a package index that pip can reach: {result.stderr.strip().splitlines()[-1]}")
    assert result.returncode == 0, result.stdout + result.stderr
    return root


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_name_and_content(wheel: Path) -> None:
    name, version, *tags = wheel.stem.split("-")
    assert (name, tags) == ("kvmpy", ["cp310", "abi3", "linux_x86_64"])
    # The release, and the commit that it was built from.
    assert Version(version).base_version == kvmpy.__version__
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert archive.read("kvmpy/_version.py").decode() == f'version = "{version}"\n'
        (about,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(about).decode())
    assert (metadata["Name"], metadata["Version"]) == ("kvmpy", version)
    assert "Programming Language :: Python :: 3.14" in metadata.get_all("Classifier", [])
    assert "kvmpy/uapi/_native.abi3.so" in names
    assert "kvmpy/py.typed" in names
    assert "kvmpy/testing/suite.ini" in names
    assert "kvmpy/testing/errata.toml" in names
    assert {"kvmpy/lab/files/init.sh", "kvmpy/lab/files/kernel.config"} <= names
    assert "kvmpy/guest_asm/include/kvmpy/guest.h" in names
    generated = {path.relative_to(ROOT).as_posix() for path in gen.files()}
    assert {name.replace("guest_asm/", "kvmpy/guest_asm/") for name in generated} <= names
    shipped = {name.removeprefix("kvmpy/") for name in names if name.startswith("kvmpy/selftests/")}
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "selftests").rglob("*.py")}
    assert here
    assert {name for name in shipped if name.endswith(".py")} == here
    assert not any(name.startswith(("tests/", "ci/", "kvmpy/tests/")) for name in names)
    assert not any(name.endswith(".pyc") for name in names)


def test_it_needs_the_c_library_alone(wheel: Path, empty: Path) -> None:
    """Built in the image of a C library, it is a wheel for all that have this one or a newer."""
    pytest.importorskip("auditwheel", reason="auditwheel: pip install 'kvmpy[dev]'")
    shown = run([sys.executable, "-m", "auditwheel", "show", wheel], empty)
    text = " ".join(shown.stdout.split())
    assert re.search(r'consistent with the following platform tag: "manylinux_2_\d+_x86_64"', text), text
    needed = set(re.findall(r"\blib\w+\.so[.\d]*", text))
    assert needed <= {"libc.so.6", "libpthread.so.0", "libdl.so.2"}, text


def test_a_selftest_runs_in_an_empty_directory(installed: Installed, empty: Path) -> None:
    listed = run([installed.command, "run", "--list"], empty)
    assert listed.returncode == 0, listed.stdout + listed.stderr
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    quick = next(name for name in names if name.startswith("harness/") and name.endswith("[none]"))
    report = empty.parent / "report.json"
    result = run([installed.command, "run", "--json", report, quick], empty)
    assert result.returncode == 0, result.stdout + result.stderr
    (test,) = json.loads(report.read_text())["tests"]
    assert test["id"] == quick
    assert test["verdict"] == ("pass" if kvm_missing() is None else "skip")
    assert list(empty.iterdir()) == []
    assert not list((installed.packages / "kvmpy" / "selftests").rglob("*.pyc"))


def test_selection_by_expression(installed: Installed, empty: Path) -> None:
    result = run([installed.command, "run", "-k", "no_test_has_this_name"], empty)
    assert result.returncode == 5
    assert "no test matches" in result.stderr


def test_the_abi_comes_out_as_json(installed: Installed, empty: Path) -> None:
    result = run([installed.command, "abi", "--json"], empty)
    assert result.returncode == 0, result.stderr
    abi = json.loads(result.stdout)
    assert abi["ioctls"]["KVM_RUN"]["nr"] == 0xAE80
    assert abi["structs"]["kvm_regs"]["size"] == 144
    assert abi["constants"]["KVM_CAP_GUEST_MEMFD"] == 234


def test_the_doctor_looks_at_this_host(installed: Installed, empty: Path) -> None:
    result = run([installed.command, "doctor", "--json"], empty)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["kernel"]["release"] == os.uname().release
    assert answer["kvm"]["usable"] is (kvm_missing() is None)


def test_the_recorder_is_compiled_from_the_wheel(installed: Installed, empty: Path) -> None:
    """`kvmpy trace` finds its C source where it was installed."""
    preload = installed.packages / "kvmpy" / "debug" / "preload"
    shipped = {path.name for path in preload.iterdir() if path.suffix in (".c", ".h")}
    assert shipped == {
        path.name for path in (ROOT / "kvmpy/debug/preload").iterdir() if path.suffix in (".c", ".h")
    }
    result = run([installed.command, "trace", "--", "sh", "-c", "exit 5"], empty)
    assert result.returncode == 5, result.stderr
    assert "issued an ioctl of KVM that the recorder saw" in result.stderr
