# SPDX-License-Identifier: Apache-2.0
"""Starts what joins the fleet, and brings back a host that hangs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from kvmpy.fleet import wire
from kvmpy.fleet.errors import FleetError
from kvmpy.fleet.fleetfile import Entry
from kvmpy.lab.kernels import Say
from kvmpy.owned import dies_with_parent

SSH_VARIABLE = "KVMPY_SSH"
"""The command that reaches a host, with its options; ssh without it."""
_POWER_SECONDS = 120.0
_END_SECONDS = 15.0
_RETRY_SECONDS = 10.0
_READY_SECONDS = 30.0
_POLL = 0.05
_PACK = "guest.pack"


def command(*words: str) -> list[str]:
    """Return a command of this kvmpy."""
    return [sys.executable, "-m", "kvmpy", "fleet", *words]


def start(words: Sequence[str], output: Path, given: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Start a process that gets SIGTERM when this one dies; it reads *given*, and prints into a file.

    FleetError where there is no such command.
    """
    with output.open("ab") as stream:
        try:
            return _started(words, stream, given)
        except OSError as error:
            raise FleetError(f"{words[0]} cannot be started: {error.strerror}") from None


def _started(words: Sequence[str], stream: IO[bytes], given: IO[bytes] | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        words,
        stdin=given or subprocess.DEVNULL,
        stdout=stream,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=dies_with_parent(signal.SIGTERM),  # noqa: PLW1509 - fork comes before any thread's lock
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process in order, or not in order."""
    if process.poll() is None:
        process.terminate()
        # One that was stopped hears nothing.
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
    if process.poll() is None:
        process.kill()
        process.wait()


def tail(path: Path, lines: int = 20) -> str:
    """Return the last lines of a file, empty without one."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.strip().splitlines()[-lines:])


class Server:
    """A scheduler of this run's own, on this machine."""

    def __init__(self, folder: Path, listen: str) -> None:
        self._output = folder / "serve.out"
        words = command("serve", "--folder", str(folder), "--listen", listen, "--port", "0")
        self.process = start(words, self._output)
        limit = time.monotonic() + _READY_SECONDS
        while not (folder / wire.ADDRESS).exists():
            if self.process.poll() is not None or time.monotonic() > limit:
                end(self.process)
                raise FleetError(f"the fleet cannot be served: {tail(self._output) or 'no answer'}")
            time.sleep(_POLL)
        self.address = wire.known_address(folder)

    def close(self) -> None:
        """End it: whoever has joined ends, too."""
        end(self.process)


class Launcher:
    """What starts one host; *folder* takes what it and its commands print."""

    def __init__(self, entry: Entry, address: str, certificate: Path, folder: Path, say: Say) -> None:
        self.entry = entry
        self._address = address
        self._certificate = certificate
        self.output = folder / f"{entry.name}.out"
        self._screen = folder / f"{entry.name}.console"
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._power: subprocess.Popen[bytes] | None = None
        self._lock: subprocess.Popen[bytes] | None = None
        self._console: subprocess.Popen[bytes] | None = None
        self._again = 0.0
        self.joined = False

    # ---- its life

    def start(self) -> None:
        """Take the lock, and start what joins."""
        if self.entry.lock:
            self._lock = start(shlex.split(self.entry.lock), self.output)
            with contextlib.suppress(subprocess.TimeoutExpired):
                if self._lock.wait(1.0):
                    raise FleetError(
                        f"{self.entry.name} is not to be had: {tail(self.output, 1) or self.entry.lock}"
                    )
        if self.entry.console:
            self._console = start(shlex.split(self.entry.console), self._screen)
        self._start()

    def _join(self, certificate: str = "") -> list[str]:
        words = ["join", self._address, "--name", self.entry.name]
        words += ["--certificate", certificate or str(self._certificate)]
        if self.entry.pack:
            words += ["--pack", _PACK if certificate else self.entry.pack]
        words += ["--dangerous"] * self.entry.dangerous
        return [*words, *([] if self.entry.lab is None else ["--lab", *self.entry.lab])]

    def _start(self) -> None:
        if self.entry.local:
            self._process = start(command(*self._join()), self.output)
        elif self.entry.ssh:
            with self._packed().open("rb") as pack:
                words = [*shlex.split(os.environ.get(SSH_VARIABLE, "ssh -o BatchMode=yes")), self.entry.ssh]
                self._process = start([*words, self._script()], self.output, pack)

    def _packed(self) -> Path:
        """Return an archive of what the host needs: the certificate, the wheels, and the pack."""
        target = self.output.with_suffix(".tar")
        with tarfile.open(target, "w") as archive:
            archive.add(self._certificate, wire.CERTIFICATE)
            if self.entry.wheels:
                wheels = Path(self.entry.wheels)
                if not any(wheels.glob("kvmpy-*.whl")):
                    raise FleetError(f"{wheels} has no wheel of kvmpy: pip wheel -w {wheels} 'kvmpy[fleet]'")
                archive.add(wheels, "wheels")
            if self.entry.pack:
                if not Path(self.entry.pack).is_file():
                    raise FleetError(f"{self.entry.pack} is not there: kvmpy pack build -o {self.entry.pack}")
                archive.add(self.entry.pack, _PACK)
        return target

    def _script(self) -> str:
        """Return what the host's shell does: unpack, install below its cache, and join."""
        python = shlex.quote(self.entry.python)
        join = shlex.join(["-m", "kvmpy", "fleet", *self._join(wire.CERTIFICATE)])
        # An environment of its own for each set of wheels: nothing is installed elsewhere.
        wheels = sorted(Path(self.entry.wheels or "/nonexistent").glob("*.whl"))
        content = hashlib.sha256()
        for path in wheels:
            content.update(path.name.encode() + path.read_bytes())
        own = f"venv-{content.hexdigest()[:12]}"
        folder = f"kvmpy/fleet-host/{shlex.quote(self.entry.name)}"
        lines = ["set -e", "umask 077", f'd="${{XDG_CACHE_HOME:-$HOME/.cache}}/{folder}"']
        lines += ['mkdir -p "$d"', 'cd "$d"', "rm -rf wheels", "tar -x"]
        if self.entry.wheels:
            pip = f"{own}/bin/python -m pip install -q --disable-pip-version-check"
            lines += [f"[ -e {own}/ready ] || {{ rm -rf venv-*; {python} -m venv {own}; "]
            lines[-1] += f"{pip} --no-index --find-links wheels 'kvmpy[fleet]'; touch {own}/ready; }}"
            python = f"{own}/bin/python"
        return "\n".join([*lines, f"exec {python} {join} < /dev/null"])

    def alive(self) -> bool:
        """Whether what joins runs, or is started again: a host that boots is not reached at once."""
        waits = bool(self.entry.ssh) and self.joined
        return waits or self._process is None or self._process.poll() is None

    def last_words(self) -> str:
        """Return the last line of what it printed."""
        return tail(self.output, 1) or "it says nothing"

    def evidence(self) -> str:
        """Return the end of the host's console, empty without one."""
        text = tail(self._screen)
        return f"console:\n{text}" if text else ""

    def can_cycle(self) -> bool:
        """Whether anything brings back a host that hangs."""
        return bool(self.entry.local or self.entry.power)

    def cycle(self) -> None:
        """Bring a host back that hangs."""
        if self._process is not None:
            self._kill(self._process)
            self._process = None
        if self.entry.power:
            self._power = start(self.entry.power_command("reboot"), self.output)
            self._again = time.monotonic() + _POWER_SECONDS
        else:
            self._start()

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kill it with its children, which may be stopped and hear nothing."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
            for each in (psutil.Process(process.pid), *family):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            psutil.wait_procs(family, timeout=_END_SECONDS)
        process.wait(_END_SECONDS)

    def turn(self) -> None:
        """Go on with what takes long; to be called from time to time."""
        if self._power is None:
            died = self.joined and self._process is not None and self._process.poll() is not None
            if died and self.entry.ssh and time.monotonic() > self._again:
                self._again = time.monotonic() + _RETRY_SECONDS
                self._start()
            return
        status = self._power.poll()
        if status is None and time.monotonic() > self._again:
            end(self._power)
            status = -1
        if status is not None:
            self._power = None
            if status:
                self._say(f"{self.entry.name}: its power command failed: {tail(self.output, 1)}")
            self._start()

    def close(self) -> None:
        """End what was started, and give the lock back."""
        for process in (self._process, self._power, self._console, self._lock):
            if process is not None:
                end(process)
        if self.entry.unlock:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(
                    shlex.split(self.entry.unlock),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=_END_SECONDS,
                    check=False,
                    env=os.environ,
                )
