# SPDX-License-Identifier: Apache-2.0
"""``kvmpy run``: the selftests on this host."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import click

import kvmpy
from kvmpy import caches
from kvmpy.testing import naming
from kvmpy.testing.verdicts import suite_id

_EXTRA = "kvmpy.pytest_args"
NOTHING_SELECTED = 5


strict_private = click.option(
    "--strict-private",
    is_flag=True,
    help="Refuse host access to private pages under every protection, as SEV-SNP does.",
)
"""The option of the commands that run tests."""


class SplitCommand(click.Command):
    """Keeps what follows ``--`` apart: it goes to pytest as it is."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Split the arguments at the first ``--``."""
        if "--" in args:
            at = args.index("--")
            args, ctx.meta[_EXTRA] = args[:at], args[at + 1 :]
        return super().parse_args(ctx, args)


def suite_folder() -> Path:
    """Return the folder of the selftests: inside the installed package, or the checkout's."""
    folder = naming.suite_folder()
    if folder is None:
        raise click.ClickException("this kvmpy has no selftests: neither in the package nor beside it")
    return folder


def targets(paths: tuple[str, ...], suite: Path) -> naming.Targets:
    """Return what *paths* name (of the suite, or the user's own files); a usage error for what is neither."""
    try:
        return naming.targets(paths, suite, Path.cwd())
    except naming.NamingError as error:
        raise click.BadParameter(str(error), param_hint="PATHS") from None


def extra_arguments(ctx: click.Context) -> list[str]:
    """Return what followed ``--`` on the command line."""
    return list(ctx.meta.get(_EXTRA, []))


def pytest_args(suite: Path, options: Mapping[str, object], paths: tuple[str, ...]) -> list[str]:
    """Return pytest's arguments for this command's *options*; what is absent is not asked for."""
    chosen = targets(paths, suite)
    for remark in chosen.remarks:
        _say(f"kvmpy run: {remark}")
    settings = Path(kvmpy.__file__).parent / "testing" / "suite.ini"
    args = ["-c", str(settings), "--rootdir", str(chosen.root), "--kvmpy-ids-from", str(Path.cwd())]
    args += chosen.arguments
    for option, flag in (
        ("expression", "-k"),
        ("workers", "-n"),
        ("json", "--kvmpy-json"),
        ("ktap", "--ktap"),
        ("junit", "--junitxml"),
        ("html", "--kvmpy-html"),
        ("timeline", "--kvmpy-timeline"),
        ("protection", "--protection"),
        ("seed", "--kvmpy-seed"),
        ("deadline", "--deadline"),
        ("record", "--record"),
        ("record_dir", "--record-dir"),
    ):
        if options.get(option) is not None:
            args += [flag, str(options[option])]
    for option, flag in (("dangerous", "--run-dangerous"), ("strict_private", "--strict-private")):
        if options.get(option):
            args.append(flag)
    if options.get("listing"):
        args += ["--collect-only", "-q"]
    return args


def _say(text: str) -> None:
    # Nobody may listen any more.
    with contextlib.suppress(OSError):
        click.echo(text, err=True)


def _list(args: list[str]) -> int:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *args], check=False, stdout=subprocess.PIPE, text=True
    )
    for line in result.stdout.splitlines():
        # Names as in every report, and as this command takes them.
        click.echo(suite_id(line) if "::" in line else line)
    return result.returncode


def why_lab(choice: str) -> str:
    """Return why tests run in the lab and not here, empty where they run here."""
    from kvmpy.testing import gate, host

    if choice == "always":
        return "as asked for"
    # Who insists on KVM wants to hear that it is missing; inside the lab there is no other one.
    if choice == "never" or host.platform_name() != "host" or {"all", "kvm"} & gate.required_names():
        return ""
    missing = host.kvm_missing()
    return f"KVM cannot be used here ({missing.what})" if missing is not None else ""


def _in_lab(paths: tuple[str, ...], options: Mapping[str, object], extra: list[str]) -> int:
    from kvmpy.cli.lab import lab_errors, run_tests

    workers = str(options["workers"] or "")
    machines = int(workers) if workers.isdigit() else None
    with lab_errors():
        return run_tests(paths, {**options, "machines": machines, "may_build": True}, extra)


@click.command(cls=SplitCommand, epilog="Arguments after -- are passed to pytest.")
@click.argument("paths", nargs=-1)
@click.option("-k", "expression", metavar="EXPR", help="Run only tests whose names match, as in pytest -k.")
@click.option("-n", "workers", metavar="N", help="Run in N processes at once (a number or auto).")
@click.option("--json", metavar="FILE", help="Write the verdicts as JSON.")
@click.option("--ktap", metavar="FILE", help="Write the verdicts as KTAP version 1.")
@click.option("--junit", metavar="FILE", help="Write the verdicts as JUnit XML.")
@click.option("--html", metavar="FILE", help="Write one HTML page: verdicts, reasons, memory maps, ioctls.")
@click.option("--timeline", metavar="FILE", help="Write a timeline of threads and vCPUs for Perfetto.")
@click.option("--list", "listing", is_flag=True, help="List the tests without running them.")
@click.option("--protection", metavar="P[,P]", help="Run only under these protections.")
@click.option("--seed", metavar="N", help="Repeat the random choices of a run.")
@click.option("--deadline", metavar="SECONDS", help="Time limit for a guest to run without an expected exit.")
@click.option(
    "--record",
    type=click.Choice(["failures", "all"]),
    help="Record the ioctls of each test and keep the records of failed or of all tests.",
)
@click.option("--record-dir", metavar="DIR", help="Folder for records (default: kvmpy-records).")
@click.option("--dangerous", is_flag=True, help="Also run tests that can crash an unfixed host.")
@strict_private
@click.option("--journal", type=click.Path(path_type=Path), hidden=True)
@click.option(
    "--lab",
    type=click.Choice(["auto", "never", "always"]),
    default="auto",
    envvar="KVMPY_LAB",
    show_default=True,
    show_envvar=True,
    help="Run in a kernel under QEMU: if KVM cannot be used here, never, or always.",
)
@click.pass_context
def run(ctx: click.Context, /, paths: tuple[str, ...], **options: object) -> None:
    """Run the selftests, or the tests in PATHS (of the suite, or files of your own)."""
    from kvmpy.testing.supervisor import guarded, supervise

    if not options["listing"] and (why := why_lab(str(options["lab"]))):
        click.echo(f"kvmpy run: {why}: the selftests run in the lab", err=True)
        sys.exit(_in_lab(paths, options, extra_arguments(ctx)))
    suite = suite_folder()
    args = [*pytest_args(suite, options, paths), *extra_arguments(ctx)]
    # Compiled tests are kept out of the installed package.
    if (cache := caches.own("pycache")) is not None:
        os.environ.setdefault("PYTHONPYCACHEPREFIX", str(cache))
    else:
        os.environ.setdefault("PYTHONDONTWRITEBYTECODE", "1")
    if options["timeline"] is not None:
        # Test processes add to it, one after another.
        Path(str(options["timeline"])).unlink(missing_ok=True)
    kept = options["journal"] if isinstance(options["journal"], Path) else None
    code = _list(args) if options["listing"] else guarded(lambda: supervise(args, _say, kept=kept))
    if code == NOTHING_SELECTED:
        _say("kvmpy run: no test matches")
    sys.exit(code)
