# SPDX-License-Identifier: Apache-2.0
"""What is kept of a build for coverage: gcov's notes and KVM's sources, in one archive beside the kernel."""

from __future__ import annotations

import os
import re
import zipfile
from functools import cache, cached_property
from pathlib import Path, PurePosixPath

from kvmpy.lab import hooks
from kvmpy.lab.errors import LabError

ARCHIVE = "coverage.zip"
# Of the kernel's tree: what is compiled with counters.
FOLDERS = ("arch/x86/kvm", "virt/kvm")
# make evaluates it in each folder; virt/kvm is compiled from KVM's Makefile in arch/x86/kvm.
MAKE_VARIABLE = "GCOV_PROFILE=$(if $(filter arch/x86/kvm arch/x86/kvm/%,$(obj)),y)"
# The lines and files that the software AMD-SP and the bug catalogue add to KVM's (kvmpy/lab/hooks.py).
_HOOK = re.compile(rf"^/\* (?:{'|'.join(hooks.OWNERS)}): (end of )?\S+(?: [0-9a-f]{{8}})? \*/$")
_HOOK_FILES = re.compile(r"(?:^|/)(?:softsev[^/]*|kvm_bugs\.[ch])$")
_NOTES = ".gcno"
_SOURCE = "source/"
_TEXTS = (".c", ".h")


def own_lines(text: str) -> list[int]:
    """Return the numbers, from 1, of the lines of a source that no hook has added."""
    numbers = []
    inside = False
    for number, line in enumerate(text.split("\n"), 1):
        match = _HOOK.match(line)
        if match is not None:
            inside = match[1] is None
        elif not inside:
            numbers.append(number)
    return numbers


def pack(tree: Path, build: Path, target: Path) -> None:
    """Write the archive *target* for a kernel of the source *tree* that was compiled in *build*.

    LabError when the build left no notes of gcov's.
    """
    notes = 0
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for folder in FOLDERS:
            for path in sorted((build / folder).rglob(f"*{_NOTES}")):
                archive.write(path, f"notes/{path.relative_to(build).as_posix()}")
                notes += 1
            for path in sorted((tree / folder).rglob("*")):
                if path.suffix in _TEXTS and path.is_file():
                    archive.write(path, f"{_SOURCE}{path.relative_to(tree).as_posix()}")
        archive.writestr("folders", f"{build.resolve()}\n{tree.resolve()}\n")
    if not notes:
        raise LabError(f"the build in {build} left no notes of gcov's: the compiler does not count")


class Kept:
    """The archive of a kernel."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
            lines = self._archive.read("folders").decode("utf-8").splitlines()
            self.build, self.tree = (PurePosixPath(line) for line in lines)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise LabError(f"{path} is no archive of a coverage build: {error}") from error

    @cached_property
    def objects(self) -> tuple[str, ...]:
        """The compiled objects, such as ``arch/x86/kvm/mmu/mmu``, in order."""
        names = (name for name in self._archive.namelist() if name.startswith("notes/"))
        return tuple(sorted(name[len("notes/") : -len(_NOTES)] for name in names))

    def notes(self, name: str) -> bytes:
        """Return gcov's notes of an object."""
        return self._archive.read(f"notes/{name}{_NOTES}")

    @cached_property
    def sources(self) -> frozenset[str]:
        """The paths of KVM's own sources in the kernel's tree."""
        names = (name[len(_SOURCE) :] for name in self._archive.namelist() if name.startswith(_SOURCE))
        return frozenset(name for name in names if not _HOOK_FILES.search(name))

    @cache  # noqa: B019 - as long as the archive
    def source(self, path: str) -> str:
        """Return a source as it is in the tree, without what was added; KeyError where there is none."""
        lines = self._text(path).split("\n")
        own = "\n".join(lines[number - 1] for number in own_lines("\n".join(lines)))
        return hooks.without(own)

    def _text(self, path: str) -> str:
        return self._archive.read(f"{_SOURCE}{path}").decode("utf-8", "replace")

    def place(self, name: str, line: int) -> tuple[str, int] | None:
        """Return path and line in the tree of what the notes name; None for what is not KVM's own."""
        path = self.within(name)
        if path is None:
            return None
        number = self._numbers(path).get(line)
        return None if number is None else (path, number)

    @cache  # noqa: B019
    def _numbers(self, path: str) -> dict[int, int]:
        return {compiled: own for own, compiled in enumerate(own_lines(self._text(path)), 1)}

    @cache  # noqa: B019
    def within(self, name: str) -> str | None:
        """Return the path in the tree of a source that the notes name, None for one that is not KVM's own."""
        path = os.path.normpath(name if name.startswith("/") else self.build / name)
        for root in (self.tree, self.build):
            if path.startswith(f"{root}/") and (found := path[len(str(root)) + 1 :]) in self.sources:
                return found
        return None

    def unpack(self, folder: Path) -> None:
        """Write the sources, as they are in the tree, into *folder*."""
        for path in self.sources:
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(self.source(path), encoding="utf-8")
