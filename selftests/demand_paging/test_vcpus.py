# SPDX-License-Identifier: Apache-2.0
"""Demand paging under several vCPUs, under a vCPU that waits, and of a whole guest in mid-run."""

from __future__ import annotations

import mmap
import struct
import threading
import time

import pytest

from kvmpy import (
    AGENT,
    PAGE_SIZE,
    Agent,
    Anonymous,
    Gpa,
    GuestVm,
    Gva,
    MakeVm,
    Mapping,
    PageFault,
    VcpuThread,
)
from selftests.demand_paging.conftest import MakePager

GPA = Gpa(0x8000_0000)
GVA = Gva(0x70_0000_0000)

# Each vCPU checks every page of its own range; the content of a page is its number.
OWN_RANGES = """
#include <kvmpy/guest.h>

void guest_main(u64 address, u64 first, u64 pages)
{
	for (u64 i = 0; i < pages; i++) {
		volatile u64 *page = (u64 *)(uintptr_t)(address + (first + i) * PAGE_SIZE);

		GUEST_ASSERT_EQ(page[511], first + i);
		page[0] = ~(first + i);
	}
}
"""

# All vCPUs read the same pages, none of them first by design.
SAME_PAGES = """
#include <kvmpy/guest.h>

#define VCPUS	4
#define PAGES	8

GUEST_SHARED u64 seen[VCPUS][PAGES];
GUEST_SHARED volatile u32 arrived[PAGES];

void guest_main(u64 address)
{
	u32 me = guest_cpu_index();

	for (u64 i = 0; i < PAGES; i++) {
		__atomic_fetch_add(&arrived[i], 1, __ATOMIC_SEQ_CST);
		while (arrived[i] < VCPUS)
			cpu_relax();
		seen[me][i] = *(volatile u64 *)(uintptr_t)(address + i * PAGE_SIZE);
	}
}
"""

# Works in memory of several kinds: code, stack, globals, page tables, a heap.
WORKING = """
#include <kvmpy/guest.h>

static u64 table[1024];

static __noinline u64 recurse(u64 depth)
{
	volatile u64 here[32];

	here[0] = depth;
	return depth ? recurse(depth - 1) + here[0] : 0;
}

void guest_main(u64 address)
{
	volatile u64 *heap = (u64 *)(uintptr_t)address;

	for (u64 i = 0; i < ARRAY_SIZE(table); i += 16)
		table[i] = i * i;
	for (u64 i = 0; i < 16; i++)
		heap[i * 512] = i + 1;
	GUEST_SYNC(recurse(20));
	for (u64 i = 0; i < ARRAY_SIZE(table); i += 16)
		GUEST_ASSERT_EQ(table[i], i * i);
	for (u64 i = 0; i < 16; i++)
		GUEST_ASSERT_EQ(heap[i * 512], i + 1);
	GUEST_SYNC(recurse(40));
}
"""


def number_page(number: int) -> bytes:
    return bytes(PAGE_SIZE - 8) + struct.pack("<Q", number)


def paged_memory(vm: GuestVm, pages: int) -> Mapping:
    slot = vm.add_slot(GPA, pages * PAGE_SIZE, backing=Anonymous(huge="never"))
    vm.map(GVA, GPA, pages * PAGE_SIZE, page_size=PAGE_SIZE, user=True, nx=True, private=False)
    return slot.mapping


