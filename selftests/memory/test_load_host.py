# SPDX-License-Identifier: Apache-2.0
"""What the host does to memory while vCPUs use it: they see the old or the new state, nothing else."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmpy import (
    PAGE_SIZE,
    SIZE_2M,
    Anonymous,
    Backing,
    DemandPager,
    LoadedRegion,
    MakeLoad,
    MemFd,
    MemoryFaultExit,
    PageFault,
    UffdFeature,
    UffdRegisterMode,
)
from kvmpy.core.backing import MappedGuestMemfd
from kvmpy.guest.load import WORDS, Moment
from selftests.conftest import UNDER_LOAD
from selftests.demand_paging.conftest import MakePager, make_pager

__all__ = ["make_pager"]

pytestmark = UNDER_LOAD

PAGES = 192
HUGE_PAGES = 2 * SIZE_2M // PAGE_SIZE
READ, WRITE = mmap.PROT_READ, mmap.PROT_WRITE
MADV_COLD, MADV_PAGEOUT, MADV_COLLAPSE = 20, 21, 25
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
MOVE_PAGES = 279
MPOL_MF_MOVE = 2
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.mremap.restype = ctypes.c_void_p


class Waiting:
    """Lets vCPUs that cannot reach their memory wait until it is back."""

    def __init__(self, region: LoadedRegion) -> None:
        self.region = region
        self.back = threading.Event()
        self.back.set()
        self.count = 0
        region.load.on_exit = lambda _vcpu, exit_: isinstance(exit_, MemoryFaultExit) and self.met()
        for vcpu in region.vm.vcpus:
            # A KVM that tells nothing more.
            vcpu.on_error = lambda error: error.errno == errno.EFAULT and self.met()

    def met(self) -> bool:
        """Wait in the thread of a vCPU."""
        self.count += 1
        return self.back.wait(self.region.vm.deadline)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Let those that meet the change wait until the end of the block."""
        self.back.clear()
        self.count = 0
        try:
            yield
        finally:
            self.back.set()

    def until_met(self) -> None:
        """Wait until a vCPU met what was taken away: each page has its turn in every round."""
        end = time.monotonic() + self.region.vm.deadline
        while not self.count:
            assert time.monotonic() < end, "no vCPU met the change"
            os.sched_yield()


def some_pages(rng: random.Random, pages: int) -> tuple[int, int]:
    """Return a range of pages: the first, and how many."""
    first = rng.randrange(pages)
    return first, rng.randint(1, pages - first)


def image(region: LoadedRegion, first: int, count: int) -> bytes:
    """Return the pages as they are now."""
    with region.mapping.view(first * PAGE_SIZE, count * PAGE_SIZE) as memory:
        return bytes(memory)


def protect(hva: int, size: int, protection: int) -> None:
    assert libc.mprotect(hva, size, protection) == 0, os.strerror(ctypes.get_errno())


# Ring 3 alone: an emulator of ring 0 takes memory that it cannot reach for MMIO.
RING3 = pytest.mark.parametrize("ring", [3], ids=["ring3"], indirect=True)


@RING3
@pytest.mark.parametrize(
    "backing", [Anonymous("never"), Anonymous("thp"), MemFd()], ids=["4K", "thp", "memfd"]
)
def test_memory_becomes_read_only(
    make_load: MakeLoad, ring: int, rng: random.Random, backing: Backing
) -> None:
    """Once mprotect(PROT_READ) returns nobody writes: writes are EFAULT until it is undone, reads go on.

    Documentation/virt/kvm/api.rst 4.35: changes of the backing "are automatically reflected into the guest".
    """
    region = make_load(pages=PAGES, ring=ring, readers=1, backing=backing)
    waiting = Waiting(region)
    reader = len(region.vm.vcpus) - 1
    with region.load as load:
        for _ in load.turns(visits=20):
            first, count = some_pages(rng, PAGES)
            hva, size = region.mapping.hva + first * PAGE_SIZE, count * PAGE_SIZE
            with waiting.away():
                protect(hva, size, READ)
                before = image(region, first, count)
                load.wait(20, vcpus=[reader])
                waiting.until_met()
                assert image(region, first, count) == before
                protect(hva, size, READ | WRITE)
            region.check()
    region.check()


