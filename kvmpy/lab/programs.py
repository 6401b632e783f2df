# SPDX-License-Identifier: Apache-2.0
"""Guest programs for the lab: the session inside asks, the host compiles, where gcc is not emulated."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvmpy.guest import cache
from kvmpy.guest import program as guest_program

# The host's cache of guest programs, as it is to be seen inside.
CACHE_VARIABLE = "KVMPY_LAB_PROGRAMS"
EVENT = "program"
_SECONDS = 60.0
_FLAG = re.compile(
    r"-(?:[DU]\w+(?:=[^\x00]*)?|[Og][0-3gs]?|W(?:no-)?[a-z][\w+=-]*|m[\w.=-]+|f(?!plugin)[\w=-]+|std=[\w+]+)"
)
_POLL = 0.01


def answer(folder: Path, key: str, recipe: Mapping[str, Any]) -> None:
    """Do what *recipe* asks for the entry *key* of the host's cache, and say so in *folder*.

    Where that fails, the session inside does it itself, with the messages that its test may wait for.
    """
    try:
        same = harmless(recipe) and guest_program.build_recipe(recipe) == key
    except Exception:  # noqa: BLE001 - whatever is wrong with the program is told inside
        same = False
    folder.mkdir(exist_ok=True)
    _marker(folder, key, recipe).write_text("1" if same else "0", encoding="ascii")


def _marker(folder: Path, key: str, recipe: Mapping[str, Any]) -> Path:
    return folder / (f"{key}-lines" if "lines" in recipe else key)


def harmless(recipe: Mapping[str, Any]) -> bool:
    """Whether gcc's options in *recipe* are of the kinds that run no program and name no file of the host."""
    return all(_FLAG.fullmatch(flag) for flag in recipe.get("cflags", ()))


def ask(write: Callable[[dict[str, Any]], None], folder: Path, key: str, recipe: Mapping[str, Any]) -> None:
    """Have the host do what *recipe* asks for the program *key*, which is put into the cache."""
    programs = os.environ.get(CACHE_VARIABLE)
    if not programs:
        return
    write({"event": EVENT, "key": key, "recipe": dict(recipe)})
    marker = _marker(folder, key, recipe)
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        try:
            text = marker.read_text(encoding="ascii")
        except FileNotFoundError:
            text = ""
        if text:
            break
        time.sleep(_POLL)
    target = cache.entry(key)
    if text == "1" and not target.exists():
        target.symlink_to(Path(programs) / key)
