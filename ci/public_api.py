# SPDX-License-Identifier: Apache-2.0
"""Write docs/api.md: every public name of kvmpy by topic, with the first sentence of its docstring.

``public_api.py`` writes the page; ``public_api.py --check`` fails when it is not up to date.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
import types
from pathlib import Path

import kvmpy
from kvmpy.core.topic import Topic, topic

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/api.md"

INTRODUCTION = """\
# Public names

What a test or a tool imports from kvmpy: `from kvmpy import Gpa, MakeVm, refused`. These names and
what their docstrings promise stay from one release to the next; every other module may change. The
list is `kvmpy/__init__.pyi`, and this page is made from it (`python ci/public_api.py`). `make docs`
builds the reference of every module with all members.
"""

MEMBERS = """\
## What a VM and a vCPU can do

What belongs to a topic stands behind that topic. A method is named after its ioctl, less what the
topic says already: KVM_GET_LAPIC is `vcpu.lapic.get()`, KVM_RESET_DIRTY_RINGS
`vm.dirty.reset_rings()`. What most tests use is direct. A bare `Vm` and `Vcpu` have the same
topics, but for `private`.

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


def members(cls: type) -> set[str]:
    """Return the public members of *cls*: those of the class, and what its __init__ sets."""
    found = {name for name in dir(cls) if not name.startswith("_")}
    for base in cls.__mro__:
        init = base.__dict__.get("__init__")
        if isinstance(init, types.FunctionType):
            found |= set(re.findall(r"self\.([a-z]\w*)\b[^=(\n]* = ", inspect.getsource(init)))
    return found


def topics_of(name: str, cls: type) -> str:
    """Return what *cls* can do: its own members, those of every descriptor, and the topics with theirs."""
    topics = {key: kind for key in dir(cls) if isinstance(kind := getattr(cls, key), topic)}
    descriptor = members(kvmpy.KvmFd)
    own = sorted(members(cls) - set(topics) - descriptor)
    rows = [
        f"| `{name}.{key}` | {summary(kind.kind)} | "
        + ", ".join(f"`{each}`" for each in sorted(members(kind.kind) - members(Topic)))
        + " |"
        for key, kind in topics.items()
    ]
    count = f"{len(own)} members, those of a descriptor and {len(topics)} topics"
    head = f"`{name}`, a `{cls.__name__}`, has {count}:"
    direct = textwrap.fill(", ".join(f"`{each}`" for each in own) + ".", 100)
    table = "\n".join(["| topic | about | members |", "|---|---|---|", *rows])
    return f"{head}\n\n{direct}\n\n{table}\n"


def page() -> str:
    """Return the whole page."""
    parts = [INTRODUCTION]
    topics = re.split(r"(?m)^# (.+)\n", (ROOT / "kvmpy/__init__.pyi").read_text(encoding="utf-8"))
    for title, body in zip(topics[1::2], topics[2::2], strict=True):
        names = re.findall(r"(?m)^from \S+ import (\w+) as \1$", body)
        if not names:
            continue
        rows = "\n".join(f"| `{name}` | {summary(getattr(kvmpy, name))} |" for name in names)
        parts.append(f"## {title.split(':')[0]}\n\n| name | what it is |\n|---|---|\n{rows}\n")
    every = ", ".join(f"`{each}`" for each in sorted(members(kvmpy.KvmFd)))
    parts.append(MEMBERS + textwrap.fill(f"Every descriptor has {every}.", 100) + "\n")
    parts += [topics_of("vm", kvmpy.GuestVm), topics_of("vcpu", kvmpy.GuestVcpu)]
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
