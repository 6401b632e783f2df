# SPDX-License-Identifier: Apache-2.0
"""``kvmpy lab``: kernels booted under QEMU, and the selftests inside them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from kvmpy.cli import completion
from kvmpy.cli.lab_run import lab_errors, machine, run_tests, say
from kvmpy.cli.options import PYTEST_EPILOG, SplitCommand, extra_arguments, options, report_on_stdout
from kvmpy.lab import bisect
from kvmpy.lab.errors import LabError

_WORDS = "kvmpy.lab_words"


class _WrongArgumentError(click.UsageError):
    exit_code = bisect.USAGE


class _Lab(click.Group):
    """Prints every LabError as a message."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Remember the arguments."""
        ctx.meta[_WORDS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; a wrong argument must not tell `git bisect run` that a tree is bad."""
        try:
            with lab_errors():
                return super().invoke(ctx)
        except click.UsageError as error:
            if any(word.partition("=")[0] == "--source" for word in ctx.meta[_WORDS]):
                raise _WrongArgumentError(error.format_message(), error.ctx) from None
            raise


@click.group(cls=_Lab)
def lab() -> None:
    """Build kernels, boot them under QEMU and run tests inside; no /dev/kvm is needed."""


@lab.command()
@click.option("--source", metavar="TREE", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--debian", metavar="SUITE", help="A Debian suite with linux-source-X.Y (default: sid).")
@click.option(
    "--kernel", metavar="BZIMAGE", type=click.Path(path_type=Path), help="A kernel that is already built."
)
@click.option("--missing", is_flag=True, help="Build only if no such kernel in the cache is up to date.")
@click.option("--soft-sev", is_flag=True, help="Add the software AMD-SP, for SEV, SEV-ES and SNP.")
@click.option(
    "--coverage",
    is_flag=True,
    help="Count what KVM executes (gcov), for lab run --coverage; booted only for that or if named.",
)
@click.option(
    "--bugs", is_flag=True, help="Add the bug catalogue, for kvmpy bugs; booted only for that or if named."
)
@click.option(
    "--config",
    "configs",
    metavar="FILE",
    multiple=True,
    help="A file with additional kernel options, such as CONFIG_KASAN=y; 'debug' stands for kvmpy's own.",
)
def build(
    source: Path | None,
    debian: str | None,
    kernel: Path | None,
    missing: bool,
    soft_sev: bool,
    coverage: bool,
    bugs: bool,
    configs: tuple[str, ...],
) -> None:
    """Put a lab kernel into the cache: from a Debian suite, a tree of your own, or a bzImage."""
    from kvmpy.lab import build as builds
    from kvmpy.lab import places
    from kvmpy.lab.debian import DEFAULT_SUITE

    if configs and (kernel is not None or missing):
        raise click.UsageError("--config is for a kernel that is built now: not with --kernel or --missing")
    for flag in (name for name, given in (("--coverage", coverage), ("--bugs", bugs)) if given):
        if kernel is not None or missing:
            raise click.UsageError(
                f"{flag} is for a kernel that is built now: not with --kernel or --missing"
            )
    extra = [places.extra_fragment(name) for name in configs]
    if sum(given is not None for given in (source, debian, kernel)) > 1:
        raise click.UsageError("--source, --debian and --kernel exclude each other")
    if missing and (present := builds.present(soft_sev)):
        click.echo(present.name)
        return
    if kernel is not None:
        kernel_built = builds.from_image(kernel, soft_sev=soft_sev)
    elif source is not None:
        kernel_built = builds.from_source(
            source, say, soft_sev=soft_sev, extra=extra, coverage=coverage, bugs=bugs
        )
    else:
        kernel_built = builds.from_debian(
            debian or DEFAULT_SUITE, say, soft_sev=soft_sev, extra=extra, coverage=coverage, bugs=bugs
        )
    click.echo(kernel_built.name)


@lab.command("list")
def list_kernels() -> None:
    """List the kernels of the cache, the newest first."""
    from kvmpy.lab import kernels

    for kernel in kernels.cached():
        extra = f", with {kernel.extra}" if kernel.extra else ""
        extra += f", with {len(kernel.bugs)} bugs" if kernel.bugs else ""
        click.echo(f"{kernel.name:<28} {kernel.origin}{extra}")


@lab.command("rm")
@click.argument("names", nargs=-1)
@click.option(
    "--all", "everything", is_flag=True, help="Remove the whole cache of the lab, including downloads."
)
def remove(names: tuple[str, ...], everything: bool) -> None:
    """Remove kernels from the cache, by name or release."""
    import shutil

    from kvmpy.lab import kernels, places

    if everything == bool(names):
        raise click.UsageError("name kernels (see `kvmpy lab list`), or say --all")
    if everything:
        with kernels.build_lock(say):
            for folder in places.cache().iterdir():
                if folder.is_dir():
                    shutil.rmtree(folder)
        return
    for kernel in [kernels.find(name) for name in names]:
        if kernel.folder.parent != places.cache() / "kernels":
            raise LabError(f"{kernel.name} is not in the cache")
        kernels.remove(kernel)
        click.echo(f"removed {kernel.name}")


@lab.command("run", cls=SplitCommand, epilog=PYTEST_EPILOG)
@click.argument("paths", nargs=-1, shell_complete=completion.tests)
@options("lab run")
@click.pass_context
def run_inside(ctx: click.Context, /, paths: tuple[str, ...], **values: Any) -> None:
    """Run the selftests, or the tests in PATHS, in a kernel under QEMU, including dangerous ones."""
    with report_on_stdout(values):
        code = run_tests(paths, values, extra_arguments(ctx))
    sys.exit(code)


@lab.command("shell", cls=SplitCommand, epilog="Arguments after -- are a command to run instead of a shell.")
@options("lab shell")
@click.pass_context
def interactive(ctx: click.Context, /, **values: Any) -> None:
    """Open a shell in the VM; leaving it powers the VM off."""
    from kvmpy.lab.coverage import store
    from kvmpy.lab.runs import shell

    command = extra_arguments(ctx) or ["/bin/bash" if Path("/bin/bash").exists() else "/bin/sh", "-i"]
    vm = machine(values)
    if values["coverage"] is not None:
        store.create(values["coverage"], vm.kernel)
    sys.exit(shell(vm, command, values["coverage"]))


@lab.command("configurations")
@click.option(
    "--configurations",
    "files",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Read one more file of configurations.",
)
def list_configurations(files: tuple[Path, ...]) -> None:
    """List the configurations: what each sets, and what it is for."""
    from kvmpy.testing import configurations

    try:
        known = configurations.load(files)
    except configurations.ConfigurationError as error:
        raise LabError(str(error)) from None
    width = max(map(len, known))
    for entry in known.values():
        click.echo(f"{entry.name:<{width}}  {entry.settings() or '-'}")
        if entry.about:
            click.echo(f"{'':<{width}}  {entry.about}")
