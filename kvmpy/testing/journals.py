# SPDX-License-Identifier: Apache-2.0
"""The journals of runs: where they are kept, who writes one, and which can be gone on from."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from kvmpy import caches
from kvmpy.testing import journal

# Journals of earlier runs that stay in the cache.
KEPT = 10
_SUFFIX = ".jsonl"


class JournalError(Exception):
    """A journal that cannot be begun, gone on from or read."""


def folder(kind: str = "journals") -> Path | None:
    """Return the folder of the journals in the cache; None where somebody else may write there.

    *kind* is another one for runs that are gone on from in another way.
    """
    return caches.own(kind)


def fresh(kind: str = "journals") -> Path | None:
    """Return the path of a new journal in the cache, and remove the oldest there; None without a cache."""
    place = folder(kind)
    if place is None:
        return None
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    for old in _kept(place)[KEPT - 1 :]:
        if not in_use(old):
            remove(old)
    return place / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}{_SUFFIX}"


def _kept(place: Path) -> list[Path]:
    """Return the journals of the cache, the newest first."""
    return sorted(place.glob(f"*{_SUFFIX}"), reverse=True)


def remove(path: Path) -> None:
    """Remove a journal, and what its run's processes wrote beside it."""
    for each in (path, *beside(path)):
        each.unlink(missing_ok=True)


def beside(path: Path) -> list[Path]:
    """Return the files that the processes of the journal's run write beside it."""
    return sorted(path.parent.glob(f"{path.name}.*"))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Keep others from a journal that a run writes; JournalError where one does already."""
    with path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError(f"{path}: its run has not ended yet") from None
        yield


def in_use(path: Path) -> bool:
    """Tell whether a run writes this journal."""
    try:
        with writing(path):
            return False
    except JournalError:
        return True
    except OSError:
        return False


def readable(path: Path) -> journal.History:
    """Return what a journal holds; JournalError where there is none."""
    try:
        with path.open("rb"):
            history = journal.read(path)
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}") from error
    if not history.sessions:
        raise JournalError(f"{path} holds nothing of a run")
    return history


def last(*, unfinished: bool = False, kind: str = "journals") -> Path:
    """Return the newest journal of the cache, with *unfinished* of a run that did not come to its end.

    JournalError when there is none.
    """
    place = folder(kind)
    for path in _kept(place) if place is not None else ():
        history = journal.History() if in_use(path) else journal.read(path)
        if history.sessions and not (unfinished and history.complete):
            return path
    what = "a run that did not come to its end" if unfinished else "a run"
    raise JournalError(f"no journal of {what} in {place or 'the cache, in which others may write'}")
