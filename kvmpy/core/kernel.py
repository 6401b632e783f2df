# SPDX-License-Identifier: Apache-2.0
"""The running kernel's configuration and module parameters: what says why KVM lacks something."""

from __future__ import annotations

import functools
import gzip
import os
from collections.abc import Mapping
from pathlib import Path

SYS_MODULE = Path("/sys/module")
CONFIG_GZ = Path("/proc/config.gz")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def module_parameters(module: str) -> dict[str, str]:
    """Return a module's parameters as sysfs shows them; empty when it has none or is absent."""
    try:
        files = sorted((SYS_MODULE / module / "parameters").iterdir())
    except OSError:
        return {}
    return {file.name: _read(file) for file in files}


@functools.lru_cache(maxsize=1)
def _config() -> Mapping[str, str]:
    try:
        text = gzip.decompress(CONFIG_GZ.read_bytes()).decode("utf-8", "replace")
    except (OSError, EOFError):
        text = _read(Path(f"/boot/config-{os.uname().release}"))
    values = {}
    for line in text.splitlines():
        if line.startswith("CONFIG_"):
            key, _, value = line.partition("=")
            values[key] = value.strip('"')
        elif line.startswith("# CONFIG_") and line.endswith(" is not set"):
            values[line.split()[1]] = "n"
    return values


def kernel_config(option: str) -> str | None:
    """Return the running kernel's value of ``CONFIG_option`` (``y``, ``m``, ``n``); None when unknown."""
    config = _config()
    if not config:
        return None
    return config.get(f"CONFIG_{option.removeprefix('CONFIG_')}", "n")


def config_hint(option: str) -> str:
    """Return how to get *option*: a kernel that has it, and what this one has where that is known."""
    value = kernel_config(option)
    state = {None: "", "n": " (this kernel: not set)"}.get(value, f" (this kernel: {value})")
    return f"a kernel with CONFIG_{option}=y{state}"
