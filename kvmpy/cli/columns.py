# SPDX-License-Identifier: Apache-2.0
"""Numbers, times and command lines as tables of VMs show them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kvmpy.debug.watch.counters import Unseen

_COMMAND_LENGTH = 48


def size(count: int) -> str:
    """Return bytes with a binary unit; nothing for 0."""
    if not count:
        return "-"
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 10 or unit == "B" else f"{value:.1f} {unit}"


def per_second(rate: float | None) -> str:
    """Return a rate with at most four digits; a dash where it is not known."""
    if rate is None:
        return "-"
    for limit, divisor, unit in ((9999.5, 1, ""), (999_950, 1e3, "k"), (float("inf"), 1e6, "M")):
        if rate < limit:
            return f"{rate / divisor:.0f}{unit}" if divisor == 1 else f"{rate / divisor:.1f}{unit}"
    return f"{rate:.0f}"


def span(seconds: float) -> str:
    """Return a length of time in its two largest units."""
    whole = int(seconds)
    for unit, length, lower, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= length:
            return f"{whole // length}{unit}{whole % length // part:02}{lower}"
    return f"{seconds:.1f}s"


def numbers(values: Iterable[int]) -> str:
    """Return numbers as ranges, such as ``0-3,8``."""
    parts: list[list[int]] = []
    for value in sorted(values):
        if parts and parts[-1][1] == value - 1:
            parts[-1][1] = value
        else:
            parts.append([value, value])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def shorten(command: str, length: int = _COMMAND_LENGTH) -> str:
    """Return a command line without what leads to the program, and not too long."""
    program, _, rest = command.partition(" ")
    text = f"{program.rpartition('/')[2]} {rest}".strip()
    return text if len(text) <= length else text[: length - 1] + "…"


def explain(unseen: Iterable[Unseen]) -> None:
    """Print to stderr what could not be seen, and what to do about it."""
    for entry in unseen:
        click.echo(f"not seen: {entry}", err=True)
