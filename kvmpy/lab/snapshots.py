# SPDX-License-Identifier: Apache-2.0
"""Machines that have booted and wait for a run, kept so that the next run resumes one in place of booting.

A snapshot is a folder: the guest's memory as files that every resumed machine maps privately, the state of
its devices, and the initramfs it booted from.  Its name is a hash of all that it came from.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvmpy
from kvmpy.lab import bytecode, places, tools
from kvmpy.lab.errors import LabError
from kvmpy.lab.initramfs import Initramfs
from kvmpy.lab.root import JOB_MOUNT, Root, is_covered, libraries
from kvmpy.owned import OwnedFolder, is_owned

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

# A snapshot takes 300 to 600 MiB.
MOST = 6
STATE = "state"
INITRAMFS = "initramfs"
CONSOLE = "console"
_MIB = 1200
_SECONDS = 60.0
_POLL = 0.01
# Of the environment, what Python reads before the session has its job.
_EARLY = ("PYTHONPATH", "VIRTUAL_ENV")


def _folder() -> Path:
    return places.cache() / "snapshots"


def _stats(files: Iterable[Path]) -> Iterator[str]:
    for path in files:
        with contextlib.suppress(OSError):
            status = path.lstat()
            yield f"{path} {status.st_mode} {status.st_size} {status.st_mtime_ns}"


def key(kernel: str, command: Sequence[str], root: Root) -> str:
    """Return the name of the snapshot for a machine that *command* starts with *kernel*, a hash; no path of a
    run is in that command.

    A change of QEMU, the kernel, its parameters, kvmpy, an installed package or a file of the root gives
    another name.
    """
    package = Path(kvmpy.__file__).resolve().parent
    program = Path(shutil.which(tools.QEMU) or tools.QEMU).resolve()
    installed = (path for entry in sys.path if entry for path in Path(entry).glob("*.dist-info"))
    parts = [kvmpy.__version__, sys.executable, sys.version, kernel, *command]
    parts += [f"{name}={os.environ.get(name, '')}" for name in _EARLY]
    parts += _stats([program, Path(sys.executable).resolve()])
    parts += _stats(path for path in sorted(package.rglob("*")) if path.parent.name != "__pycache__")
    parts += _stats(sorted(installed))
    for path in sorted(root.folder.rglob("*")):
        if path.is_symlink():
            parts.append(f"{path.relative_to(root.folder)} {os.readlink(path)}")
        elif path.is_file():
            parts.append(f"{path.relative_to(root.folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def find(name: str) -> Path | None:
    """Return the folder of the snapshot *name*, None where there is none."""
    folder = _folder() / name
    try:
        os.utime(folder)  # the least recently used go first
    except OSError:
        return None
    return folder


def begin() -> OwnedFolder:
    """Return a folder for a snapshot that is to be taken; LabError where the disk has no room."""
    base = _folder()
    places.need_space(base, _MIB, "a snapshot of the lab")
    base.mkdir(parents=True, exist_ok=True)
    return OwnedFolder("snapshot", base)


def keep(fresh: OwnedFolder, name: str) -> Path:
    """Give the finished snapshot in *fresh* its name, and return its folder; old ones are removed."""
    target = _folder() / name
    try:
        fresh.path.rename(target)
    except OSError:
        if not target.is_dir():  # else another run has made the same one meanwhile
            raise
    finally:
        fresh.close()
    kept = sorted((path for path in _folder().iterdir() if not is_owned(path)), key=_age, reverse=True)
    for old in kept[MOST:]:
        remove(old)
    return target


def _age(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def remove(folder: Path) -> None:
    """Remove a snapshot; a machine that was resumed from it goes on."""
    shutil.rmtree(folder, ignore_errors=True)


def _session_files() -> list[str]:
    try:
        result = subprocess.run(
            [sys.executable, "-m", "kvmpy.lab.frozen", "--files"],
            env=os.environ | bytecode.environment(writing=True),
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"importing what a session needs took longer than {_SECONDS:.0f} s") from error
    if result.returncode:
        raise LabError(f"what a session needs cannot be imported: {result.stderr.strip()[-2000:]}")
    names: list[str] = json.loads(result.stdout.splitlines()[-1])
    return names


def write_initramfs(target: Path, root: Root, *, session: bool) -> None:
    """Write the root file system of a machine, with *session* for one that waits for its run.

    That one has Python and all modules of a session in memory; the other mounts the folders of its run first.
    """
    archive = Initramfs()
    archive.tree(root.folder)
    if not session:
        base = (root.folder / "etc" / "fstab").read_text(encoding="utf-8")
        archive.put(Path("/etc/fstab"), (base + JOB_MOUNT + root.mounts).encode())
    else:
        names = _session_files()
        # Without its bytecode a session starts all the same.
        if covered := [name for name in names if is_covered(Path(name)) and Path(name).suffix != ".pyc"]:
            raise LabError(f"{covered[0]} lies where the lab has a file system in memory")
        shared = [name for name in names if ".so" in Path(name).name or name == sys.executable]
        for name in [*names, *libraries(shared)]:
            archive.file(Path(name))
        early = [f"{name}={os.environ[name]}" for name in _EARLY if name in os.environ]
        early += [f"{name}={value}" for name, value in bytecode.environment(writing=False).items()]
        lines = [f"export {shlex.quote(word)}" for word in early]
        lines.append(f"set -- {shlex.quote(sys.executable)} -m kvmpy.lab.frozen")
        archive.put(Path("/etc/kvmpy-session"), ("\n".join(lines) + "\n").encode())
    archive.write(target)


# ---- QEMU's side

# Memory that is a file stays where it is.
_SHARED = {"capabilities": [{"capability": "x-ignore-shared", "state": True}]}


def save(monitor: socket.socket, state: Path) -> None:
    """Stop the machine at the other end of *monitor*, and write the state of its devices to *state*.

    LabError when QEMU refuses, or ends.
    """
    command = f"exec:cat > {shlex.quote(str(state))}"
    _ask(monitor, ("stop", {}), ("migrate-set-capabilities", _SHARED), ("migrate", {"uri": command}))


def resume(monitor: socket.socket, state: Path) -> None:
    """Let a machine that waits for it go on from *state*; LabError when QEMU refuses, or ends."""
    command = f"exec:cat {shlex.quote(str(state))}"
    _ask(monitor, ("migrate-set-capabilities", _SHARED), ("migrate-incoming", {"uri": command}), then="cont")


def _ask(monitor: socket.socket, *commands: tuple[str, dict[str, Any]], then: str = "") -> None:
    from qemu.qmp import QMPClient, QMPError

    async def ask() -> None:
        client = QMPClient("kvmpy")
        await client.connect(monitor)
        try:
            for command, arguments in commands:
                await client.execute(command, arguments)
            while (status := await _status(client)) != "completed":
                if status in ("failed", "cancelled"):
                    raise LabError(f"QEMU's state cannot be moved: {status}")
                await asyncio.sleep(_POLL)
            if then:
                await client.execute(then)
        finally:
            # A machine that ends from now on was asked all the same.
            with contextlib.suppress(QMPError, OSError, EOFError):
                await client.disconnect()

    try:
        asyncio.run(asyncio.wait_for(ask(), _SECONDS))
    except (QMPError, OSError, EOFError, asyncio.TimeoutError) as error:
        raise LabError(f"QEMU's monitor: {str(error) or type(error).__name__}") from error


async def _status(client: QMPClient) -> str:
    answer = await client.execute("query-migrate")
    return str(answer.get("status")) if isinstance(answer, dict) else ""
