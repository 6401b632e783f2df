# SPDX-License-Identifier: Apache-2.0
"""Write docs/api.md: every public name of kvmpy by topic, with the first sentence of its docstring.

``public_api.py`` writes the page; ``public_api.py --check`` fails when it is not up to date.
"""

from __future__ import annotations

import inspect
import re
import sys
import types
from pathlib import Path

import kvmpy

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/api.md"

INTRODUCTION = """\
# Public names

What a test or a tool imports from kvmpy: `from kvmpy import Gpa, MakeVm, refused`. These names and
what their docstrings promise stay from one release to the next; every other module may change. The
list is `kvmpy/__init__.pyi`, and this page is made from it (`python ci/public_api.py`). `make docs`
builds the reference of every module with all members.
"""


def summary(value: object) -> str:
    """Return the first sentence of what *value* says of itself."""
    if isinstance(value, int):
        return f"{int(value):#x}"
    if isinstance(value, str):
        return "the program `" + " ".join(value.split()) + "`"
    if isinstance(value, types.UnionType):
        return "any of " + ", ".join(f"`{part.__name__}`" for part in value.__args__)
    if isinstance(value, types.GenericAlias):
        return f"`{value}`"
    text = " ".join((inspect.getdoc(value) or "").split("\n\n", 1)[0].split())
    return re.sub(r"``([^`]*)``|:\w+:`~?([^`]*)`", lambda m: f"`{m[1] or m[2]}`", text)


def page() -> str:
    """Return the whole page."""
    parts = [INTRODUCTION]
    topics = re.split(r"(?m)^# (.+)\n", (ROOT / "kvmpy/__init__.pyi").read_text(encoding="utf-8"))
    for topic, body in zip(topics[1::2], topics[2::2], strict=True):
        names = re.findall(r"(?m)^from \S+ import (\w+) as \1$", body)
        if not names:
            continue
        title = topic.split(":")[0]
        rows = "\n".join(f"| `{name}` | {summary(getattr(kvmpy, name))} |" for name in names)
        parts.append(f"## {title}\n\n| name | what it is |\n|---|---|\n{rows}\n")
    parts.append(
        "Every constant and struct of KVM's user interface is public under the kernel's name, too:\n"
        "`KVM_CAP_IRQCHIP`, `kvm_regs`, ...\n"
    )
    return "\n".join(parts)


def main() -> int:
    """Write the page, or compare it; return the exit status."""
    text = page()
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text(encoding="utf-8") == text:
            return 0
        print(f"{PAGE.relative_to(ROOT)} is not up to date: python ci/public_api.py", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
