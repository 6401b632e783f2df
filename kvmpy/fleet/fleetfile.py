# SPDX-License-Identifier: Apache-2.0
"""The hosts file: how each host is reached, what it bears, and what switches its power. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmpy.fleet.errors import FleetError
from kvmpy.testing.configurations import nearest, read_toml

ACTION = "{action}"
ACTIONS = ("on", "off", "reboot", "status")
DEATHS = 3


@dataclass(frozen=True)
class Entry:
    """One host. *local*: this machine; *ssh*: where ssh goes; neither: it joins by itself.

    *lab*: tests run in a machine of the lab there, with these options of ``kvmpy lab shell``.  *pack* is
    sent with the *wheels*: guest programs, for a host without a compiler.

    *power* has ``{action}``; *deaths* is how often it may die; *lock* runs as long as the host is used, and
    ends with status 0 at once where it only takes the lock.
    """

    name: str
    local: bool = False
    lab: tuple[str, ...] | None = None
    ssh: str = ""
    python: str = "python3"
    wheels: str = ""
    pack: str = ""
    power: str = ""
    console: str = ""
    deaths: int = DEATHS
    dangerous: bool = False
    lock: str = ""
    unlock: str = ""

    def power_command(self, action: str) -> list[str]:
        """Return the command for an action; FleetError without one."""
        if not self.power:
            raise FleetError(f"{self.name} has no power command")
        return [word.replace(ACTION, action) for word in shlex.split(self.power)]


_TEXTS = ("ssh", "python", "wheels", "pack", "power", "console", "lock", "unlock")
_FLAGS = ("local", "dangerous")
_KEYS = (*_FLAGS, "lab", "deaths", *_TEXTS)


def load(path: Path) -> list[Entry]:
    """Return the hosts of a file; FleetError with the place for one that says what cannot be."""
    data = read_toml(path, FleetError)
    if not data:
        raise FleetError(f"{path} names no host: [NAME] begins one")
    return [_entry(name, raw, f"{path}, host {name!r}") for name, raw in data.items()]


def _entry(name: str, raw: object, where: str) -> Entry:
    if not isinstance(raw, Mapping):
        raise FleetError(f"{where}: a host is a table, [{name}]")
    values: dict[str, Any] = dict(raw)
    for key, value in values.items():
        if key not in _KEYS:
            raise FleetError(f"{where}: unknown key {key!r}{nearest(key, _KEYS)}")
        if key in _TEXTS and not isinstance(value, str):
            raise FleetError(f"{where}: {key!r} is text")
        if key in _FLAGS and not isinstance(value, bool):
            raise FleetError(f"{where}: {key!r} is true or false")
    deaths = values.get("deaths", DEATHS)
    if not isinstance(deaths, int) or isinstance(deaths, bool) or not 0 <= deaths <= 1000:
        raise FleetError(f"{where}: 'deaths' is a number from 0 to 1000")
    lab = values.get("lab")
    if lab is not None:
        if not isinstance(lab, list) or not all(isinstance(word, str) for word in lab):
            raise FleetError(f"{where}: 'lab' is a list of options of `kvmpy lab shell`")
        values["lab"] = tuple(lab)
    for key in ("power", "console", "lock", "unlock"):
        try:
            shlex.split(values.get(key, ""))
        except ValueError as error:
            raise FleetError(f"{where}: {key!r} is no command: {error}") from None
    if values.get("power") and ACTION not in values["power"]:
        raise FleetError(f"{where}: 'power' has no {ACTION}: fence_ipmilan -a ADDRESS -o {ACTION}")
    if values.get("local") and values.get("ssh"):
        raise FleetError(f"{where}: it is this machine, or reached by ssh, not both")
    return Entry(name, **values)
