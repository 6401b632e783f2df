# SPDX-License-Identifier: Apache-2.0
"""Changes a kernel tree by its structure: copies files, and puts code beside or around the kernel's own."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvmpy.lab.errors import BuildError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PLACES = ("after-includes", "append", "before", "after", "around")
OWN = "@@"
"""In the text of a hook that goes around an expression: the kernel's own."""
SOFTWARE_SP = "softsev"
BUG = "bug"
OWNERS = {
    SOFTWARE_SP: "this kernel differs from those that the software AMD-SP knows; see kernel/hooks.toml",
    BUG: "this kernel differs from those that the bug catalogue knows",
}
"""Whose hooks there are, as the comments around each say, and what a hook that does not fit means."""
_HASH_COMMENTS = ("Makefile", "Kbuild", "Kconfig")
_INCLUDE = re.compile(r"^#\s*include\b", re.MULTILINE)
_CONDITION = re.compile(r"^#\s*(if|endif)", re.MULTILINE)


class HookError(BuildError):
    """A tree that the hooks do not fit; the message names the hook."""


@dataclass(frozen=True)
class Hook:
    """Code that goes beside a line of the kernel's, or around an expression.

    The head of softsev/kernel/hooks.toml has the fields; *owner* is one of OWNERS.
    """

    name: str
    file: str
    place: str
    text: str
    anchor: str = ""
    scope: str = ""
    when: str = ""
    needs: Sequence[str] = field(default=())
    owner: str = SOFTWARE_SP

    @property
    def mark(self) -> str:
        """The comment before what is inserted: it names the hook and this version of it."""
        body = self.text.strip("\n")
        digest = hashlib.sha256(f"{self.place}\0{self.anchor}\0{body}".encode()).hexdigest()[:8]
        return self._comment(f"{self.name} {digest}")

    def _comment(self, words: str) -> str:
        if Path(self.file).name in _HASH_COMMENTS:
            return f"# {self.owner}: {words}"
        return f"/* {self.owner}: {words} */"

    @property
    def lines(self) -> str:
        """What is inserted, between two comments."""
        body = self.text.strip("\n")
        return f"{self.mark}\n{body}\n{self._comment(f'end of {self.name}')}\n"

    def _around(self, own: str) -> str:
        """Return the kernel's *own* code within the hook's; the comments let :func:`without` take it off."""
        before, _, after = self.text.strip("\n").partition(OWN)
        start, stop = self._comment(f"around {self.name}"), self._comment(f"within {self.name}")
        return f"{self.mark}{before}{start}{own}{stop}{after}{self._comment(f'end of {self.name}')}"

    def _fail(self, why: str) -> HookError:
        return HookError(
            f"hook {self.name} does not fit {self.file}: {why}",
            OWNERS[self.owner],
        )

    def check(self) -> None:
        """Raise HookError where the fields do not go together."""
        if self.place not in PLACES:
            raise HookError(f"hook {self.name}: {self.place!r} is not a place")
        if self.place in {"before", "after", "around"} and not self.anchor:
            raise HookError(f"hook {self.name} has no anchor")
        if self.place == "around" and (self.text.count(OWN) != 1 or "\n" in self.text.strip("\n")):
            raise HookError(f"hook {self.name}: one line is expected, with {OWN} for the kernel's own code")

    def _scope(self, source: str) -> tuple[int, int]:
        if not self.scope:
            return 0, len(source)
        starts = [
            match.start()
            for match in re.finditer(self.scope, source, re.MULTILINE)
            if not _is_declaration(source, match.start())
        ]
        if len(starts) != 1:
            raise self._fail(f"{len(starts)} places begin like {self.scope}, not one")
        end = re.compile(r"^\}", re.MULTILINE).search(source, starts[0])
        if end is None:
            raise self._fail(f"what begins like {self.scope} does not end")
        return starts[0], end.start()

    def _match(self, source: str) -> re.Match[str]:
        start, end = self._scope(source)
        matches = list(re.compile(self.anchor, re.MULTILINE).finditer(source, start, end))
        if not matches:
            raise self._fail(f"nothing there is like {self.anchor}")
        if len(matches) > 1:
            raise self._fail(f"{len(matches)} lines are like {self.anchor}, and it must be one")
        return matches[0]

    def _position(self, source: str) -> int:
        if self.place == "append":
            return len(source)
        if self.place == "after-includes":
            return _after_includes(source, self._fail)
        match = self._match(source)
        if self.place == "before":
            return source.rfind("\n", 0, match.start() + 1) + 1
        return source.find("\n", match.end() - 1) + 1

    def insert(self, source: str) -> str:
        """Return the file's text with the lines; unchanged when they are there, or not for this tree."""
        if self.mark in source:
            return source
        if re.search(rf"{self.owner}: {re.escape(self.name)} ", source):
            raise HookError(
                f"{self.file} has hook {self.name} of another version of kvmpy", "start from a clean tree"
            )
        if self.when and not re.search(self.when, source, re.MULTILINE):
            return source
        for pattern in self.needs:
            if not re.search(pattern, source, re.MULTILINE):
                raise self._fail(f"nothing there is like {pattern}")
        if self.place == "around":
            match = self._match(source)
            return source[: match.start()] + self._around(match.group()) + source[match.end() :]
        offset = self._position(source)
        head = source[:offset]
        if head and not head.endswith("\n"):
            head += "\n"
        return head + self.lines + source[offset:]


