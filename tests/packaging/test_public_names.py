# SPDX-License-Identifier: Apache-2.0
"""What can be imported from kvmpy itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kvmpy

ROOT = Path(__file__).resolve().parents[2]


def test_every_declared_name_is_there() -> None:
    """Each name of the stub is the object of its home module, and none stands there twice."""
    assert len(set(kvmpy.__all__)) == len(kvmpy.__all__)
    for name in kvmpy.__all__:
        assert getattr(kvmpy, name) is not None


def test_the_kernels_words() -> None:
    """Constants and structs have their own names, and what is neither is an AttributeError with its name."""
    assert int(kvmpy.KVM_CAP_USER_MEMORY) == 3
    assert kvmpy.kvm_regs.SIZE == 144
    with pytest.raises(AttributeError, match="'KVM_CAP_IRQCHOP'"):
        _ = kvmpy.KVM_CAP_IRQCHOP  # type: ignore[attr-defined]


def test_importing_it_is_light() -> None:
    """``import kvmpy`` loads neither the extension nor any room: --help and the plugin start with it."""
    code = "import kvmpy, sys; print([m for m in sys.modules if m.startswith('kvmpy.')])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT
    )
    assert result.stdout.strip() == "[]"


def test_the_page_is_up_to_date() -> None:
    """docs/api.md names what the stub declares."""
    command = [sys.executable, str(ROOT / "ci/public_api.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_rooms_do_not_import_the_face() -> None:
    """Inside of the package a name comes from its home, for the public names stand on every room.

    The proofs of the bug catalogue are tests, as selftests are.
    """
    allowed = {"__version__"}
    for path in sorted((ROOT / "kvmpy").rglob("*.py")):
        if path.is_relative_to(ROOT / "kvmpy" / "lab" / "bugs" / "proofs"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "kvmpy":
                names = {alias.name for alias in node.names}
                packages = {part.stem for part in (ROOT / "kvmpy").iterdir()}
                assert names <= allowed | packages, f"{path}:{node.lineno} takes {names} from kvmpy"
