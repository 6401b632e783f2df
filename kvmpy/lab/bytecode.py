# SPDX-License-Identifier: Apache-2.0
"""Bytecode of the lab's own, compiled on the host: inside, a module takes twenty times longer to compile."""

from __future__ import annotations

import importlib.machinery
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kvmpy.lab import places

_SECONDS = 120.0


def folder() -> Path:
    """Return the folder that takes the place of every ``__pycache__``."""
    return places.cache() / "pycache"


def environment(writing: bool) -> dict[str, str]:
    """Return what makes Python read bytecode from the folder, and with *writing* put more there."""
    return {"PYTHONPYCACHEPREFIX": str(folder()), "PYTHONDONTWRITEBYTECODE": "" if writing else "1"}


def uncompiled() -> list[str]:
    """Return the source files of this process's modules that have no bytecode."""
    files = []
    for module in list(sys.modules.values()):
        spec = getattr(module, "__spec__", None)
        # Test modules have another loader, and their collection on the host compiles them.
        if spec is None or type(spec.loader) is not importlib.machinery.SourceFileLoader:
            continue
        if spec.origin and spec.cached and not Path(spec.cached).exists():
            files.append(spec.origin)
    return sorted(files)


def compile_files(files: Sequence[str]) -> None:
    """Compile what a session inside has missed, for the next one; none of it is executed."""
    present = [name for name in files if name.endswith(".py") and Path(name).is_file()]
    if not present:
        return
    subprocess.run(
        [sys.executable, "-m", "compileall", "-q", *present],
        env=os.environ | environment(writing=True),
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=_SECONDS,
    )
