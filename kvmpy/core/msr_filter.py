# SPDX-License-Identifier: Apache-2.0
"""Which MSR accesses of a guest KVM lets through (KVM_X86_SET_MSR_FILTER, api.rst section 4.97)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmpy.core.topic import Topic
from kvmpy.uapi import ffi, ioctls
from kvmpy.uapi.constants import (
    KVM_CAP_X86_USER_SPACE_MSR,
    KVM_MSR_FILTER_MAX_BITMAP_SIZE,
    KVM_MSR_FILTER_MAX_RANGES,
    KVM_MSR_FILTER_READ,
    KVM_MSR_FILTER_WRITE,
    MsrExitReason,
)
from kvmpy.uapi.structs import kvm_msr_filter

if TYPE_CHECKING:
    from kvmpy.core.vm import Vm

READ = KVM_MSR_FILTER_READ
WRITE = KVM_MSR_FILTER_WRITE
MAX_RANGES = KVM_MSR_FILTER_MAX_RANGES
MAX_RANGE_MSRS = KVM_MSR_FILTER_MAX_BITMAP_SIZE * 8
_X2APIC = range(0x800, 0x900)


@dataclass(frozen=True)
class MsrRange:
    """*nmsrs* MSRs from *base*: a 1 in *bitmap* allows the accesses in *flags*, a 0 denies them.

    The kernel reads whole 64-bit words of the bitmap; a shorter one is filled up with zeros.
    """

    base: int
    nmsrs: int
    flags: int
    bitmap: bytes

    def __post_init__(self) -> None:
        missing = -(-self.nmsrs // 64) * 8 - len(self.bitmap)
        if missing > 0:
            object.__setattr__(self, "bitmap", self.bitmap + bytes(missing))

    def allows(self, index: int) -> bool:
        """Tell whether the bit of MSR *index* is set; ValueError when it is outside the range."""
        if not self.base <= index < self.base + self.nmsrs:
            raise ValueError(f"MSR {index:#x} is outside {self.base:#x}..{self.base + self.nmsrs - 1:#x}")
        bit = index - self.base
        return bool(self.bitmap[bit >> 3] >> (bit & 7) & 1)


@dataclass(frozen=True)
class MsrFilter:
    """A filter as the kernel takes it: at most 16 ranges; accesses outside all of them follow *default_deny*.

    The first range that holds the MSR and names the kind of access decides. Nothing is checked here, so that
    wrong filters reach the kernel; :meth:`denying` and :meth:`allowing` build right ones. ``MsrFilter()``
    removes all filtering.
    """

    ranges: tuple[MsrRange, ...] = field(default=())
    default_deny: bool = False

    @classmethod
    def denying(
        cls, both: Iterable[int] = (), *, reads: Iterable[int] = (), writes: Iterable[int] = ()
    ) -> MsrFilter:
        """Deny the MSRs in *both*, reads of those in *reads* and writes of those in *writes*.

        Allow the others.
        """
        shared = set(both)
        return cls(
            _ranges(shared | set(reads), shared | set(writes), listed_allowed=False), default_deny=False
        )

    @classmethod
    def allowing(
        cls, both: Iterable[int] = (), *, reads: Iterable[int] = (), writes: Iterable[int] = ()
    ) -> MsrFilter:
        """Allow only the MSRs in *both*, reads of those in *reads* and writes of those in *writes*.

        The kernel wants at least one MSR in a filter that denies by default, and never filters x2APIC MSRs.
        """
        shared = set(both)
        read_set, write_set = shared | set(reads), shared | set(writes)
        if not read_set and not write_set:
            raise ValueError("a filter that denies everything needs at least one MSR that it allows")
        return cls(_ranges(read_set, write_set, listed_allowed=True), default_deny=True)

    def argument(self) -> kvm_msr_filter:
        """Return the kernel's struct, whose pointers lead into this filter: it must live as long.

        ValueError for more ranges than the struct holds.
        """
        if len(self.ranges) > MAX_RANGES:
            raise ValueError(f"{len(self.ranges)} ranges, the kernel's struct holds {MAX_RANGES}")
        arg = kvm_msr_filter(flags=int(self.default_deny))
        for slot, item in zip(arg.ranges, self.ranges, strict=False):
            slot.flags = item.flags
            slot.nmsrs = item.nmsrs
            slot.base = item.base
            slot.bitmap = int(ffi.cast("uintptr_t", ffi.from_buffer(item.bitmap)))
        return arg

    def allows(self, index: int, access: int) -> bool:
        """Tell what the kernel decides for one access (READ or WRITE) to MSR *index*."""
        if index in _X2APIC:
            return True
        for item in self.ranges:
            if item.flags & access and item.base <= index < item.base + item.nmsrs:
                return item.allows(index)
        return not self.default_deny


def _ranges(reads: set[int], writes: set[int], *, listed_allowed: bool) -> tuple[MsrRange, ...]:
    for index in reads | writes:
        if not 0 <= index < 1 << 32:
            raise ValueError(f"MSR {index:#x} is no 32-bit number")
        if index in _X2APIC:
            raise ValueError(f"MSR {index:#x} belongs to the x2APIC, which KVM does not filter")
    if reads == writes:
        msr_ranges = _of_one_kind(reads, READ | WRITE, listed_allowed)
    else:
        msr_ranges = _of_one_kind(reads, READ, listed_allowed) + _of_one_kind(writes, WRITE, listed_allowed)
    if len(msr_ranges) > MAX_RANGES:
        raise ValueError(
            f"these MSRs need {len(msr_ranges)} ranges, a filter holds {MAX_RANGES}: they lie too far apart"
        )
    return tuple(msr_ranges)


def _of_one_kind(msrs: set[int], flags: int, listed_allowed: bool) -> list[MsrRange]:
    # Taking each range as long as it may be, from the lowest MSR on, gives the fewest ranges.
    ranges: list[MsrRange] = []
    pending = sorted(msrs)
    while pending:
        base = pending[0]
        inside = [index for index in pending if index < base + MAX_RANGE_MSRS]
        pending = pending[len(inside) :]
        nmsrs = inside[-1] - base + 1
        bits = sum(1 << index - base for index in inside)
        if not listed_allowed:
            bits ^= (1 << nmsrs) - 1
        ranges.append(MsrRange(base, nmsrs, flags, bits.to_bytes(-(-nmsrs // 64) * 8, "little")))
    return ranges


class VmMsrs(Topic):
    """MSR accesses of a VM's guest."""

    _owner: Vm

    # What was set last: KVM cannot be asked.
    filter: MsrFilter | None = None

    def set_filter(self, msr_filter: MsrFilter) -> None:
        """Replace the filter (KVM_X86_SET_MSR_FILTER).

        Denied accesses get #GP, or exit as :meth:`enable_user_space` says.
        """
        # lifetime: the filter's own bitmaps are pointed at, and it outlives the ioctl.
        self._owner.ioctl(ioctls.KVM_X86_SET_MSR_FILTER, msr_filter.argument())
        self.filter = msr_filter

    def enable_user_space(self, reasons: MsrExitReason | int) -> None:
        """Exit instead of injecting #GP for these reasons, 0 for none (KVM_CAP_X86_USER_SPACE_MSR)."""
        self._owner.enable_cap(KVM_CAP_X86_USER_SPACE_MSR, int(reasons))
