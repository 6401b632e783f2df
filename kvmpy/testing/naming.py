# SPDX-License-Identifier: Apache-2.0
"""Where the suite is, what a command line names, and the ids of tests: the same however a test is named."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import kvmpy
from kvmpy.testing.verdicts import SUITE_FOLDER


class NamingError(ValueError):
    """A name of no test."""


def suite_folder() -> Path | None:
    """Return the folder of the selftests: inside the installed package, or the checkout's; None without."""
    package = Path(kvmpy.__file__).parent
    for folder in (package / SUITE_FOLDER, package.parent / SUITE_FOLDER):
        if folder.is_dir():
            return folder
    return None


@dataclass(frozen=True)
class Targets:
    """What to run: pytest's arguments, the root below which files become modules, remarks on the names."""

    arguments: list[str]
    root: Path
    remarks: list[str]


def targets(names: Sequence[str], suite: Path, here: Path) -> Targets:
    """Return what *names* stand for: files, folders and tests of the suite, or of one's own in *here*.

    Of two that have the same name, an own one is meant that has tests; ``./`` before a name says that it is
    an own one, ``selftests/`` that it is the suite's. NamingError for what is neither.
    """
    if not names:
        return Targets([str(suite)], suite.parent, [])
    # Folders below the root become modules: with the suite as root, its io would replace the module io.
    root = suite.parent
    arguments, remarks = [], []
    for text in names:
        name, separator, test = text.partition("::")
        path, remark = _file(name, suite, here)
        remarks += [remark] if remark else []
        arguments.append(f"{path}{separator}{test}")
        if not path.is_relative_to(suite):
            root = here.parent if _shadows(path, here) else here
    return Targets(arguments, root, remarks)


def _shadows(path: Path, here: Path) -> bool:
    """Whether a folder of *here*, on the way to *path* or below it, has the name of a module of Python."""
    if not path.is_relative_to(here):
        return False
    first = path.relative_to(here).parts[:1]
    names = first or [entry.name for entry in here.iterdir() if entry.is_dir()]
    return not sys.stdlib_module_names.isdisjoint(names)


def _file(name: str, suite: Path, here: Path) -> tuple[Path, str]:
    own = Path(os.path.normpath(here / name))
    explicit = Path(name).is_absolute() or name.startswith(".")
    theirs = Path(os.path.normpath(suite / name))
    if not theirs.exists() and Path(name).parts[:1] == (SUITE_FOLDER,):
        theirs = Path(os.path.normpath(suite.parent / name))
    if explicit or not theirs.exists():
        if own.exists():
            return own, ""
        raise NamingError(f"{name} is neither in the suite ({suite}) nor a file here")
    if not own.exists() or own.samefile(theirs) or not any(_tests(own)):
        return theirs, ""
    return own, f"{name} is in the suite, too: these are your own, {SUITE_FOLDER}/{name} are the suite's"


def _tests(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    for pattern in ("test_*.py", "*_test.py"):
        yield from path.rglob(pattern)


def identifier(path: Path, here: Path) -> str:
    """Return the id of a test file: below ``selftests/`` for the suite's, below *here* for one's own.

    One that is elsewhere keeps its whole path.
    """
    suite = suite_folder()
    if suite is not None and path.is_relative_to(suite):
        return f"{SUITE_FOLDER}/{path.relative_to(suite).as_posix()}"
    return (path.relative_to(here) if path.is_relative_to(here) else path).as_posix()
