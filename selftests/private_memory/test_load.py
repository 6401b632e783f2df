# SPDX-License-Identifier: Apache-2.0
"""Conversions, holes and slots that go, beside vCPUs that use the memory all the time."""

from __future__ import annotations

import random
import threading

import pytest
from pyroaring import BitMap

from kvmpy import (
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    PAGE_SIZE,
    Exit,
    Gpa,
    GuestVcpu,
    LoadedRegion,
    MakeLoad,
    MemoryFaultExit,
)
from kvmpy.guest.load import WORDS, Moment

pytestmark = pytest.mark.protections("sw-protected")

# Slots; those with a guest_memfd.
PARTS = (61, 3, 128)
PRIVATE = (1, 2)
PAGES = sum(PARTS)
FIRST = PARTS[0]


def again(vcpu: GuestVcpu, exit_: Exit) -> bool:
    """Let an access that met a conversion under way be tried again: Documentation/virt/kvm/api.rst 4.141."""
    del vcpu
    return isinstance(exit_, MemoryFaultExit)


@pytest.fixture
def region(make_load: MakeLoad, ring: int) -> LoadedRegion:
    """A plain slot and two whose pages can be private; every page has two sides, one of them older."""
    return make_load(
        pages=PAGES,
        slots=PARTS,
        guest_memfds=PRIVATE,
        flags=KVM_MEM_LOG_DIRTY_PAGES,
        ring=ring,
        loss="older",
        on_exit=again,
    )


def some_pages(rng: random.Random) -> tuple[int, int]:
    """Return a range of pages that can be private, over both slots at times: the first and how many."""
    first = rng.randrange(FIRST, PAGES)
    return first, rng.randint(1, PAGES - first)


def convert(region: LoadedRegion, first: int, count: int, *, private: bool) -> None:
    gpa = Gpa(region.slot.gpa + first * PAGE_SIZE)
    attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
    region.vm.set_memory_attributes(gpa, count * PAGE_SIZE, attributes)


def image(region: LoadedRegion, first: int, count: int) -> bytes:
    """Return the shared side of pages."""
    with region.mapping.view(first * PAGE_SIZE, count * PAGE_SIZE) as memory:
        return bytes(memory)


def check_arrived(region: LoadedRegion, pages: BitMap, since: Moment) -> None:
    """Check that writes after *since* to *pages*, which are shared, are in shared memory."""
    shared = memoryview(image(region, 0, PAGES)).cast("Q")
    for order, start in zip(region.load.orders, since, strict=False):
        for page, generation in order.generations(start):
            for word in WORDS if page in pages else ():
                value = shared[page * 512 + word]
                assert value >> 32 > generation, (
                    f"page {page}, word {word}: generation {value >> 32} in shared memory, but the guest "
                    f"wrote one above {generation} while the page was shared"
                )


def test_private_pages_leave_the_shared_side(region: LoadedRegion, rng: random.Random) -> None:
    """Once a conversion returns nobody writes the other side any more, and all write the one that counts.

    Documentation/virt/kvm/api.rst 4.141 KVM_SET_MEMORY_ATTRIBUTES, beside running vCPUs.
    """
    with region.load as load:
        for _ in load.turns(visits=5):
            first, count = some_pages(rng)
            convert(region, first, count, private=True)
            before = image(region, first, count)
            # A part of it back, over the edges of the range.
            inner, inner_count = some_pages(rng)
            load.wait(10)
            assert image(region, first, count) == before, "a vCPU wrote the shared side of a private page"
            convert(region, inner, inner_count, private=False)
            since = load.moment()
            until = load.wait(30)
            check_arrived(
                region, load.written(since, until) & BitMap(range(inner, inner + inner_count)), since
            )
            convert(region, FIRST, PAGES - FIRST, private=False)


