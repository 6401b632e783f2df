# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with a guest: its source, its image, its launch and its run."""

from __future__ import annotations

from kvmpy.core.errors import MissingError


def printable(text: str) -> str:
    """Return *text* with what a terminal would obey, and what cannot be seen, as Python's escapes.

    New lines and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() or sign in "\n\t" else sign.encode("unicode_escape").decode()
        for sign in text
    )


class GuestError(RuntimeError):
    """A guest program or VM that cannot be used, or that failed; ``.postmortem`` is its state, or empty.

    Both hold text of the guest's: control characters are escaped.
    """

    def __init__(self, message: str, postmortem: str = "") -> None:
        self.message = printable(message)
        self.postmortem = printable(postmortem)
        super().__init__(f"{self.message}\n{self.postmortem}" if postmortem else self.message)


class LaunchError(GuestError):
    """A step that is not possible before, or after, launch."""


class GuestAssertionError(GuestError, AssertionError):
    """An assertion in guest code failed."""


class GuestExceptionError(GuestError):
    """The guest raised an exception that it did not expect: ``.vector``, ``.error_code``."""

    def __init__(self, message: str, postmortem: str = "", vector: int = 0, error_code: int = 0) -> None:
        self.vector = vector
        self.error_code = error_code
        super().__init__(message, postmortem)


class GuestTimeoutError(GuestError, TimeoutError):
    """A vCPU was still running at its deadline."""


class UnexpectedExitError(GuestError):
    """A vCPU left the guest in another way than the test expected; ``.got`` is the exit or ucall."""

    def __init__(self, message: str, postmortem: str = "", got: object = None) -> None:
        self.got = got
        super().__init__(message, postmortem)


class GuestBuildError(GuestError):
    """The compiler or the linker refused the source; ``.stderr`` is what ``.command`` said."""

    def __init__(self, program: str, stderr: str, command: str) -> None:
        self.program = program
        self.stderr = stderr
        self.command = command
        super().__init__(f"guest program {program} does not build:\n{stderr.rstrip()}\n  command: {command}")


class GuestImageError(GuestError):
    """Not an ELF that a guest of kvmpy can run; the message says why."""


class GuestSymbolError(GuestError, LookupError):
    """The program has no such symbol; ``.closest`` are the closest names."""

    def __init__(self, symbol: str, program: str, closest: list[str]) -> None:
        self.symbol = symbol
        self.closest = closest
        hint = f"; closest: {', '.join(closest)}" if closest else ""
        super().__init__(f"guest program {program} has no symbol {symbol!r}{hint}")


class GuestTypeError(GuestError, TypeError):
    """A value that does not fit the C type of a guest's variable, or a variable whose type is not known."""


class GuestBuildWarning(UserWarning):
    """The compiler warned about a guest program."""


class ToolchainError(MissingError):
    """A tool that builds guest programs is missing: ``.missing`` names it, ``.how`` says how to get it."""