@RING3
def test_memory_becomes_inaccessible(make_load: MakeLoad, ring: int, rng: random.Random) -> None:
    """Once mprotect(PROT_NONE) returns nobody reads or writes; what was there is there when it is undone.

    Documentation/virt/kvm/api.rst 8.44, KVM_CAP_MEMORY_FAULT_INFO.
    """
    region = make_load(pages=PAGES, ring=ring)
    waiting = Waiting(region)
    with region.load as load:
        for _ in load.turns(visits=20):
            first, count = some_pages(rng, PAGES)
            hva, size = region.mapping.hva + first * PAGE_SIZE, count * PAGE_SIZE
            with waiting.away():
                since = load.moment()
                protect(hva, size, 0)
                until = load.moment()
                waiting.until_met()
                protect(hva, size, READ)
                between = image(region, first, count)
                protect(hva, size, READ | WRITE)
            region.check()
            whole = bytearray(image(region, 0, PAGES))
            whole[first * PAGE_SIZE : (first + count) * PAGE_SIZE] = between
            wrong = [each for each in load.wrong(whole, since, until) if first <= each.page < first + count]
            assert not wrong, f"written in between: {wrong[0]}"
    region.check()


def test_memory_moves_away_and_back(make_load: MakeLoad, ring: int, rng: random.Random) -> None:
    """Once mremap() returns no vCPU reaches memory through its old address, until it is there again.

    Documentation/virt/kvm/api.rst 4.35.
    """
    region = make_load(pages=PAGES, ring=ring, backing=Anonymous("never"), loss="older")
    elsewhere = region.vm.own(Anonymous("never").map(PAGES * PAGE_SIZE))
    with region.load as load:
        for _ in load.turns(visits=20):
            first, count = some_pages(rng, PAGES)
            hva, size = region.mapping.hva + first * PAGE_SIZE, count * PAGE_SIZE
            since = load.moment()
            move(hva, elsewhere.hva, size)
            with elsewhere.view(0, size) as memory:
                before = bytes(memory)
                check_gone(region, since, first, count)
                load.wait(20)
                assert before == memory, "a vCPU wrote memory that had moved"
            move(elsewhere.hva, hva, size)
            region.check()
    region.check()


def move(source: int, target: int, size: int) -> None:
    """Move memory, and leave empty memory where it was: nobody else is to find room there."""
    flags = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP
    assert libc.mremap(source, size, size, flags, target) == target, os.strerror(ctypes.get_errno())


def drop(region: LoadedRegion, first: int, count: int, how: int) -> None:
    region.mapping.madvise(how, first * PAGE_SIZE, count * PAGE_SIZE)


def punch(region: LoadedRegion, first: int, count: int, how: int) -> None:
    del how
    mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    start, size = ctypes.c_long(first * PAGE_SIZE), ctypes.c_long(count * PAGE_SIZE)
    assert libc.fallocate(region.mapping.fd, mode, start, size) == 0, os.strerror(ctypes.get_errno())


def punch_guest_memfd(region: LoadedRegion, first: int, count: int, how: int) -> None:
    del how
    assert region.slot.gmem is not None
    region.slot.gmem.punch_hole(first * PAGE_SIZE, count * PAGE_SIZE)


Drop = Callable[[LoadedRegion, int, int, int], None]


@pytest.mark.parametrize(
    ("backing", "take", "how"),
    [
        pytest.param(Anonymous("never"), drop, mmap.MADV_DONTNEED, id="dontneed"),
        pytest.param(Anonymous("thp"), drop, mmap.MADV_DONTNEED, id="dontneed-thp"),
        pytest.param(MemFd(), punch, 0, id="memfd-hole"),
    ],
)
def test_memory_is_given_back(
    make_load: MakeLoad, ring: int, rng: random.Random, backing: Backing, take: Drop, how: int
) -> None:
    """Dropped pages are zero or written anew: no vCPU sees old content, or reaches the memory they were in.

    Documentation/virt/kvm/api.rst 4.35 (MADV_DROP); madvise(2); fallocate(2).
    """
    give_back(make_load(pages=PAGES, ring=ring, backing=backing, loss="zero"), rng, take, how)


@pytest.mark.protections("none")
@pytest.mark.requires("KVM_CAP_GUEST_MEMFD_FLAGS&3")
def test_mapped_private_memory_is_given_back(make_load: MakeLoad, ring: int, rng: random.Random) -> None:
    """The same of a guest_memfd that the host has mapped, of a VM whose type has such.

    Documentation/virt/kvm/api.rst 4.142 KVM_CREATE_GUEST_MEMFD; fallocate(2).
    """
    region = make_load(pages=PAGES, ring=ring, backing=MappedGuestMemfd(), loss="zero")
    give_back(region, rng, punch_guest_memfd, 0)


