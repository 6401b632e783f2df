# SPDX-License-Identifier: Apache-2.0
"""Packs: compiled guest programs in one file, for hosts that have no compiler.

A pack is a zip file: what it is for in ``pack.json``, and for each program its image and its index, under a
digest of its source.  Paths are not part of that: the same suite has the same programs wherever it lies.
"""

from __future__ import annotations

import functools
import io
import json
import lzma
import os
import posixpath
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kvmpy
from kvmpy import caches
from kvmpy.guest import toolchain

VARIABLE = "KVMPY_PACK"
"""Names the pack that programs come from; this process's children take it, too."""
HOW = "kvmpy pack build, with this kvmpy on a machine with gcc"
_FORMAT = 1
_ABOUT = "pack.json"
_TARGET = "x86_64"
# What zipfile and its decompressors raise for bytes that are not theirs.
_DAMAGED = (
    OSError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    lzma.LZMAError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


class PackError(RuntimeError):
    """A file that is no pack, is damaged, or belongs to another kvmpy."""


@dataclass(frozen=True)
class Places:
    """Where a program's source lies: *file* and *line* of inline source, and further *files*."""

    file: str
    line: int
    files: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The folder that its headers are relative to."""
        return posixpath.dirname(self.file or self.files[0])

    def moved(self, new: Places, file: str, line: int) -> tuple[str, int]:
        """Return where a line of the program that was built from these places is, with *new* ones."""
        if file and file == self.file:
            return new.file, line - self.line + new.line
        if file in self.files:
            return new.files[self.files.index(file)], line
        if posixpath.isabs(file) and posixpath.isabs(self.folder) and posixpath.isabs(new.folder):
            return posixpath.normpath(posixpath.join(new.folder, posixpath.relpath(file, self.folder))), line
        return file, line


def default() -> Path:
    """Return where the pack of this kvmpy is looked for, and put, where nobody names another one."""
    return caches.base() / "packs" / f"{kvmpy.__version__}-{toolchain.runtime_hash()[:12]}.pack"


def chosen() -> Pack | None:
    """Return the pack that ``$KVMPY_PACK`` names, else the default one if there is one; PackError."""
    named = os.environ.get(VARIABLE, "")
    return _opened(named, os.environ.get("XDG_CACHE_HOME", ""), os.environ.get("HOME", ""))


def verify_chosen() -> None:
    """Read all of the pack that programs come from, if there is one; PackError where it cannot be used."""
    pack = chosen()
    if pack is not None:
        pack.verify()


@functools.lru_cache(maxsize=8)
def _opened(named: str, xdg: str, home: str) -> Pack | None:
    del xdg, home  # what the default depends on
    if named:
        return Pack(Path(named))
    path = default()
    return Pack(path) if path.is_file() and not caches.stranger(path) else None


class Pack:
    """An open pack; PackError says in one line why *path* is none that this kvmpy can use."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        try:
            # Its content, not the open file: a test is looked at for what it leaves open.
            self._zip = zipfile.ZipFile(io.BytesIO(self.path.read_bytes()))
            self.about: dict[str, Any] = json.loads(self._zip.read(_ABOUT))
            self._check()
        except PackError:
            raise
        except OSError as error:
            raise PackError(f"pack {path}: {error.strerror or error}") from None
        except _DAMAGED as error:
            raise PackError(f"{path} is no pack of guest programs, or a damaged one: {error}") from None
        self._names = frozenset(self._zip.namelist())

    def _check(self) -> None:
        if self.about["format"] != _FORMAT:
            raise PackError(f"pack {self.path} has format {self.about['format']}, not {_FORMAT}: {HOW}")
        version, runtime = self.about["kvmpy"], self.about["runtime"]
        if version != kvmpy.__version__:
            raise PackError(f"pack {self.path} is of kvmpy {version}, this is {kvmpy.__version__}: {HOW}")
        if runtime != toolchain.runtime_hash():
            raise PackError(
                f"pack {self.path} was built with another guest_asm than that of this kvmpy: {HOW}"
            )

    def verify(self) -> None:
        """Read all of it; PackError where anything is damaged."""
        try:
            damaged = self._zip.testzip()
        except _DAMAGED as error:
            damaged = str(error)
        if damaged is not None:
            raise PackError(f"pack {self.path} is damaged ({damaged}): copy it again, or {HOW}")

    def find(self, key: str) -> tuple[bytes, bytes] | None:
        """Return index and image of the program with the digest *key*, None where it has none; PackError."""
        if f"{key}.json" not in self._names:
            return None
        try:
            return self._zip.read(f"{key}.json"), self._zip.read(f"{key}.elf")
        except _DAMAGED as error:
            raise PackError(f"pack {self.path} is damaged ({error}): copy it again, or {HOW}") from None

    def names(self) -> list[str]:
        """Return the names of its programs."""
        return sorted(
            json.loads(self._zip.read(name))["name"]
            for name in self._names
            if name.endswith(".json") and name != _ABOUT
        )


class Writer:
    """Collects programs; :meth:`write` makes the pack of them."""

    def __init__(self) -> None:
        self.programs: dict[str, tuple[bytes, bytes]] = {}

    def add(self, key: str, index: Mapping[str, Any], elf: bytes) -> None:
        """Add a program; the first one with a digest stays."""
        self.programs.setdefault(key, (json.dumps(index).encode(), elf))

    def write(self, path: Path, compiler: str) -> None:
        """Write the pack, which appears whole or not at all."""
        about = {
            "format": _FORMAT,
            "target": _TARGET,
            "kvmpy": kvmpy.__version__,
            "runtime": toolchain.runtime_hash(),
            "compiler": compiler,
            "programs": len(self.programs),
        }
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with zipfile.ZipFile(part, "w", zipfile.ZIP_LZMA) as archive:
                archive.writestr(_ABOUT, json.dumps(about))
                for key, (index, elf) in sorted(self.programs.items()):
                    archive.writestr(f"{key}.json", index)
                    archive.writestr(f"{key}.elf", elf)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
