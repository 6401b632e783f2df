# SPDX-License-Identifier: Apache-2.0
"""How ``kvmpy pack build`` learns the guest programs of tests: it runs them up to what they want of the host.

No test gets KVM, a device or a process: its first ioctl ends it, and so does its first command.  All that a
test asks for is taken as met, so that this needs no KVM, and a test of SEV-SNP names its program anywhere.
Programs that stand in the tests' files as constants are taken whether or not a test comes that far.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import kvmpy
from kvmpy.guest import packs, toolchain
from kvmpy.testing import naming
from kvmpy.testing.fixtures import REQUIREMENTS
from kvmpy.testing.requirements import Requirements
from kvmpy.testing.verdicts import Missing

_PROGRAM = re.compile(r"\b(guest_main|_start)\b|#include\s*<kvmpy/")
_ASSEMBLY = re.compile(r"^\s*(\.globa?l\b|guest_main:|_start:)", re.MULTILINE)
_HARMLESS = (
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/shm",  # noqa: S108 - its name
    "/dev/pts",
    "/dev/tty",
)
_HOSTS = ("/dev/", "/sys/", "/proc/")
_PROCESSES = ("os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn", "os.system")
_CHANGES = (
    "os.chmod",
    "os.chown",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
)


class Reached(BaseException):
    """A test wants something of the host: what follows is not needed."""


class _AllMet(Requirements):
    def missing(self, wanted: Sequence[Any]) -> list[Missing]:
        """Say that nothing is missing."""
        del wanted
        return []


def attach(config: pytest.Config, target: Path) -> None:
    """Make this session one that fills the pack *target*; its process is good for nothing else."""
    from kvmpy.core import kvm
    from kvmpy.core.fd import KvmFd
    from kvmpy.guest import program
    from kvmpy.uapi.ioctls import KVM_GET_API_VERSION, Ioctl

    tools = toolchain.find()
    writer = packs.Writer()

    def issue(_: KvmFd, op: Ioctl, __: object) -> tuple[int, int]:
        if op is KVM_GET_API_VERSION:
            return kvm.API_VERSION, 0
        raise Reached(op.name)

    os.environ["KVMPY_DEV_KVM"] = "/nonexistent"
    os.environ.pop(packs.VARIABLE, None)
    KvmFd._issue = issue  # type: ignore[method-assign,assignment]
    program.collected = writer.add
    config.stash[REQUIREMENTS] = _AllMet(())
    config.pluginmanager.register(_DryRun(writer, target, tools), "kvmpy-pack")


class _Host:
    """Refuses what a test wants of the host, but for the compiler, while it is ``closed``."""

    def __init__(self, tools: toolchain.Toolchain) -> None:
        self._tools = (tools.cc, tools.ar)
        self.closed = False

    def ask(self, event: str, args: tuple[Any, ...]) -> None:
        """Be told of an event of the interpreter; Reached for one that leaves it."""
        if not self.closed:
            return
        if event == "subprocess.Popen":
            if args[0] not in self._tools:
                raise Reached(event)
        elif event in _PROCESSES:
            raise Reached(event)
        elif event == "open" or event in _CHANGES:
            path = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes)) else ""
            if not path.startswith(_HOSTS) or path.startswith(_HARMLESS):
                return
            writes = event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or path.startswith("/dev/"):
                raise Reached(path)


class _DryRun:
    """Plugin object of the session."""

    def __init__(self, writer: packs.Writer, target: Path, tools: toolchain.Toolchain) -> None:
        self._writer = writer
        self._target = target
        self._tools = tools
        self._items: list[pytest.Item] = []
        self._whole = True
        self._host = _Host(tools)
        sys.addaudithook(self._host.ask)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A pack lacks nothing that its tests need: one of a file that cannot be read is none."""
        if report.failed:
            self._whole = False
            print(f"\n{report.nodeid}:\n{report.longreprtext}")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Keep the tests, whose files are looked at last; from now on there is a KVM, which does nothing."""
        self._items = list(session.items)
        os.environ["KVMPY_DEV_KVM"] = os.devnull

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        """Keep the host from a test."""
        self._host.closed = True
        try:
            return (yield)
        finally:
            self._host.closed = False

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Add the constants, and write the pack."""
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and self._whole:
            self._write()

    def _write(self) -> None:
        self._add_constants()
        self._writer.write(self._target, _version(self._tools))

    def _add_constants(self) -> None:
        from kvmpy.guest import program
        from kvmpy.guest.errors import GuestBuildError, GuestImageError

        for file, text in dict.fromkeys(self._constants()):
            suffix = ".S" if _ASSEMBLY.search(text) else ".c"
            if program.digest_of(text, suffix) not in self._writer.programs:
                # A part of a program, or one that is not to build.
                with contextlib.suppress(GuestBuildError, GuestImageError):
                    program.build_text(text, suffix, file)

    def _constants(self) -> Iterator[tuple[str, str]]:
        suite = naming.suite_folder()
        roots = [str(path) for path in (Path(kvmpy.__file__).parent, suite) if path is not None]
        roots += [str(item.path.parent) for item in self._items]
        for module in list(sys.modules.values()):
            file = getattr(module, "__file__", None) or ""
            if file.startswith(tuple(f"{root}/" for root in dict.fromkeys(roots))):
                for value in vars(module).copy().values():
                    yield from ((file, text) for text in _texts(value))
        for item in self._items:
            values = getattr(getattr(item, "callspec", None), "params", {})
            yield from ((str(item.path), text) for text in _texts(values))


def _texts(value: object, depth: int = 4) -> Iterator[str]:
    """Yield the guest programs in *value* and in what it holds."""
    if isinstance(value, str):
        if _PROGRAM.search(value) and "\n" in value:
            yield value
    elif depth and isinstance(value, dict):
        for part in value.values():
            yield from _texts(part, depth - 1)
    elif depth and isinstance(value, (list, tuple, set, frozenset)):
        for part in value:
            yield from _texts(part, depth - 1)
    elif depth and dataclasses.is_dataclass(value) and not isinstance(value, type):
        for part in vars(value).values() if hasattr(value, "__dict__") else ():
            yield from _texts(part, depth - 1)


def _version(tools: toolchain.Toolchain) -> str:
    done = subprocess.run([tools.cc, "--version"], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.partition("\n")[0]
