# SPDX-License-Identifier: Apache-2.0
"""A copy of a tree that is brought up to date."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmpy.lab.tree_copy import synchronise


@pytest.fixture(name="tree")
def _tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "arch" / "x86").mkdir(parents=True)
    (tree / ".git").mkdir()
    (tree / "arch" / ".git").write_text("not at the top")
    (tree / "Makefile").write_text("all:")
    (tree / "arch" / "x86" / "a.c").write_text("int a;")
    (tree / "arch" / "link").symlink_to("x86")
    (tree / "script").write_text("#!/bin/sh")
    (tree / "script").chmod(0o755)
    return tree


def listing(folder: Path) -> dict[str, object]:
    """Return what is in a folder: contents, modes and times of files, targets of links."""
    entries: dict[str, object] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.relative_to(folder).parts[0] == ".git":
            continue
        if path.is_symlink():
            entries[name] = os.readlink(path)
        elif path.is_dir():
            entries[name] = None
        else:
            entries[name] = (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns)
    return entries


@pytest.fixture(name="copy")
def _copy(tree: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    synchronise(tree, copy, without=(".git",))
    return copy


def test_a_first_copy(tree: Path, copy: Path) -> None:
    """It is the tree, without the repository at its top."""
    assert listing(copy) == listing(tree)
    assert not (copy / ".git").exists()


def test_what_is_the_same_is_left_alone(tree: Path, copy: Path) -> None:
    changes = {path: path.lstat().st_ctime_ns for path in copy.rglob("*")}
    synchronise(tree, copy, without=(".git",))
    assert {path: path.lstat().st_ctime_ns for path in copy.rglob("*")} == changes


def test_what_differs_is_copied(tree: Path, copy: Path) -> None:
    """Contents, of the same length too, modes, links, files that are folders now, and what is gone."""
    (tree / "arch" / "x86" / "a.c").write_text("int b;")
    (tree / "script").chmod(0o644)
    (tree / "arch" / "link").unlink()
    (tree / "arch" / "link").symlink_to(".")
    (tree / "Makefile").unlink()
    (tree / "Makefile").mkdir()
    (tree / "Makefile" / "new").write_text("")
    (copy / "brought").mkdir()
    (copy / "brought" / "x.c").write_text("1")
    (copy / "patched.c").symlink_to("brought")
    synchronise(tree, copy, without=(".git",))
    assert listing(copy) == listing(tree)


def test_what_was_changed_in_the_copy(tree: Path, copy: Path) -> None:
    """A folder that is a link now, and a file that was patched: it has another time."""
    (copy / "arch" / "x86" / "a.c").write_text("int z;")
    (copy / "arch" / "link").unlink()
    (copy / "arch" / "link").mkdir()
    synchronise(tree, copy, without=(".git",))
    assert listing(copy) == listing(tree)


def test_what_cannot_be_copied(tree: Path, tmp_path: Path) -> None:
    os.mkfifo(tree / "pipe")
    with pytest.raises(OSError, match="named pipe"):
        synchronise(tree, tmp_path / "copy")
