# SPDX-License-Identifier: Apache-2.0
"""What the shell offers for arguments that are names: protections, kernels, configurations, tests.

A completion that fails offers nothing: nobody looks for a traceback behind the Tab key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from kvmpy.testing import naming

if TYPE_CHECKING:
    Complete = Callable[[click.Context, click.Parameter, str], "list[CompletionItem]"]


def _protections() -> Iterable[str]:
    from kvmpy.coco import ladder

    return ("auto", *ladder.protections())


def _kernels() -> Iterable[str]:
    from kvmpy.lab import kernels

    return [kernel.name for kernel in kernels.cached()]


def _configurations() -> Iterable[str]:
    from kvmpy.testing import configurations

    return configurations.load()


def _of(names: Callable[[], Iterable[str]]) -> Complete:
    def complete(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, part = incomplete.rpartition(",")
        try:
            return [CompletionItem(f"{before}{comma}{name}") for name in names() if name.startswith(part)]
        except Exception:  # noqa: BLE001 - see above
            return []

    return complete


OF_OPTION: dict[str, Complete] = {
    "protection": _of(_protections),
    "kernel": _of(_kernels),
    "configuration": _of(_configurations),
}
"""By the option's name; lists have commas between their parts."""


def _below(folder: Path, suite: Path) -> Iterable[str]:
    for path in sorted(folder.iterdir()):
        name = str(path.relative_to(suite))
        if path.is_dir() and any(path.glob("test_*.py")):
            yield f"{name}/"
        elif path.match("test_*.py"):
            yield name


def tests(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer areas and files of the suite, and files of the user's own."""
    suite = naming.suite_folder()
    items = [CompletionItem(incomplete, type="file")]
    if suite is None:
        return items
    area = suite / incomplete.rpartition("/")[0]
    names = _below(area, suite) if area.is_dir() and suite in (area, *area.parents) else ()
    return [*(CompletionItem(name) for name in names if name.startswith(incomplete)), *items]
