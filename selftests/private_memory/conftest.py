# SPDX-License-Identifier: Apache-2.0
"""A guest that accesses memory as it is told, and a range of its memory that is slots with a guest_memfd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from kvmpy import (
    KVM_MEM_GUEST_MEMFD,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    PAGE_SIZE,
    SIZE_2M,
    Agent,
    Anonymous,
    Gpa,
    GuestMemfd,
    GuestVm,
    Gva,
    MakeVm,
    Mapping,
    MemoryFaultExit,
)

PRIVATE = KVM_MEMORY_ATTRIBUTE_PRIVATE
GPA = Gpa(0x8000_0000)
GVA = Gva(0x70_0000_0000)
FIRST_SLOT = 1000

# Addresses are guest-virtual.
GUEST = """
#include <kvmpy/guest.h>

/* How often a vCPU went round in spin(), and its end. */
GUEST_SHARED volatile u64 rounds[8];
GUEST_SHARED volatile u64 stop;

/* The first and the last word of each page: @value plus the number of the page. */
void fill(u64 address, u64 size, u64 value)
{
	for (u64 i = 0; i < size; i += 4096) {
		*(volatile u64 *)(address + i) = value + i / 4096;
		*(volatile u64 *)(address + i + 4088) = value + i / 4096;
	}
}

/* How many pages are not as fill() left them (@step 0: not @value); the first plus one in the upper half. */
u64 check(u64 address, u64 size, u64 value, u64 step)
{
	u64 bad = 0, first = 0;

	for (u64 i = 0; i < size; i += 4096) {
		u64 want = value + step * (i / 4096);

		if (*(volatile u64 *)(address + i) == want && *(volatile u64 *)(address + i + 4088) == want)
			continue;
		if (!bad++)
			first = i / 4096 + 1;
	}
	return bad | first << 32;
}

/* Reads @address until @stop; the number of values that were neither 0, @a nor @b. */
u64 spin(u64 address, u64 a, u64 b)
{
	u64 strange = 0;

	while (!stop) {
		u64 value = *(volatile u64 *)address;

		strange += value != 0 && value != a && value != b;
		rounds[guest_cpu_index()]++;
	}
	return strange;
}

