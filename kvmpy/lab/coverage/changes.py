# SPDX-License-Identifier: Apache-2.0
"""Changes of a kernel tree against its coverage: which of the lines that a patch adds no test executes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unidiff.errors import UnidiffParseError
from unidiff.patch import PatchedFile, PatchSet

from kvmpy.lab.coverage.functions import functions_of
from kvmpy.lab.coverage.kept import FOLDERS
from kvmpy.lab.coverage.maps import Map, Test
from kvmpy.lab.coverage.queries import Functions
from kvmpy.lab.errors import LabError

_RANGE = re.compile(r"\S+\.\.\.?\S*")
_NOTHING = re.compile(r"\s*(?:/?\*.*|//.*|[{}();]*)\s*")
_SECONDS = 120.0
_SHOWN_TESTS = 3


def git(tree: Path, *words: str) -> str:
    """Return what git prints for *tree*; LabError with git's first line where it fails."""
    command = ["git", "-C", str(tree), "-c", "core.quotePath=false", *words]
    try:
        result = subprocess.run(command, check=False, capture_output=True, timeout=_SECONDS)
    except FileNotFoundError:
        raise LabError("git is missing", "install it: apt-get install git") from None
    if result.returncode:
        lines = result.stderr.decode("utf-8", "replace").strip().splitlines() or ["it failed"]
        raise LabError(f"git {words[0]} in {tree}: {lines[0]}")
    return result.stdout.decode("utf-8", "replace")


@dataclass(frozen=True)
class Change:
    """A change: its name, its files as unidiff reads them, and the text of a file before and after it."""

    name: str
    files: Sequence[PatchedFile]
    before: Callable[[str], str] | None
    after: Callable[[str], str] | None


def parse(text: str, name: str) -> list[PatchedFile]:
    """Return the files of KVM that a patch changes; LabError for what is no patch, or none of KVM's."""
    try:
        patches = PatchSet(text)
    except UnidiffParseError as error:
        raise LabError(f"{name} is no patch: {error}") from error
    if not patches:
        raise LabError(f"{name} changes nothing, or is no patch")
    found = [file for file in patches if file.path.startswith(tuple(f"{folder}/" for folder in FOLDERS))]
    if not found:
        raise LabError(f"{name} changes nothing in {' and '.join(FOLDERS)}", "that is what is measured")
    return found


def change(what: str, tree: Path | None) -> Change:
    """Return the change *what*: a file with a patch, or ``REV..REV`` of the repository *tree*."""
    path = Path(what)
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        return Change(what, parse(text, what), None, _worktree(tree) if tree is not None else None)
    if not _RANGE.fullmatch(what):
        raise LabError(f"{what} is neither a file with a patch nor REV..REV")
    if tree is None:
        raise LabError(f"{what} is of a repository", "name it: --source TREE")
    old, _, new = what.replace("...", "..").partition("..")
    old, new = old or "HEAD", new or "HEAD"
    text = git(tree, "diff", "--no-color", "--no-ext-diff", "-M", old, new, "--", *FOLDERS)
    if not text.strip():
        raise LabError(f"{what} changes nothing in {' and '.join(FOLDERS)}", "that is what is measured")
    return Change(what, parse(text, what), _revision(tree, old), _revision(tree, new))


def _revision(tree: Path, revision: str) -> Callable[[str], str]:
    return lambda path: git(tree, "show", f"{revision}:{path}")


def _worktree(tree: Path) -> Callable[[str], str]:
    def read(path: str) -> str:
        try:
            return (tree / path).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise LabError(f"{tree / path}: {error.strerror}") from error

    return read


@dataclass(frozen=True)
class Line:
    """An added line: *tests* None where it has no code that was compiled, *function* where it is in one."""

    file: str
    number: int
    text: str
    function: str | None
    tests: Sequence[Test] | None

    @property
    def state(self) -> str:
        """``executed``, ``not executed``, ``no code`` or ``not compiled``."""
        if self.tests is not None:
            return "executed" if self.tests else "not executed"
        return "no code" if self.function or _NOTHING.fullmatch(self.text) else "not compiled"


def judge(known: Map, changed: Change, source: Callable[[str], str | None]) -> list[Line]:
    """Return the lines that a change adds, as *known* has them.

    *source* gives the text of a file that was measured, None for one that was not there. LabError where the
    change is not in it.
    """
    functions = Functions(known)
    lines = []
    for file in changed.files:
        if file.is_removed_file:
            continue
        text = source(file.path)
        if text is None:
            raise LabError(
                f"the measured kernel ({known.kernel}, build id {known.build_id}) has no {file.path}",
                "build and measure the tree with the change in it",
            )
        _same_tree(known, changed, file, text)
        for number, content in _added(known, changed, file, text.split("\n")):
            place = functions.at(file.path, number)
            lines.append(
                Line(
                    file.path,
                    number,
                    content,
                    place[0].name if place else None,
                    known.of_line(file.path, number),
                )
            )
    return lines


