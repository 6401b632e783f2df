# SPDX-License-Identifier: Apache-2.0
"""One figure, and the rounds that it is the median of."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Figure:
    """One figure: medians over the rounds in *unit*, and the median of the ratios of each round.

    *target* is what is asked for, as text; *holds* whether it is met (None where nothing is asked).  What is
    measured and what it stands beside is in *what*; *beside* names the second number.
    """

    name: str
    what: str
    unit: str
    kvmpy: float
    bare: float
    ratio: float
    target: str = ""
    holds: bool | None = None
    note: str = ""
    beside: str = "bare"


@dataclass
class Samples:
    """What both sides took, round by round."""

    kvmpy: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)

    def add(self, kvmpy: float, bare: float) -> None:
        """Note a round."""
        self.kvmpy.append(kvmpy)
        self.bare.append(bare)

    def figure(
        self,
        name: str,
        action: str,
        unit: str,
        target: str = "",
        check: Callable[[Figure], bool] | None = None,
        *,
        beside: str = "bare",
    ) -> Figure:
        """Return the figure; *check* tells whether it meets its target."""
        ratios = [mine / bare for mine, bare in zip(self.kvmpy, self.bare, strict=True)]
        figure_row = Figure(
            name,
            action,
            unit,
            statistics.median(self.kvmpy),
            statistics.median(self.bare),
            statistics.median(ratios),
            target,
            beside=beside,
        )
        if check is None:
            return figure_row
        return Figure(**{**figure_row.__dict__, "holds": check(figure_row)})
