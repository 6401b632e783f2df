# SPDX-License-Identifier: Apache-2.0
"""The format of KVM's binary statistics files (KVM_GET_STATS_FD, api.rst section 4.133), as typed values."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from kvmpy.uapi.constants import StatsBase, StatsType, StatsUnit

_HEADER = struct.Struct("<6I")
_DESCRIPTOR = struct.Struct("<IhHII")
_BASES = {int(StatsBase.KVM_STATS_BASE_POW10): 10, int(StatsBase.KVM_STATS_BASE_POW2): 2}


@dataclass(frozen=True)
class StatsHeader:
    """The header of a statistics file: sizes in bytes, offsets from its start."""

    flags: int
    name_size: int
    num_desc: int
    id_offset: int
    desc_offset: int
    data_offset: int

    SIZE = _HEADER.size

    @classmethod
    def parse(cls, data: bytes) -> StatsHeader:
        """Read the header; ValueError when *data* is too short or names a layout that overlaps itself."""
        if len(data) < _HEADER.size:
            raise ValueError(f"a statistics header has {_HEADER.size} bytes, {len(data)} were read")
        header = cls(*_HEADER.unpack_from(data))
        if header.id_offset < _HEADER.size or header.desc_offset < header.id_offset:
            raise ValueError(f"statistics blocks overlap: {header}")
        return header

    @property
    def descriptor_size(self) -> int:
        """Bytes of one descriptor, its name included."""
        return _DESCRIPTOR.size + self.name_size


@dataclass(frozen=True)
class StatDescriptor:
    """One statistic: *size* 64-bit numbers at *offset* of the data block, in *base* ** *exponent* of *unit*.

    Types and units that this version does not know stay plain numbers.
    """

    name: str
    type: StatsType | int
    unit: StatsUnit | int
    base: int
    exponent: int
    size: int
    offset: int
    bucket_size: int

    @classmethod
    def parse(cls, data: bytes) -> StatDescriptor:
        """Read one descriptor of a statistics file."""
        flags, exponent, size, offset, bucket_size = _DESCRIPTOR.unpack_from(data)
        name = data[_DESCRIPTOR.size :].split(b"\0", 1)[0].decode("ascii", "replace")
        kind, unit = flags & 0xF, flags & 0xF0
        return cls(
            name=name,
            type=StatsType(kind) if kind in StatsType._value2member_map_ else kind,
            unit=StatsUnit(unit) if unit in StatsUnit._value2member_map_ else unit,
            base=_BASES.get(flags & 0xF00, 0),
            exponent=exponent,
            size=size,
            offset=offset,
            bucket_size=bucket_size,
        )

    @property
    def scale(self) -> Fraction:
        """The factor from a raw number to the unit, such as 1/1000000000 for nanoseconds."""
        return Fraction(self.base) ** self.exponent if self.exponent else Fraction(1)


@dataclass(frozen=True)
class Bucket:
    """A bucket of a histogram: *count* samples in *low* <= sample < *high* (None: no bound), raw numbers."""

    low: int
    high: int | None
    count: int


@dataclass(frozen=True)
class StatValue:
    """A statistic as it was when it was read: the raw numbers in ``values``."""

    descriptor: StatDescriptor
    values: tuple[int, ...]

    @property
    def name(self) -> str:
        """The kernel's name of it."""
        return self.descriptor.name

    @property
    def type(self) -> StatsType | int:
        """How it behaves in time."""
        return self.descriptor.type

    @property
    def unit(self) -> StatsUnit | int:
        """What it counts."""
        return self.descriptor.unit

    @property
    def is_histogram(self) -> bool:
        """Whether the numbers are the buckets of a histogram."""
        return self.descriptor.type in (
            StatsType.KVM_STATS_TYPE_LINEAR_HIST,
            StatsType.KVM_STATS_TYPE_LOG_HIST,
        )

    @property
    def value(self) -> int:
        """The raw number; ValueError where there are several (use ``values`` or :meth:`buckets`)."""
        if len(self.values) != 1:
            raise ValueError(f"{self.name} has {len(self.values)} numbers: use .values or .buckets()")
        return self.values[0]

    @property
    def scaled(self) -> Fraction:
        """The number in its unit (bytes, seconds, cycles), exactly."""
        return self.value * self.descriptor.scale

    def __int__(self) -> int:
        return self.value

    def __bool__(self) -> bool:
        return any(self.values)

    @property
    def total(self) -> int:
        """The sum of all numbers: of a histogram, the number of samples."""
        return sum(self.values)

    def buckets(self) -> list[Bucket]:
        """Return the buckets of a histogram with their bounds; ValueError for other types."""
        last = len(self.values) - 1
        if self.descriptor.type == StatsType.KVM_STATS_TYPE_LINEAR_HIST:
            width = self.descriptor.bucket_size
            bounds = [width * n for n in range(last + 1)]
        elif self.descriptor.type == StatsType.KVM_STATS_TYPE_LOG_HIST:
            bounds = [0] + [1 << n for n in range(last)]
        else:
            raise ValueError(f"{self.name} is not a histogram")
        return [
            Bucket(bounds[n], bounds[n + 1] if n < last else None, count)
            for n, count in enumerate(self.values)
        ]

    def __str__(self) -> str:
        number = ", ".join(str(value) for value in self.values)
        unit = self.unit.name[len("KVM_STATS_UNIT_") :].lower() if isinstance(self.unit, StatsUnit) else ""
        unit = "" if unit == "none" else unit
        power = f"{self.descriptor.base}^{self.descriptor.exponent} " if self.descriptor.exponent else ""
        return f"{self.name} = {number}" + (f" ({power}{unit})" if unit else "")


