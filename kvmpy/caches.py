# SPDX-License-Identifier: Apache-2.0
"""Where kvmpy keeps what it has built, and whether nobody else can have put something there.

A library that is loaded, bytecode and kernels are code: root who runs with another user's ``$HOME`` or
``$XDG_CACHE_HOME`` must not take them from that user.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def base() -> Path:
    """Return the folder of all caches, below ``$XDG_CACHE_HOME`` or ``$HOME/.cache``; it need not exist."""
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    above = (
        Path(xdg) if Path(xdg).is_absolute() else Path(os.environ.get("HOME") or "/nonexistent") / ".cache"
    )
    return above / "kvmpy"


def stranger(path: Path) -> str:
    """Return why somebody else than root and this user may change what is at *path*; empty if nobody may.

    Looked at are the owner and the mode of *path* and of every folder above it, symbolic links followed and
    not. What does not exist is nobody's.
    """
    for start in dict.fromkeys((Path(os.path.abspath(path)), path.resolve())):
        for place in (start, *start.parents):
            try:
                about = place.lstat()
            except FileNotFoundError:
                continue
            except OSError as error:
                return f"{place}: {error.strerror}"
            why = _open_to(about)
            if why:
                return f"{place} {why}"
    return ""


def _open_to(about: os.stat_result) -> str:
    if about.st_uid not in (0, os.geteuid()):
        return f"belongs to user {about.st_uid}"
    if stat.S_ISLNK(about.st_mode):
        return ""
    # In a sticky folder, such as /tmp, entries are safe from all but their owners.
    if stat.S_ISDIR(about.st_mode) and about.st_mode & stat.S_ISVTX:
        return ""
    if about.st_mode & stat.S_IWOTH:
        return "may be written by everybody"
    # A user's own group, by umask 002; root's is other people's, too.
    if about.st_mode & stat.S_IWGRP and (about.st_gid != os.getegid() or os.geteuid() == 0):
        return f"may be written by group {about.st_gid}"
    return ""


def own(name: str) -> Path | None:
    """Make the cache *name* if need be and return its folder; None where it cannot be made or trusted."""
    folder = base() / name
    if stranger(folder):
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None
