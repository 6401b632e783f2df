# SPDX-License-Identifier: Apache-2.0
"""Command-line options, ini settings and markers of the plugin, and their values in one object."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvmpy.testing.host import platform_name

DEFAULT_DEADLINE = 20.0
LEAK_MODES = ("all", "kvm", "off")
SEED_BITS = 32
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

    ``deadline`` is in seconds; ``protections`` None means all; ``about_protections`` says why ``auto`` stands
    for which.
    """

    seed: int
    deadline: float
    protections: tuple[str, ...] | None
    about_protections: tuple[str, ...]
    run_dangerous: bool
    strict_private: bool
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


SETTINGS = pytest.StashKey[Settings]()


def _positive(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise ValueError("a deadline is a positive number of seconds")
    return value


def _number(text: str) -> int:
    value = int(text, 0)
    if not 0 <= value < 1 << SEED_BITS:
        raise ValueError(f"a seed is a number from 0 to 2**{SEED_BITS} - 1")
    return value


def add_options(parser: pytest.Parser) -> None:
    """Declare options and ini settings."""
    group = parser.getgroup("kvmpy", "KVM tests")
    group.addoption(
        "--protection",
        metavar="P[,P]",
        help="leave out the items under other protections; auto: the strongest here",
    )
    group.addoption(
        "--deadline",
        type=_positive,
        default=DEFAULT_DEADLINE,
        metavar="SECONDS",
        help=f"how long a guest may run without a wanted exit (default {DEFAULT_DEADLINE:g})",
    )
    group.addoption(
        "--kvmpy-seed",
        type=_number,
        metavar="N",
        help="repeat a session's random choices (default: a new seed)",
    )
    group.addoption("--kvmpy-json", metavar="FILE", help="write the verdicts as JSON")
    group.addoption("--ktap", metavar="FILE", help="write the verdicts as KTAP version 1")
    group.addoption("--kvmpy-html", metavar="FILE", help="write the verdicts as one HTML page")
    group.addoption(
        "--kvmpy-evidence",
        action="store_true",
        help="keep memory maps of all tests' VMs and the last ioctls of failures (--kvmpy-html does so, too)",
    )
    group.addoption(
        "--kvmpy-timeline", metavar="FILE", help="write what threads and vCPUs did, for Perfetto's viewer"
    )
    group.addoption("--kvmpy-table", action="store_true", help="print the verdict table at the end")
    group.addoption(
        "--run-dangerous", action="store_true", help="also run tests that can crash an unfixed host"
    )
    group.addoption(
        "--strict-private",
        action="store_true",
        help="refuse the host's reads and writes of private pages even where a protection allows them",
    )
    group.addoption(
        "--kvmpy-errata", action="append", default=[], metavar="FILE", help="read one more errata file"
    )
    group.addoption(
        "--kvmpy-journal", metavar="FILE", help="keep every report here, and go on from what it holds"
    )
    group.addoption(
        "--kvmpy-only-report", metavar="WHY", help="run nothing: report what the journal holds, and WHY"
    )
    group.addoption(
        "--kvmpy-ids-from", metavar="DIR", help="name own test files by their path below DIR, not the root's"
    )
    parser.addini("kvmpy_suite", "this is a suite of KVM tests: host header and verdict table", "bool", False)
    parser.addini(
        "kvmpy_leaks",
        "which tests are checked for leaks: all, kvm (those that use kvmpy's fixtures or markers), off",
        default="kvm",
    )


def widen_timeout(item: pytest.Item) -> None:
    """Keep the time-out, the outer net, well beyond a test's own deadline."""
    marker = item.get_closest_marker("deadline")
    if marker is None or item.get_closest_marker("timeout") is not None:
        return
    least = TIMEOUT_BEYOND + 2 * float(marker.args[0])
    if float(item.config.getini("timeout") or least) < least:
        item.add_marker(pytest.mark.timeout(least))


def _path(config: pytest.Config, option: str) -> Path | None:
    """Return the file that an option names; one that can never be written is told before any test runs."""
    value = config.getoption(option)
    if not value:
        return None
    path = Path(value).absolute()
    if path.is_dir():
        raise pytest.UsageError(f"{option}: {path} is a folder; a file is expected")
    return path


def read_settings(config: pytest.Config) -> Settings:
    """Return the session's settings; picks the seed when none was given."""
    seed = getattr(config, "workerinput", {}).get(WORKER_SEED, config.getoption("--kvmpy-seed"))
    if seed is None:
        seed = secrets.randbits(SEED_BITS)
    leaks = str(config.getini("kvmpy_leaks"))
    if leaks not in LEAK_MODES:
        raise pytest.UsageError(f"kvmpy_leaks = {leaks}: choose from {', '.join(LEAK_MODES)}")
    wanted = config.getoption("--protection")
    suite = bool(config.getini("kvmpy_suite"))
    protections: tuple[str, ...] | None = None
    about: tuple[str, ...] = ()
    if wanted is not None:
        from kvmpy.coco import ladder
        from kvmpy.testing.protections import parse_option, resolve_auto

        chosen, about = resolve_auto(parse_option(wanted, ladder.protections()))
        protections = tuple(chosen)
    return Settings(
        seed=seed,
        deadline=config.getoption("--deadline"),
        protections=protections,
        about_protections=about,
        run_dangerous=config.getoption("--run-dangerous") or platform_name() != "host",
        strict_private=config.getoption("--strict-private"),
        suite=suite,
        table=suite or config.getoption("--kvmpy-table"),
        leaks=leaks,
        json=_path(config, "--kvmpy-json"),
        ktap=_path(config, "--ktap"),
        html=_path(config, "--kvmpy-html"),
        timeline=_path(config, "--kvmpy-timeline"),
        evidence=bool(config.getoption("--kvmpy-evidence") or config.getoption("--kvmpy-html")),
        journal=_path(config, "--kvmpy-journal"),
        errata=tuple(Path(name).absolute() for name in config.getoption("--kvmpy-errata")),
    )
