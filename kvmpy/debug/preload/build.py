# SPDX-License-Identifier: Apache-2.0
"""Compiles the recorder at its first use and keeps it by the content of its source."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from kvmpy import caches

HERE = Path(__file__).resolve().parent
SOURCES = ("recorder.c", "capture.c", "memory.c", "objects.c", "frames.c")
HEADERS = (
    "recorder.h", "rawcall.h", "ring.h", "tables.h", "../record/format.h", "../../uapi/native/capture.h",
    "../../uapi/native/capture.c", "../../uapi/native/objects.c",
)  # fmt: skip
FLAGS = ("-shared", "-fPIC", "-O2", "-g", "-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden")
LIBRARIES = ("-ldl", "-pthread")
TARGET = "kvmpy-recorder.so"
_TIMEOUT_S = 120


class RecorderBuildError(RuntimeError):
    """The recorder cannot be compiled; the text says why and what to do."""


def _key() -> str:
    digest = hashlib.sha256(" ".join(FLAGS + LIBRARIES).encode())
    for name in SOURCES + HEADERS:
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()[:32]


def _compile(target: Path) -> None:
    compiler = os.environ.get("CC") or "gcc"
    if shutil.which(compiler) is None:
        raise RecorderBuildError(
            f"the recorder has to be compiled once, and there is no {compiler}: "
            "apt-get install gcc libc6-dev, or trace a running program with -p"
        )
    command = [compiler, *FLAGS, "-o", str(target), *(str(HERE / name) for name in SOURCES), *LIBRARIES]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S, env=environment
    )
    if done.returncode:
        raise RecorderBuildError(f"{compiler} could not compile the recorder:\n{done.stderr.strip()}")


def recorder(fallback: Path) -> Path:
    """Return the compiled recorder; in *fallback* where the cache cannot be written, or others can write it.

    RecorderBuildError when there is no compiler or it fails.
    """
    cache = caches.own("preload")
    folder = (cache or fallback) / _key()
    target = folder / TARGET
    try:
        if cache is None or caches.stranger(target):
            raise PermissionError
        if target.is_file():
            return target
        folder.mkdir(exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, suffix=".so")
        os.close(handle)
    except OSError:
        target = fallback / TARGET
        _compile(target)
        return target
    path = Path(name)
    try:
        _compile(path)
        path.chmod(0o755)
        path.replace(target)
    finally:
        path.unlink(missing_ok=True)
    return target
