# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin ``kvmpy``: fixtures, requirements, errata, leak checks and reports for KVM tests."""

from __future__ import annotations

from kvmpy.testing.fixtures import MakeVm
from kvmpy.testing.verdicts import Missing

__all__ = ["MakeVm", "Missing"]
