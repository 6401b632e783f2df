# SPDX-License-Identifier: Apache-2.0
"""Random sequences of steps by hypothesis, which a seed repeats."""

from __future__ import annotations

from unittest import mock

import hypothesis
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture.providers import HypothesisProvider
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test


def run(machine: type[RuleBasedStateMachine], seed: int, *, examples: int, steps: int) -> None:
    """Run *examples* sequences of *steps* at most; the shortest one that fails is told, and raised."""
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    # hypothesis also draws constants that it finds in the modules loaded by then: beside other tests,
    # the same seed would give other sequences.
    with mock.patch.object(HypothesisProvider, "_maybe_draw_constant", return_value=None):
        run_state_machine_as_test(hypothesis.seed(seed)(machine), settings=chosen)
