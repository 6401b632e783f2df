# SPDX-License-Identifier: Apache-2.0
"""Slots whose memory has large pages, moved to places of another alignment: each page is still itself."""

from __future__ import annotations

import pytest

from kvmpy import AGENT, PAGE_SIZE, SIZE_2M, Agent, Anonymous, Gpa, Gva, MakeVm

pytestmark = pytest.mark.protections("none")

PLACE, WINDOW = Gpa(0x4000_0000), Gva(0x60_0000_0000)
# No whole number of large pages.
SIZE = 3 * SIZE_2M - 16 * PAGE_SIZE
LOOKED_AT = (0, 1, 255, 511, 512, 513, 1023, 1024, SIZE // PAGE_SIZE - 1)
DISTANCES = {
    "a page": PAGE_SIZE,
    "a page less than 2 MiB": SIZE_2M - PAGE_SIZE,
    "1 MiB": SIZE_2M // 2,
    "2 MiB": SIZE_2M,
    "2 MiB and a page": SIZE_2M + PAGE_SIZE,
}


@pytest.mark.parametrize("touched", [False, True], ids=["fresh", "used-before"])
@pytest.mark.parametrize("distance", DISTANCES.values(), ids=[name.replace(" ", "-") for name in DISTANCES])
def test_moved(make_vm: MakeVm, distance: int, touched: bool) -> None:
    """The guest finds each page of the slot at the slot's new place, and what it writes is in that page.

    Documentation/virt/kvm/api.rst, 4.35 KVM_SET_USER_MEMORY_REGION (guest_phys_addr may change).
    """
    vm = make_vm(AGENT)
    slot = vm.add_slot(PLACE, SIZE, backing=Anonymous(huge="thp"))
    for page in range(SIZE // PAGE_SIZE):
        slot.mapping.view(page * PAGE_SIZE, 2)[:] = page.to_bytes(2, "little")
    moves = [PLACE, PLACE + distance, PLACE]
    for index, place in enumerate(moves):
        vm.map(WINDOW + (index << 30), place, SIZE, page_size=PAGE_SIZE, private=False)
    agent = Agent(vm.vcpus[0])
    for index, place in enumerate(moves):
        if index:
            vm.set_user_memory_region(slot.slot, place, SIZE, slot.hva)
        elif not touched:
            continue
        start = WINDOW + (index << 30)
        got = {page: agent.read(start + page * PAGE_SIZE, 2) for page in LOOKED_AT}
        assert got == {page: page for page in LOOKED_AT}
        for page in LOOKED_AT:
            assert agent.write(start + page * PAGE_SIZE + 8, index + 1) is None
        shown = {page: slot.mapping.view(page * PAGE_SIZE + 8, 1)[0] for page in LOOKED_AT}
        assert shown == dict.fromkeys(LOOKED_AT, index + 1)