def test_holes_in_private_memory(region: LoadedRegion, rng: random.Random) -> None:
    """A hole in the guest_memfd beside running vCPUs empties pages, and leaves the shared side alone.

    Documentation/virt/kvm/api.rst 4.142 KVM_CREATE_GUEST_MEMFD; fallocate(2).
    """
    gmem = region.slots[1].gmem
    assert gmem is not None
    with region.load as load:
        convert(region, FIRST, PAGES - FIRST, private=True)
        before = image(region, FIRST, PAGES - FIRST)
        for _ in load.turns(visits=10):
            first, count = some_pages(rng)
            gmem.punch_hole(first * PAGE_SIZE, count * PAGE_SIZE)
            load.wait(10)
            assert image(region, FIRST, PAGES - FIRST) == before


def test_slots_go_while_pages_are_private(region: LoadedRegion) -> None:
    """A slot that goes takes neither side along: back again, private pages are private, shared ones shared.

    Documentation/virt/kvm/api.rst 4.140 and 4.141: attributes belong to the VM's addresses.
    """
    gone = threading.Event()
    back = threading.Event()

    def wait(vcpu: GuestVcpu, exit_: Exit) -> bool:
        if not isinstance(exit_, MemoryFaultExit):
            return False
        gone.set()
        return back.wait(vcpu.vm.deadline)

    region.load.on_exit = wait
    # All private: where no slot is, a private access is a memory fault, which can be tried again.
    with region.load as load:
        back.set()
        convert(region, FIRST, PAGES - FIRST, private=True)
        before = image(region, FIRST, PAGES - FIRST)
        for turn in load.turns(visits=10):
            slot = region.slots[PRIVATE[turn % 2]]
            back.clear()
            region.vm.set_user_memory_region(slot.slot, slot.gpa, 0, slot.hva)
            gone.wait(0.05)
            slot.renew()
            back.set()
            load.wait(10)
            assert image(region, FIRST, PAGES - FIRST) == before
    assert gone.is_set()


def test_logging_beside_conversions(region: LoadedRegion, rng: random.Random) -> None:
    """The dirty log of a shared slot is complete while pages of others are converted all the time.

    Documentation/virt/kvm/api.rst 4.8 and 4.141.
    """
    size = FIRST * PAGE_SIZE
    copy = bytearray(size)
    number = region.slot.slot
    own = BitMap(range(FIRST))

    def harvest() -> BitMap:
        dirty = region.vm.dirty.get_log(number).bitmap()
        with region.mapping.view(0, size) as memory:
            for page in dirty:
                place = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
                copy[place] = memory[place]
        return dirty

    with region.load as load:
        over = load.moment()
        for turn in load.turns(visits=3):
            convert(region, *some_pages(rng), private=turn % 3 < 2)
            began = load.moment()
            missing = (load.written(over, began) & own) - harvest()
            assert not missing, f"pages {list(missing)} were written, but not reported"
            over = load.moment()
    harvest()
    assert copy == image(region, 0, FIRST)


def test_two_threads_convert(region: LoadedRegion, rng: random.Random) -> None:
    """Conversions from two threads at once leave each page as the last one said, beside running vCPUs.

    Documentation/virt/kvm/api.rst 4.141.
    """
    errors: list[BaseException] = []
    stop = threading.Event()
    half = FIRST + (PAGES - FIRST) // 2

    def other() -> None:
        turn = 0
        try:
            while not stop.is_set():
                convert(region, FIRST, half - FIRST, private=turn % 2 == 0)
                turn += 1
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    thread = threading.Thread(target=other)
    with region.load as load:
        thread.start()
        try:
            for _ in load.turns(visits=3):
                first = rng.randrange(half, PAGES)
                convert(region, first, PAGES - first, private=True)
                before = image(region, first, PAGES - first)
                load.wait(5)
                assert image(region, first, PAGES - first) == before
                convert(region, half, PAGES - half, private=False)
        finally:
            stop.set()
            thread.join(region.vm.deadline)
        assert not errors, errors
        convert(region, FIRST, PAGES - FIRST, private=False)
        since = load.moment()
        until = load.wait(2 * PAGES)
        check_arrived(region, load.written(since, until), since)
