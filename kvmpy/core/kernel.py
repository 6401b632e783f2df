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


class ModuleOptions(Mapping[str, Option]):
    """What modprobe.d and the kernel's command line ask of *modules*, by ``module.parameter``.

    They are read when the first is asked for. What a call of modprobe or insmod was given is nowhere to be
    read.
    """

    def __init__(self, *modules: str) -> None:
        self._modules = modules

    @functools.cached_property
    def _asked(self) -> Mapping[str, Option]:
        return {name: option for name, option in _options() if name.partition(".")[0] in self._modules}

    def __getitem__(self, name: str) -> Option:
        return self._asked[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._asked)

    def __len__(self) -> int:
        return len(self._asked)


def _options() -> Iterator[tuple[str, Option]]:
    for folder in reversed(MODPROBE):
        for file in sorted(folder.glob("*.conf")):
            for module, words in re.findall(r"^\s*options\s+(\S+)\s+(.*)$", _read(file), re.MULTILINE):
                for name, _, value in (word.partition("=") for word in words.split()):
                    yield f"{module.replace('-', '_')}.{name}", Option(value, str(file))
    for name, _, value in (word.partition("=") for word in command_line()):
        module, _, parameter = name.partition(".")
        yield f"{module.replace('-', '_')}.{parameter}", Option(value, "the kernel's command line")


class ModuleParameters(Mapping[str, str]):
    """A module's parameters as sysfs shows them, each read when it is asked for.

    There are none where the module has none or is absent; one that cannot be read is empty.
    """

    def __init__(self, module: str) -> None:
        self._folder = SYS_MODULE / module / "parameters"

    def __getitem__(self, name: str) -> str:
        path = self._folder / name
        if not path.is_file():
            raise KeyError(name)
        return _read(path)

    def __iter__(self) -> Iterator[str]:
        try:
            return iter(sorted(os.listdir(self._folder)))
        except OSError:
            return iter(())

    def __len__(self) -> int:
        return len(list(iter(self)))


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