def _same_tree(known: Map, changed: Change, file: PatchedFile, measured: str) -> None:
    if changed.after is not None and changed.after(file.path) != measured:
        raise LabError(
            f"{file.path} is not the one that was measured ({known.kernel}, build id {known.build_id})",
            "build and measure this tree: kvmpy lab build --coverage --source TREE",
        )


def _added(
    known: Map, changed: Change, file: PatchedFile, measured: Sequence[str]
) -> Iterator[tuple[int, str]]:
    """Yield number and text of each added line; a patch may fit some lines further up or down."""
    for hunk in file:
        after = [line.value.rstrip("\n") for line in hunk if line.is_context or line.is_added]
        at = _fit(after, measured, hunk.target_start - 1)
        if at is None:
            before = [line.value.rstrip("\n") for line in hunk if line.is_context or line.is_removed]
            unapplied = _fit(before, measured, hunk.source_start - 1) is not None
            why = "is not applied" if unapplied else "does not apply"
            raise LabError(
                f"{changed.name} {why} to the tree that was measured ({known.kernel}, build id "
                f"{known.build_id}): {file.path}, line {hunk.target_start}",
                "build and measure the tree with the change in it" if unapplied else "it is of another tree",
            )
        offset = at - (hunk.target_start - 1)
        for line in hunk:
            if line.is_added and line.target_line_no is not None:
                yield line.target_line_no + offset, line.value.rstrip("\n")


def _fit(wanted: Sequence[str], text: Sequence[str], near: int) -> int | None:
    places = [at for at in range(len(text) - len(wanted) + 1) if text[at : at + len(wanted)] == wanted]
    return min(places, key=lambda at: abs(at - near), default=None)


def summary(known: Map, changed: Change, lines: Sequence[Line]) -> list[str]:
    """Return what one would put into a cover letter: figures, and the lines that no test executes."""
    code = [line for line in lines if line.tests is not None]
    executed = [line for line in code if line.tests]
    tests = {test for line in executed for test in line.tests or ()}
    share = f" ({100 * len(executed) / len(code):.0f} %)" if code else ""
    text = [f"Coverage of {changed.name}: {len(executed)} of {len(code)} added lines with code are executed"]
    text[0] += f"{share}, by {len(tests)} of {len(known.tests)} tests."
    by_function: dict[tuple[str, str], list[Line]] = {}
    for line in code:
        by_function.setdefault((line.file, line.function or "?"), []).append(line)
    for (file, function), found in by_function.items():
        done = sum(bool(line.tests) for line in found)
        text.append(f"  {file}: {function}(): {done} of {len(found)}")
    for state in ("not executed", "not compiled"):
        bad = [line for line in lines if line.state == state]
        text += [f"{state.capitalize()}:"] if bad else []
        text += [f"  {line.file}:{line.number}: {line.text.strip()}" for line in bad]
    text.append(f"Measured on {known.kernel}, build id {known.build_id}.")
    return text


def details(lines: Sequence[Line]) -> list[str]:
    """Return each added line with its state, and some of the tests that execute it."""
    text = []
    for line in lines:
        names = [test.id for test in line.tests or ()]
        more = f", and {len(names) - _SHOWN_TESTS} more" if len(names) > _SHOWN_TESTS else ""
        by = f"  [{', '.join(names[:_SHOWN_TESTS])}{more}]" if names else ""
        text.append(f"{line.file}:{line.number}: {line.state:<12} {line.text.strip()}{by}")
    return text


# ---- functions that change


@dataclass(frozen=True)
class Touched:
    """What a change touches: functions ``(file, name)``, and places outside of functions."""

    functions: frozenset[tuple[str, str]]
    outside: tuple[str, ...]


def touched(changed: Change) -> Touched:
    """Return the functions that a change of a repository touches, as they are named before and after it."""
    functions: set[tuple[str, str]] = set()
    outside: dict[str, None] = {}
    for file in changed.files:
        removed = file.is_removed_file
        sides: Mapping[bool, tuple[str, Callable[[str], str] | None]] = {
            False: (
                (file.source_file or "").removeprefix("a/"),
                None if file.is_added_file else changed.before,
            ),
            True: (file.path, None if removed else changed.after),
        }
        for is_new, (path, read) in sides.items():
            if read is None:
                continue
            known = functions_of(read(path))
            for number, text in _changed_lines(file, is_new):
                name = next((name for first, last, name in known if first <= number <= last), None)
                if name is not None:
                    functions.add((path, name))
                elif not _NOTHING.fullmatch(text):
                    outside[f"{path}:{number}: {text.strip()}"] = None
    return Touched(frozenset(functions), tuple(outside))


def _changed_lines(file: PatchedFile, is_new: bool) -> Iterator[tuple[int, str]]:
    for hunk in file:
        for line in hunk:
            number = line.target_line_no if is_new else line.source_line_no
            if number is not None and (line.is_added if is_new else line.is_removed):
                yield number, line.value
