# SPDX-License-Identifier: Apache-2.0
"""Built things by content: each entry is a folder that appears whole, by one rename, or not at all."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kvmpy import caches

MAX_ENTRIES = 2000
_TEMPORARY = "tmp-"
_ABANDONED_AFTER = 3600.0


def folder() -> Path:
    """Return the folder of all entries: the cache ``guest``, or a temporary one where others may write."""
    return _folder(os.environ.get("XDG_CACHE_HOME", ""), os.environ.get("HOME", ""))


@functools.lru_cache(maxsize=8)
def _folder(xdg: str, home: str) -> Path:
    del xdg, home  # what the answer depends on
    wanted = caches.own("guest")
    with contextlib.suppress(OSError):
        if wanted is not None:
            with tempfile.TemporaryFile(dir=wanted):
                return wanted
    private = Path(tempfile.mkdtemp(prefix="kvmpy-guest-"))
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    return private


def entry(key: str) -> Path:
    """Return the folder of the entry *key*, which need not exist."""
    return folder() / key


def create(key: str, build: Callable[[Path], None]) -> Path:
    """Let *build* fill a new folder and make it the entry *key*, unless another process was faster."""
    target = entry(key)
    workdir = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=folder()))
    try:
        build(workdir)
        try:
            workdir.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(workdir, ignore_errors=True)
    _prune()
    return target


def drop(key: str) -> None:
    """Remove the entry *key*, because it is damaged, or a link to one that is."""
    target = entry(key)
    if not os.path.lexists(target):
        return
    # Out of the way at once, so that whoever looks meanwhile sees all of it or nothing.
    aside = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=folder()))
    with contextlib.suppress(OSError):
        target.rename(aside / target.name)
    shutil.rmtree(aside, ignore_errors=True)


def _age(item: os.DirEntry[str]) -> float:
    try:
        return item.stat().st_mtime
    except OSError:
        return 0.0


def _prune() -> None:
    entries = []
    with contextlib.suppress(OSError), os.scandir(folder()) as items:
        for item in items:
            if not item.name.startswith(_TEMPORARY):
                entries.append(item)
            elif time.time() - _age(item) > _ABANDONED_AFTER:
                shutil.rmtree(item.path, ignore_errors=True)
    if len(entries) > MAX_ENTRIES:
        entries.sort(key=_age)
        for item in entries[: len(entries) // 2]:
            drop(item.name)
