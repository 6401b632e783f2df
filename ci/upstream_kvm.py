#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs the kernel's own KVM selftests beside kvmpy's tests of the same promises, and tells where they differ.

Which of kvmpy's tests belong to which program stands in the table of docs/from-upstream.md; disagreements
that are understood stand in ci/upstream_differences.toml.  The source is Debian's linux-source, or a tree
given with --source; what is built stays in the lab's cache.

Exit status: 0 if something explains each disagreement, 1 if not, 2 for a wrong command line, 3 if nothing
could be built or run.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmpy.lab import debian, places, tools
from kvmpy.lab.errors import LabError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "from-upstream.md"
DIFFERENCES = ROOT / "ci" / "upstream_differences.toml"
SELFTESTS = Path("tools/testing/selftests/kvm")
NEEDS = (*tools.BUILD, *tools.DEBIAN, tools.Tool("rsync", "rsync", "rsync"))
# They read the encryption bit's position with the CPUID instruction, which an emulated CPU does not answer.
READ_BY_CPU = "this_cpu_property(X86_PROPERTY_SEV_C_BIT)"
READ_BY_KVM = "kvm_cpu_property(X86_PROPERTY_SEV_C_BIT)"
BUILD_SECONDS = 3000.0
# A row: the program, kvmpy's tests, how much of it they cover.
ROW = re.compile(r"^\| `(?P<program>[\w/]+)` \| (?P<tests>`.+`) \| (?P<covers>[^|]+) \|$", re.MULTILINE)
BAD, XFAIL, PASS, SKIP = "fails", "fails as expected", "passes", "does not run"

RUNNER = """\
# SPDX-License-Identifier: Apache-2.0
import subprocess

import pytest


@pytest.mark.timeout({seconds} + 30)
@pytest.mark.parametrize("program", {programs!r})
def test_upstream(program):
    try:
        result = subprocess.run(
            ["{output}/" + program],
            cwd="/",
            capture_output=True,
            text=True,
            errors="replace",
            timeout={seconds},
        )
    except subprocess.TimeoutExpired:
        pytest.skip("not at its end after {seconds} s")
    print(result.stdout[-4000:], result.stderr[-4000:])
    if result.returncode == 4:
        lines = (result.stdout + result.stderr).strip().splitlines()
        pytest.skip(lines[-1] if lines else "skipped by the program")
    lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    told = [line for line in lines if ".c:" in line] or lines or ["no word"]
    if result.returncode:
        pytest.fail(told[0], pytrace=False)
"""


def say(text: str) -> None:
    """Tell what is being done."""
    print(f"upstream: {text}", file=sys.stderr, flush=True)


# ---- what belongs together


def counterparts(text: str) -> dict[str, list[str]]:
    """Return kvmpy's tests of each program, from the table of docs/from-upstream.md.

    A file without a folder is in the folder of the one before it.
    """
    found: dict[str, list[str]] = {}
    for row in ROW.finditer(text):
        folder, tests = "", []
        for name in re.findall(r"`([^`]+)`", row["tests"]):
            before, slash, _ = name.rpartition("/")
            folder = before if slash else folder
            tests.append(name if slash else f"{folder}/{name}")
        found[row["program"]] = tests
    return found


@dataclass(frozen=True)
class Difference:
    """A disagreement that is understood: the program, the platforms where it shows, and why."""

    program: str
    platform: str
    why: str


def differences() -> list[Difference]:
    """Read them."""
    entries = tomllib.loads(DIFFERENCES.read_text(encoding="utf-8")).get("difference", [])
    return [Difference(entry["program"], entry["platform"], entry["why"]) for entry in entries]


# ---- building


def adapt(tree: Path) -> None:
    """Let the tests ask KVM for the position of the encryption bit."""
    found = False
    for file in (tree / SELFTESTS / "lib").rglob("processor.c"):
        text = file.read_text(encoding="utf-8")
        if READ_BY_CPU in text:
            file.unlink()
            file.write_text(text.replace(READ_BY_CPU, READ_BY_KVM), encoding="utf-8")
        found = found or READ_BY_CPU in text or READ_BY_KVM in text
    if not found:
        raise LabError(f"nothing in {tree / SELFTESTS} reads the position of the encryption bit as expected")


