# SPDX-License-Identifier: Apache-2.0
"""The table of docs/software-amd-sp-commands.md: the checks of the firmware's commands, in their order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "software-amd-sp-commands.md"
_SECTION = re.compile(r"^### (\w+)$")
_ROW = re.compile(r"^\| (.+) \|$")
_COLUMNS = ("Check", "Status", "Firmware", "Violated by")
_OPTIONS = re.compile(r"^`([^`]+)`$")


@dataclass(frozen=True)
class Check:
    """One row: a check of *command*, the status of a command that fails it, and the firmware's function.

    *options* are what makes a scene in which it fails; where no scene can, *reason* says why.
    """

    command: str
    number: int
    text: str
    status: str
    function: str
    options: dict[str, str]
    reason: str

    @property
    def name(self) -> str:
        """Command, number and options, as the test is called."""
        return f"{self.command}-{self.number}-" + ",".join(
            f"{key}={value}" for key, value in self.options.items()
        )


def _check(command: str, number: int, cells: list[str]) -> Check:
    if len(cells) != len(_COLUMNS):
        raise ValueError(f"{command}: a row has {len(cells)} cells: {cells}")
    text, status, function, violation = cells
    options = _OPTIONS.match(violation)
    pairs = [part.partition("=") for part in options[1].split(" ")] if options else []
    if any(not equals for _, equals, _ in pairs):
        raise ValueError(f"{command}: {violation} is no list of name=value")
    return Check(
        command,
        number,
        text,
        status.strip("`"),
        function.strip("`"),
        {name: value for name, _, value in pairs},
        "" if options else violation,
    )


def read(page: Path = PAGE) -> list[Check]:
    """Return the rows, in the page's order; [] where there is no such page: a wheel has none."""
    if not page.is_file():
        return []
    command, checks, number = "", [], 0
    for line in page.read_text(encoding="utf-8").splitlines():
        if section := _SECTION.match(line):
            command, number = section[1], 0
        elif command and (row := _ROW.match(line)):
            cells = [cell.strip() for cell in row[1].split(" | ")]
            if tuple(cells) == _COLUMNS or set("".join(cells)) <= {"-"}:
                continue
            number += 1
            checks.append(_check(command, number, cells))
        elif line.startswith("#"):
            command = ""
    return checks


def behind(checks: list[Check], check: Check) -> Check | None:
    """Return the first later check of the command that can fail in the same scene, None without one."""
    for other in checks:
        if (
            other.command == check.command
            and other.number > check.number
            and other.options
            and not other.options.keys() & check.options.keys()
            and other.status != check.status
        ):
            return other
    return None
