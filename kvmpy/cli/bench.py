# SPDX-License-Identifier: Apache-2.0
"""``kvmpy bench``: what kvmpy costs beside bare C, in one run."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click

MIN_ROUNDS = 3


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--rounds", type=click.IntRange(MIN_ROUNDS, 1000), default=11, show_default=True)
def bench(as_json: bool, rounds: int) -> None:
    """Measure kvmpy beside bare C loops that do the same: medians, and ratios within each round.

    A benchmark and no test: a target that is missed is shown, and the exit status stays 0.
    """
    from kvmpy.coco.kvm import Kvm
    from kvmpy.core.errors import MissingError
    from kvmpy.testing.bench.figures import Figure, measure

    try:
        with Kvm() as kvm:
            offered = {name: answer for name, answer in kvm.protections().items() if answer.available}
            names = tuple(name for name in offered if name in ("cbit", "none"))
            figures: list[Figure] = []
            for figure in measure(kvm, rounds, names):
                figures.append(figure)
                if not as_json:
                    _show(figure)
    except MissingError as error:
        click.echo(f"kvmpy bench: {error}", err=True)
        sys.exit(1)
    if as_json:
        click.echo(
            json.dumps({"rounds": rounds, "figures": [asdict(figure) for figure in figures]}, indent=2)
        )


def _show(figure: object) -> None:
    from kvmpy.testing.bench.figures import Figure

    if not isinstance(figure, Figure):
        raise TypeError(f"a Figure is shown, not {type(figure).__name__}")
    verdict = {True: "holds", False: "MISSED", None: figure.note}[figure.holds]
    numbers = f"{figure.kvmpy:9.2f} {figure.unit:<10} bare {figure.bare:9.2f}  ratio {figure.ratio:5.2f}"
    target = f"{figure.target}: {verdict}" if figure.target else ""
    click.echo(f"{figure.name:<24} {numbers}  {target}".rstrip())
    click.echo(f"    {figure.what}")
