# SPDX-License-Identifier: Apache-2.0
"""A guest with a range of untouched private memory, in RMP entries of 2 MiB or of 4 KiB; those entries, and
KVM's events about it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from kvmpy import (
    KVM_MAP_GPA_RANGE_ENCRYPTED,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    PAGE_SIZE,
    SIZE_2M,
    Agent,
    Anonymous,
    Gpa,
    GuestMemfd,
    Gva,
    HypercallExit,
    MakeVm,
    Mapping,
    MissingError,
)
from kvmpy.coco.rmp import Entry
from kvmpy.debug.watch.faults import FaultTracer, MappingEvent, PageFaultEvent, RmpFaultEvent
from kvmpy.debug.watch.tracefs import TracefsError
from selftests.sev.softrmp import rmp

HUGE = SIZE_2M // PAGE_SIZE
GPA = Gpa(0x8000_0000)
PRIVATE_GVA, SHARED_GVA = Gva(0x70_0000_0000), Gva(0x71_0000_0000)
SLOT = 1000
# What PVALIDATE leaves: its code, and whether the carry flag says that nothing changed.
OK, FAIL_SIZEMISMATCH, UNCHANGED = 0, 6, 1 << 32
NOT_VALIDATED = (29, 0x404)

GUEST = """
#include <kvmpy/guest.h>

/* The first and the last word of each page: @value plus the number of the page. */
u64 fill(u64 address, u64 size, u64 value)
{
	for (u64 i = 0; i < size; i += 4096) {
		*(volatile u64 *)(address + i) = value + i / 4096;
		*(volatile u64 *)(address + i + 4088) = value + i / 4096;
	}
	return 0;
}

/* How many pages are not as fill() left them; the first of them plus one in the upper half. */
u64 check(u64 address, u64 size, u64 value)
{
	u64 bad = 0, first = 0;

	for (u64 i = 0; i < size; i += 4096) {
		u64 want = value + i / 4096;

		if (*(volatile u64 *)(address + i) == want && *(volatile u64 *)(address + i + 4088) == want)
			continue;
		if (!bad++)
			first = i / 4096 + 1;
	}
	return bad | first << 32;
}

u64 validate(void *page, u64 huge, u64 valid)
{
	struct pvalidate_result result = pvalidate(page, huge, valid);

	return result.code | (u64)result.unchanged << 32;
}

/* PVALIDATE of each 4 KiB page: how many it took, and how many of them it changed in the upper half. */
u64 validate_each(u8 *page, u64 size, u64 valid)
{
	u64 taken = 0, changed = 0;

	for (u64 at = 0; at < size; at += 4096) {
		struct pvalidate_result result = pvalidate(page + at, false, valid);

		taken += !result.code;
		changed += !result.code && !result.unchanged;
	}
	return taken | changed << 32;
}

u64 change(u64 gpa, u64 huge, u64 private)
{
	struct psc_entry entry = {
		.gfn = gpa >> 12,
		.operation = private ? PSC_PRIVATE : PSC_SHARED,
		.pagesize = huge,
	};

	return psc_call(&entry, 1);
}

u64 adjust(void *page, u64 huge, u64 attributes)
{
	return rmpadjust(page, huge, attributes);
}