def give_back(region: LoadedRegion, rng: random.Random, take: Drop, how: int) -> None:
    """Drop pages beside the running vCPUs, and see that nobody has the old ones."""
    # The pages that are dropped are likely to be what new memory is made of.
    decoys = [region.vm.own(Anonymous("never").map(PAGES * PAGE_SIZE)) for _ in range(2)]
    pattern = b"\xa5" * PAGE_SIZE
    with region.load as load:
        for turn in load.turns(visits=20):
            first, count = some_pages(rng, PAGES)
            since = load.moment()
            take(region, first, count, how)
            size = count * PAGE_SIZE
            decoy = decoys[turn % 2]
            with decoy.view(0, size) as memory:
                memory[:] = pattern * count
            check_gone(region, since, first, count)
            load.wait(5)
            with decoy.view(0, size) as memory:
                assert memory == pattern * count, "a vCPU wrote memory that was taken from it"
            decoy.madvise(mmap.MADV_DONTNEED)
    region.check()


def check_gone(region: LoadedRegion, since: Moment, first: int, count: int) -> None:
    """Check that each word is 0 or of a generation that began after *since*."""
    load = region.load
    whole = bytearray(image(region, 0, PAGES))
    until = load.moment()
    load.check(whole, since, until)
    words = memoryview(whole).cast("Q")
    for order, start in zip(load.orders, since, strict=False):
        for page, generation in order.generations(start):
            if first <= page < first + count:
                for word in WORDS:
                    value = words[page * 512 + word]
                    assert not value or value >> 32 > generation, f"page {page} is gone, but holds {value:#x}"


@pytest.mark.parametrize(
    ("backing", "how"),
    [
        pytest.param(Anonymous("never"), MADV_PAGEOUT, id="pageout"),
        pytest.param(MemFd(), MADV_PAGEOUT, id="pageout-memfd"),
        pytest.param(Anonymous("never"), MADV_COLD, id="cold"),
        pytest.param(Anonymous("thp"), MADV_COLLAPSE, id="collapse"),
        pytest.param(Anonymous("thp"), 0, id="split"),
    ],
)
def test_memory_moves_below(make_load: MakeLoad, rng: random.Random, backing: Backing, how: int) -> None:
    """Reclaim, huge pages that are made and huge pages that are split change nothing of what is in memory.

    Documentation/virt/kvm/api.rst 4.35; madvise(2).
    """
    region = make_load(pages=HUGE_PAGES, backing=backing, page_size=SIZE_2M)
    waiting = Waiting(region)
    with region.load as load:
        for _ in load.turns(visits=50):
            if how:
                advise(region, how)
            else:
                page = rng.randrange(HUGE_PAGES) * PAGE_SIZE
                with waiting.away():
                    protect(region.mapping.hva + page, PAGE_SIZE, READ)
                    protect(region.mapping.hva + page, PAGE_SIZE, READ | WRITE)
                advise(region, MADV_COLLAPSE)
            region.check()
    region.check()


def advise(region: LoadedRegion, how: int) -> None:
    """Call madvise(2); what the kernel cannot do just now is nothing that the guest may notice."""
    try:
        region.mapping.madvise(how)
    except OSError:
        if how != MADV_COLLAPSE:
            raise


def test_freed_memory_is_old_or_zero(make_load: MakeLoad, ring: int, rng: random.Random) -> None:
    """After MADV_FREE a page holds what it did, or zeroes, until the guest's next write, which stays.

    madvise(2), MADV_FREE.
    """
    region = make_load(pages=PAGES, ring=ring, backing=Anonymous("never"), loss="zero")
    with region.load as load:
        for _ in load.turns(visits=20):
            first, count = some_pages(rng, PAGES)
            drop(region, first, count, mmap.MADV_FREE)
            region.check()
    region.check()


