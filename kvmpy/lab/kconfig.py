# SPDX-License-Identifier: Apache-2.0
"""Kernel configurations as text: merge a fragment into one, and find what did not survive. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SET = re.compile(r"(CONFIG_\w+)=(.*)")
_UNSET = re.compile(r"# (CONFIG_\w+) is not set")


def parse(text: str) -> dict[str, str]:
    """Return the options of a configuration or fragment; an option that is not set has the value ``n``."""
    values = {}
    for line in text.splitlines():
        if match := _SET.fullmatch(line.strip()):
            values[match[1]] = match[2]
        elif match := _UNSET.fullmatch(line.strip()):
            values[match[1]] = "n"
    return values


def _line(option: str, value: str) -> str:
    return f"# {option} is not set" if value == "n" else f"{option}={value}"


def merge(base: str, fragment: Mapping[str, str]) -> str:
    """Return the configuration *base* with the options of *fragment* in place of its own."""
    kept = [line for line in base.splitlines() if not parse(line).keys() & fragment.keys()]
    return "\n".join([*kept, *(_line(option, value) for option, value in fragment.items())]) + "\n"


def lost(wanted: Mapping[str, str], final: Mapping[str, str]) -> list[str]:
    """Return the options of *wanted* that *final* has otherwise, each with both values."""
    return [
        f"{option} (wanted {value}, got {final.get(option, 'n')})"
        for option, value in wanted.items()
        if final.get(option, "n") != value
    ]
