# SPDX-License-Identifier: Apache-2.0
"""The running kernel: configuration, command line, module parameters, which say why KVM lacks something."""

from __future__ import annotations

import functools
import gzip
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

COMMAND_LINE = Path("/proc/cmdline")
MODPROBE = tuple(Path(folder) / "modprobe.d" for folder in ("/etc", "/run", "/usr/local/lib", "/usr/lib"))
SYS_MODULE = Path("/sys/module")
CONFIG_GZ = Path("/proc/config.gz")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


@functools.lru_cache(maxsize=1)
def cpu_info() -> Mapping[str, str]:
    """Return the first CPU's entry of /proc/cpuinfo."""
    first = _read(Path("/proc/cpuinfo")).partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def command_line() -> tuple[str, ...]:
    """Return the words of the kernel's command line."""
    return tuple(_read(COMMAND_LINE).split())


@dataclass(frozen=True)
class Option:
    """What somebody asks of a module: the *value* of a parameter, and the *source* that says so."""

    value: str
    source: str


def module_options(*modules: str) -> dict[str, Option]:
    """Return what modprobe.d and the kernel's command line ask of *modules*, by ``module.parameter``.

    What a call of modprobe or insmod was given is nowhere to be read.
    """
    return {name: option for name, option in _options() if name.partition(".")[0] in modules}


def _options() -> Iterator[tuple[str, Option]]:
    for folder in reversed(MODPROBE):
        for file in sorted(folder.glob("*.conf")):
            for module, words in re.findall(r"^\s*options\s+(\S+)\s+(.*)$", _read(file), re.MULTILINE):
                for name, _, value in (word.partition("=") for word in words.split()):
                    yield f"{module.replace('-', '_')}.{name}", Option(value, str(file))
    for name, _, value in (word.partition("=") for word in command_line()):
        module, _, parameter = name.partition(".")
        yield f"{module.replace('-', '_')}.{parameter}", Option(value, "the kernel's command line")


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