def from_debian(suite: str) -> Path:
    """Return an adapted tree of the newest source of *suite*."""
    source = debian.Suite(suite)
    source.update(say)
    package = source.package()
    deb = source.download(package, say)
    return debian.unpack(deb, package, say, "-selftests", lambda tree, _: adapt(tree))


def from_tree(source: Path) -> Path:
    """Return an adapted copy of what the tests need of a developer's tree."""
    copy = places.cache() / "trees" / "selftests-of-a-tree"
    say(f"copying {source}")
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    for name in ("Makefile", "Kbuild", "Kconfig", "arch", "include", "scripts", "tools", "usr"):
        if (source / name).exists():
            subprocess.run(["cp", "-a", "--reflink=auto", str(source / name), str(copy)], check=True)
    adapt(copy)
    return copy


def build(tree: Path, jobs: int) -> Path:
    """Build all programs and return their folder; LabError with the end of the output when it fails."""
    output = tree / "kvmpy-selftests"
    output.mkdir(exist_ok=True)
    for what, arguments in (
        ("headers_install", ["-C", str(tree), "headers_install"]),
        ("the selftests", ["-C", str(tree / SELFTESTS), f"OUTPUT={output}"]),
    ):
        say(f"make {what}")
        result = subprocess.run(
            ["nice", "make", f"-j{jobs}", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=BUILD_SECONDS,
            check=False,
        )
        if result.returncode != 0:
            raise LabError(f"make {what} failed:\n" + "\n".join(result.stderr.splitlines()[-20:]))
    return output


def programs_in(output: Path) -> list[str]:
    """Return the names of the programs that were built, as the table has them."""
    found = []
    for folder in (output, output / "x86"):
        for path in folder.iterdir():
            if path.is_file() and os.access(path, os.X_OK) and path.read_bytes()[:4] == b"\x7fELF":
                found.append(str(path.relative_to(output)))
    return sorted(name for name in found if not name.endswith(".so"))


# ---- running


def run(arguments: Sequence[str], *, lab: bool, report: Path, folder: Path) -> dict[str, Any]:
    """Run tests by kvmpy on this host or in the lab, and return the report."""
    command = [
        sys.executable,
        "-m",
        "kvmpy",
        *(["lab", "run", "--soft-sev"] if lab else ["run", "--lab=never"]),
    ]
    report.unlink(missing_ok=True)
    subprocess.run([*command, "--json", str(report), *arguments], cwd=folder, check=False, stdout=sys.stderr)
    if not report.exists():
        raise LabError(f"kvmpy wrote no report for {' '.join(arguments)}")
    loaded: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return loaded


def outcome(verdicts: Iterable[str]) -> str:
    """Return what the verdicts of several tests are together."""
    seen = Counter(verdicts)
    if seen["fail"] or seen["lost"]:
        return BAD
    return XFAIL if seen["xfail"] else PASS if seen["pass"] else SKIP


@dataclass
class Line:
    """A program and kvmpy's tests of the same: how each ended, why, and whether they agree."""

    program: str
    theirs: str
    their_reason: str
    ours: str
    our_reasons: list[str]
    explained: str = ""

    @property
    def word(self) -> str:
        """``agree``, ``disagree``, who ran alone, or that an erratum of kvmpy has no counterpart."""
        if SKIP in (self.theirs, self.ours):
            alone = "only kvmpy" if self.theirs == SKIP else "only upstream"
            return "neither ran" if self.theirs == self.ours else alone
        if self.theirs == PASS and self.ours == XFAIL:
            return "kvmpy sees more"
        return "agree" if (self.theirs == PASS) == (self.ours == PASS) else "disagree"

    @property
    def open(self) -> bool:
        """Whether nothing explains it: kvmpy's own failures, and a disagreement that no list has."""
        return not self.explained and (self.ours == BAD or self.word == "disagree")


def compare(
    theirs: dict[str, Any], ours: dict[str, Any], tests_of: dict[str, list[str]], known: list[Difference]
) -> list[Line]:
    """Return a line for each program that ran or that kvmpy has tests of."""
    platform = str(ours["host"].get("module", "") if ours["platform"] == "host" else ours["platform"])
    their = {re.search(r"\[(.+)\]", test["id"])[1]: test for test in theirs["tests"]}  # type: ignore[index]
    lines = []
    for program in sorted({*their, *tests_of}):
        test = their.get(program, {"verdict": "skip", "reason": "not built"})
        patterns = [f"{name}*" for name in tests_of.get(program, [])]
        mine = [
            one for one in ours["tests"] if any(fnmatch.fnmatchcase(one["id"], glob) for glob in patterns)
        ]
        reasons = sorted({one["reason"] for one in mine if one["verdict"] in ("fail", "lost", "xfail")})
        line = Line(
            program,
            outcome([test["verdict"]]),
            test["reason"],
            outcome(one["verdict"] for one in mine),
            reasons,
        )
        matching = [
            one for one in known if one.program == program and fnmatch.fnmatchcase(platform, one.platform)
        ]
        line.explained = matching[0].why if matching else ""
        lines.append(line)
    return lines


def show(lines: list[Line]) -> None:
    """Print what both ran and did not simply pass, and what only upstream runs; the rest as numbers."""
    for line in lines:
        if line.word in ("neither ran", "only kvmpy") or (line.word == "agree" and line.theirs == PASS):
            continue
        print(f"{line.word:15} {line.program}: upstream {line.theirs}, kvmpy {line.ours}")
        if line.their_reason and line.theirs != PASS:
            print(f"                upstream: {line.their_reason.splitlines()[0][:150]}")
        for reason in line.our_reasons[:4]:
            print(f"                kvmpy: {reason.splitlines()[0][:150]}")
        if line.explained:
            print(f"                known: {line.explained}")
    counts = Counter(line.word for line in lines)
    print(", ".join(f"{count} {word}" for word, count in counts.most_common()))
    print(f"{sum(line.open for line in lines)} that nothing explains")


def options() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source", metavar="TREE", type=Path, help="a kernel tree instead of Debian's package"
    )
    parser.add_argument("--debian", metavar="SUITE", default=debian.DEFAULT_SUITE)
    parser.add_argument("--host", action="store_true", help="run on this host, not in the lab")
    parser.add_argument("--kernel", metavar="NAME", help="the lab kernel to run them in; else the newest")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="programs, such as 'x86/sev_*'")
    parser.add_argument(
        "--seconds", type=int, default=60, help="for each program; what takes longer has no verdict"
    )
    parser.add_argument(
        "--results", metavar="FILE", type=Path, help="a JSON report of kvmpy's tests: do not run them"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the lines as JSON, too")
    return parser.parse_args()


def main() -> int:
    """Build, run, compare."""
    chosen = options()
    folder = places.cache() / "upstream"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tools.need(NEEDS, "building the kernel's selftests")
        tree = from_tree(chosen.source.resolve()) if chosen.source else from_debian(chosen.debian)
        output = build(tree, len(os.sched_getaffinity(0)))
        programs = [name for name in programs_in(output) if fnmatch.fnmatchcase(name, chosen.only)]
        if not programs:
            raise LabError(f"no program is called {chosen.only}")
        runner = folder / "test_upstream.py"
        runner.write_text(RUNNER.format(seconds=chosen.seconds, programs=programs, output=output))
        where = ["--kernel", chosen.kernel] if chosen.kernel else []
        theirs = run([str(runner), *where], lab=not chosen.host, report=folder / "theirs.json", folder=folder)
        tests_of = counterparts(TABLE.read_text(encoding="utf-8"))
        tests_of = {name: tests for name, tests in tests_of.items() if fnmatch.fnmatchcase(name, chosen.only)}
        if chosen.results:
            ours = json.loads(chosen.results.read_text(encoding="utf-8"))
        else:
            wanted = sorted({f"selftests/{test}" for tests in tests_of.values() for test in tests})
            ours = run([*wanted, *where], lab=not chosen.host, report=folder / "ours.json", folder=folder)
    except LabError as error:
        say(str(error))
        return 3
    lines = compare(theirs, ours, tests_of, differences())
    show(lines)
    if chosen.json:
        chosen.json.write_text(json.dumps([vars(line) | {"word": line.word} for line in lines], indent=1))
    return 1 if any(line.open for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
