# SPDX-License-Identifier: Apache-2.0
"""The dirty log and the dirty ring under vCPUs that write all the time, as a live migration uses them.

A copy of the region takes over what KVM reports, round by round, while the vCPUs go on.  After each round
every page of the copy must be as new as the round's start, and KVM must have reported no page that nobody
accessed.
"""

from __future__ import annotations

import errno
import random
import threading
from abc import ABC, abstractmethod

import pytest
from pyroaring import BitMap

from kvmpy import (
    KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_MEM_LOG_DIRTY_PAGES,
    PAGE_SIZE,
    SIZE_2M,
    Anonymous,
    DirtyBitmap,
    DirtyRing,
    DirtyRingFullExit,
    Exit,
    GuestVcpu,
    GuestVm,
    LoadedRegion,
    LoadError,
    MakeLoad,
    MemFd,
    MemorySlot,
    refused,
)
from selftests.conftest import UNDER_LOAD

pytestmark = UNDER_LOAD

ODD = (67, 1, 63, 128, 70)
HUGE = 2 * SIZE_2M // PAGE_SIZE
ENTRIES = 1024
# Of the visits, so that some pages stay clean from round to round; ring 0 is slow on hosts that emulate it.
PACE = {0: 0, 3: 100_000}


class Tracking(ABC):
    """A way to learn which pages were written."""

    first_is_full = False

    def enable(self, vm: GuestVm) -> None:  # noqa: B027 - most have nothing to do here
        """Prepare a VM without vCPUs."""

    def start(self, region: LoadedRegion) -> None:
        """Begin with the slots of *region*."""
        self.region = region

    @abstractmethod
    def harvest(self) -> BitMap:
        """Return the pages written since the last time, and watch them from now on."""

    def on_exit(self, vcpu: GuestVcpu, exit_: Exit) -> bool:
        """Take an exit of the load."""
        del vcpu, exit_
        return False

    def of_slots(self) -> list[tuple[MemorySlot, int]]:
        """Return the slots with their first page in the region."""
        base = self.region.slots[0].gpa
        return [(slot, (slot.gpa - base) // PAGE_SIZE) for slot in self.region.slots]


class Log(Tracking):
    """KVM_GET_DIRTY_LOG, which reports and protects."""

    def harvest(self) -> BitMap:
        pages = BitMap()
        for slot, first in self.of_slots():
            pages |= self.region.vm.dirty.get_log(slot.slot).bitmap().shift(first)
        return pages


class Manual(Log):
    """KVM_GET_DIRTY_LOG, which reports, and KVM_CLEAR_DIRTY_LOG of pieces, which protect."""

    def __init__(self, initially_set: bool) -> None:
        self.first_is_full = initially_set

    def enable(self, vm: GuestVm) -> None:
        vm.dirty.enable_manual_log(initially_set=self.first_is_full)

    def harvest(self) -> BitMap:
        pages = super().harvest()
        for slot, first in self.of_slots():
            count = slot.size // PAGE_SIZE
            for start in range(0, count, 64):
                size = min(64, count - start)
                part = [page for page in range(size) if first + start + page in pages]
                if part:
                    bits = DirtyBitmap.of(size, part)
                    self.region.vm.dirty.clear_log(slot.slot, bits, first_page=start)
        return pages


class Rings(Tracking):
    """The dirty rings, harvested by the test, and by each vCPU whose ring is full."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pending = BitMap()
        self.rings: list[DirtyRing] = []
        self.times_full = 0

    def enable(self, vm: GuestVm) -> None:
        vm.dirty.enable_ring(ENTRIES)

    def start(self, region: LoadedRegion) -> None:
        super().start(region)
        self.rings = [region.vm.dirty.ring(vcpu) for vcpu in region.vm.vcpus]

    def take(self) -> None:
        """Harvest and reset; the caller has the lock."""
        first = {slot.slot: first for slot, first in self.of_slots()}
        entries = [entry for ring in self.rings for entry in ring.harvest()]
        assert self.region.vm.dirty.reset_rings() == len(entries)
        self.pending |= BitMap(first[entry.slot] + entry.offset for entry in entries)

    def harvest(self) -> BitMap:
        with self.lock:
            self.take()
            pages, self.pending = self.pending, BitMap()
            return pages

    def on_exit(self, vcpu: GuestVcpu, exit_: Exit) -> bool:
        del vcpu
        with self.lock:
            self.times_full += 1
            self.take()
        return isinstance(exit_, DirtyRingFullExit)


class Copy:
    """What a migration's target holds."""

    def __init__(self, region: LoadedRegion, tracking: Tracking) -> None:
        self.region = region
        self.load = region.load
        self.tracking = tracking
        self.memory = bytearray(region.mapping.size)
        # Of the last harvest: when it began and when it was over.
        self.began = self.over = self.load.moment()
        self.full = tracking.first_is_full

    def take(self, pages: BitMap) -> None:
        """Copy pages."""
        with self.region.memory() as memory:
            for page in pages:
                place = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
                self.memory[place] = memory[place]

    def everything(self) -> None:
        """Copy all pages, as a migration does first: what is written from now on is reported."""
        self.over = self.load.moment()
        self.take(BitMap(range(self.load.pages)))

    def round(self) -> None:
        """Harvest, copy what is dirty, and check what that promises."""
        began = self.load.moment()
        dirty = self.tracking.harvest()
        over = self.load.moment()
        self.take(dirty)
        self.load.check(self.memory, began, self.load.moment(), "the copy has in")
        missing = self.load.written(self.over, began) - dirty
        assert not missing, f"pages {list(missing)} were written, but not reported"
        if self.full:
            assert dirty == BitMap(range(self.load.pages)), "logging starts with all pages dirty"
            self.full = False
        else:
            # A read that maps a page anew maps it writable where the host may write it: that counts, too.
            extra = dirty - self.load.touched(self.began, over) - self.load.looked_at(self.began, over)
            assert not extra, f"pages {list(extra)} were reported, but nobody accessed them"
        self.began, self.over = began, over

    def end(self) -> None:
        """Take the last round, of vCPUs that stand still: nothing may differ."""
        self.round()
        with self.region.memory() as memory:
            assert self.memory == memory


MANUAL = "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"
KINDS = [
    pytest.param(Log, id="log"),
    pytest.param(lambda: Manual(False), id="manual", marks=pytest.mark.requires(MANUAL)),
    pytest.param(
        lambda: Manual(True),
        id="initially-set",
        marks=pytest.mark.requires(f"{MANUAL}&{int(KVM_DIRTY_LOG_INITIALLY_SET)}"),
    ),
    pytest.param(Rings, id="ring", marks=pytest.mark.requires("KVM_CAP_DIRTY_LOG_RING")),
]


@pytest.fixture
def tracking(request: pytest.FixtureRequest) -> Tracking:
    made: Tracking = request.param()
    return made


def migrate(region: LoadedRegion, tracking: Tracking) -> None:
    """Keep a copy up to date beside the running vCPUs, and compare it in the end."""
    tracking.start(region)
    copy = Copy(region, tracking)
    with region.load as load:
        for _ in load.turns():
            copy.round()
    copy.end()


@pytest.mark.parametrize("tracking", KINDS, indirect=True)
def test_a_copy_keeps_up(make_load: MakeLoad, ring: int, tracking: Tracking) -> None:
    """Of memory that vCPUs write, in slots of odd sizes, each round reports all writes before it.

    Documentation/virt/kvm/api.rst 4.8, 4.117 and 7.36: pages dirtied since the last call.
    """
    region = make_load(
        pages=sum(ODD),
        slots=ODD,
        ring=ring,
        pace=PACE[ring],
        flags=KVM_MEM_LOG_DIRTY_PAGES,
        before_vcpus=tracking.enable,
        on_exit=tracking.on_exit,
    )
    migrate(region, tracking)


@pytest.mark.parametrize("tracking", KINDS, indirect=True)
def test_a_copy_keeps_up_with_huge_pages(make_load: MakeLoad, tracking: Tracking) -> None:
    """The same of huge pages, which the guest maps as such: they are reported in units of 4 KiB.

    Documentation/virt/kvm/api.rst 4.8.
    """
    region = make_load(
        pages=HUGE,
        flags=KVM_MEM_LOG_DIRTY_PAGES,
        backing=Anonymous("thp"),
        pace=PACE[3],
        page_size=SIZE_2M,
        before_vcpus=tracking.enable,
        on_exit=tracking.on_exit,
    )
    migrate(region, tracking)


@pytest.mark.parametrize("tracking", KINDS[:1] + KINDS[-1:], indirect=True)
def test_a_copy_of_shared_memory_keeps_up(make_load: MakeLoad, tracking: Tracking) -> None:
    """The same of memory behind a memfd, by more vCPUs than the host may have CPUs.

    Documentation/virt/kvm/api.rst 4.8 and 7.36.
    """
    region = make_load(
        pages=sum(ODD),
        vcpus=6,
        readers=1,
        flags=KVM_MEM_LOG_DIRTY_PAGES,
        backing=MemFd(),
        pace=PACE[3],
        before_vcpus=tracking.enable,
        on_exit=tracking.on_exit,
    )
    migrate(region, tracking)


@pytest.mark.deadline(60)
@pytest.mark.requires("KVM_CAP_DIRTY_LOG_RING")
def test_full_rings_lose_nothing(make_load: MakeLoad) -> None:
    """vCPUs that fill their rings again and again leave at each full one, and no page is lost.

    Documentation/virt/kvm/api.rst 7.36 KVM_CAP_DIRTY_LOG_RING.
    """
    tracking = Rings()
    region = make_load(
        pages=2 * ENTRIES,
        vcpus=2,
        flags=KVM_MEM_LOG_DIRTY_PAGES,
        before_vcpus=tracking.enable,
        on_exit=tracking.on_exit,
    )
    tracking.start(region)
    copy = Copy(region, tracking)
    with region.load as load:
        load.wait(ENTRIES)
        for _ in load.turns():
            copy.round()
    copy.end()
    assert tracking.times_full


@pytest.mark.parametrize("tracking", KINDS, indirect=True)
def test_logging_goes_on_and_off(make_load: MakeLoad, ring: int, tracking: Tracking) -> None:
    """Logging that is switched on beside running vCPUs reports every write from then on, time after time.

    Documentation/virt/kvm/api.rst 4.35, KVM_MEM_LOG_DIRTY_PAGES.
    """
    region = make_load(
        pages=130, slots=(65, 65), ring=ring, before_vcpus=tracking.enable, on_exit=tracking.on_exit
    )
    tracking.start(region)
    switched = 0
    with region.load as load:
        for _ in load.turns():
            copy = Copy(region, tracking)
            for slot in region.slots:
                slot.set_flags(KVM_MEM_LOG_DIRTY_PAGES)
            if not copy.full:
                copy.everything()
            for _round in range(3):
                copy.round()
            for slot in region.slots:
                slot.set_flags(0)
            if not isinstance(tracking, Rings):
                with refused(errno.ENOENT):
                    region.vm.dirty.get_log(region.slot.slot)
            else:
                tracking.harvest()
            switched += 1
    assert switched
    region.check()


@pytest.mark.requires(MANUAL)
def test_pieces_are_cleared_in_any_order(make_load: MakeLoad, rng: random.Random) -> None:
    """Clearing some pages beside running vCPUs leaves the others reported; none is lost.

    Documentation/virt/kvm/api.rst 4.117 KVM_CLEAR_DIRTY_LOG.
    """
    pages = sum(ODD)
    region = make_load(
        pages=pages,
        pace=PACE[3],
        flags=KVM_MEM_LOG_DIRTY_PAGES,
        before_vcpus=lambda vm: vm.dirty.enable_manual_log(),
    )
    vm, load, number = region.vm, region.load, region.slot.slot
    copy = bytearray(region.mapping.size)
    kept = BitMap()
    with load:
        for _ in load.turns():
            began = load.moment()
            dirty = vm.dirty.get_log(number).bitmap()
            assert kept <= dirty, f"pages {list(kept - dirty)} are clean, but nobody cleared them"
            chosen = BitMap(page for page in dirty if rng.random() < 0.7)
            starts = list(range(0, pages, 64))
            rng.shuffle(starts)
            for start in starts:
                size = min(64, pages - start)
                bits = DirtyBitmap.of(size, [p - start for p in chosen if start <= p < start + size])
                vm.dirty.clear_log(number, bits, first_page=start)
            kept = dirty - chosen
            with region.memory() as memory:
                for page in dirty:
                    place = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
                    copy[place] = memory[place]
            load.check(copy, began, load.moment(), "the copy has in")


def test_logging_alone_changes_nothing(make_load: MakeLoad, ring: int) -> None:
    """Flags that come and go on slots beside the one in use do not disturb the vCPUs.

    Documentation/virt/kvm/api.rst 4.35.
    """
    region = make_load(pages=120, slots=(40, 40, 40), ring=ring)
    with region.load as load:
        for turn in load.turns():
            region.slots[turn % 3].set_flags(KVM_MEM_LOG_DIRTY_PAGES)
            region.slots[(turn + 1) % 3].set_flags(0)
            region.check()
    region.check()


class Forgetful(Log):
    """A log that forgets a page now and then, as a KVM that loses a dirty bit would."""

    def harvest(self) -> BitMap:
        pages = super().harvest()
        return pages - BitMap(list(pages)[:1])


class Late(Log):
    """A log that does not see what is written soon after it was read, as a KVM that protects too late."""

    def harvest(self) -> BitMap:
        load = self.region.load
        pages = super().harvest()
        load.wait()
        return pages - super().harvest()


@pytest.mark.parametrize("tracking", [Forgetful, Late], indirect=True)
def test_what_a_broken_log_loses_is_noticed(make_load: MakeLoad, tracking: Tracking) -> None:
    """A page that the log drops makes the copy too old: these tests can fail.

    Documentation/virt/kvm/api.rst 4.8.
    """
    region = make_load(pages=64, flags=KVM_MEM_LOG_DIRTY_PAGES, on_exit=tracking.on_exit)
    tracking.start(region)
    copy = Copy(region, tracking)
    load = region.load.start()
    load.wait(100)
    with pytest.raises((LoadError, AssertionError), match=r"the copy has in|but not reported"):
        rounds(copy, 1000)
    load.stop()


def rounds(copy: Copy, count: int) -> None:
    """Go round until something is found."""
    for _ in range(count):
        copy.load.wait(10)
        copy.round()
