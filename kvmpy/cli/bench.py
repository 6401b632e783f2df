# SPDX-License-Identifier: Apache-2.0
"""``kvmpy bench``: what kvmpy costs beside bare C, in one run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kvmpy.coco.kvm import Kvm
    from kvmpy.testing.bench.samples import Figure

MIN_ROUNDS = 3
GROUPS = ("core", "private", "launch", "sev", "digest", "trace")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--rounds", type=click.IntRange(MIN_ROUNDS, 1000), default=11, show_default=True,
              help="How often each figure is measured.")  # fmt: skip
@click.option(
    "--only",
    type=click.Choice(GROUPS),
    multiple=True,
    help="Measure only this group of figures (repeatable; default: all).",
)
def bench(as_json: bool, rounds: int, only: tuple[str, ...]) -> None:
    """Compare kvmpy with C programs that do the same work, in the same run; print medians and ratios.

    A missed target is reported, but the exit status stays 0.
    """
    from kvmpy.coco.kvm import Kvm
    from kvmpy.core.errors import MissingError

    try:
        with Kvm() as kvm:
            figures: list[Figure] = []
            for figure in _figures(kvm, rounds, only or GROUPS):
                figures.append(figure)
                if not as_json:
                    _show(figure)
    except MissingError as error:
        click.echo(f"kvmpy bench: {error}", err=True)
        sys.exit(1)
    if not figures:
        click.echo(
            "nothing to measure: this host has no protection that hides private memory from the host",
            err=True,
        )
    if as_json:
        click.echo(
            json.dumps({"rounds": rounds, "figures": [asdict(figure) for figure in figures]}, indent=2)
        )


def _figures(kvm: Kvm, rounds: int, groups: Sequence[str]) -> Iterator[Figure]:
    from kvmpy.coco import ladder
    from kvmpy.testing.bench import digest, private, sev, trace
    from kvmpy.testing.bench.figures import measure
    from kvmpy.testing.bench.launch import measure_launch

    offered = tuple(name for name, answer in kvm.protections().items() if answer.available)
    if "core" in groups:
        yield from measure(kvm, rounds, tuple(name for name in offered if name in ("cbit", "none")))
    if "private" in groups and private.PROTECTION in offered:
        yield from private.measure(kvm, rounds)
    if "launch" in groups:
        # Where the host writes private memory itself, there is nothing to bring in.
        hidden = tuple(name for name in offered if not ladder.get(name).traits.host_sees_private)
        yield from measure_launch(kvm, MIN_ROUNDS, hidden)
    if "sev" in groups:
        guests = tuple(name for name in offered if name in ("sev", "sev-es", "snp"))
        yield from sev.measure(kvm, MIN_ROUNDS, guests)
    if "digest" in groups:
        yield from digest.measure(MIN_ROUNDS)
    if "trace" in groups:
        yield from trace.measure(MIN_ROUNDS)


def _show(figure: object) -> None:
    from kvmpy.testing.bench.samples import Figure

    if not isinstance(figure, Figure):
        raise TypeError(f"a Figure is shown, not {type(figure).__name__}")
    verdict = {True: "holds", False: "MISSED", None: figure.note}[figure.holds]
    numbers = (
        f"{figure.kvmpy:9.2f} {figure.unit:<10} {figure.beside} {figure.bare:9.2f}  ratio {figure.ratio:5.2f}"
    )
    target = f"{figure.target}: {verdict}" if figure.target else ""
    click.echo(f"{figure.name:<24} {numbers}  {target}".rstrip())
    click.echo(f"    {figure.what}")
