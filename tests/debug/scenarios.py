# SPDX-License-Identifier: Apache-2.0
"""All scenarios of records."""

from __future__ import annotations

from tests.debug import record_scenarios, run_scenarios, sev_scenarios
from tests.debug.scenario import SCENARIOS, SHOWS, names

__all__ = ["SCENARIOS", "SHOWS", "names", "record_scenarios", "run_scenarios", "sev_scenarios"]
