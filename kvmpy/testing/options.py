# SPDX-License-Identifier: Apache-2.0
"""The plugin's options (of kvmpy/testing/option_table.py), ini settings and markers, and their values."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvmpy.guest.defaults import DEFAULT_DEADLINE
from kvmpy.testing.host import platform_name
from kvmpy.testing.option_table import LOAD_SECONDS, OF_PYTEST, OPTIONS, SEED_BITS

LEAK_MODES = ("all", "kvm", "off")
# Seconds.
TIMEOUT_BEYOND = 60.0
# What the controlling process hands to its xdist workers.
WORKER_SEED = "kvmpy_seed"

MARKERS = (
    "requires(*needs): what the test needs: 'KVM_CAP_X', 'ioctl:KVM_X', 'param:kvm.name=Y', a callable, ...",
    "protections(*names): run the test once under each named protection, or under 'all' of them",
    "dangerous(unless=FIX): could crash a host without FIX; runs with --run-dangerous, named or in the lab",
    "deadline(seconds): how long this test's guests may run without an exit the test waits for",
)


@dataclass(frozen=True)
class Settings:
    """The values of one session.

    ``deadline`` and ``load_seconds`` are in seconds; ``protections`` None means all; ``about_protections``
    says why ``auto`` stands for which.
    """

    seed: int
    deadline: float
    load_seconds: float
    protections: tuple[str, ...] | None
    about_protections: tuple[str, ...]
    run_dangerous: bool
    strict_private: bool
    fail_allocations: bool
    suite: bool
    table: bool
    leaks: str
    json: Path | None
    ktap: Path | None
    html: Path | None
    evidence: bool
    timeline: Path | None
    journal: Path | None
    errata: tuple[Path, ...]
    configurations: tuple[Path, ...]


SETTINGS = pytest.StashKey[Settings]()


def add_options(parser: pytest.Parser) -> None:
    """Declare the plugin's options of the table, and its ini settings."""
    group = parser.getgroup("kvmpy", "KVM tests")
    for option in OPTIONS:
        if not option.pytest or not option.own:
            continue
        about = option.help[0].lower() + option.help[1:].removesuffix(".")
        keywords: dict[str, Any] = {"help": argparse.SUPPRESS if option.hidden else about}
        if option.kind == "flag":
            keywords["action"] = "store_true"
        elif isinstance(option.kind, tuple):
            keywords["choices"] = option.kind
        else:
            keywords["metavar"] = option.metavar
            if callable(option.kind):
                keywords["type"] = _argument(option.kind)
            if option.repeated:
                keywords |= {"action": "append", "default": []}
        group.addoption(option.pytest, **keywords)
    parser.addini("kvmpy_suite", "this is a suite of KVM tests: host header and verdict table", "bool", False)
    parser.addini(
        "kvmpy_leaks",
        "which tests are checked for leaks: all, kvm (those that use kvmpy's fixtures or markers), off",
        default="kvm",
    )


def _argument(parse: Callable[[str], object]) -> Callable[[str], object]:
    def convert(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def chosen(config: pytest.Config, name: str) -> Any:
    """Return the value of the option that the table calls *name*, None where it was not given."""
    return config.getoption(OF_PYTEST[name])


def widen_timeout(item: pytest.Item) -> None:
    """Keep the time-out, the outer net, well beyond a test's own deadline."""
    marker = item.get_closest_marker("deadline")
    # A test goes on for longer than it was told by what its last turn takes.
    loaded = "load_seconds" in getattr(item, "fixturenames", ())
    load = float(chosen(item.config, "load_seconds") or 0) if loaded else 0.0
    if (marker is None and not load) or item.get_closest_marker("timeout") is not None:
        return
    least = TIMEOUT_BEYOND + (0.0 if marker is None else 2 * float(marker.args[0])) + 2 * load
    if float(item.config.getini("timeout") or least) < least:
        item.add_marker(pytest.mark.timeout(least))


def _path(config: pytest.Config, name: str) -> Path | None:
    """Return the file that an option names; one that can never be written is told before any test runs."""
    value = chosen(config, name)
    if not value:
        return None
    path = Path(value).absolute()
    if path.is_dir():
        raise pytest.UsageError(f"{OF_PYTEST[name]}: {path} is a folder; a file is expected")
    return path


def read_settings(config: pytest.Config) -> Settings:
    """Return the session's settings; picks the seed when none was given."""
    seed = getattr(config, "workerinput", {}).get(WORKER_SEED, chosen(config, "seed"))
    if seed is None:
        seed = secrets.randbits(SEED_BITS)
    leaks = str(config.getini("kvmpy_leaks"))
    if leaks not in LEAK_MODES:
        raise pytest.UsageError(f"kvmpy_leaks = {leaks}: choose from {', '.join(LEAK_MODES)}")
    wanted = chosen(config, "protection")
    suite = bool(config.getini("kvmpy_suite"))
    protections: tuple[str, ...] | None = None
    about: tuple[str, ...] = ()
    if wanted is not None:
        from kvmpy.coco import ladder
        from kvmpy.testing.protections import parse_option, resolve_auto

        names, about = resolve_auto(parse_option(wanted, ladder.protections()))
        protections = tuple(names)
    return Settings(
        seed=seed,
        deadline=chosen(config, "deadline") or DEFAULT_DEADLINE,
        load_seconds=chosen(config, "load_seconds") or LOAD_SECONDS,
        protections=protections,
        about_protections=about,
        run_dangerous=chosen(config, "dangerous") or platform_name() != "host",
        strict_private=chosen(config, "strict_private"),
        fail_allocations=chosen(config, "fail_allocations"),
        suite=suite,
        table=suite or chosen(config, "table"),
        leaks=leaks,
        json=_path(config, "json"),
        ktap=_path(config, "ktap"),
        html=_path(config, "html"),
        timeline=_path(config, "timeline"),
        evidence=bool(chosen(config, "evidence") or chosen(config, "html")),
        journal=_path(config, "journal"),
        errata=tuple(Path(name).absolute() for name in chosen(config, "errata")),
        configurations=tuple(Path(name).absolute() for name in chosen(config, "configurations")),
    )
