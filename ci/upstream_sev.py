#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Builds the kernel's own SEV selftests and runs them on the lab's software AMD-SP: somebody else's tests.

The source is Debian's linux-source, or a tree given with --source; what is built stays in the lab's cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from kvmpy.lab import debian, places, tools
from kvmpy.lab.errors import LabError

PROGRAMS = ("sev_init2_tests", "sev_smoke_test", "sev_migrate_tests", "sev_dbg_test")
SELFTESTS = Path("tools/testing/selftests/kvm")
NEEDS = (*tools.BUILD, *tools.DEBIAN, tools.Tool("rsync", "rsync", "rsync"))
# They read the encryption bit's position with the CPUID instruction, which an emulated CPU does not answer.
READ_BY_CPU = "this_cpu_property(X86_PROPERTY_SEV_C_BIT)"
READ_BY_KVM = "kvm_cpu_property(X86_PROPERTY_SEV_C_BIT)"
BUILD_SECONDS = 1800.0
TEST_SECONDS = 300

RUNNER = """\
# SPDX-License-Identifier: Apache-2.0
import subprocess

import pytest


@pytest.mark.timeout({seconds} + 30)
@pytest.mark.parametrize("program", {programs!r})
def test_upstream(program):
    result = subprocess.run([program], capture_output=True, text=True, errors="replace", timeout={seconds})
    print(result.stdout, result.stderr)
    if result.returncode == 4:
        pytest.skip(result.stdout.strip() or result.stderr.strip() or "skipped by the program")
    assert result.returncode == 0
"""


def say(text: str) -> None:
    """Tell what is being done."""
    print(f"upstream: {text}", file=sys.stderr, flush=True)


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


def build(tree: Path, jobs: int) -> list[Path]:
    """Build the programs and return them; LabError with the end of the output when it fails."""
    output = tree / "kvmpy-selftests"
    programs = [output / "x86" / name for name in PROGRAMS]
    output.mkdir(exist_ok=True)
    for arguments in (
        ["-C", str(tree), "headers_install"],
        ["-C", str(tree / SELFTESTS), f"OUTPUT={output}", *map(str, programs)],
    ):
        say(f"make {' '.join(arguments[2:3])}")
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
            raise LabError(f"make {arguments[-1]} failed:\n" + "\n".join(result.stderr.splitlines()[-20:]))
    return programs


def main() -> int:
    """Build and run; the exit status is that of the run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--source", metavar="TREE", type=Path, help="a kernel tree instead of Debian's package"
    )
    parser.add_argument("--debian", metavar="SUITE", default=debian.DEFAULT_SUITE)
    parser.add_argument("--kernel", metavar="NAME", help="the lab kernel to run them in; else the newest")
    options = parser.parse_args()
    try:
        tools.need(NEEDS, "building the kernel's selftests")
        tree = from_tree(options.source.resolve()) if options.source else from_debian(options.debian)
        programs = build(tree, len(os.sched_getaffinity(0)))
    except LabError as error:
        say(str(error))
        return 3
    folder = places.cache() / "upstream"
    folder.mkdir(parents=True, exist_ok=True)
    runner = folder / "test_upstream_sev.py"
    runner.write_text(RUNNER.format(seconds=TEST_SECONDS, programs=[str(path) for path in programs]))
    command = [sys.executable, "-m", "kvmpy", "lab", "run", "--soft-sev", "--machines", "1", str(runner)]
    if options.kernel:
        command += ["--kernel", options.kernel]
    return subprocess.run(command, cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
