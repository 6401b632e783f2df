# SPDX-License-Identifier: Apache-2.0
"""``kvmpy pack``: guest programs for hosts without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

from kvmpy.cli import completion
from kvmpy.cli.options import pytest_args
from kvmpy.guest import packs, toolchain
from kvmpy.guest.errors import ToolchainError
from kvmpy.testing.option_table import pytest_arguments

# A guest that builds takes a fraction of a second; a test that asks for none, less.
_SECONDS = 60
_FILE = click.Path(path_type=Path, dir_okay=False)


def _fail(text: str) -> None:
    click.echo(f"kvmpy pack: {text}", err=True)
    sys.exit(3)


@click.group()
def pack() -> None:
    """Compile the guest programs of tests into one file, a pack, for hosts that have no compiler."""


@pack.command()
@click.argument("paths", nargs=-1, shell_complete=completion.tests)
@click.option("-o", "--output", metavar="FILE", type=_FILE,
              help="The pack to write (default: in the cache, where every run looks).")  # fmt: skip
def build(paths: tuple[str, ...], output: Path | None) -> None:
    """Compile the programs of the suite, or of the tests in PATHS, and write a pack.

    Tests are run up to what they want of the host: this needs gcc, and no KVM.
    """
    try:
        toolchain.check_target(toolchain.find())
    except ToolchainError as error:
        _fail(str(error))
    target = (output or packs.default()).absolute()
    arguments = pytest_args(paths, {"verbose": True}, lambda text: click.echo(text, err=True))
    if output is None:
        target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(target.parent, os.W_OK):
        _fail(f"{target.parent} is no folder that can be written to")
    # An older pack stays until there is a new one.
    fresh = target.with_name(f"{target.name}.{os.getpid()}")
    command = [sys.executable, "-m", "pytest", *arguments, *pytest_arguments({"pack_to": fresh})]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-q", "--tb=no", "--no-header", "--no-summary"]
    command += [f"--timeout={_SECONDS}"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if not fresh.is_file():
        click.echo(done.stdout[-2000:], err=True)
        _fail(f"the tests could not be collected (pytest's status {done.returncode})")
    fresh.replace(target)
    click.echo(_about(packs.Pack(target)), err=True)


@pack.command()
@click.argument("file", type=_FILE, required=False)
def show(file: Path | None) -> None:
    """Say what a pack is for, and name its programs; exit status 3 if this kvmpy cannot use it."""
    try:
        opened = packs.Pack(file or packs.default())
        opened.verify()
    except packs.PackError as error:
        _fail(str(error))
        return
    click.echo(_about(opened))
    for name in opened.names():
        click.echo(f"  {name}")


def _about(opened: packs.Pack) -> str:
    about = opened.about
    size = opened.path.stat().st_size / (1 << 20)
    return (
        f"{opened.path}: {about['programs']} guest programs for {about['target']}, {size:.1f} MiB, "
        f"kvmpy {about['kvmpy']}, {about['compiler']}"
    )
