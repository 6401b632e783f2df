# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvmpy.core.msr_filter import MAX_RANGE_MSRS, READ, WRITE, MsrFilter, MsrRange

# A few clusters, so that most examples need at most 16 ranges.
MSRS = st.one_of(
    st.integers(0, 0x7FF),
    st.integers(0x900, 0x20FF),
    st.integers(0xC000_0000, 0xC001_1FFF),
    st.integers(0x4B56_4D00, 0x4B56_4DFF),
)


@pytest.mark.parametrize("allowing", [False, True], ids=["denying", "allowing"])
@given(st.sets(MSRS, max_size=60), st.sets(MSRS, max_size=60), MSRS)
def test_a_filter_is_about_what_it_lists_and_nothing_else(
    allowing: bool, reads: set[int], writes: set[int], other: int
) -> None:
    assume(reads or not allowing)
    make = MsrFilter.allowing if allowing else MsrFilter.denying
    msr_filter = make(reads=reads, writes=writes)
    assert msr_filter.default_deny is allowing
    for index in reads | writes | {other}:
        assert msr_filter.allows(index, READ) == ((index in reads) is allowing)
        assert msr_filter.allows(index, WRITE) == ((index in writes) is allowing)


@given(st.sets(MSRS, max_size=100))
def test_ranges_fit_the_kernels_limits_and_do_not_overlap(msrs: set[int]) -> None:
    ranges = MsrFilter.denying(msrs).ranges
    assert len(ranges) <= 16
    for item in ranges:
        assert item.flags == READ | WRITE
        assert 0 < len(item.bitmap) <= 0x600
        assert len(item.bitmap) == -(-item.nmsrs // 64) * 8
    ordered = sorted(ranges, key=lambda item: item.base)
    assert all(a.base + a.nmsrs <= b.base for a, b in itertools.pairwise(ordered))


def test_the_longest_range_is_exactly_what_the_kernel_takes() -> None:
    built = MsrFilter.denying([0x1000, 0x1000 + MAX_RANGE_MSRS - 1])
    assert [(item.base, item.nmsrs) for item in built.ranges] == [(0x1000, MAX_RANGE_MSRS)]
    built = MsrFilter.denying([0x1000, 0x1000 + MAX_RANGE_MSRS])
    assert [(item.base, item.nmsrs) for item in built.ranges] == [(0x1000, 1), (0x1000 + MAX_RANGE_MSRS, 1)]


def test_seventeen_distant_msrs_are_refused() -> None:
    far = [0x1000_0000 + n * 0x10_0000 for n in range(17)]
    assert len(MsrFilter.denying(far[:16]).ranges) == 16
    with pytest.raises(ValueError, match="need 17 ranges"):
        MsrFilter.denying(far)


@pytest.mark.parametrize("index", [0x800, 0x8FF])
def test_x2apic_msrs_are_refused(index: int) -> None:
    with pytest.raises(ValueError, match="x2APIC"):
        MsrFilter.denying([index])


def test_x2apic_msrs_pass_every_filter() -> None:
    assert MsrFilter.allowing([0x10]).allows(0x80B, WRITE)


def test_numbers_beyond_32_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="no 32-bit number"):
        MsrFilter.denying([1 << 32])


def test_a_filter_that_allows_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        MsrFilter.allowing()


def test_the_empty_filter_allows_everything() -> None:
    assert MsrFilter().allows(0x10, READ)
    assert MsrFilter.denying() == MsrFilter()


def test_a_short_bitmap_is_filled_up_to_whole_words() -> None:
    item = MsrRange(0x10, 65, READ, b"\x01")
    assert len(item.bitmap) == 16
    assert item.allows(0x10)
    assert not item.allows(0x50)
    with pytest.raises(ValueError, match="outside"):
        item.allows(0x51)
