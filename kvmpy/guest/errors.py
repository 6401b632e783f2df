# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between a guest's source and its image."""

from __future__ import annotations

from kvmpy.core.errors import MissingError


class GuestError(RuntimeError):
    """A guest program that cannot be used."""


class GuestBuildError(GuestError):
    """The compiler or the linker refused the source; ``.stderr`` is what it said, ``.command`` what was run."""

    def __init__(self, name: str, stderr: str, command: str) -> None:
        self.program = name
        self.stderr = stderr
        self.command = command
        super().__init__(f"the guest program {name} does not build:\n{stderr.rstrip()}\n  command: {command}")


class GuestImageError(GuestError):
    """Not an ELF that a guest of kvmpy can run; the message says why."""


class GuestSymbolError(GuestError, KeyError):
    """The program has no such symbol; ``.closest`` are the names most like it."""

    def __init__(self, symbol: str, program: str, closest: list[str]) -> None:
        self.symbol = symbol
        self.closest = closest
        hint = f"; closest: {', '.join(closest)}" if closest else ""
        super().__init__(f"the guest program {program} has no symbol {symbol!r}{hint}")

    def __str__(self) -> str:
        return str(self.args[0])


class GuestBuildWarning(UserWarning):
    """The compiler warned about a guest program."""


class ToolchainError(MissingError):
    """A tool that builds guest programs is missing: ``.missing`` names it, ``.how`` says how to get it."""
