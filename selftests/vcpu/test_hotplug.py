# SPDX-License-Identifier: Apache-2.0
"""CPUs that go and come back under running vCPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpy import MakeLoad, MissingError
from kvmpy.testing.host import platform_name
from selftests.conftest import UNDER_LOAD

pytestmark = [pytest.mark.dangerous, UNDER_LOAD]


def test_a_cpu_goes_and_comes_back(make_load: MakeLoad, ring: int) -> None:
    """vCPUs whose CPU is taken away go on elsewhere, on it again later, and lose nothing that they wrote.

    virt/kvm/kvm_main.c, kvm_offline_cpu() and kvm_online_cpu().
    """
    if platform_name() == "host":
        raise MissingError("a machine whose CPUs a test may take away", "`kvmpy lab run`")
    switch = Path("/sys/devices/system/cpu/cpu1/online")
    if not switch.exists():
        raise MissingError("a second CPU that can be switched off", "CONFIG_HOTPLUG_CPU, --cpus 2")
    region = make_load(pages=60, ring=ring)
    try:
        with region.load as load:
            for _ in load.turns():
                switch.write_text("0", encoding="ascii")
                load.wait(5)
                region.check()
                switch.write_text("1", encoding="ascii")
                load.wait(5)
    finally:
        switch.write_text("1", encoding="ascii")
    region.check()
