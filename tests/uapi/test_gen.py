# SPDX-License-Identifier: Apache-2.0
"""What the build generates, from the declarations alone, is what the ioctl table and the extension say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvmpy.gen
from kvmpy.uapi import constants, gen, structs

ROOT = Path(__file__).resolve().parents[2]

# The stand-in leaves no way to the extension in the process, so each build has one of its own.
GENERATE = """
import sys
sys.path.insert(0, {root!r})
sys.path.append({packages!r})
from kvmpy import build
build.generate(build.ffibuilder())
others = {{name.partition(".")[0] for name in sys.modules}} - sys.stdlib_module_names
print(*sorted(name for name in others if getattr(sys.modules[name], "__file__", None)))
"""


def test_generated_files_are_up_to_date() -> None:
    """What lies there was generated from the declarations; here the compiled extension says the same."""
    for path, text in kvmpy.gen.files().items():
        assert path.read_text() == text, f"{path} is out of date: run `make build`"


def test_only_what_differs_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same, other, missing = (tmp_path / name for name in ("same.h", "other.h", "missing.h"))
    same.write_text("text\n")
    other.write_text("text")
    before = same.stat().st_mtime_ns
    monkeypatch.setattr(kvmpy.gen, "files", lambda: dict.fromkeys((same, other, missing), "text\n"))
    assert kvmpy.gen.write() == [same, other, missing]
    assert [path.read_text() for path in (same, other, missing)] == ["text\n"] * 3
    assert same.stat().st_mtime_ns == before


def test_generating_needs_cffi_alone() -> None:
    """A build has no other package, and no extension yet."""
    code = GENERATE.format(root=str(ROOT), packages=str(Path(pytest.__file__).parents[1]))
    command = [sys.executable, "-I", "-S", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["_cffi_backend", "cffi", "kvmpy", "pycparser"]


def test_git_ignores_what_is_generated() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this tree is no git checkout")
    names = [str(path.relative_to(ROOT)) for path in kvmpy.gen.files()]
    command = ["git", "-C", str(ROOT), "check-ignore", *names]
    ignored = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ignored.stdout.split() == names, ignored.stderr


def test_the_recorder_learns_what_ioctls_make() -> None:
    """Request, kind, place of the descriptor, where it makes nothing, name, and what numbers it."""
    rows = re.findall(r"\{ (KVM_CREATE_\w+, .*) \},", kvmpy.gen.tables())
    assert rows == [
        'KVM_CREATE_VM, 2, -1, 0, 0, "vm", -3',
        'KVM_CREATE_VCPU, 3, -1, 0, 0, "vcpu", -2',
        'KVM_CREATE_GUEST_MEMFD, 5, -1, 0, 0, "gmem", -3',
        'KVM_CREATE_DEVICE, 4, 4, 8, 1, "device", 0',
    ]


def test_struct_stub_declares_every_field() -> None:
    tree = ast.parse(gen.structs_stub())
    declared = {
        node.name: {
            item.target.id
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    }
    assert declared == {
        name: set(kind.FIELDS) for name, kind in {**structs.STRUCTS, **structs.NESTED}.items()
    }


def test_constants_stub_declares_every_constant() -> None:
    tree = ast.parse(gen.constants_stub())
    declared = {
        item.target.id
        for item in tree.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    assert declared == {*constants.ALL, "ALL", "GROUPS", "TOPICS"}
