# SPDX-License-Identifier: Apache-2.0
"""``kvmpy hardware``: everything on a machine with SEV, and one archive of it to attach to a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from kvmpy.cli.run import SplitCommand, extra_arguments, suite_folder, targets

PROTECTIONS = "snp,sev-es,sev"
_TOOL_SECONDS = 1800


def _say(text: str) -> None:
    click.echo(f"kvmpy hardware: {text}", err=True)


def _kvmpy(
    arguments: Sequence[str], environment: Mapping[str, str], seconds: float | None = None
) -> tuple[int, bytes]:
    """Run a kvmpy command, show what it prints as it comes, and return status and text."""
    printed = bytearray()
    with subprocess.Popen(
        [sys.executable, "-m", "kvmpy", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
    ) as process:
        timer = threading.Timer(seconds, process.kill) if seconds is not None else None
        try:
            if timer:
                timer.start()
            while chunk := os.read(process.stdout.fileno(), 65536) if process.stdout else b"":
                printed += chunk
                click.echo(chunk, nl=False)
        except BaseException:
            process.terminate()
            raise
        finally:
            if timer:
                timer.cancel()
    return process.returncode, bytes(printed)


@click.command(cls=SplitCommand, epilog="What follows -- goes to pytest as it is.")
@click.argument("paths", nargs=-1)
@click.option(
    "-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="The archive, a .tar.gz."
)
@click.option("--require", metavar="NAMES", default=PROTECTIONS, show_default=True,
              help="What may not be missing (KVMPY_REQUIRE); '' for nothing.")  # fmt: skip
@click.option("--bench/--no-bench", default=True, help="Measure, too.")
@click.pass_context
def hardware(
    ctx: click.Context, /, paths: tuple[str, ...], output: Path | None, require: str, bench: bool
) -> None:
    """Run doctor, the whole suite (or PATHS) and the benchmark, and put all of it into one archive."""
    from kvmpy.testing.archive import KernelLog, Scrubber, machine, write

    target = output or Path(f"kvmpy-hardware-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz")
    if not target.name.endswith(".tar.gz"):
        raise click.BadParameter("the archive's name ends in .tar.gz", param_hint="--output")
    if not target.absolute().parent.is_dir():
        raise click.BadParameter(f"no folder {target.parent}", param_hint="--output")
    targets(paths, suite_folder())  # a wrong one is told before it all
    log = KernelLog()
    if log.missing:
        _say(f"without the kernel's messages: {log.missing}")
    code = 1
    files: dict[str, bytes] = {"machine.json": json.dumps(machine(), indent=2).encode()}
    with tempfile.TemporaryDirectory(prefix="kvmpy-hardware-") as name:
        folder = Path(name)
        try:
            _say("what this machine offers")
            _, files["doctor.txt"] = _kvmpy(["doctor"], {})
            _say(f"the suite; {require or 'nothing'} may not be missing")
            reports = {"--json": "verdicts.json", "--ktap": "verdicts.ktap", "--html": "report.html"}
            arguments = [
                "run",
                "--lab",
                "never",
                "--record",
                "failures",
                "--record-dir",
                str(folder / "records"),
            ]
            for flag, file in reports.items():
                arguments += [flag, str(folder / file)]
            code, files["run.txt"] = _kvmpy(
                [*arguments, *paths, "--", *extra_arguments(ctx)], {"KVMPY_REQUIRE": require}
            )
            if bench:
                _say("the benchmark")
                _, files["bench.json"] = _kvmpy(["bench", "--json"], {}, _TOOL_SECONDS)
        finally:  # an interrupted run has something to say, too
            for file in ("verdicts.json", "verdicts.ktap", "report.html"):
                if (folder / file).exists():
                    files[file] = (folder / file).read_bytes()
            files["dmesg.txt"] = log.read().encode() or log.missing.encode()
            log.close()
            inside = write(target, files, [("records", folder / "records")], Scrubber())
            _say(f"{target}: {len(inside)} files; host, user and network names are taken out of the texts")
    sys.exit(code)