void guest_main(void)
{
	guest_agent();
}
"""


@dataclass
class Part:
    """One slot of the range: *pages* pages at *first*, backed by *gmem* from *offset* on (None: plain)."""

    slot: int
    first: int
    pages: int
    mapping: Mapping
    gmem: GuestMemfd | None
    offset: int = 0


@dataclass
class Region:
    """Pages of guest memory at GPA, numbered from 0, that a guest with one or more vCPUs accesses.

    Every slot has host memory for shared pages and, mostly, a guest_memfd for private ones.  The first
    access launches the VM.
    """

    vm: GuestVm
    pages: int
    parts: list[Part] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.agents = [Agent(vcpu) for vcpu in self.vm.vcpus]

    # The guest's side.

    def launch(self) -> None:
        """Launch the VM, once, and run every vCPU to where it waits for orders, its code mapped."""
        if not self.vm.launched:
            for agent in self.agents:
                agent.must(b"")

    def begin(self, access: str, page: int, value: int = 0, *, offset: int = 0, cpu: int = 0) -> None:
        """Order an access ("read", "write" or "fetch"); the vCPU carries it out when it runs."""
        self.launch()
        agent, gva = self.agents[cpu], self.gva(page) + offset
        if access == "fetch":
            agent.begin_call(gva)
        elif access == "write":
            agent.begin_write(gva, value)
        else:
            agent.begin_read(gva)

    def begin_spin(self, page: int, *values: int) -> None:
        """Order the first vCPU to read a page until ``stop`` is set and to count what is none of *values*."""
        self.launch()
        self.agents[0].begin_call("spin", int(self.gva(page)), *values)

    def result(self, cpu: int = 0) -> int:
        """Run a vCPU to the end of its order and return the result."""
        return self.agents[cpu].value()

    def read(self, page: int, offset: int = 0, *, cpu: int = 0) -> int:
        """What the guest reads."""
        self.begin("read", page, offset=offset, cpu=cpu)
        return self.result(cpu)

    def write(self, page: int, value: int, offset: int = 0, *, cpu: int = 0) -> None:
        """Let the guest write."""
        self.begin("write", page, value, offset=offset, cpu=cpu)
        self.result(cpu)

    def fill(self, first: int, pages: int, value: int) -> None:
        """Let the guest write *value*, counting up from page to page, into the ends of pages."""
        self.launch()
        self.agents[0].begin_call("fill", int(self.gva(first)), pages * PAGE_SIZE, value)
        self.result()

    def check(self, first: int, pages: int, value: int, *, step: int = 1) -> None:
        """Let the guest find what :meth:`fill` wrote; with *step* 0, *value* in each page."""
        self.launch()
        self.agents[0].begin_call("check", int(self.gva(first)), pages * PAGE_SIZE, value, step)
        bad = self.result()
        assert bad == 0, f"{bad & 0xFFFF_FFFF} of {pages} pages differ, page {first + (bad >> 32) - 1} first"

    def check_zero(self, first: int, pages: int) -> None:
        """Let the guest find nothing but zeroes at the ends of pages."""
        self.check(first, pages, 0, step=0)

    def fault(
        self, access: str, page: int, value: int = 0, *, offset: int = 0, cpu: int = 0
    ) -> MemoryFaultExit:
        """Let the guest access a page, and return the memory fault that this must end in."""
        self.begin(access, page, value, offset=offset, cpu=cpu)
        return self.vm.vcpus[cpu].expect(MemoryFaultExit)

    # The host's side.

    def gpa(self, page: int) -> Gpa:
        """The guest-physical address of a page."""
        return GPA + page * PAGE_SIZE

    def gva(self, page: int) -> Gva:
        """The guest-virtual address of a page."""
        return GVA + page * PAGE_SIZE

    def part(self, page: int) -> Part:
        """The slot that holds a page."""
        return next(part for part in self.parts if part.first <= page < part.first + part.pages)

    def host(self, page: int, size: int = PAGE_SIZE, offset: int = 0) -> memoryview:
        """The shared memory of a page as the host sees it."""
        part = self.part(page)
        return part.mapping.view((page - part.first) * PAGE_SIZE + offset, size)

    def host_read(self, page: int, offset: int = 0) -> int:
        """A word of the shared memory of a page."""
        return int.from_bytes(self.host(page, 8, offset), "little")

    def host_write(self, page: int, value: int, offset: int = 0) -> None:
        """Write a word of the shared memory of a page."""
        self.host(page, 8, offset)[:] = value.to_bytes(8, "little")

    def convert(self, first: int, pages: int, *, private: bool) -> None:
        """Make pages private or shared in KVM: one ioctl, whatever slots they lie in."""
        self.vm.set_memory_attributes(self.gpa(first), pages * PAGE_SIZE, PRIVATE if private else 0)

    def _in_files(self, first: int, pages: int) -> Iterator[tuple[GuestMemfd, int, int]]:
        for part in self.parts:
            start, end = max(first, part.first), min(first + pages, part.first + part.pages)
            if start < end and part.gmem is not None:
                yield part.gmem, part.offset + (start - part.first) * PAGE_SIZE, (end - start) * PAGE_SIZE

    def punch(self, first: int, pages: int) -> None:
        """Give the private memory of pages back."""
        for gmem, offset, size in self._in_files(first, pages):
            gmem.punch_hole(offset, size)

    def allocate(self, first: int, pages: int) -> None:
        """Allocate the private memory of pages in advance."""
        for gmem, offset, size in self._in_files(first, pages):
            gmem.allocate(offset, size)

    def bind(self, part: Part) -> None:
        """Give a slot to KVM (again)."""
        flags = 0 if part.gmem is None else KVM_MEM_GUEST_MEMFD
        self.vm.set_user_memory_region2(
            part.slot,
            self.gpa(part.first),
            part.pages * PAGE_SIZE,
            part.mapping.hva,
            flags,
            gmem=part.gmem,
            gmem_offset=part.offset,
        )

    def unbind(self, part: Part) -> None:
        """Take a slot from KVM; its memory stays."""
        self.vm.set_user_memory_region(part.slot, self.gpa(part.first), 0, 0)

    def renew(self, slot: int) -> None:
        """Delete the slot of this number in the range and give it to KVM again."""
        self.unbind(self.parts[slot])
        self.bind(self.parts[slot])

    def pre_fault(self, first: int, pages: int) -> None:
        """Map pages in advance, all of them."""
        gpa, left = int(self.gpa(first)), pages * PAGE_SIZE
        self.launch()
        while left:
            gpa, left = self.vm.vcpus[0].pre_fault_memory(gpa, left)

    def add(
        self, first: int, pages: int, *, gmem: GuestMemfd | bool = True, offset: int = 0, huge: str = "never"
    ) -> Part:
        """Add a slot: with a guest_memfd of its own, the given one, or none."""
        file = self.vm.create_guest_memfd(pages * PAGE_SIZE) if gmem is True else gmem or None
        mapping = self.vm.own(Anonymous(huge).map(pages * PAGE_SIZE))
        part = Part(FIRST_SLOT + len(self.parts), first, pages, mapping, file, offset)
        self.bind(part)
        self.parts.append(part)
        return part

    def stats(self) -> dict[str, int]:
        """The counters of the VM and of its first vCPU that have one value."""
        stats = {**self.vm.stats.get(), **self.vm.vcpus[0].stats.get()}
        return {name: value.value for name, value in stats.items() if len(value.values) == 1}


@dataclass
class MakeRegion:
    """Makes a VM whose guest has a range of *pages* pages beside its own memory, in slots of the given sizes
    (default: one), of which the first *mapped* are mapped in 4 KiB pages.
    """

    make_vm: MakeVm

    def __call__(
        self,
        pages: int = 16,
        *,
        slots: Sequence[int] | None = None,
        vcpus: int = 1,
        gmem: bool = True,
        huge: str = "never",
        mapped: int | None = None,
        program: str = GUEST,
    ) -> Region:
        """Make the VM; *gmem* and *huge* are those of :meth:`Region.add`."""
        vm = self.make_vm(program, vcpus=vcpus, memory=16 << 20)
        region = Region(vm, pages)
        first = 0
        for size in slots if slots is not None else [pages]:
            region.add(first, size, gmem=gmem, huge=huge)
            first += size
        vm.map(GVA, GPA, (mapped or pages) * PAGE_SIZE, page_size=PAGE_SIZE, private=False)
        return region


@pytest.fixture
def make_region(make_vm: MakeVm) -> MakeRegion:
    return MakeRegion(make_vm)


@pytest.fixture
def region(make_region: MakeRegion) -> Region:
    """Sixteen pages in one slot."""
    return make_region()


ADD_RETURN = bytes.fromhex("48b8") + (0x600DC0DE).to_bytes(8, "little") + b"\xc3"
"""mov $0x600dc0de, %rax; ret"""

ALIGNED_PAGES = SIZE_2M // PAGE_SIZE
