# SPDX-License-Identifier: Apache-2.0
"""What kind of program a file is: whether LD_PRELOAD reaches it, and if not, why; and how it is ended."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_ELF_X86_64 = 62
_PT_INTERP = 3
_PHDR = struct.Struct("<IIQQQQQQ")
_MAX_SCRIPTS = 4
_GRACE_S = 5.0


class ProgramError(Exception):
    """The program cannot be started; the text says why."""


@dataclass(frozen=True)
class Program:
    """``path`` as found; ``static`` and ``privileged`` name why the recorder is not loaded into it."""

    path: Path
    static: bool = False
    privileged: str = ""
    foreign: str = ""


def find(name: str, path: str | None = None) -> Path:
    """Return the file that executing *name* runs; ProgramError with the reason where that fails."""
    if "/" not in name:
        program = shutil.which(name, path=path)
        if program is None:
            raise ProgramError(f"{name}: no such program in PATH")
        return Path(program)
    file = Path(name)
    if not file.exists():
        raise ProgramError(f"{name}: no such file")
    if file.is_dir():
        raise ProgramError(f"{name}: is a directory")
    if not os.access(file, os.X_OK):
        raise ProgramError(f"{name}: no permission to execute it")
    return file


def examine(name: str, path: str | None = None) -> Program:
    """Return what *name* is, following scripts to their interpreter; ProgramError when it cannot be run."""
    file = find(name, path)
    for _ in range(_MAX_SCRIPTS):
        interpreter = _interpreter(file)
        if interpreter is None:
            break
        file = find(interpreter, path)
    return _elf(file)


def _interpreter(file: Path) -> str | None:
    try:
        with file.open("rb") as stream:
            first = stream.readline(512)
    except OSError:
        return None
    if not first.startswith(b"#!"):
        return None
    words = first[2:].decode("utf-8", "replace").split()
    if words and Path(words[0]).name == "env":
        words = [word for word in words[1:] if not word.startswith("-") and "=" not in word]
    return words[0] if words else None


def _elf(file: Path) -> Program:
    privileged = _privileges(file)
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
            if head[:4] != b"\x7fELF" or len(head) < 64:
                return Program(file, privileged=privileged)
            if head[4] != 2 or int.from_bytes(head[18:20], "little") != _ELF_X86_64:
                return Program(file, privileged=privileged, foreign="no 64-bit x86 program")
            offset, size, number = struct.unpack_from("<Q", head, 32)[0], head[54], head[56]
            stream.seek(offset)
            table = stream.read(size * number)
    except OSError:
        # Executable and not readable: its kind is unknown, and it is dynamic most likely.
        return Program(file, privileged=privileged)
    kinds = [
        _PHDR.unpack_from(table, start)[0] for start in range(0, len(table) - _PHDR.size + 1, size or 56)
    ]
    return Program(file, static=_PT_INTERP not in kinds, privileged=privileged)


def _privileges(file: Path) -> str:
    try:
        info = file.stat()
    except OSError:
        return ""
    if info.st_mode & stat.S_ISUID and info.st_uid != os.geteuid():
        return f"setuid to user {info.st_uid}"
    if info.st_mode & stat.S_ISGID and info.st_mode & stat.S_IXGRP and info.st_gid != os.getegid():
        return f"setgid to group {info.st_gid}"
    try:
        os.getxattr(file, "security.capability")
    except OSError:
        return ""
    return "given capabilities (getcap shows them)" if os.geteuid() else ""


@contextmanager
def passed_on(send: Callable[[int], object]) -> Iterator[list[int]]:
    """Pass SIGTERM and SIGHUP on to the traced program with *send*; the list holds those that came.

    A program that is still there 5 s after the first, or at the second, gets SIGKILL.
    """
    came: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        del frame
        if number != signal.SIGALRM:
            came.append(number)
        first = len(came) == 1 and number != signal.SIGALRM
        with suppress(ProcessLookupError):
            send(number if first else signal.SIGKILL)
        if first:
            signal.setitimer(signal.ITIMER_REAL, _GRACE_S)

    # What a shell or nohup had us ignore stays ignored.
    passed = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN]
    earlier = {number: signal.signal(number, handler) for number in (*passed, signal.SIGALRM)}
    try:
        yield came
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, old in earlier.items():
            signal.signal(number, old)