void guest_main(void)
{
	guest_agent();
}
"""


class Watch:
    """KVM's events about the range, of one thread: RMP faults, and the sizes of what it maps."""

    def __init__(self, folios: Folios) -> None:
        self._folios = folios
        try:
            self._tracer = FaultTracer(
                [threading.get_native_id()], kinds=("rmp", "mappings", "faults"), buffer_kib=1024
            )
        except TracefsError as error:
            raise MissingError(error.missing, error.how) from error
        self.faults: list[PageFaultEvent] = []

    def read(self) -> tuple[list[RmpFaultEvent], list[tuple[int, int]]]:
        """Return the RMP faults since the last call, and page and size in bytes of each new mapping.

        Page faults are in :attr:`faults`.
        """
        rmp_faults, mappings = [], []
        self.faults = []
        for event in self._tracer.read():
            if isinstance(event, MappingEvent) and (page := self._page(event.gpa)) is not None:
                mappings.append((page, event.size))
            elif isinstance(event, RmpFaultEvent) and self._page(event.address) is not None:
                rmp_faults.append(event)
            elif isinstance(event, PageFaultEvent) and self._page(event.address) is not None:
                self.faults.append(event)
        assert self._tracer.lost == 0
        return rmp_faults, mappings

    def _page(self, gpa: int) -> int | None:
        page = (gpa - int(GPA)) // PAGE_SIZE
        return page if 0 <= page < self._folios.pages else None

    def close(self) -> None:
        """Remove what was set up in tracefs."""
        self._tracer.close()


