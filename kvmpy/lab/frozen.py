# SPDX-License-Identifier: Apache-2.0
"""The session inside up to the point where nothing about its run is known yet: a snapshot is taken there.

The process has imported what tests need.  It says so in the journal, and waits for a byte on a port of its
own: that byte comes when a machine has been resumed for a run.  Then it mounts that run's folders and becomes
the command of its job.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import random
import runpy
import shlex
import socket
import struct
import sys
import time
from pathlib import Path

import kvmpy
from kvmpy.lab.places import INSIDE, SEED_VARIABLE, SHARES_FILE
from kvmpy.lab.root import JOB_FLAGS, JOB_TAG, MOUNT_FLAGS

PORT = "wake"
# Packages of kvmpy whose modules tests import, and those that run them.
_PACKAGES = ("core", "coco", "guest", "uapi", "x86", "testing", "debug.decode", "debug.record")
_MODULES = ("hypothesis", "kvmpy", "kvmpy.lab.inside", "pytest", "pytest_timeout")
# Modules that build or measure kvmpy itself.
_LEFT_OUT = {"bench", "gen", "headers", "html", "abi"}
_LINKS = "[0-9a-f]*"
_MS_RDONLY = 1
# include/uapi/linux/sockios.h, if.h, random.h
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_RNDRESEEDCRNG = 0x5207


def modules() -> list[str]:
    """Return the names of the modules that are imported in advance."""
    from _pytest.config import default_plugins

    names = [*_MODULES, *(f"_pytest.{name}" for name in default_plugins)]
    for package in (importlib.import_module(f"kvmpy.{name}") for name in _PACKAGES):
        entries = pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=lambda _: None)
        names += [entry.name for entry in entries if not set(entry.name.split(".")) & _LEFT_OUT]
    return names


def _import() -> None:
    for name in modules():
        importlib.import_module(name)


def files() -> list[str]:
    """Return the files of kvmpy and of this process's modules, their bytecode, and what else is mapped."""
    _import()
    found = {sys.executable, f"{sys.prefix}/pyvenv.cfg"}
    for module in list(sys.modules.values()):
        found |= {getattr(module, "__file__", None) or "", getattr(module, "__cached__", None) or ""}
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        found.add(line.split(maxsplit=5)[5] if line.count("/") else "")
    package = Path(kvmpy.__file__).parent
    found |= {str(path) for path in package.rglob("*") if path.parent.name != "__pycache__"}
    for folder in filter(None, sys.path):
        found |= {str(path) for path in Path(folder).glob("*.pth")}
    return sorted(name for name in found if name.startswith("/") and os.path.isfile(name))


def _mount(tag: str, place: str, flags: str = MOUNT_FLAGS) -> None:
    # As mount(8) does it, whose start takes a tenth of a second.
    libc = ctypes.CDLL(None, use_errno=True)
    os.makedirs(place, exist_ok=True)
    if libc.mount(tag.encode(), os.fsencode(place), b"9p", _MS_RDONLY, flags.encode()):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), place)


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))


def _become(text: str) -> None:
    """Take over environment, folder and command of the job, whose file the first process reads elsewhere."""
    words = shlex.split(text)
    start = words.index("set")
    os.environ |= dict(word.split("=", 1) for word in words[:start] if word != "export")
    folder, programs = os.environ["KVMPY_LAB_FOLDER"], os.environ["KVMPY_LAB_PROGRAMS"]
    # Every machine that is resumed would have the same numbers.
    with open("/dev/urandom", "wb", buffering=0) as pool:
        pool.write(bytes.fromhex(os.environ.pop(SEED_VARIABLE)))
        fcntl.ioctl(pool, _RNDRESEEDCRNG)
    random.seed()
    _loopback_up()
    for name in Path(programs).glob(_LINKS) if programs else ():
        os.symlink(name, f"/tmp/cache/kvmpy/guest/{name.name}")  # noqa: S108 - a tmpfs inside
    os.chdir(folder)
    importlib.invalidate_caches()
    python, option, module, *arguments = words[start + 2 :]
    if (python, option) != (sys.executable, "-m"):
        raise ValueError(f"a session runs {sys.executable} -m MODULE, not {words[start + 2 :]}")
    sys.path[0] = folder
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main() -> None:
    """Import, wait, and become the job's command."""
    _import()
    gc.collect()
    with open("/dev/kvmpy.journal", "w", encoding="utf-8") as journal:
        journal.write("\n" + json.dumps({"event": "frozen"}) + "\n")
    with open(f"/dev/kvmpy.{PORT}", "rb", buffering=0) as port:
        port.read(1)
    _mount(JOB_TAG, INSIDE, JOB_FLAGS)
    job = Path(INSIDE) / "job.env"
    time.clock_settime_ns(time.CLOCK_REALTIME, job.stat().st_mtime_ns)
    for tag, place in json.loads((Path(INSIDE) / SHARES_FILE).read_text(encoding="utf-8")).items():
        _mount(tag, place)
    _become(job.read_text(encoding="utf-8"))


if __name__ == "__main__":
    if sys.argv[1:] == ["--files"]:
        print(json.dumps(files()))
    else:
        main()
