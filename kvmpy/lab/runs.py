# SPDX-License-Identifier: Apache-2.0
"""One run of tests in the lab, from the host's side: what is asked of pytest here and of pytest inside."""

from __future__ import annotations

import base64
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

import kvmpy
from kvmpy import version
from kvmpy.guest import cache as programs
from kvmpy.guest import packs
from kvmpy.lab import bugs, bytecode, events, places, readback, records, root, snapshots, softsev, tools
from kvmpy.lab.bisect import Ended
from kvmpy.lab.coverage.store import Writer
from kvmpy.lab.errors import LabError
from kvmpy.lab.kernels import Say
from kvmpy.lab.lane import Limits
from kvmpy.lab.listing import Listing
from kvmpy.lab.qemu import Job, Options, Start, command_line, nested_works, prepare
from kvmpy.lab.session import FAILED, WITHOUT_TRACE, LabSession, Setup
from kvmpy.owned import dies_with_parent
from kvmpy.platforms import LARGE_GMEM, LARGE_GMEM_PLATFORM, bugs_platform
from kvmpy.signals import Interrupter, handled
from kvmpy.testing.configurations import is_value
from kvmpy.testing.host import CONFIGURATION_VARIABLE, PLATFORM_VARIABLE
from kvmpy.testing.option_table import SEED_BITS, pytest_arguments

# Emulated, every import counts: what the suite needs, and what of pytest's own it does not.
_PLUGINS = ("kvmpy.testing.plugin", "pytest_timeout")
_NOT = ("junitxml", "doctest", "legacypath", "pastebin", "xdist")
_KEPT_SECONDS = 7 * 86400.0
_NO_PLUGINS = "PYTEST_DISABLE_PLUGIN_AUTOLOAD"
_PASSED_ON = ("KVMPY_REQUIRE", "PYTHONPATH", "VIRTUAL_ENV", "HYPOTHESIS_PROFILE")
MAX_MACHINES = 8


@dataclass(frozen=True)
class Request:
    """What to run: *inside* are the arguments of pytest there, *reports* those for report files here.

    *machines* is how many kernels may run at once; *records* is where records of tests go
    that *inside* asks for; *coverage* takes what KVM executes, for each test file or, with *by_test*, for
    each test.
    """

    options: Options
    inside: Sequence[str]
    reports: Sequence[str] = ()
    extra: Sequence[str] = ()
    seed: int | None = None
    limits: Limits = field(default_factory=Limits)
    machines: int = 1
    records: Path | None = None
    coverage: Writer | None = None
    by_test: bool = False


def accelerator(wanted: str) -> str:
    """Return ``kvm`` or ``tcg``; ``auto`` becomes kvm only where guests can have KVM, too."""
    if wanted != "auto":
        return wanted
    return "kvm" if nested_works() and os.access("/dev/kvm", os.R_OK | os.W_OK) else "tcg"


def machines(memory: int, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return how many machines with *memory* MiB this host bears: one for each CPU, while memory lasts."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    available = int(match[1]) >> 10 if match is not None else 0
    # Half of it is touched at most, by experience.
    fitting = 2 * available // (3 * memory) if available else 1
    return max(1, min(len(os.sched_getaffinity(0)), fitting, MAX_MACHINES))


def _folder() -> Path:
    root = places.cache() / "runs"
    root.mkdir(parents=True, exist_ok=True)
    places.need_space(root, 64, "a lab run")
    for old in root.iterdir():
        if time.time() - old.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix="run-", dir=root))


def platform(options: Options) -> str:
    """Return the platform that every verdict of a run is marked with."""
    words = ["lab"]
    if softsev.PARAMETER in options.parameters:
        words.append(softsev.PLATFORM)
    pairs = dict(word.partition("=")[::2] for word in options.parameters)
    if is_value(LARGE_GMEM, "Y", pairs.get(LARGE_GMEM, "N") or "Y"):
        words.append(LARGE_GMEM_PLATFORM)
    if options.kernel.bugs:
        words.append(bugs_platform(options.bugs))
    return ", ".join(words)


def _common(options: Options) -> dict[str, str]:
    # Emulated, the import of a plugin that no selftest needs takes as long as the kernel's boot.
    return {
        PLATFORM_VARIABLE: platform(options),
        version.VARIABLE: version.exact(),
        CONFIGURATION_VARIABLE: options.configuration,
        _NO_PLUGINS: "1",
    }


