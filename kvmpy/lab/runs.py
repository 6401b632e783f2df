# SPDX-License-Identifier: Apache-2.0
"""One run of tests in the lab, from the host's side: what is asked of pytest here and of pytest inside."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import kvmpy
from kvmpy.guest import cache as programs
from kvmpy.lab import places, tools
from kvmpy.lab.kernels import Say
from kvmpy.lab.process import dies_with_parent
from kvmpy.lab.qemu import Job, Options, command_line, nested_works, prepare
from kvmpy.lab.session import LabSession, Limits
from kvmpy.testing.host import PLATFORM_VARIABLE

_KEPT_SECONDS = 7 * 86400.0
_PASSED_ON = ("KVMPY_REQUIRE", "PYTHONPATH", "VIRTUAL_ENV", "HYPOTHESIS_PROFILE")


@dataclass(frozen=True)
class Request:
    """What to run: *inside* are the arguments of pytest there, *reports* those for report files here."""

    options: Options
    inside: Sequence[str]
    reports: Sequence[str] = ()
    extra: Sequence[str] = ()
    seed: int | None = None
    limits: Limits = field(default_factory=Limits)


def accelerator(wanted: str) -> str:
    """Return ``kvm`` or ``tcg``; ``auto`` becomes kvm only where guests can have KVM, too."""
    if wanted != "auto":
        return wanted
    return "kvm" if nested_works() and os.access("/dev/kvm", os.R_OK | os.W_OK) else "tcg"


def _folder() -> Path:
    root = places.cache() / "runs"
    root.mkdir(parents=True, exist_ok=True)
    places.need_space(root, 64, "a lab run")
    for old in root.iterdir():
        if time.time() - old.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix="run-", dir=root))


def _job(command: Sequence[str], *, interactive: bool = False) -> Job:
    package = Path(kvmpy.__file__).resolve().parent
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment |= {
        PLATFORM_VARIABLE: "lab",
        "PYTHONDONTWRITEBYTECODE": "1",
        "XDG_CACHE_HOME": "/tmp/cache",  # noqa: S108 - a tmpfs inside
        "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    }
    needed = [Path(sys.prefix), Path(sys.base_prefix), package.parent, Path.cwd(), places.files()]
    compiled = programs.folder()
    return Job(
        command,
        environment,
        Path.cwd(),
        [*dict.fromkeys(needed)],
        compiled if compiled.is_dir() else None,
        interactive,
    )


def run(request: Request, say: Say) -> int:
    """Run the tests inside and return pytest's exit status; the reports are those of a run on the host."""
    tools.need(tools.RUN, "the lab")
    os.environ[PLATFORM_VARIABLE] = "lab"
    seed = ["--kvmpy-seed", str(secrets.randbits(32) if request.seed is None else request.seed)]
    suite = Path(kvmpy.__file__).resolve().parent / "testing" / "suite.ini"
    common = ["-p", "no:xdist", *seed, *request.extra]
    inside = [sys.executable, "-m", "pytest", *request.inside, *common, "-p", "kvmpy.lab.inside"]
    inside += ["--kvmpy-journal", "/dev/kvmpy.journal"]
    here = [
        "-c",
        str(suite),
        "--rootdir",
        str(Path.cwd()),
        "--noconftest",
        "--assert=plain",
        *request.reports,
        *common,
    ]
    folder = _folder()
    session = LabSession(request.options, _job(inside), folder, request.limits, say)
    code = 3
    try:
        code = int(pytest.main(here, plugins=[session]))
    finally:
        session.close()
        if code in (0, 5):
            shutil.rmtree(folder, ignore_errors=True)
        else:
            say(f"console and output of the last boot: {folder}")
    if session.first_test is not None:
        say(f"boot to first test: {session.first_test:.1f} s ({request.options.accel})")
    return code


def shell(options: Options, command: Sequence[str]) -> int:
    """Boot with the console on this terminal, run *command* there, and return QEMU's exit status."""
    tools.need(tools.RUN, "the lab")
    folder = _folder()
    try:
        prepare(folder, _job(command, interactive=True))
        child = subprocess.Popen(
            command_line(options, folder, interactive=True),
            preexec_fn=dies_with_parent(),  # noqa: PLW1509 - no other thread is there
        )
        try:
            return child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
