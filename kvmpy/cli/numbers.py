# SPDX-License-Identifier: Apache-2.0
"""Types of options: numbers of some bits, and bytes in hex."""

from __future__ import annotations

from collections.abc import Callable

import click


def number(bits: int) -> Callable[[str], int]:
    """Return the type of an option: an unsigned number of so many bits, decimal or with 0x."""

    def convert(text: str) -> int:
        try:
            value = int(text, 0)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not a number") from None
        if not 0 <= value < 1 << bits:
            raise click.BadParameter(f"{text} does not fit {bits} bits")
        return value

    convert.__name__ = "number"  # the placeholder in --help
    return convert


def hex_bytes(size: int, *, shorter: bool = False) -> Callable[[str], bytes]:
    """Return the type of an option: *size* bytes in hex, or fewer and zeros behind them."""

    def convert(text: str) -> bytes:
        try:
            data = bytes.fromhex(text.removeprefix("0x"))
        except ValueError:
            raise click.BadParameter(f"{text!r} is not hex") from None
        if len(data) > size or (len(data) < size and not shorter):
            raise click.BadParameter(f"{len(data)} bytes, expected {'up to ' if shorter else ''}{size}")
        return data.ljust(size, b"\0")

    convert.__name__ = "hex"
    return convert
