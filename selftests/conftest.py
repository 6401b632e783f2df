# SPDX-License-Identifier: Apache-2.0
"""What selftests of several areas share."""

from __future__ import annotations

import pytest


@pytest.fixture
def open_registers(protection: str) -> None:
    """Skip under protections that keep the vCPUs' registers from the host after launch."""
    from kvmpy.coco import ladder

    if not ladder.get(protection).traits.can_read_registers:
        pytest.skip(f"protection {protection} keeps vCPU registers from the host")
