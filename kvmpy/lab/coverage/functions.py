# SPDX-License-Identifier: Apache-2.0
"""The functions of a source in the kernel's style, without compiling it. Pure."""

from __future__ import annotations

import re

_FUNCTION_NAME = re.compile(r"(\w+)\s*\(")
_MADE_NAME = re.compile(r"\b[A-Z]+\((\w+)\)\s*\(")
_ATTRIBUTE = re.compile(r"__attribute__\s*\(\(.*?\)\)|\b__\w+\s*\([^()]*\)\s*(?=\w)")


def functions_of(text: str) -> list[tuple[int, int, str]]:
    """Return first line, last line and name of each function of a source in the kernel's style.

    Where a macro makes the name, as FNAME() of KVM's page tables, it begins with ``*``.
    """
    lines = text.split("\n")
    found = []
    end = -1
    for number, line in enumerate(lines):
        if number <= end or not (line.startswith("{") or line.endswith(") {")):
            continue
        # What goes on is indented.
        start = number - line.startswith("{")
        while start > 0 and lines[start].startswith(("\t", " ")):
            start -= 1
        head = _ATTRIBUTE.sub("", " ".join(lines[start : number + 1]))
        end = next((last for last in range(number, len(lines)) if lines[last].startswith("}")), number)
        if match := _MADE_NAME.search(head):
            found.append((start + 1, end + 1, f"*_{match[1]}"))
        elif match := _FUNCTION_NAME.search(head):
            found.append((start + 1, end + 1, match[1]))
    return found
