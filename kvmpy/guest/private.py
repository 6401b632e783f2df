# SPDX-License-Identifier: Apache-2.0
"""Private memory of a launched VM: conversions by the host and by the guest, and whether everybody agrees."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from pyroaring import BitMap

from kvmpy.core.address import PAGE_SHIFT, PAGE_SIZE, EncryptionBit, Gpa, Gva
from kvmpy.core.memory import GuestMemory, PageAllocator
from kvmpy.core.vm import Vm
from kvmpy.guest.protection import Protection
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
    from kvmpy.x86.paging import PageTables

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


class VmPrivate(Vm):
    """The part of a VM with a guest program that is about private memory."""

    memory: GuestMemory
    allocator: PageAllocator
    pages: PageTables
    protection: Protection
    encryption: EncryptionBit | None
    launched: bool
    # Takes hypercalls before the harness does; returns True for those it answered.
    on_hypercall: Callable[[GuestVcpu, HypercallExit], bool] | None = None
    _known: list[tuple[int, int, int]]

    def _enable_conversions(self) -> None:
        # KVM answers KVM_HC_MAP_GPA_RANGE with -KVM_ENOSYS unless user space wants to see it.
        if self.kvm.check_extension(KVM_CAP_EXIT_HYPERCALL) >> KVM_HC_MAP_GPA_RANGE & 1:
            self.enable_cap(KVM_CAP_EXIT_HYPERCALL, 1 << KVM_HC_MAP_GPA_RANGE)

    # What is private.

    def private_runs(self) -> list[tuple[Gpa, int]]:
        """Return all private pages as runs (gpa, bytes), none of which crosses the border of a slot."""
        return self._runs(self.memory.private.copy())

    def private_image(self) -> list[tuple[Gpa, int]]:
        """Return the private pages as runs (gpa, bytes) within one slot, without those that the allocator
        took back: what a launch brings in.

        Before launch their content is at ``vm.memory.hva(gpa, private=True)``, contiguous within a run.
        """
        return self._runs(self.memory.private - self.allocator.recycled)

    def _runs(self, frames: BitMap) -> list[tuple[Gpa, int]]:
        return frame_runs(frames, (segment.gpa.gfn for segment in self.memory.segments()))

    # Conversions.

    def set_private(self, gpa: Gpa, size: int, *, discard: bool = False) -> None:
        """Make pages private, in KVM and in the bitmap; their range may cross slots.

        Where private pages live in a guest_memfd, the guest finds there what the guest_memfd holds: zeroes
        in a page that was never private or was discarded, unless the guest's key encrypts it.  Then, as under
        SNP, these are the host's zeroes decrypted (Linux: sev_gmem_prepare()), and undefined.  So is the
        content elsewhere, and the guest must change its page tables.  *discard* gives the memory behind the
        shared pages back: they are zeroes when they are shared again.  ValueError outside guest memory,
        KvmError with the errno of KVM_SET_MEMORY_ATTRIBUTES.
        """
        self.memory.set_private(gpa, size, discard=discard)

    def set_shared(self, gpa: Gpa, size: int, *, discard: bool = False) -> None:
        """Make pages shared, in KVM and in the bitmap; their range may cross slots.

        Where private pages live in a guest_memfd, guest and host find there what the shared memory held
        before.  *discard* punches a hole into the guest_memfd: when they are private again, the pages are as
        those that never were.
        """
        self.memory.set_shared(gpa, size, discard=discard)

    def answer_hypercall(self, vcpu: GuestVcpu, call: HypercallExit) -> bool:
        """Answer a hypercall the way the VM does by itself; False for one that it does not know.

        KVM_HC_MAP_GPA_RANGE converts the range (gpa, pages, attributes) and gives the guest 0, or
        -KVM_EINVAL where a page is outside memory that can be private.  ``vm.on_hypercall`` is asked first.
        """
        if self.on_hypercall is not None and self.on_hypercall(vcpu, call):
            return True
        if call.nr != KVM_HC_MAP_GPA_RANGE or not self.protection.traits.has_private_memory:
            return False
        size = call.args[1] << PAGE_SHIFT
        try:
            if call.args[2] & KVM_MAP_GPA_RANGE_ENCRYPTED:
                self.set_private(Gpa(call.args[0]), size)
            else:
                self.set_shared(Gpa(call.args[0]), size)
        except ValueError:
            # A page state change of SNP takes the number as it is, and KVM no other than EINVAL and EAGAIN.
            call.respond(_EINVAL if self.protection.traits.must_validate else -_EINVAL)
        else:
            call.respond(0)
        return True

    # Agreement.

    def compare_private(self, gpa: Gpa | None = None, size: int | None = None) -> list[PrivacyDifference]:
        """Return where somebody does not agree with the bitmap of private pages; empty when all agree.

        Compared are the attributes that KVM accepted, KVM's own answer where it can be asked (see
        ``Protection.private_in_kvm``; no vCPU may run) and, with an encryption bit and tables that the host
        may read, the guest's page tables.  By default for the pages in use.
        """
        if gpa is None:
            runs = self._runs(self.allocator.used & self._present())
        else:
            runs = self._runs(BitMap(range(gpa.gfn, gpa.gfn + (size or PAGE_SIZE) // PAGE_SIZE)))
        frames = BitMap()
        found: list[PrivacyDifference] = []
        with self.memory.lock:
            for at, length in runs:
                frames.add_range(at.gfn, at.gfn + (length >> PAGE_SHIFT))
            private = self.memory.private & frames
            if self.launched and self.protection.traits.private_is_fd_backed:
                found += self._differences("attributes", private, self.private_attributes & frames)
                asked = BitMap()
                for at, length in runs:
                    answer = self.protection.private_in_kvm(cast("GuestVm", self), at, length)
                    asked |= private if answer is None else answer
                found += self._differences("kvm", private, asked & frames)
            if self.encryption is not None:
                found += self._differences("tables", private, self._private_in_tables(private, frames))
        return found

    def _present(self) -> BitMap:
        frames = BitMap()
        for segment in self.memory.segments():
            frames.add_range(segment.gpa.gfn, segment.end_gfn)
        return frames

    def _differences(self, who: str, expected: BitMap, got: BitMap) -> list[PrivacyDifference]:
        return [
            PrivacyDifference(who, at, length, bitmap_private)
            for bitmap_private, frames in ((True, expected - got), (False, got - expected))
            for at, length in self._runs(frames)
        ]

    def _private_in_tables(self, private: BitMap, frames: BitMap) -> BitMap:
        # Pages that the tables do not map, and tables out of the host's reach, contradict nobody.
        answer = BitMap(private)
        if self.memory.seal is not None and self.memory.is_private(self.page_table_root):
            return answer
        for start, gpa, length in self._known:
            for offset in range(0, length, PAGE_SIZE):
                gfn = (gpa + offset) >> PAGE_SHIFT
                if gfn not in frames:
                    continue
                try:
                    walk = self.pages.walk(Gva(start + offset))
                except PagingError:
                    continue
                if walk.private:
                    answer.add(gfn)
                else:
                    answer.discard(gfn)
        return answer

    @property
    def page_table_root(self) -> Gpa:
        """Where the root of the guest's page tables lies."""
        raw = self.pages.cr3
        return Gpa(int(raw)) if self.encryption is None else self.encryption.from_raw(raw)[0]