_MARK = rf"(?:{'|'.join(OWNERS)}): "
_LINES = re.compile(
    rf"^/\* {_MARK}(\S+) [0-9a-f]{{8}} \*/\n(?:.*\n)*?/\* {_MARK}end of \1 \*/\n", re.MULTILINE
)
_AROUND = re.compile(
    rf"/\* {_MARK}(\S+) [0-9a-f]{{8}} \*/.*?/\* {_MARK}around \1 \*/(.*?)/\* {_MARK}within \1 \*/.*?"
    rf"/\* {_MARK}end of \1 \*/",
    re.DOTALL,
)


def without(source: str) -> str:
    """Return a C source as it was before the hooks."""
    while (bare := _AROUND.sub(r"\2", _LINES.sub("", source))) != source:
        source = bare
    return source


def _is_declaration(source: str, start: int) -> bool:
    """Whether what begins at *start* ends with a semicolon before any brace: a prototype."""
    brace, semicolon = source.find("{", start), source.find(";", start)
    return semicolon != -1 and (brace == -1 or semicolon < brace)


def _after_includes(source: str, fail: Any) -> int:
    """Return the position after the last #include that stands outside of any #if."""
    depth = 0
    last = -1
    for line in re.finditer(r"^.*\n", source, re.MULTILINE):
        text = line.group()
        if condition := _CONDITION.match(text):
            depth += 1 if condition[1] == "if" else -1
        elif depth == 0 and _INCLUDE.match(text):
            last = line.end()
    if last < 0:
        raise fail("it includes nothing")
    return last


@dataclass(frozen=True)
class Copy:
    """A file, or the files of a folder, that come into the tree."""

    source: Path
    target: str

    def files(self) -> dict[str, Path]:
        """The file behind each one that comes into the tree, by its place there."""
        if not self.source.is_dir():
            return {self.target: self.source}
        return {f"{self.target}/{file.name}": file for file in sorted(self.source.iterdir())}

    def apply(self, tree: Path) -> None:
        """Copy what differs, so that a second build compiles only that."""
        for name, source in self.files().items():
            target = tree / name
            if target.is_file() and target.read_bytes() == source.read_bytes():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


Snapshot = dict[str, tuple[bytes, int]]


@dataclass(frozen=True)
class HookList:
    """All that is done to a tree."""

    copies: Sequence[Copy]
    hooks: Sequence[Hook]

    @classmethod
    def load(cls, folder: Path, owner: str = SOFTWARE_SP) -> HookList:
        """Read ``hooks.toml`` of *folder*."""
        data = tomllib.loads((folder / "hooks.toml").read_text(encoding="utf-8"))
        hooks = [Hook(**entry, owner=owner) for entry in data.get("hook", [])]
        for hook in hooks:
            hook.check()
        return cls([Copy(folder / entry["from"], entry["to"]) for entry in data.get("copy", [])], hooks)

    def apply(self, tree: Path) -> list[str]:
        """Change *tree*, or nothing of it when a hook does not fit; return the names of the hooks put in."""
        texts: dict[str, str] = {}
        done = []
        for hook in self.hooks:
            path = tree / hook.file
            if hook.file not in texts:
                try:
                    texts[hook.file] = path.read_text(encoding="utf-8")
                except FileNotFoundError as error:
                    raise HookError(f"hook {hook.name}: this tree has no {hook.file}") from error
            changed = hook.insert(texts[hook.file])
            if changed != texts[hook.file]:
                done.append(hook.name)
            texts[hook.file] = changed
        for name, text in texts.items():
            path = tree / name
            if path.read_text(encoding="utf-8") != text:
                # A new file, since the old one may be a hard link into somebody's tree.
                path.unlink()
                path.write_text(text, encoding="utf-8")
        for copy in self.copies:
            copy.apply(tree)
        return done

    def snapshot(self, tree: Path) -> Snapshot:
        """Return content and time of what the list changes in *tree*, or brings there; {} without a tree."""
        names = [hook.file for hook in self.hooks]
        for copy in self.copies:
            names += copy.files()
        paths = {name: tree / name for name in names if (tree / name).is_file()}
        return {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in paths.items()}

    def keep_times(self, tree: Path, before: Snapshot) -> None:
        """Give each file of *tree* that is as it was *before* its time of then: make compiles the rest."""
        for name, (content, time) in before.items():
            path = tree / name
            if path.is_file() and path.read_bytes() == content:
                os.utime(path, ns=(time, time))