def job_of(
    options: Options,
    command: Sequence[str],
    folder: Path,
    words: Sequence[str],
    *,
    interactive: bool = False,
    coverage: str = "",
) -> Job:
    """Return what a machine runs; *words* are those of the user that may name files."""
    package = Path(kvmpy.__file__).resolve().parent
    bytecode.folder().mkdir(parents=True, exist_ok=True)
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment |= _common(options) | bytecode.environment(writing=False)
    if interactive:
        # Who runs pytest there does so without naming the plugins.
        del environment[_NO_PLUGINS]
    pack = packs.chosen()
    if pack is not None:
        environment[packs.VARIABLE] = f"{places.INSIDE}/{places.PACK}"
    environment |= {
        readback.VARIABLE: readback.asked([*options.parameters, *options.optional], options.cpu),
        places.COVERAGE_VARIABLE: coverage,
        bugs.VARIABLE: options.bugs,
        "XDG_CACHE_HOME": "/tmp/cache",  # noqa: S108 - a tmpfs inside
        "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",  # noqa: S108
        "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    }
    needed = [Path(sys.prefix), Path(sys.base_prefix), package.parent, places.files(), bytecode.folder()]
    needed += [programs.folder(), Path(sys.executable), *(Path(entry) for entry in sys.path if entry)]
    return Job(
        command,
        environment,
        Path.cwd(),
        root.build(folder / "root", needed, _named(words)),
        programs.folder(),
        interactive,
        None if pack is None else pack.path,
    )


def _named(words: Sequence[str]) -> list[Path]:
    """Return the current folder and the files and folders that *words* name."""
    named = [Path(word.partition("::")[0]).absolute() for word in words if word]
    return [Path.cwd(), *(path for path in named if path.exists())]


def listing_command(arguments: Sequence[str]) -> list[str]:
    """Return the command of a pytest as it runs inside, by which the host collects."""
    # They are imported before there is a pytest, in a session that is a snapshot.
    known = "-Wignore:Module already imported:pytest.PytestAssertRewriteWarning"
    plugins = [*(f"-p{name}" for name in _PLUGINS), *(f"-pno:{name}" for name in _NOT), known]
    return [sys.executable, "-m", "pytest", *plugins, *arguments]


def session_command(command: Sequence[str], record_to: str | None = None) -> list[str]:
    """Return the command of the session inside, which talks to the host."""
    sent = {"journal": "/dev/kvmpy.journal", "record_to": record_to}
    return [*command, "-p", "kvmpy.lab.inside", *pytest_arguments(sent)]


def run(request: Request, say: Say, judge: Callable[[Ended], int] = lambda ended: ended.status) -> int:
    """Run the tests inside and return pytest's exit status, or what *judge* makes of the session.

    The reports are those of a run on the host.
    """
    tools.need(tools.RUN, "the lab")
    os.environ[PLATFORM_VARIABLE] = platform(request.options)
    chosen = secrets.randbits(SEED_BITS) if request.seed is None else request.seed
    suite = Path(kvmpy.__file__).resolve().parent / "testing" / "suite.ini"
    common = [*pytest_arguments({"seed": chosen}), *request.extra]
    command = listing_command([*request.inside, *common])
    inside = session_command(command, records.FOLDER if request.records else None)
    here = ["-c", str(suite), "--rootdir", str(Path.cwd()), "--noconftest", "--assert=plain"]
    folder = _folder()
    listing = partial(Listing, command, _common(request.options), folder)
    counts = ("test" if request.by_test else "file") if request.coverage else ""
    setup = Setup(
        request.options,
        request.machines,
        job_of(request.options, inside, folder, request.inside, coverage=counts),
        listing,
        folder,
        request.limits,
        request.records,
        request.coverage,
    )
    session = LabSession(setup, say)
    code = 3
    try:
        # What ends this process ends the session in order, with its reports and without a QEMU.
        with handled(Interrupter(), signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            code = int(pytest.main([*here, *request.reports, "-pno:xdist", *common], plugins=[session]))
    finally:
        session.close()
        if code in WITHOUT_TRACE:
            shutil.rmtree(folder, ignore_errors=True)
        elif not session.told:
            say(f"consoles and output: {folder}")
    if request.coverage is not None and request.coverage.failure:
        say(f"the coverage is not complete: {request.coverage.failure}")
        code = code or FAILED
    return judge(session.ended(code))


def shell(options: Options, command: Sequence[str], coverage: Path | None = None) -> int:
    """Boot with the console on this terminal, run *command* there, and return QEMU's exit status.

    What `kvmpy coverage count` counts there is added to *coverage*.
    """
    tools.need(tools.RUN, "the lab")
    folder = _folder()
    try:
        job = job_of(options, command, folder, command, interactive=True)
        prepare(folder, job)
        start = Start(folder / snapshots.INITRAMFS)
        snapshots.write_initramfs(start.initramfs, job.root, session=False)
        child = subprocess.Popen(
            command_line(options, folder, job.root, start, interactive=True),
            preexec_fn=dies_with_parent(),  # noqa: PLW1509 - no other thread is there
        )
        try:
            return child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    finally:
        try:
            if coverage is not None:
                _keep_counted(folder / "journal", coverage, options)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _keep_counted(journal: Path, coverage: Path, options: Options) -> None:
    writer: Writer | None = None
    try:
        for line in journal.read_bytes().splitlines():
            event = events.parse(line)
            if isinstance(event, events.Objects):
                writer = Writer(coverage, event.suite, options.parameters)
                writer.objects(event.names)
            elif isinstance(event, events.Counted) and writer is not None:
                writer.add(event.test, event.seconds, base64.b64decode(event.data, validate=True))
    except ValueError as error:  # a machine may say anything
        raise LabError(f"what was counted is not to be understood: {error}") from error
    if writer is not None and writer.failure:
        raise LabError(f"the coverage is not complete: {writer.failure}")
