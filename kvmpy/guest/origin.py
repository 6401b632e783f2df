# SPDX-License-Identifier: Apache-2.0
"""Where inline guest source stands in the test's own file, so that errors and line tables point there."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_PACKAGE = __name__.split(".")[0]
_SELFTESTS = f"{_PACKAGE}.selftests"


@dataclass(frozen=True)
class Origin:
    """*file* and *line* of the first line of a guest source.

    *exact*: they are those of the string literal.  Otherwise *file* is ``FILE:LINE`` of the call, and lines
    are counted from 1 within the source.
    """

    file: str
    line: int
    exact: bool

    @property
    def directive(self) -> str:
        """The preprocessor line to put before the source."""
        escaped = self.file.replace("\\", "\\\\").replace('"', '\\"')
        return f'#line {self.line} "{escaped}"\n'

    @property
    def label(self) -> str:
        """A short name, such as ``test_counter.py:12``."""
        name = Path(self.file).name
        return f"{name}:{self.line}" if self.exact else name

    @property
    def folder(self) -> str | None:
        """The folder that ``#include "..."`` starts from."""
        parent = Path(self.file).parent
        return str(parent) if parent.is_absolute() else None


def caller() -> FrameType | None:
    """Return the innermost frame that is not part of kvmpy itself; its selftests are not."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        ours = module == _PACKAGE or module.startswith(_PACKAGE + ".")
        if not ours or module == _SELFTESTS or module.startswith(_SELFTESTS + "."):
            return frame
        frame = frame.f_back
    return None


def find(source: str, frame: FrameType | None) -> Origin:
    """Return where *source* stands in the file of *frame*: its string literal, else the call."""
    if frame is None:
        return Origin("<guest>", 1, exact=False)
    filename = frame.f_code.co_filename
    return in_file(source, filename, frame.f_lineno)


def in_file(source: str, filename: str, line: int) -> Origin:
    """Return where *source* stands in a file, else that *line* of it."""
    if filename.startswith("<"):
        return Origin(filename, 1, exact=False)
    literal = _literals(filename).line_of(source)
    absolute = str(Path(filename).absolute())
    if literal is not None:
        return Origin(absolute, literal, exact=True)
    return Origin(f"{absolute}:{line}", 1, exact=False)


class _Literals:
    """The multi-line string literals of one Python file, by their value."""

    def __init__(self, text: str) -> None:
        self._lines = text.splitlines()
        self._exact: dict[str, int] = {}
        self._patterns: list[tuple[re.Pattern[str], int]] = []
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return
        for node in _strings(tree):
            if not _follows_its_lines(node):
                continue
            line = self._first_line(node)
            if isinstance(node, ast.Constant):
                self._add(str(node.value), line)
            else:
                self._patterns.append((_pattern(node), line))

    def _add(self, value: str, line: int) -> None:
        self._exact.setdefault(value, line)
        # What tests do to literals that are indented with the code around them.
        self._exact.setdefault(textwrap.dedent(value), line)
        cleaned = inspect.cleandoc(value)
        empty = len(value) - len(value.lstrip("\n"))
        self._exact.setdefault(cleaned, line + empty)

    def _first_line(self, node: ast.expr) -> int:
        # A backslash after the opening quotes makes the value start one line further down.
        opening = self._lines[node.lineno - 1].encode()[node.col_offset :].decode(errors="replace")
        continued = re.fullmatch(r"[A-Za-z]*(\"\"\"|''')\\", opening)
        raw = re.match(r"[A-Za-z]*[rR]", opening)
        return node.lineno + (1 if continued and not raw else 0)

    def line_of(self, source: str) -> int | None:
        line = self._exact.get(source)
        if line is None:
            for pattern, where in self._patterns:
                if pattern.fullmatch(source):
                    line = self._exact[source] = where
                    break
        return line


def _strings(tree: ast.AST) -> Iterator[ast.Constant | ast.JoinedStr]:
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.JoinedStr):
            yield node
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value:
            yield node
        pending.extend(reversed(list(ast.iter_child_nodes(node))))


def _follows_its_lines(node: ast.Constant | ast.JoinedStr) -> bool:
    # With "\\n" inside one line of the file, lines of the value are not lines of the file.
    values = node.values if isinstance(node, ast.JoinedStr) else [node]
    lines = sum(str(part.value).count("\n") for part in values if isinstance(part, ast.Constant))
    return lines <= (node.end_lineno or node.lineno) - node.lineno


def _pattern(node: ast.JoinedStr) -> re.Pattern[str]:
    parts = []
    for value in node.values:
        constant = isinstance(value, ast.Constant) and isinstance(value.value, str)
        # A replacement that spans lines would shift those after it: leave such sources to the call's line.
        parts.append(re.escape(str(value.value)) if constant else "[^\n]*?")  # type: ignore[attr-defined]
    return re.compile("".join(parts))


@functools.lru_cache(maxsize=256)
def _literals(filename: str) -> _Literals:
    return _Literals("".join(linecache.getlines(filename)))