def parse_descriptors(header: StatsHeader, data: bytes) -> list[StatDescriptor]:
    """Read all descriptors; ValueError when *data* holds fewer than the header says."""
    step = header.descriptor_size
    if len(data) < step * header.num_desc:
        raise ValueError(
            f"{header.num_desc} descriptors of {step} bytes expected, {len(data)} bytes were read"
        )
    return [StatDescriptor.parse(data[n * step : (n + 1) * step]) for n in range(header.num_desc)]


def parse_values(descriptors: Sequence[StatDescriptor], data: bytes) -> dict[str, StatValue]:
    """Read the values out of the data block; ValueError when it is too short for a descriptor."""
    values = {}
    for descriptor in descriptors:
        end = descriptor.offset + 8 * descriptor.size
        if end > len(data):
            raise ValueError(f"{descriptor.name} ends at byte {end} of a data block of {len(data)} bytes")
        numbers = struct.unpack_from(f"<{descriptor.size}Q", data, descriptor.offset)
        values[descriptor.name] = StatValue(descriptor, numbers)
    return values


Stats = dict[str, StatValue]


@dataclass(frozen=True)
class StatsFile:
    """What a statistics file says of itself, to read its values again and again.

    ``id`` is the kernel's name of the object, such as ``kvm-1234/vcpu-0``.
    """

    header: StatsHeader
    id: str
    descriptors: tuple[StatDescriptor, ...]

    @classmethod
    def parse(cls, read: Callable[[int, int], bytes]) -> StatsFile:
        """Read header, id and descriptors with *read(offset, size)*; ValueError when they do not fit."""
        header = StatsHeader.parse(read(0, StatsHeader.SIZE))
        name = read(header.id_offset, header.name_size).split(b"\0", 1)[0].decode("ascii", "replace")
        size = header.descriptor_size * header.num_desc
        return cls(header, name, tuple(parse_descriptors(header, read(header.desc_offset, size))))

    def values(self, read: Callable[[int, int], bytes]) -> Stats:
        """Read all values in one go."""
        size = max((d.offset + 8 * d.size for d in self.descriptors), default=0)
        return parse_values(self.descriptors, read(self.header.data_offset, size))
