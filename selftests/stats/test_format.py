# SPDX-License-Identifier: Apache-2.0
"""The statistics file of VMs and vCPUs, read byte by byte against its documentation."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from kvmpy import Kvm, StatsFd, Vcpu, Vm, ioctls, refused

pytestmark = pytest.mark.requires("KVM_CAP_BINARY_STATS_FD")

HEADER = struct.Struct("<6I")
DESCRIPTOR = struct.Struct("<IhHII")
CUMULATIVE, INSTANT, PEAK, LINEAR, LOGARITHMIC = range(5)
NONE, BYTES, SECONDS, CYCLES, BOOLEAN = range(5)
HISTOGRAMS = (LINEAR, LOGARITHMIC)


@dataclass(frozen=True)
class Raw:
    """A descriptor as the file has it."""

    flags: int
    exponent: int
    size: int
    offset: int
    bucket_size: int
    name_field: bytes

    @property
    def name(self) -> str:
        return self.name_field.split(b"\0", 1)[0].decode("ascii")

    @property
    def type(self) -> int:
        return self.flags & 0xF

    @property
    def unit(self) -> int:
        return self.flags >> 4 & 0xF

    @property
    def base(self) -> int:
        return self.flags >> 8 & 0xF


class Statistics:
    """A statistics file, its blocks found by its own header."""

    def __init__(self, owner: Vm | Vcpu) -> None:
        self.file: StatsFd = owner.stats.get_fd()
        self.fd = self.file.fd
        fields = HEADER.unpack(os.pread(self.fd, HEADER.size, 0))
        self.flags, self.name_size, self.num_desc, self.id_offset, self.desc_offset, self.data_offset = fields
        self.step = DESCRIPTOR.size + self.name_size
        raw = self.read(self.desc_offset, self.step * self.num_desc)
        self.descriptors = [
            Raw(
                *DESCRIPTOR.unpack_from(raw, position), raw[position + DESCRIPTOR.size : position + self.step]
            )  # type: ignore[call-arg]
            for position in range(0, len(raw), self.step)
        ]

    def read(self, offset: int, size: int) -> bytes:
        """Read all of a block."""
        data = b""
        while len(data) < size:
            part = os.pread(self.fd, size - len(data), offset + len(data))
            assert part, f"the file ends at {offset + len(data)}"
            data += part
        return data

    @property
    def data_size(self) -> int:
        """Bytes of the data block by its descriptors."""
        return 8 * sum(one.size for one in self.descriptors)


@pytest.fixture(params=["vm", "vcpu"])
def owner(request: pytest.FixtureRequest, vm: Vm) -> Vm | Vcpu:
    """A VM or a vCPU, which has number 3."""
    vcpu = vm.create_vcpu(3)
    return vm if request.param == "vm" else vcpu


@pytest.fixture
def statistics(owner: Vm | Vcpu) -> Iterator[Statistics]:
    stats = Statistics(owner)
    try:
        yield stats
    finally:
        stats.file.close()


def test_header(statistics: Statistics) -> None:
    """The header's flags are 0, there are descriptors, and all blocks start at multiples of 8.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD.
    """
    assert statistics.flags == 0
    assert statistics.num_desc > 0
    assert statistics.name_size > 0
    offsets = (statistics.id_offset, statistics.desc_offset, statistics.data_offset)
    assert [offset % 8 for offset in offsets] == [0, 0, 0]


def test_blocks_do_not_overlap(statistics: Statistics) -> None:
    """Header, id, descriptors and data do not overlap, and the file ends with the last of them.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD: four blocks that do not overlap.
    """
    blocks = sorted(
        [
            (0, HEADER.size),
            (statistics.id_offset, statistics.name_size),
            (statistics.desc_offset, statistics.step * statistics.num_desc),
            (statistics.data_offset, statistics.data_size),
        ]
    )
    ends = [start + size for start, size in blocks]
    for (start, _), end in zip(blocks[1:], ends, strict=False):
        assert start >= end
    assert len(os.pread(statistics.fd, 1, ends[-1] - 1)) == 1
    assert os.pread(statistics.fd, 1, ends[-1]) == b""


def test_id(owner: Vm | Vcpu, statistics: Statistics) -> None:
    """The id string is terminated, and names the process and the vCPU.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD; virt/kvm/kvm_main.c ("kvm-%d", "kvm-%d/vcpu-%d").
    """
    field = statistics.read(statistics.id_offset, statistics.name_size)
    text, end, _ = field.partition(b"\0")
    assert end == b"\0"
    process = f"kvm-{os.getpid()}"
    assert text.decode() == (process if isinstance(owner, Vm) else f"{process}/vcpu-3")


def test_names(statistics: Statistics) -> None:
    """Every statistic has a terminated name, and no two have the same.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD (name, with its trailing NUL).
    """
    for one in statistics.descriptors:
        assert b"\0" in one.name_field
        assert one.name.replace("_", "").isalnum()
    names = [one.name for one in statistics.descriptors]
    assert len(set(names)) == len(names)


def test_flags(statistics: Statistics) -> None:
    """Type, unit and base of every statistic are known ones, and no other flag is set.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD (bits 0-3, 4-7, 8-11).
    """
    for one in statistics.descriptors:
        assert one.type in (CUMULATIVE, INSTANT, PEAK, LINEAR, LOGARITHMIC), one.name
        assert one.unit in (NONE, BYTES, SECONDS, CYCLES, BOOLEAN), one.name
        assert one.base in (0, 1), one.name
        assert one.flags >> 12 == 0, one.name


def test_sizes(statistics: Statistics) -> None:
    """A histogram has several values, everything else one; linear histograms alone have a bucket size.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD (size, bucket_size).
    """
    for one in statistics.descriptors:
        assert (one.size > 1) == (one.type in HISTOGRAMS), one.name
        assert (one.bucket_size > 0) == (one.type == LINEAR), one.name


def test_booleans(statistics: Statistics) -> None:
    """A boolean statistic is 0 or 1; as a histogram it is linear with two buckets.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD: KVM_STATS_UNIT_BOOLEAN.
    """
    values = statistics.file.read()
    for one in statistics.descriptors:
        if one.unit != BOOLEAN:
            continue
        assert one.exponent == 0, one.name
        if one.type in HISTOGRAMS:
            assert (one.type, one.size) == (LINEAR, 2), one.name
        else:
            assert values[one.name].value in (0, 1), one.name


def test_values_fill_data_block(statistics: Statistics) -> None:
    """The values lie side by side: aligned, without overlap or gap, from the start of the data block.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD: an array of 64-bit values.
    """
    expected = 0
    for one in sorted(statistics.descriptors, key=lambda one: one.offset):
        assert one.offset == expected, one.name
        expected += 8 * one.size
    assert expected == statistics.data_size


def test_order_of_values(statistics: Statistics) -> None:
    """The values lie in the order of the descriptors.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD: an array of 64-bit values in the same order.
    """
    expected = 0
    for one in statistics.descriptors:
        assert one.offset == expected, one.name
        expected += 8 * one.size


def test_scales_go_one_way(statistics: Statistics) -> None:
    """Times are parts of a second; what has no unit, bytes and cycles come in ones or more, never in parts.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD (KVM_STATS_UNIT_* and exponent).
    """
    for one in statistics.descriptors:
        assert one.exponent <= 0 if one.unit == SECONDS else one.exponent >= 0, one.name


def test_times_are_in_nanoseconds(statistics: Statistics) -> None:
    """What is named after nanoseconds has seconds as unit and 10^-9 as scale.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD: KVM_STATS_BASE_POW10 with exponent -9.
    """
    for one in statistics.descriptors:
        if one.name.endswith("_ns"):
            assert (one.unit, one.base, one.exponent) == (SECONDS, 0, -9), one.name


def test_constant_blocks(statistics: Statistics) -> None:
    """All blocks but the data are immutable: a second file of the same object has the same.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD.
    """
    size = statistics.data_offset
    assert statistics.read(0, size) == statistics.read(0, size)


def test_partial_reads(statistics: Statistics) -> None:
    """The file may be read in any pieces, with pread() anywhere, and with read() from its start.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD: use pread.
    """
    whole = statistics.read(0, statistics.data_offset)
    assert b"".join(statistics.read(offset, 1) for offset in range(200)) == whole[:200]
    assert b"".join(os.read(statistics.fd, 40) for _ in range(5)) == whole[:200]


def test_seek(statistics: Statistics) -> None:
    """lseek() moves to where the next read() begins.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD: use pread or lseek to read repeatedly.
    """
    whole = statistics.read(0, statistics.data_offset)
    os.lseek(statistics.fd, statistics.desc_offset, os.SEEK_SET)
    assert os.read(statistics.fd, 100) == whole[statistics.desc_offset : statistics.desc_offset + 100]
    assert os.read(statistics.fd, 100) == whole[statistics.desc_offset + 100 : statistics.desc_offset + 200]


def test_outlives_owner(owner: Vm | Vcpu, statistics: Statistics) -> None:
    """The file stays readable when the file descriptor of its VM or vCPU is closed.

    virt/kvm/kvm_main.c: a statistics file holds a reference to the VM (commit eed3013faa40).
    """
    names = set(statistics.file.read())
    owner.close()
    assert set(statistics.file.read()) == names


def test_is_read_only(statistics: Statistics) -> None:
    """The file cannot be written.

    virt/kvm/kvm_main.c: the descriptor is opened read-only.
    """
    with refused(errno.EBADF, by=OSError):
        os.write(statistics.fd, b"\0" * 8)


def test_system_has_none(kvm: Kvm) -> None:
    """/dev/kvm itself has no statistics: the ioctl is for VMs and vCPUs.

    Documentation/virt/kvm/api.rst, 4.133 KVM_GET_STATS_FD (type: vm ioctl, vcpu ioctl).
    """
    with refused(errno.EINVAL, errno.ENOTTY):
        kvm.ioctl(ioctls.KVM_GET_STATS_FD)


def test_kvmpy_reads_the_same(statistics: Statistics) -> None:
    """kvmpy's own reader has the descriptors that the file has.

    kvmpy.core.stats against the bytes of the file.
    """
    mine = [
        (one.name, one.type | one.unit, one.exponent, one.size, one.offset, one.bucket_size)
        for one in statistics.file.descriptors
    ]
    assert mine == [
        (one.name, one.flags & 0xFF, one.exponent, one.size, one.offset, one.bucket_size)
        for one in statistics.descriptors
    ]
