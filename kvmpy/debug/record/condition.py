# SPDX-License-Identifier: Apache-2.0
"""What has to stay true while a record is cut down: an expression, the recorded outcome, or a command."""

from __future__ import annotations

import errno
import operator
import re
import shlex
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from kvmpy.debug.record.worker import Answer, Player, Replayed
from kvmpy.uapi import constants
from kvmpy.uapi.commands import SEV_COMMANDS, SEV_PLATFORM_COMMANDS
from kvmpy.uapi.ioctls import IOCTLS

_OPERATORS: dict[str, Callable[[int, int], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_TERM = re.compile(r"(errno|result|exit|firmware)\s*(==|!=|<=|>=|<|>)\s*([-\w]+)$")


class ConditionError(ValueError):
    """An expression that cannot be understood; the text says which part and what is possible."""


@dataclass(frozen=True)
class Term:
    """One comparison."""

    field: str
    compare: Callable[[int, int], bool]
    value: int

    def holds(self, each: Replayed) -> bool:
        """Tell whether it is true of an ioctl that was replayed."""
        results = {
            "errno": each.errno, "result": each.result, "exit": each.exit, "firmware": each.firmware,
        }[self.field]  # fmt: skip
        return results is not None and self.compare(results, self.value)


@dataclass(frozen=True)
class Expression:
    """Terms joined by "and", at one ioctl (or SEV command) or at any: true where one replayed ioctl fits
    them all.
    """

    terms: tuple[Term, ...]
    ioctl: str | None

    def match(self, answer: Answer) -> Replayed | None:
        """Return the last replayed ioctl that fits."""
        for each in reversed(answer.ioctls):
            if self.ioctl in (None, each.name, each.command) and all(term.holds(each) for term in self.terms):
                return each
        return None


def parse(text: str) -> Expression:
    """Return the expression *text*, such as ``errno==EINVAL at KVM_SET_SREGS``; ConditionError."""
    terms_text, mark, ioctl = text.partition(" at ")
    name = ioctl.strip() if mark else None
    if name is not None and name not in IOCTLS.keys() | SEV_COMMANDS.keys() | SEV_PLATFORM_COMMANDS.keys():
        raise ConditionError(f"{name} is not an ioctl or SEV command that kvmpy knows")
    terms = []
    for part in re.split(r"\s+and\s+|&&", terms_text.strip()):
        matched = _TERM.match(part.strip())
        if matched is None:
            raise ConditionError(
                f"{part.strip()!r}: expected errno, result, exit or firmware, a comparison and a value, "
                "as in 'errno==EINVAL at KVM_SET_SREGS' or 'exit==KVM_EXIT_SHUTDOWN'"
            )
        terms.append(Term(matched[1], _OPERATORS[matched[2]], _value(matched[3])))
    return Expression(tuple(terms), name)


def _value(text: str) -> int:
    number = getattr(errno, text, None)
    if isinstance(number, int):
        return number
    if text in constants.ALL:
        # The firmware's status is unsigned where it is compared.
        return constants.ALL[text] & 0xFFFF_FFFF if text.startswith("SEV_RET_") else constants.ALL[text]
    try:
        return int(text, 0)
    except ValueError:
        raise ConditionError(f"{text!r} is not a number, errno or constant of KVM") from None


class Condition(ABC):
    """Tells whether the record at a path still shows what matters."""

    @abstractmethod
    def holds(self, path: str) -> bool:
        """Try the record at *path*."""


class UntilExpression(Condition):
    """An expression holds for some ioctl of the replay."""

    def __init__(self, player: Player, expression: Expression) -> None:
        self._player = player
        self.expression = expression

    def holds(self, path: str) -> bool:
        """Try the record at *path*."""
        return self.expression.match(self._player.play(path)) is not None


class SameOutcome(Condition):
    """Every ioctl that is left ends as it was recorded, and the one with order number *order* is there.

    Where that is KVM_RUN, the guest stands where it stood in the first attempt: another way to the same kind
    of exit does not count.
    """

    def __init__(self, player: Player, order: int) -> None:
        self._player = player
        self._order = order
        self._rip: int | None = None

    def holds(self, path: str) -> bool:
        """Try the record at *path*."""
        answer = self._player.play(path)
        if answer.failure or any(each.differs for each in answer.ioctls):
            return False
        index = next((each for each in answer.ioctls if each.order == self._order), None)
        if index is None:
            return False
        self._rip = index.rip if self._rip is None else self._rip
        return index.rip == self._rip


class ShellTest(Condition):
    """A command exits with status 0; ``{}`` in it is the path of the record, which else comes last."""

    def __init__(self, command: str, timeout: float = 60.0) -> None:
        self._command = command
        self._timeout = timeout

    def holds(self, path: str) -> bool:
        """Try the record at *path*; False for a command that takes too long."""
        quoted = shlex.quote(path)
        text = self._command.replace("{}", quoted) if "{}" in self._command else f"{self._command} {quoted}"
        try:
            done = subprocess.run(
                ["/bin/sh", "-c", text],
                check=False,
                timeout=self._timeout,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0
