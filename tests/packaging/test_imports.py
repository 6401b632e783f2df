# SPDX-License-Identifier: Apache-2.0
"""Imports of the package are import statements, so that the import contracts see each of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "kvmpy"
_IMPORTING = frozenset(
    {"run_module", "run_path", "__import__", "import_module", "import_plugin", "pkgutil", "resolve_name"}
)
_MODULE = re.compile(r"kvmpy(\.[a-z_]\w*)+\.?")

# Where something is imported by name, and why an import statement does not do.
IMPORTING = {
    "__init__.py": "the face imports what it names at first use: --help and the plugin come without the rest",
    "cli/main.py": "a command's module is imported when the command is called",
    "cli/shell.py": "IPython is optional, and no module of kvmpy",
    "lab/frozen.py": "a session imports what tests need before it knows its run, and becomes its command",
    "lab/inside.py": "what a post-mortem imports comes before it is needed, a module at a time between tests",
}

# Where a string names a module, and why.
NAMED = {
    "cli/hardware.py": "a program of its own: python -m",
    "cli/main.py": "a command's module is named after it",
    "debug/record/worker.py": "a program of its own: python -m",
    "fleet/session.py": "a plugin of the session's pytest, on its command line",
    "guest/postmortem.py": "tells the session in the lab which of its imports to make early",
    "lab/frozen.py": "what a session imports before it knows its run",
    "lab/inside.py": "makes them",
    "lab/snapshots.py": "a program of its own: python -m",
    "lab/runs.py": "plugins of the pytest inside, on its command line",
    "testing/itemreports.py": "looked up in sys.modules: whoever raised a MissingError has imported it",
    "uapi/struct_base.py": "the __module__ of generated classes",
}


def importing(source: str) -> Iterator[str]:
    """Yield the functions and modules for imports by name that *source* uses."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
        yield from _IMPORTING.intersection(names)


def named(source: str) -> Iterator[str]:
    """Yield the strings of *source* that are names of modules of this package, or begin one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _MODULE.fullmatch(node.value):
            place = PACKAGE.parent / node.value.replace(".", "/")
            if place.is_dir() or place.with_suffix(".py").is_file():
                yield node.value


def modules(kind: Callable[[str], Iterator[str]]) -> set[str]:
    """Return the files of the package in which *kind* sees something."""
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(kind(path.read_text(encoding="utf-8")))
    }


def test_what_imports_by_name_is_known() -> None:
    assert modules(importing) == set(IMPORTING)


def test_what_names_a_module_in_a_string_is_known() -> None:
    assert modules(named) == set(NAMED)


@pytest.mark.parametrize(
    "source",
    [
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module as load\nload(name)",
        "__import__(name)",
        "load = __builtins__['x'] or __import__",
        "import pkgutil\npkgutil.walk_packages(path)",
        "from runpy import run_module as run",
        "manager.import_plugin(name)",
    ],
)
def test_imports_by_name_are_seen(source: str) -> None:
    assert list(importing(source))


@pytest.mark.parametrize("source", ["load('kvmpy.core.vm')", "load(f'kvmpy.cli.{name}')", "'kvmpy.debug'"])
def test_names_of_modules_are_seen(source: str) -> None:
    assert list(named(source))


@pytest.mark.parametrize(
    "text", ["'see kvmpy.core.vm'", "'kvmpy.no_such'", "import kvmpy.core.vm", "'kvmpy'"]
)
def test_what_names_no_module_is_not(text: str) -> None:
    assert not [*named(text), *importing(text)]
