# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

from kvmpy.core.dirty import GFN_SIZE, DirtyBitmap, DirtyGfn, DirtyRing
from kvmpy.core.errors import ClosedError
from kvmpy.core.fd import KvmFd
from kvmpy.uapi.constants import KVM_DIRTY_LOG_PAGE_OFFSET

PAGE = 4096


@given(st.integers(1, 300), st.data())
def test_scan_finds_exactly_the_set_bits(pages: int, data: st.DataObject) -> None:
    dirty = data.draw(st.sets(st.integers(0, pages - 1)))
    bitmap = DirtyBitmap.of(pages, dirty)
    assert list(bitmap) == sorted(dirty)
    assert len(bitmap) == len(dirty)
    assert bitmap.bitmap() == BitMap(dirty)
    assert bool(bitmap) == bool(dirty)
    assert [page in bitmap for page in range(pages)] == [page in dirty for page in range(pages)]


@pytest.mark.parametrize("pages", [1, 63, 64, 65, 4096])
def test_bits_behind_the_last_page_do_not_count(pages: int) -> None:
    bitmap = DirtyBitmap(pages, b"\xff" * (-(-pages // 64) * 8))
    assert list(bitmap) == list(range(pages))
    assert len(bitmap) == pages


def test_a_bitmap_has_whole_64_bit_words() -> None:
    assert [len(DirtyBitmap(pages).data) for pages in (1, 64, 65)] == [8, 8, 16]


def test_bitmaps_compare_by_pages_not_by_padding() -> None:
    padded = DirtyBitmap(3, b"\x0a")
    assert padded == DirtyBitmap.of(3, [1])
    assert padded != DirtyBitmap.of(4, [1])
    assert padded != DirtyBitmap.of(3, [2])


@pytest.mark.parametrize("page", [-1, 10])
def test_pages_outside_the_slot_are_refused(page: int) -> None:
    with pytest.raises(ValueError, match="outside a slot of 10"):
        DirtyBitmap.of(10, [page])
    with pytest.raises(ValueError, match="outside a slot of 10"):
        _ = page in DirtyBitmap(10)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="0 pages"):
        DirtyBitmap(0)
    with pytest.raises(ValueError, match="more than"):
        DirtyBitmap(64, bytes(9))


class FakeVcpu(KvmFd):
    """A file whose pages from 64 on are a dirty ring that the test fills as KVM would."""

    def __init__(self, entries: int) -> None:
        super().__init__(os.memfd_create("ring"), "vm0/vcpu0")
        self.entries = entries
        self.next = 0
        os.ftruncate(self.fd, KVM_DIRTY_LOG_PAGE_OFFSET * PAGE + entries * GFN_SIZE)

    def _at(self, index: int) -> int:
        return KVM_DIRTY_LOG_PAGE_OFFSET * PAGE + index % self.entries * GFN_SIZE

    def push(self, slot: int, offset: int) -> None:
        os.pwrite(self.fd, struct.pack("<IIQ", 1, slot, offset), self._at(self.next))
        self.next += 1

    def flags(self, index: int) -> int:
        return int(struct.unpack("<I", os.pread(self.fd, 4, self._at(index)))[0])

    def reset(self) -> int:
        count = 0
        for index in range(self.entries):
            if self.flags(index) & 2:
                os.pwrite(self.fd, struct.pack("<I", 0), self._at(index))
                count += 1
        return count


@pytest.fixture
def vcpu() -> Iterator[FakeVcpu]:
    with FakeVcpu(256) as fake_vcpu:
        yield fake_vcpu


def test_harvest_returns_entries_in_order_and_marks_them(vcpu: FakeVcpu) -> None:
    ring = DirtyRing(vcpu, 256)
    for offset in (5, 3, 5):
        vcpu.push(1, offset)
    assert ring.harvest() == [DirtyGfn(1, 5), DirtyGfn(1, 3), DirtyGfn(1, 5)]
    assert [vcpu.flags(n) for n in range(4)] == [2, 2, 2, 0]
    assert ring.harvest() == []
    ring.close()


def test_harvest_goes_on_where_it_stopped_across_the_end_of_the_ring(vcpu: FakeVcpu) -> None:
    ring = DirtyRing(vcpu, 256)
    seen: list[int] = []
    for start in range(0, 1000, 200):
        for offset in range(start, start + 200):
            vcpu.push(0, offset)
        seen += [entry.offset for entry in ring.harvest()]
        assert vcpu.reset() == 200
    assert seen == list(range(1000))
    ring.close()


def test_entries_that_wait_for_a_reset_are_not_harvested_again(vcpu: FakeVcpu) -> None:
    ring = DirtyRing(vcpu, 256)
    for offset in range(256):
        vcpu.push(0, offset)
    assert len(ring.harvest()) == 256
    assert ring.harvest() == []
    assert vcpu.reset() == 256
    vcpu.push(0, 77)
    assert ring.harvest() == [DirtyGfn(0, 77)]
    ring.close()


def test_a_limit_leaves_the_rest(vcpu: FakeVcpu) -> None:
    ring = DirtyRing(vcpu, 256)
    for offset in range(4):
        vcpu.push(0, offset)
    assert [entry.offset for entry in ring.harvest(3)] == [0, 1, 2]
    assert [entry.offset for entry in ring.harvest()] == [3]
    ring.close()


def test_harvest_pages_groups_by_slot(vcpu: FakeVcpu) -> None:
    ring = DirtyRing(vcpu, 256)
    for slot, offset in ((1, 9), (0x10002, 4), (1, 9), (1, 2)):
        vcpu.push(slot, offset)
    assert ring.harvest_pages() == {1: BitMap([2, 9]), 0x10002: BitMap([4])}
    assert ring.harvest_pages() == {}
    vcpu.push(1, 3)
    assert ring.harvest_pages() == {1: BitMap([3])}
    ring.close()


@pytest.mark.parametrize("entries", [0, -1, 3, 100])
def test_sizes_that_are_no_power_of_two_are_refused(vcpu: FakeVcpu, entries: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        DirtyRing(vcpu, entries)


def test_a_closed_ring_is_a_clear_error(vcpu: FakeVcpu) -> None:
    ring = DirtyRing(vcpu, 256)
    ring.close()
    ring.close()
    with pytest.raises(ClosedError, match="vm0/vcpu0/dirty-ring"):
        ring.harvest()