def test_pages_migrate(make_load: MakeLoad, ring: int, rng: random.Random) -> None:
    """Pages that move between NUMA nodes (or stay, where there is one) keep what is in them.

    move_pages(2).
    """
    region = make_load(pages=PAGES, ring=ring, backing=Anonymous("never"))
    folder = Path("/sys/devices/system/node")
    nodes = [int(node.name[4:]) for node in folder.glob("node[0-9]*")] or [0]
    moved = 0
    with region.load as load:
        for turn in load.turns(visits=20):
            first, count = some_pages(rng, PAGES)
            addresses = (ctypes.c_void_p * count)(
                *(region.mapping.hva + (first + page) * PAGE_SIZE for page in range(count))
            )
            targets = (ctypes.c_int * count)(*[nodes[turn % len(nodes)]] * count)
            status = (ctypes.c_int * count)()
            arguments = (0, ctypes.c_ulong(count), addresses, targets, status, MPOL_MF_MOVE)
            assert libc.syscall(MOVE_PAGES, *arguments) >= 0, os.strerror(ctypes.get_errno())
            moved += 1
            region.check()
    region.check()
    assert moved


def test_a_child_has_the_memory_of_its_birth(make_load: MakeLoad, ring: int) -> None:
    """A fork() beside running vCPUs gives the child the memory of that time; they go on in the parent's.

    fork(2): private memory is copied; KVM follows when the parent's page is the copy.
    """
    region = make_load(pages=PAGES, ring=ring, backing=Anonymous("never"))
    with region.load as load:
        for _ in load.turns(visits=20):
            since = load.moment()
            to_child, from_child = os.pipe(), os.pipe()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
                child = os.fork()
            if not child:
                watch_own_memory(region, to_child, from_child)
            try:
                os.close(from_child[1])
                os.close(to_child[0])
                assert os.read(from_child[0], 1) == b"1"
                load.wait(PAGES)
                region.check()
                os.write(to_child[1], b"1")
                copy = bytearray()
                while part := os.read(from_child[0], 1 << 20):
                    copy += part
            finally:
                for fd in (from_child[0], to_child[1]):
                    os.close(fd)
                _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0, "the child's memory changed"
            load.check(copy, since, load.moment(), "the child has")
    region.check()


def watch_own_memory(region: LoadedRegion, told: tuple[int, int], tell: tuple[int, int]) -> None:
    """In the child: look at the memory, wait, and see whether it is the same."""
    code = 2
    try:
        os.close(told[1])
        os.close(tell[0])
        before = image(region, 0, PAGES)
        os.write(tell[1], b"1")
        os.read(told[0], 1)
        code = int(image(region, 0, PAGES) != before)
        rest = memoryview(before)
        while rest:
            rest = rest[os.write(tell[1], rest) :]
    finally:
        os._exit(code)


@pytest.mark.parametrize(
    ("backing", "feature"),
    [
        pytest.param(Anonymous("never"), UffdFeature.UFFD_FEATURE_PAGEFAULT_FLAG_WP, id="anonymous"),
        pytest.param(MemFd(), UffdFeature.UFFD_FEATURE_WP_HUGETLBFS_SHMEM, id="memfd"),
    ],
)
def test_write_protection_by_userfaultfd(
    make_load: MakeLoad,
    make_pager: MakePager,
    ring: int,
    backing: Backing,
    feature: UffdFeature,
) -> None:
    """A page that userfaultfd protects is written by no vCPU before its fault is told: a snapshot is exact.

    Documentation/admin-guide/mm/userfaultfd.rst, Write Protect Notifications.
    """
    region = make_load(pages=PAGES, ring=ring, backing=backing)
    mapping = region.mapping
    saved: dict[int, bytes] = {}
    # A fault that waits may be of a page that was protected anew meanwhile: look and lift in one step.
    step = threading.Lock()

    def save(fault: PageFault) -> object:
        page = (fault.address - mapping.hva) // PAGE_SIZE
        with step:
            saved.setdefault(page, image(region, page, 1))
            pager.uffd.writeprotect(mapping.hva + page * PAGE_SIZE, PAGE_SIZE, False)
        return DemandPager.DONE

    pager = make_pager(save, features=feature)
    with region.load as load:
        # Pages that are not there yet cannot be protected.
        load.wait(PAGES)
        pager.register(mapping.hva, mapping.size, UffdRegisterMode.UFFDIO_REGISTER_MODE_WP)
        for _ in load.turns(visits=10):
            with step:
                saved.clear()
                since = load.moment()
                pager.uffd.writeprotect(mapping.hva, mapping.size, True)
                until = load.moment()
            load.wait(10)
            # Whatever was not told is as it was.
            snapshot = bytearray(image(region, 0, PAGES))
            with step:
                told = dict(saved)
            for page, content in told.items():
                snapshot[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = content
            load.check(snapshot, since, until, "the snapshot has")
            pager.uffd.writeprotect(mapping.hva, mapping.size, False)
            region.check()
    pager.stop()
    region.check()
