# SPDX-License-Identifier: Apache-2.0
"""The stubs in the tree are what the generator writes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kvmpy.gen
from kvmpy.uapi import constants, gen, structs


def test_generated_files_are_up_to_date() -> None:
    assert kvmpy.gen.main(["--check"]) == 0


def test_check_says_when_a_file_is_outdated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generated = tmp_path / "a.h"
    monkeypatch.setattr(kvmpy.gen, "files", lambda: {generated: "text\n"})
    assert kvmpy.gen.main(["--check"]) == 1
    assert "outdated; run python -m kvmpy.gen" in capsys.readouterr().err
    assert kvmpy.gen.main([]) == 0
    assert kvmpy.gen.main(["--check"]) == 0
    generated.write_text("text")
    assert kvmpy.gen.main(["--check"]) == 1


def test_unknown_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert kvmpy.gen.main(["--wrong"]) == 2
    assert "usage" in capsys.readouterr().err


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
