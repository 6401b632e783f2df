# SPDX-License-Identifier: Apache-2.0
"""Sequences that nobody thought of."""

from __future__ import annotations

import pytest

from kvmpy import PAGE_SIZE, SIZE_2M
from selftests.private_memory import machine
from selftests.private_memory.conftest import MakeRegion, Region

pytestmark = [
    pytest.mark.protections("sw-protected"),
    pytest.mark.requires("KVM_CAP_PRE_FAULT_MEMORY"),
    pytest.mark.timeout(600),
]


def test_any_sequence(make_region: MakeRegion, seed: int) -> None:
    """After any sequence of conversions, accesses by host and guests, holes, allocations, pre-faults and
    renewed slots, each page holds the last word of its kind.

    Documentation/virt/kvm/api.rst 4.140 to 4.143.
    """
    region = make_region(machine.PAGES, slots=machine.SLOTS, vcpus=2)
    region.launch()
    machine.run(region, seed, examples=40, steps=30)


HUGE = SIZE_2M // PAGE_SIZE
# Where the machine's pages lie: at the ends of 2 MiB, and elsewhere.
PLACES = (0, 1, 2, 255, 510, 511, 512, 513, 767, 768, 1022, 1023)
MADE = f'Spread(make_region({2 * HUGE}, slots=({HUGE}, {HUGE}), vcpus=2, huge="thp"))'


class Spread:
    """The machine's pages at PLACES of 4 MiB; what happens to a range of them happens to all between, too."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.renew = region.renew

    def _span(self, first: int, pages: int) -> tuple[int, int]:
        return PLACES[first], PLACES[first + pages - 1] - PLACES[first] + 1

    def convert(self, first: int, pages: int, *, private: bool) -> None:
        self.region.convert(*self._span(first, pages), private=private)

    def write(self, page: int, value: int, offset: int = 0, *, cpu: int = 0) -> None:
        self.region.write(PLACES[page], value, offset, cpu=cpu)

    def fill(self, first: int, pages: int, value: int) -> None:
        for page in range(pages):
            self.region.write(PLACES[first + page], value + page)

    def read(self, page: int, offset: int = 0, *, cpu: int = 0) -> int:
        return self.region.read(PLACES[page], offset, cpu=cpu)

    def host_write(self, page: int, value: int) -> None:
        self.region.host_write(PLACES[page], value)

    def host_read(self, page: int) -> int:
        return self.region.host_read(PLACES[page])

    def punch(self, first: int, pages: int) -> None:
        self.region.punch(*self._span(first, pages))

    def allocate(self, first: int, pages: int) -> None:
        self.region.allocate(*self._span(first, pages))

    def pre_fault(self, first: int, pages: int) -> None:
        self.region.pre_fault(*self._span(first, pages))


@pytest.mark.requires("param:kvm.large_gmem=Y")
def test_any_sequence_on_large_folios(make_region: MakeRegion, seed: int) -> None:
    """The same where the guest_memfd has folios of 2 MiB, which conversions and holes cut.

    Documentation/virt/kvm/api.rst 4.140 to 4.143.
    """
    region = make_region(2 * HUGE, slots=(HUGE, HUGE), vcpus=2, huge="thp")
    region.launch()
    region.convert(0, 2 * HUGE, private=True)
    region.read(0)
    assert region.stats()["pages_2m"] >= 1
    machine.run(Spread(region), seed, examples=25, steps=30, made=MADE)
