# SPDX-License-Identifier: Apache-2.0
"""The entries of the catalogue, and the kernel tree that gets them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvmpy.lab.errors import LabError
from kvmpy.lab.hooks import BUG, Hook, HookError, HookList, Snapshot

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).resolve().parent / "kernel"
PROOFS = FOLDER.parent / "proofs"
# The numbers that the kernel's parameter can hold.
LAST_NUMBER = 255
SWITCH = "$BUG"
"""In a hook: whether the bug is on."""
_FUNCTION = re.compile(r"(\w+)\\\(")


@dataclass(frozen=True)
class Bug:
    """One bug: *wrong* says what was wrong, *fix* is the subject of the commit that fixed it.

    *commit* is that commit's id, as far as it is known; *since* the first release with the fix.  *visible*
    says what user space or a guest could see, *conditions* what it takes beside, of which *parameters* are
    kernel parameters.
    """

    number: int
    name: str
    area: str
    wrong: str
    fix: str
    commit: str
    since: str
    visible: str
    hooks: tuple[Hook, ...]
    cve: str = ""
    conditions: str = ""
    parameters: tuple[str, ...] = ()

    @property
    def functions(self) -> list[tuple[str, str]]:
        """The file and name of each function that changes."""
        found = [(hook.file, match[1]) for hook in self.hooks if (match := _FUNCTION.search(hook.scope))]
        return list(dict.fromkeys(found))

    @property
    def title(self) -> str:
        """Number and name."""
        return f"{self.number} {self.name}"


def _parse(file: Path) -> list[Bug]:
    bugs = []
    for entry in tomllib.loads(file.read_text(encoding="utf-8"))["bug"]:
        number = entry["number"]
        hooks = []
        for index, fields in enumerate(entry.pop("hook"), 1):
            text = fields.pop("text").replace(SWITCH, f"kvm_bug({number})")
            hooks.append(Hook(f"{number}-{index}", text=text, owner=BUG, **fields))
        try:
            parameters = tuple(entry.pop("parameters", ()))
            bug = Bug(area=file.stem, hooks=tuple(hooks), parameters=parameters, **entry)
        except TypeError as error:
            raise LabError(f"{file.name}, bug {number}: {error}") from None
        for hook in bug.hooks:
            hook.check()
            if f"kvm_bug({number})" not in hook.text and not hook.text.startswith("#include "):
                raise HookError(f"hook {hook.name} is not behind {SWITCH}")
        bugs.append(bug)
    return bugs


@cache
def load() -> dict[int, Bug]:
    """Return the catalogue by number; LabError where an entry is wrong."""
    bugs = [bug for file in sorted((FOLDER / "catalogue").glob("*.toml")) for bug in _parse(file)]
    known: dict[int, Bug] = {}
    for bug in bugs:
        if not 1 <= bug.number <= LAST_NUMBER or bug.number in known:
            raise LabError(f"bug {bug.title}: the number is taken, or not from 1 to {LAST_NUMBER}")
        known[bug.number] = bug
    return dict(sorted(known.items()))


def chosen(wanted: Sequence[str]) -> list[Bug]:
    """Return the bugs that *wanted* names: numbers, ranges such as 3-7, names, or areas; all for none."""
    known = load()
    if not wanted:
        return list(known.values())
    numbers: set[int] = set()
    for word in wanted:
        first, _, last = word.partition("-")
        if first.isdigit() and (last.isdigit() or not last):
            found = {number for number in known if int(first) <= number <= int(last or first)}
        else:
            found = {bug.number for bug in known.values() if word in (bug.name, bug.area)}
        if not found:
            areas = ", ".join(sorted({bug.area for bug in known.values()}))
            raise LabError(f"the catalogue has no bug {word}", f"numbers, names, or one of the areas {areas}")
        numbers |= found
    return [known[number] for number in sorted(numbers)]


def lists() -> list[HookList]:
    """Return what goes into a tree: first what all bugs need, then one list for each bug."""
    common = HookList.load(FOLDER, BUG)
    return [common, *(HookList([], bug.hooks) for bug in load().values())]


def snapshot(tree: Path) -> Snapshot:
    """Return what :func:`apply` made of *tree*, which need not exist: content and times of its files."""
    found: Snapshot = {}
    for each in lists():
        found |= each.snapshot(tree)
    return found


def apply(tree: Path, say: Callable[[str], None], before: Snapshot | None = None) -> list[int]:
    """Put the bugs into the kernel tree *tree*, and return their numbers.

    A bug whose hooks do not fit is told and left out.  HookError where there can be none at all.  *before* is
    as in :func:`kvmpy.lab.softsev.apply`.
    """
    common, *_ = everything = lists()
    common.apply(tree)
    numbers = []
    for bug, hooks in zip(load().values(), everything[1:], strict=True):
        try:
            hooks.apply(tree)
        except HookError as error:
            say(f"bug {bug.title} is left out: {error.what}")
        else:
            numbers.append(bug.number)
    for hooks in everything:
        hooks.keep_times(tree, before or {})
    return numbers
