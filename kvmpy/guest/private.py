# SPDX-License-Identifier: Apache-2.0
"""Private memory of a launched VM: conversions by the host and by the guest, and whether everybody agrees."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyroaring import BitMap

from kvmpy.core.address import PAGE_SHIFT, PAGE_SIZE, Gpa, Gva
from kvmpy.core.topic import Topic
from kvmpy.uapi.constants import (
    KVM_CAP_EXIT_HYPERCALL,
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
)
from kvmpy.x86.paging_errors import PagingError

if TYPE_CHECKING:
    from kvmpy.core.exits import HypercallExit
    from kvmpy.guest.vcpu import GuestVcpu
    from kvmpy.guest.vm import GuestVm

# What a hypercall gives back (Documentation/virt/kvm/x86/hypercalls.rst): the kernel's own numbers.
_EINVAL = 22


@dataclass(frozen=True)
class PrivacyDifference:
    """Pages about which somebody does not agree with the bitmap; *who* is ``attributes`` (what
    KVM_SET_MEMORY_ATTRIBUTES accepted last), ``kvm`` (what KVM did when it was asked to map the page) or
    ``tables`` (the encryption bit in the guest's page tables).
    """

    who: str
    gpa: Gpa
    size: int
    bitmap_private: bool

    def __str__(self) -> str:
        kinds = ("private", "shared") if self.bitmap_private else ("shared", "private")
        return f"gpa {self.gpa}, {self.size:#x} bytes: {kinds[0]} in the bitmap, {kinds[1]} by {self.who}"


def frame_runs(frames: Iterable[int], ends: Iterable[int] = ()) -> list[tuple[Gpa, int]]:
    """Return the runs (gpa, bytes) of consecutive *frames*, in order; none goes across a frame in *ends*."""
    cuts = set(ends)
    runs: list[tuple[int, int]] = []
    for gfn in frames:
        if runs and runs[-1][1] == gfn and gfn not in cuts:
            runs[-1] = (runs[-1][0], gfn + 1)
        else:
            runs.append((gfn, gfn + 1))
    return [(Gpa(first << PAGE_SHIFT), (last - first) << PAGE_SHIFT) for first, last in runs]


class Private(Topic):
    """Which memory of a VM is private, and whether everybody agrees about it."""

    _owner: GuestVm

    def enable_conversions(self) -> None:
        """Let KVM pass KVM_HC_MAP_GPA_RANGE on: else it answers with -KVM_ENOSYS."""
        vm = self._owner
        if vm.kvm.check_extension(KVM_CAP_EXIT_HYPERCALL) >> KVM_HC_MAP_GPA_RANGE & 1:
            vm.enable_cap(KVM_CAP_EXIT_HYPERCALL, 1 << KVM_HC_MAP_GPA_RANGE)

    def runs(self) -> list[tuple[Gpa, int]]:
        """Return all private pages as runs (gpa, bytes), none of which crosses the border of a slot."""
        return self._runs(self._owner.memory.private.copy())

    def image(self) -> list[tuple[Gpa, int]]:
        """Return the private pages as runs (gpa, bytes) within one slot, without those that the allocator
        took back: what a launch brings in.

        Before launch their content is at ``vm.memory.hva(gpa, private=True)``, contiguous within a run.
        """
        return self._runs(self._owner.memory.private - self._owner.allocator.recycled)

    def _runs(self, frames: BitMap) -> list[tuple[Gpa, int]]:
        return frame_runs(frames, (segment.gpa.gfn for segment in self._owner.memory.segments()))

    def answer_hypercall(self, vcpu: GuestVcpu, call: HypercallExit) -> bool:
        """Answer a hypercall the way the VM does by itself; False for one that it does not know.

        KVM_HC_MAP_GPA_RANGE converts the range (gpa, pages, attributes) and gives the guest 0, or
        -KVM_EINVAL where a page is outside memory that can be private.  ``vm.on_hypercall`` is asked first.
        """
        if self._owner.on_hypercall is not None and self._owner.on_hypercall(vcpu, call):
            return True
        if call.nr != KVM_HC_MAP_GPA_RANGE or not self._owner.protection.traits.has_private_memory:
            return False
        size = call.args[1] << PAGE_SHIFT
        try:
            if call.args[2] & KVM_MAP_GPA_RANGE_ENCRYPTED:
                self._owner.memory.set_private(Gpa(call.args[0]), size)
            else:
                self._owner.memory.set_shared(Gpa(call.args[0]), size)
        except ValueError:
            # A page state change of SNP takes the number as it is, and KVM no other than EINVAL and EAGAIN.
            call.respond(_EINVAL if self._owner.protection.traits.must_validate else -_EINVAL)
        else:
            call.respond(0)
        return True

    def compare(self, gpa: Gpa | None = None, size: int | None = None) -> list[PrivacyDifference]:
        """Return where somebody does not agree with the bitmap of private pages; empty when all agree.

        Compared are the attributes that KVM accepted, KVM's own answer where it can be asked (see
        ``Protection.private_in_kvm``; no vCPU may run) and, with an encryption bit and tables that the host
        may read, the guest's page tables.  By default for the pages in use.
        """
        if gpa is None:
            runs = self._runs(self._owner.allocator.used & self._present())
        else:
            runs = self._runs(BitMap(range(gpa.gfn, gpa.gfn + (size or PAGE_SIZE) // PAGE_SIZE)))
        frames = BitMap()
        results: list[PrivacyDifference] = []
        with self._owner.memory.lock:
            for position, length in runs:
                frames.add_range(position.gfn, position.gfn + (length >> PAGE_SHIFT))
            private = self._owner.memory.private & frames
            if self._owner.launched and self._owner.protection.traits.private_is_fd_backed:
                results += self._differences("attributes", private, self._owner.private_attributes & frames)
                asked = BitMap()
                for position, length in runs:
                    answer = self._owner.protection.private_in_kvm(self._owner, position, length)
                    asked |= private if answer is None else answer
                results += self._differences("kvm", private, asked & frames)
            if self._owner.encryption is not None:
                results += self._differences("tables", private, self._private_in_tables(private, frames))
        return results

    def _present(self) -> BitMap:
        frames = BitMap()
        for segment in self._owner.memory.segments():
            frames.add_range(segment.gpa.gfn, segment.end_gfn)
        return frames

    def _differences(self, who: str, expected: BitMap, got: BitMap) -> list[PrivacyDifference]:
        return [
            PrivacyDifference(who, piece, length, bitmap_private)
            for bitmap_private, frames in ((True, expected - got), (False, got - expected))
            for piece, length in self._runs(frames)
        ]

    def _private_in_tables(self, private: BitMap, frames: BitMap) -> BitMap:
        # Pages that the tables do not map, and tables out of the host's reach, contradict nobody.
        answer = BitMap(private)
        if self._owner.memory.seal is not None and self._owner.memory.is_private(self._owner.pages.root):
            return answer
        for start, gpa, length in self._owner._known:
            for offset in range(0, length, PAGE_SIZE):
                gfn = (gpa + offset) >> PAGE_SHIFT
                if gfn not in frames:
                    continue
                try:
                    walk = self._owner.pages.walk(Gva(start + offset))
                except PagingError:
                    continue
                if walk.private:
                    answer.add(gfn)
                else:
                    answer.discard(gfn)
        return answer
