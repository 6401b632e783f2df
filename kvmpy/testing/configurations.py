# SPDX-License-Identifier: Apache-2.0
"""Configurations: names for kernel and module parameters, CPU flags, CPUs, memory and NUMA nodes.

kvmpy's own set is in configurations.toml; the format is described in docs/configurations.md. Pure: no KVM, no
pytest, no QEMU.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmpy.testing import option_table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUILTIN = Path(__file__).with_name("configurations.toml")
DEFAULT = "default"
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_KEYS = ("about", "parameters", "optional", "cpu", "cpus", "memory", "nodes", "soft-sev")
_MAX_CPUS, _MAX_NODES = 255, 64

# As the kernel reads and writes booleans.
_BOOLEANS = {"N": "0", "n": "0", "off": "0", "Y": "1", "y": "1", "on": "1"}
# Words that a parameter takes and sysfs shows as others; "auto" is for the kernel to decide.
_SHOWN = {"kvm.nx_huge_pages": {"force": "1", "off": "0", "auto": ""}}


class ConfigurationError(ValueError):
    """A configuration, or a file of them, that cannot be used; the message names it."""


@dataclass(frozen=True)
class Configuration:
    """What is booted under one name; None where it says nothing. ``memory`` is in MiB.

    ``parameters`` are words of the kernel's command line, those of modules as ``kvm_amd.npt=N``; ``optional``
    are those that not every kernel has. ``cpu`` are flags by QEMU's names, as ``+la57``.
    ``soft_sev`` False: without the software AMD-SP.
    """

    name: str
    about: str = ""
    parameters: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    cpu: tuple[str, ...] = ()
    cpus: int | None = None
    memory: int | None = None
    nodes: int | None = None
    soft_sev: bool | None = None

    def settings(self) -> str:
        """Return what it sets, in one line; empty for the default."""
        words = [*self.parameters, *self.optional, *self.cpu]
        words += [f"{self.cpus} CPUs"] if self.cpus else []
        words += [f"{self.memory} MiB"] if self.memory else []
        words += [f"{self.nodes} nodes" if self.nodes != 1 else "1 node"] if self.nodes else []
        if self.soft_sev is not None:
            words.append(f"{'with' if self.soft_sev else 'without'} the software AMD-SP")
        return ", ".join(words)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean ...?`` with what of *known* is closest to *word*, empty without such."""
    close = difflib.get_close_matches(word, list(known), 3, 0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def is_value(name: str, wanted: str, real: str) -> bool:
    """Whether sysfs, which shows *real*, says that the parameter *name* has the value *wanted*."""
    shown = _SHOWN.get(name, {}).get(wanted, wanted)
    return not shown or _number(shown) == _number(real)


def _number(text: str) -> int | str:
    try:
        return int(_BOOLEANS.get(text, text), 0)
    except ValueError:
        return text


def _words(raw: object, where: str, parse: Any) -> tuple[str, ...]:
    if not isinstance(raw, list) or not all(isinstance(word, str) for word in raw):
        raise ConfigurationError(f"{where} is a list of texts")
    try:
        return tuple(parse(word) for word in raw)
    except ValueError as error:
        raise ConfigurationError(f"{where}: {error}") from None


def _count(raw: object, where: str, most: int) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool) or not 1 <= raw <= most:
        raise ConfigurationError(f"{where} is a number from 1 to {most}")
    return raw


def _entry(name: str, raw: object, where: str) -> Configuration:
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"{where}: a name has small letters, digits, '-', '_' and '.'")
    if not isinstance(raw, dict):
        raise ConfigurationError(f"{where}: a configuration is a table, [{name}]")
    for key in raw:
        if key not in _KEYS:
            raise ConfigurationError(f"{where}: unknown key {key!r}{nearest(key, _KEYS)}")
    about = raw.get("about", "")
    if not isinstance(about, str):
        raise ConfigurationError(f"{where}: 'about' is text")
    memory = raw.get("memory")
    if memory is not None and not isinstance(memory, str):
        raise ConfigurationError(f"{where}: 'memory' is a text such as \"6G\"")
    try:
        mebibytes = None if memory is None else option_table.mebibytes(memory)
    except ValueError as error:
        raise ConfigurationError(f"{where}: 'memory': {error}") from None
    soft_sev = raw.get("soft-sev")
    if soft_sev is not None and not isinstance(soft_sev, bool):
        raise ConfigurationError(f"{where}: 'soft-sev' is true or false")
    return Configuration(
        name,
        about,
        _words(raw.get("parameters", []), f"{where}: 'parameters'", option_table.kernel_parameter),
        _words(raw.get("optional", []), f"{where}: 'optional'", option_table.module_parameter),
        _words(raw.get("cpu", []), f"{where}: 'cpu'", option_table.cpu_flag),
        None if "cpus" not in raw else _count(raw["cpus"], f"{where}: 'cpus'", _MAX_CPUS),
        mebibytes,
        None if "nodes" not in raw else _count(raw["nodes"], f"{where}: 'nodes'", _MAX_NODES),
        soft_sev,
    )


def read_toml(path: Path, failure: Callable[[str], Exception]) -> dict[str, Any]:
    """Return what a TOML file of a user's holds; *failure* for one that cannot be read or is no TOML."""
    try:
        tables: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise failure(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise failure(f"{path} is no TOML: {error}") from None
    return tables


def load(files: Iterable[Path] = ()) -> dict[str, Configuration]:
    """Return kvmpy's configurations and those of *files* by name; a later one replaces an earlier one.

    ConfigurationError for a file that cannot be read, is no TOML, or says what cannot be.
    """
    known: dict[str, Configuration] = {}
    for path in (BUILTIN, *files):
        for name, raw in read_toml(path, ConfigurationError).items():
            known[name] = _entry(name, raw, f"{path}, configuration {name!r}")
    return known


def chosen(text: str, known: Mapping[str, Configuration]) -> list[Configuration]:
    """Return the configurations that *text* names, separated by commas; ``all`` are all.

    ConfigurationError for a name that is not known, with the nearest, and for one that comes twice.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return list(known.values())
    for number, name in enumerate(names):
        if name not in known:
            hint = nearest(name, known) or f"; there are {', '.join(known)}"
            raise ConfigurationError(f"there is no configuration {name}{hint}")
        if name in names[:number]:
            raise ConfigurationError(f"configuration {name} is named twice")
    if not names:
        raise ConfigurationError("no configuration is named")
    return [known[name] for name in names]


def with_parameter(known: Iterable[Configuration], name: str, value: str = "") -> Configuration | None:
    """Return the first configuration that sets the parameter *name*, to *value* where that is given."""
    for configuration in known:
        for word, _, given in (word.partition("=") for word in configuration.parameters):
            if word == name and (not value or is_value(name, given, value)):
                return configuration
    return None
