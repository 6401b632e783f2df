# SPDX-License-Identifier: Apache-2.0
"""Statistics that are read, and files of them that are closed, while vCPUs run."""

from __future__ import annotations

import pytest

from kvmpy import MakeLoad, Stats, StatsFd
from selftests.conftest import UNDER_LOAD, Beside

pytestmark = [UNDER_LOAD, pytest.mark.requires("KVM_CAP_BINARY_STATS_FD")]

CUMULATIVE, PEAK = 0, 2


def check_growth(file: StatsFd, before: Stats, after: Stats) -> None:
    for descriptor in file.descriptors:
        if descriptor.type in (CUMULATIVE, PEAK):
            name = descriptor.name
            lost = [
                (old, new)
                for old, new in zip(before[name].values, after[name].values, strict=True)
                if new < old
            ]
            assert not lost, f"{name} went back from {lost[0][0]} to {lost[0][1]}"


def test_counters_never_go_back(make_load: MakeLoad, ring: int) -> None:
    """Counters and peaks that are read beside running vCPUs only grow, in each of several files.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD: KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_PEAK.
    """
    region = make_load(pages=64, ring=ring)
    vm = region.vm
    owners = [vm.stats, *(vcpu.stats for vcpu in vm.vcpus)]

    def come_and_go(_turn: int) -> None:
        # Of the VM: the ioctl of a vCPU waits until that leaves the guest.
        vm.stats.get()

    files = [owner.get_fd() for owner in owners]
    try:
        with region.load as load, Beside(come_and_go):
            before = [file.read() for file in files]
            for turn in load.turns():
                # Mappings that come and go are what many counters are about.
                region.slot.set_flags(turn & 1)
                after = [file.read() for file in files]
                for file, old, new in zip(files, before, after, strict=True):
                    check_growth(file, old, new)
                before = after
    finally:
        for file in files:
            file.close()