def test_vcpus_fault_at_the_same_time(make_vm: MakeVm, make_pager: MakePager) -> None:
    """Many vCPUs may wait for missing pages at once: each goes on with the content of its own page.

    Documentation/admin-guide/mm/userfaultfd.rst, QEMU/KVM: "multiple vcpus" fault asynchronously.
    """
    vcpus, each = 4, 24
    vm = make_vm(OWN_RANGES, vcpus=vcpus)
    memory = paged_memory(vm, vcpus * each)
    for index, vcpu in enumerate(vm.vcpus):
        vcpu.set_entry("guest_main", int(GVA), index * each, each)
    vm.launch()
    pager = make_pager(lambda fault: number_page((fault.address - memory.hva) // PAGE_SIZE))
    pager.register(memory.hva, memory.size)
    vm.run_all()
    pager.stop()
    asked = {(fault.address - memory.hva) // PAGE_SIZE for fault in pager.faults}
    assert asked == set(range(vcpus * each))
    for number in range(vcpus * each):
        first, last = struct.unpack("<Q4080xQ", memory.view(number * PAGE_SIZE, PAGE_SIZE))
        assert (first, last) == (~number & (1 << 64) - 1, number)


def test_vcpus_that_meet_at_a_page_see_one_content(make_vm: MakeVm, make_pager: MakePager) -> None:
    """When several vCPUs fault at one page, the first answer counts: all of them see the same content.

    Documentation/admin-guide/mm/userfaultfd.rst, UFFDIO_COPY: EEXIST where a page is already.
    """
    vm = make_vm(SAME_PAGES, vcpus=4)
    memory = paged_memory(vm, 8)
    for vcpu in vm.vcpus:
        vcpu.set_entry("guest_main", int(GVA))
    vm.launch()
    answers = 0

    def ever_different(_fault: PageFault) -> bytes:
        nonlocal answers
        answers += 1
        return struct.pack("<Q", answers) + bytes(PAGE_SIZE - 8)

    pager = make_pager(ever_different)
    pager.register(memory.hva, memory.size)
    vm.run_all()
    seen = vm.symbol("seen").view("Q")
    for page in range(8):
        values = {seen[vcpu * 8 + page] for vcpu in range(4)}
        assert len(values) == 1, f"page {page}: {values}"
        assert 1 <= values.pop() <= answers


class LatePager:
    """A pager of one page that the guest's agent reads; it answers when the test says so."""

    def __init__(self, agent: Agent, make_pager: MakePager) -> None:
        self.deadline = agent.vm.deadline
        memory = paged_memory(agent.vm, 1)
        self.asked, self.may_answer = threading.Event(), threading.Event()
        make_pager(self.answer).register(memory.hva, memory.size)

    def answer(self, _fault: PageFault) -> bytes:
        """Wait, and give the page."""
        self.asked.set()
        assert self.may_answer.wait(self.deadline)
        return struct.pack("<Q", 0xC0FFEE) + bytes(PAGE_SIZE - 8)


def test_a_vcpu_waits_while_others_run(make_vm: MakeVm, make_pager: MakePager, ring: int) -> None:
    """A vCPU that waits for a page does not go on before it comes; other vCPUs do.

    Documentation/admin-guide/mm/userfaultfd.rst, QEMU/KVM: postcopy lets "other vcpus" run meanwhile.
    """
    vm = make_vm(AGENT, vcpus=2)
    waiting, other = (Agent(vcpu, ring=ring) for vcpu in vm.vcpus)
    pager = LatePager(waiting, make_pager)
    waiting.begin_read(GVA)
    with VcpuThread(waiting.value, vcpu=waiting.vcpu) as thread:
        try:
            assert pager.asked.wait(vm.deadline)
            for number in range(100):
                assert other.must(b"", rax=number).rax == number
            assert thread.alive
            assert waiting.vcpu.running
        finally:
            pager.may_answer.set()
        assert thread.join(vm.deadline) == 0xC0FFEE


@pytest.mark.parametrize("ring", [3], ids=["ring3"], indirect=True)
def test_a_vcpu_that_waits_can_be_interrupted(make_vm: MakeVm, make_pager: MakePager, ring: int) -> None:
    """A signal ends KVM_RUN (EINTR) while the vCPU waits for a page; run again, it gets the page.

    Documentation/virt/kvm/api.rst 4.10 KVM_RUN, EINTR.  Ring 3 only: emulators wait uninterruptibly.
    """
    agent = Agent(make_vm(AGENT).vcpus[0], ring=ring)
    vcpu, deadline = agent.vcpu, agent.vm.deadline
    pager = LatePager(agent, make_pager)
    agent.begin_read(GVA)
    try:
        with VcpuThread(vcpu.run_until_kicked, vcpu=vcpu) as thread:
            assert pager.asked.wait(deadline)
            vcpu.kick()
            thread.join(deadline)
    finally:
        pager.may_answer.set()
    assert agent.value() == 0xC0FFEE


def test_a_guest_goes_on_in_memory_that_is_not_there(make_vm: MakeVm, make_pager: MakePager) -> None:
    """All of a guest's memory, its page tables included, may be taken away in mid-run and come page by page.

    Documentation/admin-guide/mm/userfaultfd.rst, QEMU/KVM: postcopy live migration.
    """
    vm = make_vm(WORKING, memory=8 << 20, backing=Anonymous(huge="never"))
    heap = vm.alloc(16 * PAGE_SIZE)
    vm.vcpus[0].set_entry("guest_main", int(heap))
    vm.launch()
    if not vm.protection.traits.host_sees_private:
        pytest.skip(f"protection {vm.protection.name} keeps private memory from the host")
    assert vm.vcpus[0].sync().args == (sum(range(21)),)
    saved: list[tuple[Mapping, bytes]] = []
    for segment in vm.memory.segments():
        for mapping in {id(m): m for m in (segment.shared, segment.private) if m is not None}.values():
            saved.append((mapping, bytes(mapping.view(0, mapping.size))))
            mapping.madvise(mmap.MADV_DONTNEED)

    def arrive(fault: PageFault) -> bytes:
        page = fault.address & -PAGE_SIZE
        for mapping, content in saved:
            if mapping.hva <= page < mapping.hva + mapping.size:
                return content[page - mapping.hva : page - mapping.hva + PAGE_SIZE]
        raise AssertionError(f"nobody registered {page:#x}")

    pager = make_pager(arrive)
    for mapping, _content in saved:
        pager.register(mapping.hva, mapping.size)
    started = time.monotonic()
    assert vm.vcpus[0].sync().args == (sum(range(41)),)
    assert time.monotonic() - started < vm.deadline
    # At least a table of each level, code, stack, globals and the heap's pages had to come.
    asked = {fault.address & -PAGE_SIZE for fault in pager.faults}
    assert len(asked) >= 4 + 3 + 16
    gpa = vm.gva_to_gpa
    for address in (heap, heap + 15 * PAGE_SIZE, vm.symbol("table").gva, vm.symbol("guest_main").gva):
        assert vm.gpa_to_hva(gpa(address)) & -PAGE_SIZE in asked
