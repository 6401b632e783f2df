# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import os
import struct
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.core.stats import (
    Bucket,
    StatDescriptor,
    StatsFd,
    StatsHeader,
    StatValue,
    parse_descriptors,
    parse_values,
)
from kvmpy.uapi.constants import StatsType, StatsUnit

NAME_SIZE = 48


def descriptor(
    name: str,
    *,
    kind: int = 0,
    unit: int = 0,
    base: int = 0,
    exponent: int = 0,
    size: int = 1,
    offset: int = 0,
    bucket: int = 0,
) -> bytes:
    flags = kind | unit << 4 | base << 8
    return struct.pack("<IhHII", flags, exponent, size, offset, bucket) + name.encode().ljust(
        NAME_SIZE, b"\0"
    )


def stats_file(descriptors: list[bytes], values: list[int], *, gap: int = 0) -> int:
    id_offset = 24
    desc_offset = id_offset + NAME_SIZE + gap
    data_offset = desc_offset + len(descriptors) * (16 + NAME_SIZE) + gap
    raw = struct.pack("<6I", 0, NAME_SIZE, len(descriptors), id_offset, desc_offset, data_offset)
    raw += b"kvm-17".ljust(NAME_SIZE + gap, b"\0") + b"".join(descriptors) + bytes(gap)
    raw += struct.pack(f"<{len(values)}Q", *values)
    fd = os.memfd_create("stats")
    os.write(fd, raw)
    return fd


@pytest.mark.parametrize("gap", [0, 64])
def test_a_file_is_read_by_the_offsets_of_its_header(gap: int) -> None:
    fd = stats_file(
        [descriptor("exits"), descriptor("hist", kind=4, size=3, offset=8)], [7, 1, 2, 3], gap=gap
    )
    with StatsFd(fd, "stats") as stats:
        assert stats.id == "kvm-17"
        values = stats.read()
    assert values["exits"].value == 7
    assert values["hist"].values == (1, 2, 3)


def test_reading_again_sees_new_values() -> None:
    fd = stats_file([descriptor("exits")], [1])
    with StatsFd(fd, "stats") as stats:
        before = stats.read()
        os.pwrite(fd, struct.pack("<Q", 9), stats.header.data_offset)
        assert (before["exits"].value, stats.read()["exits"].value) == (1, 9)


def test_types_units_and_exponents_are_decoded() -> None:
    raw = descriptor("wait", kind=2, unit=2, base=0, exponent=-9, offset=16)
    got = StatDescriptor.parse(raw)
    assert got == StatDescriptor(
        "wait", StatsType.KVM_STATS_TYPE_PEAK, StatsUnit.KVM_STATS_UNIT_SECONDS, 10, -9, 1, 16, 0
    )
    assert got.scale == Fraction(1, 10**9)


def test_pow2_scale_is_exact() -> None:
    value = StatValue(StatDescriptor.parse(descriptor("b", unit=1, base=1, exponent=20)), (3,))
    assert value.scaled == 3 * 2**20


def test_unknown_type_and_unit_stay_numbers() -> None:
    got = StatDescriptor.parse(descriptor("new", kind=9, unit=15))
    assert (got.type, got.unit) == (9, 0xF0)


def test_linear_histogram_bounds() -> None:
    value = StatValue(StatDescriptor.parse(descriptor("h", kind=3, size=3, bucket=10)), (4, 5, 6))
    assert value.buckets() == [Bucket(0, 10, 4), Bucket(10, 20, 5), Bucket(20, None, 6)]
    assert value.total == 15


def test_logarithmic_histogram_bounds() -> None:
    value = StatValue(StatDescriptor.parse(descriptor("h", kind=4, size=4)), (1, 2, 3, 4))
    assert value.buckets() == [Bucket(0, 1, 1), Bucket(1, 2, 2), Bucket(2, 4, 3), Bucket(4, None, 4)]


@given(st.integers(min_value=2, max_value=64), st.integers(min_value=3, max_value=4))
def test_buckets_tile_the_numbers_from_zero(size: int, kind: int) -> None:
    value = StatValue(
        StatDescriptor.parse(descriptor("h", kind=kind, size=size, bucket=8)), tuple(range(size))
    )
    buckets = value.buckets()
    assert buckets[0].low == 0
    assert buckets[-1].high is None
    assert all(a.high == b.low for a, b in itertools.pairwise(buckets))


def test_a_scalar_has_no_buckets_and_a_histogram_no_value() -> None:
    scalar = StatValue(StatDescriptor.parse(descriptor("s")), (1,))
    hist = StatValue(StatDescriptor.parse(descriptor("h", kind=4, size=2)), (1, 2))
    with pytest.raises(ValueError, match="not a histogram"):
        scalar.buckets()
    with pytest.raises(ValueError, match="2 numbers"):
        _ = hist.value


def test_truncated_files_are_refused() -> None:
    with pytest.raises(ValueError, match="24 bytes"):
        StatsHeader.parse(bytes(23))
    header = StatsHeader(0, NAME_SIZE, 2, 24, 72, 200)
    with pytest.raises(ValueError, match="2 descriptors"):
        parse_descriptors(header, descriptor("one"))
    with pytest.raises(ValueError, match="exits ends at byte 16"):
        parse_values([StatDescriptor.parse(descriptor("exits", offset=8))], bytes(8))


def test_overlapping_blocks_are_refused_and_the_descriptor_is_closed() -> None:
    fd = os.memfd_create("stats")
    os.write(fd, struct.pack("<6I", 0, NAME_SIZE, 1, 4, 8, 12))
    with pytest.raises(ValueError, match="overlap"):
        StatsFd(fd, "stats")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