class Folios:
    """*blocks* times 2 MiB of private memory at GPA and *more* pages, which the guest has mapped twice.

    *size* is that of the RMP's entries that KVM can make: with "4K", the file lies 4 KiB beside the guest's
    addresses.  The VM is launched, and the range untouched.
    """

    def __init__(
        self,
        make_vm: MakeVm,
        size: str,
        *,
        blocks: int = 1,
        more: int = 0,
        vcpus: int = 1,
        program: str = GUEST,
    ) -> None:
        self.large = size == "2M"
        self.pages = blocks * HUGE + more
        self.size = self.pages * PAGE_SIZE
        self.before = rmp()
        self.vm = make_vm(program, vcpus=vcpus)
        self.offset = 0 if self.large else PAGE_SIZE
        self.gmem: GuestMemfd = self.vm.create_guest_memfd(self.size + self.offset)
        # KVM maps 2 MiB only where the host address is aligned as the guest's.
        self.shared: Mapping = self.vm.own(Anonymous("thp").map(self.size))
        self.vm.set_user_memory_region2(
            SLOT,
            GPA,
            self.size,
            self.shared.hva,
            KVM_MEM_GUEST_MEMFD,
            gmem=self.gmem,
            gmem_offset=self.offset,
        )
        self.vm.set_memory_attributes(GPA, self.size, KVM_MEMORY_ATTRIBUTE_PRIVATE)
        self.vm.map(PRIVATE_GVA, GPA, self.size, page_size=PAGE_SIZE, private=True)
        self.vm.map(SHARED_GVA, GPA, self.size, page_size=PAGE_SIZE, private=False)
        self.vm.on_hypercall = self._hypercall
        self.discard = False
        self.agents = [Agent(vcpu) for vcpu in self.vm.vcpus]
        for agent in self.agents:
            agent.start()
        self.asid = next(e.asid for pfn, e in rmp().items() if pfn not in self.before and e.asid)

    # The host's side.

    def convert(self, first: int, pages: int, *, private: bool) -> None:
        """Change the attribute of pages; with *discard*, give up the private memory of shared ones."""
        attribute = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        self.vm.set_memory_attributes(GPA + first * PAGE_SIZE, pages * PAGE_SIZE, attribute)
        if self.discard and not private:
            self.punch(first, pages)

    def _hypercall(self, _vcpu: object, call: HypercallExit) -> bool:
        gpa, pages, flags = call.args[:3]
        first = Gpa(gpa).gfn - GPA.gfn
        if not 0 <= first < self.pages:
            return False
        self.convert(first, pages, private=bool(flags & KVM_MAP_GPA_RANGE_ENCRYPTED))
        call.respond(0)
        return True

    def punch(self, first: int, pages: int = 1) -> None:
        """Punch a hole into the file."""
        self.gmem.punch_hole(self.offset + first * PAGE_SIZE, pages * PAGE_SIZE)

    def shared_word(self, page: int) -> int:
        """Return the first word of a shared page."""
        return int.from_bytes(self.shared.view(page * PAGE_SIZE, 8), "little")

    def mapped(self) -> tuple[int, int]:
        """Return how many pages KVM has mapped for the VM: 4 KiB, 2 MiB."""
        stats = self.vm.stats.get()
        return stats["pages_4k"].value, stats["pages_2m"].value

    def entries(self) -> dict[int, Entry]:
        """Return the RMP's entries of the range by page; a large one stands at its head."""
        found = {}
        for entry in rmp().values():
            page = (entry.gpa - int(GPA)) // PAGE_SIZE
            if entry.asid == self.asid and 0 <= page < self.pages:
                assert page not in found
                found[page] = entry
        return found

    def frames(self) -> dict[int, int]:
        """Return the page frame of each page of the range that has one."""
        found: dict[int, int] = {}
        for pfn, entry in rmp().items():
            page = (entry.gpa - int(GPA)) // PAGE_SIZE
            if entry.asid == self.asid and 0 <= page < self.pages:
                found.update((page + i, pfn + i) for i in range(HUGE if entry.large else 1))
        return found

    # The guest's side.

    def call(self, function: str, *arguments: int, cpu: int = 0) -> int:
        """Call a function of the guest that must not fault."""
        got = self.agents[cpu].call(function, *arguments)
        assert isinstance(got, int), f"{function}{arguments}: {got}"
        return got

    def gva(self, page: int, *, shared: bool = False) -> int:
        """Return the guest-virtual address of a page."""
        return int(SHARED_GVA if shared else PRIVATE_GVA) + page * PAGE_SIZE

    def touch(self, page: int, *, shared: bool = False, cpu: int = 0) -> int | tuple[int, int]:
        """Let the guest read a page: the first word, or vector and error code of its fault."""
        got = self.agents[cpu].read(Gva(self.gva(page, shared=shared)))
        return got if isinstance(got, int) else (got.vector, got.error_code)

    def validate(self, page: int, huge: bool, valid: bool = True, *, cpu: int = 0) -> int:
        """PVALIDATE: its code, or UNCHANGED."""
        return self.call("validate", self.gva(page), huge, valid, cpu=cpu)

    def accept(self, first: int = 0, pages: int | None = None) -> None:
        """Validate pages that are not: 2 MiB at once where the RMP's entries are."""
        end = first + (self.pages if pages is None else pages)
        while first < end:
            whole = first % HUGE == 0 and end - first >= HUGE
            if whole and self.validate(first, True) == OK:
                first += HUGE
                continue
            count = HUGE if whole else min(end - first, HUGE - first % HUGE)
            assert self.call("validate_each", self.gva(first), count * PAGE_SIZE, 1) & 0xFFFF == count
            first += count

    def change(self, page: int, huge: bool, private: bool, *, cpu: int = 0) -> None:
        """A page state change that the guest asks for; 2 MiB at once with *huge*."""
        assert self.call("change", int(GPA) + page * PAGE_SIZE, huge, private, cpu=cpu) == 0

    def share(self, page: int) -> None:
        """The guest shares a page as it has to: it rescinds the page, then asks for the change."""
        assert self.validate(page, False, False) in (OK, UNCHANGED)
        self.change(page, False, False)

    def fill(self, value: int, first: int = 0, pages: int | None = None) -> None:
        """Write *value*, counting up, into the ends of private pages."""
        self.call("fill", self.gva(first), (self.pages if pages is None else pages) * PAGE_SIZE, value)

    def check(self, value: int, first: int = 0, pages: int | None = None) -> None:
        """Find what :meth:`fill` wrote."""
        count = self.pages - first if pages is None else pages
        if count:
            bad = self.call("check", self.gva(first), count * PAGE_SIZE, value)
            assert bad == 0, (
                f"{bad & 0xFFFF_FFFF} of {count} pages differ, page {first + (bad >> 32) - 1} first"
            )

    def check_but(self, value: int, *pages: int) -> None:
        """Find what one :meth:`fill` of all wrote, but for some pages."""
        first = 0
        for page in (*sorted(pages), self.pages):
            self.check(value + first, first, page - first)
            first = page + 1


MakeFolios = Callable[..., Folios]
