# SPDX-License-Identifier: Apache-2.0
"""A copy of a kernel tree that is brought up to date: only what differs is copied."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Collection
from pathlib import Path


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _same(source: os.DirEntry[str], copy: os.DirEntry[str]) -> bool:
    """Whether a file or a link need not be copied again."""
    old, new = copy.stat(follow_symlinks=False), source.stat(follow_symlinks=False)
    if stat.S_ISLNK(new.st_mode) and stat.S_ISLNK(old.st_mode):
        return os.readlink(source.path) == os.readlink(copy.path)
    return (old.st_mode, old.st_size, old.st_mtime_ns) == (new.st_mode, new.st_size, new.st_mtime_ns)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def synchronise(tree: Path, copy: Path, without: Collection[str] = ()) -> None:
    """Make *copy* what *tree* is, times included, without the entries *without* at its top.

    A file of the same mode, size and time is taken for the same; what *tree* does not have goes.
    """
    copy.mkdir(parents=True, exist_ok=True)
    old = {entry.name: entry for entry in _entries(copy)}
    for entry in _entries(tree):
        if entry.name in without:
            continue
        there = old.pop(entry.name, None)
        if there and _is_folder(entry) != _is_folder(there):
            _remove(there.path)
            there = None
        if _is_folder(entry):
            synchronise(Path(entry.path), copy / entry.name)
        elif there is None or not _same(entry, there):
            if there:
                os.unlink(there.path)
            shutil.copy2(entry.path, copy / entry.name, follow_symlinks=False)
    for entry in old.values():
        _remove(entry.path)
