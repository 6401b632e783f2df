# SPDX-License-Identifier: Apache-2.0
"""HvFlushVirtualAddressSpace and -List and their forms with sparse sets: no vCPU uses what was flushed."""

from __future__ import annotations

import struct

import pytest

from kvmpy import PAGE_SIZE, Gpa, Msr
from kvmpy.x86.hyperv import HvCall, HvFlush, HvVpSet, control

from .conftest import Call, MakeHyperV, ask, banks

pytestmark = [
    pytest.mark.requires("KVM_CAP_HYPERV_TLBFLUSH", "KVM_CAP_SYS_HYPERV_CPUID", "KVM_CAP_HYPERV_VP_INDEX"),
    pytest.mark.protections("none", "cbit"),
]

SPARSE, EVERYBODY = int(HvVpSet.HV_GENERIC_SET_SPARSE_4K), int(HvVpSet.HV_GENERIC_SET_ALL)
ALL = int(HvFlush.HV_FLUSH_ALL_PROCESSORS)
SPACES = int(HvFlush.HV_FLUSH_ALL_VIRTUAL_ADDRESS_SPACES)
SPACE, LIST = HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST
SPACE_EX, LIST_EX = HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX, HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX
VALUES = (0x1111_1111, 0x2222_2222)
ROUNDS = 1

GUEST = """
#include "hyperv.h"

#define CPUS	3

/* What the host tells: the page under test, its entry, both contents of that, and whom each row reaches. */
u64 page_gva, entry_gva, entries[2], values[2], rounds, rows;
u64 reached[HV_ROWS];

/* What went wrong, by row: a bit for each vCPU that saw the old page, bit 63 for a bad status. */
u64 wrong[HV_ROWS] GUEST_SHARED;
u64 looks_made GUEST_SHARED;

/* The generation that a vCPU may expect: its parity says which page. 0: nothing for sure. */
static volatile u64 expected[CPUS], row_now, looks[CPUS];
static volatile bool over;

static void look(u32 me)
{
	u64 generation = expected[me];
	u64 row = row_now;
	u64 got;

	barrier();
	got = *(volatile u64 *)page_gva;
	barrier();
	if (generation && expected[me] == generation && got != values[generation & 1])
		__sync_fetch_and_or(&wrong[row], BIT(me));
	looks[me]++;
}

void worker(void)
{
	u32 me = guest_cpu_index();

	while (!over)
		look(me);
}

static void wait_for_looks(u64 who)
{
	for (u32 cpu = 1; cpu < CPUS; cpu++) {
		u64 then = looks[cpu];

		while (who & BIT(cpu) && looks[cpu] < then + 3)
			cpu_relax();
	}
}

void sender(void)
{
	u64 generation = 2;

	for (u32 cpu = 1; cpu < CPUS; cpu++)
		while (!looks[cpu])
			cpu_relax();
	for (u64 row = 0; row < rows; row++) {
		for (u64 round = 0; round < rounds; round++) {
			for (u32 cpu = 0; cpu < CPUS; cpu++)
				expected[cpu] = 0;
			row_now = row;
			smp_mb();
			/* So that there is an old translation. */
			(void)*(volatile u64 *)page_gva;
			wait_for_looks(reached[row]);
			generation++;
			*(volatile u64 *)entry_gva = entries[generation & 1];
			smp_mb();
			hv_do(&hv_requests[row]);
			if (hv_requests[row].result & 0xffff)
				wrong[row] |= BIT(63);
			for (u32 cpu = 0; cpu < CPUS; cpu++)
				if (reached[row] & BIT(cpu))
					expected[cpu] = generation;
			smp_mb();
			if (reached[row] & 1)
				look(0);
			wait_for_looks(reached[row]);
		}
	}
	for (u32 cpu = 0; cpu < CPUS; cpu++)
		looks_made += looks[cpu];
	over = true;
}

void guest_main(void)
{
	if (guest_cpu_index())
		worker();
	else
		sender();
}
"""


@pytest.mark.deadline(60)
@pytest.mark.parametrize("indices", [(0, 1, 2), (1, 70, 130)], ids=lambda i: "-".join(map(str, i)))
def test_no_stale_translation(make_hyperv: MakeHyperV, indices: tuple[int, ...]) -> None:
    """After a flush each vCPU that it names reads by the new entry: by every form, entry and set.

    TLFS, HvCallFlushVirtualAddressSpace and -List.  One vCPU changes a page-table entry and flushes; the
    others read all the time.
    """
    vm = make_hyperv(GUEST, vcpus=3)
    for vcpu, index in zip(vm.vcpus, indices, strict=True):
        vcpu.msrs.set(Msr.HV_X64_MSR_VP_INDEX, index)
    page, other = (vm.alloc(PAGE_SIZE) for _ in range(2))
    vm.write(page, VALUES[0].to_bytes(8, "little"))
    vm.write(other, VALUES[1].to_bytes(8, "little"))
    steps = [vm.pages.walk(each).steps[-1] for each in (page, other)]
    # The page table, where the guest can write it.
    table = steps[0].table
    table_gpa = vm.encryption.from_raw(table)[0] if vm.encryption else Gpa(int(table))
    window = vm.alloc(PAGE_SIZE) + 16 * PAGE_SIZE
    vm.map(window, table_gpa, PAGE_SIZE)
    vm.symbol("page_gva").u64 = int(page)
    vm.symbol("entry_gva").u64 = int(window) + 8 * steps[0].index
    vm.symbol("rounds").u64 = ROUNDS
    for number in range(2):
        vm.symbol("entries").view("Q")[number] = steps[number].value | 0x60
        vm.symbol("values").view("Q")[number] = VALUES[number]

    room = vm.alloc(4 * PAGE_SIZE, private=False)
    filled = 0

    def put(*words: int) -> int:
        nonlocal filled
        vm.write(room + filled, struct.pack(f"<{len(words)}Q", *words))
        gpa = int(vm.gva_to_gpa(room)) + filled
        filled += 8 * len(words)
        return gpa

    here, far = int(page), 0x6000_0000_0000
    # The page alone, in a range, last of a list, and in a list that KVM has no place for.
    lists = {
        "page": [here],
        "range": [here - 3 * PAGE_SIZE | 7],
        "end of a range": [here - 7 * PAGE_SIZE | 7],
        "last": [far, far + PAGE_SIZE, here],
    }
    long = [far + n * PAGE_SIZE for n in range(20)] + [here]
    rows: dict[str, tuple[Call, tuple[int, ...]]] = {}
    everybody = indices
    low_all = sum(1 << index for index in indices if index < 64)
    rows["space, all"] = (Call(control(SPACE), put(0, ALL | SPACES, 0)), everybody)
    rows["space, all, fast"] = (Call(control(SPACE, fast=True), 0, ALL, (0,)), everybody)
    rows["space, mask 0"] = (Call(control(SPACE), put(0, 0, 0)), everybody)
    rows["space ex, all"] = (Call(control(SPACE_EX), put(0, 0, EVERYBODY, 0)), everybody)
    rows["space ex, all, fast"] = (Call(control(SPACE_EX, fast=True), 0, 0, (EVERYBODY, 0)), everybody)
    for name, entries in {**lists, "long": long}.items():
        gpa = put(0, ALL, 0, *entries)
        rows[f"list, {name}, all"] = (Call(control(LIST, reps=len(entries)), gpa), everybody)
    for name, entries in lists.items():
        word = control(LIST, fast=True, reps=len(entries))
        rows[f"list, {name}, all, fast"] = (Call(word, 0, ALL, (0, *entries)), everybody)
        word = control(LIST_EX, fast=True, reps=len(entries))
        rows[f"list ex, {name}, all, fast"] = (Call(word, 0, 0, (EVERYBODY, 0, *entries)), everybody)
    subsets = [tuple(index for n, index in enumerate(indices) if chosen >> n & 1) for chosen in range(1, 8)]
    for subset in subsets:
        mask, words = banks(subset)
        low = sum(1 << index for index in subset if index < 64)
        if low and low != low_all | 1 << 63:
            reached = tuple(index for index in subset if index < 64)
            rows[f"space {subset}"] = (Call(control(SPACE), put(0, 0, low)), reached)
            rows[f"list {subset}"] = (Call(control(LIST, reps=1), put(0, 0, low, here)), reached)
            rows[f"list {subset}, fast"] = (
                Call(control(LIST, fast=True, reps=1), 0, 0, (low, here)),
                reached,
            )
        size = len(words)
        slow = put(0, 0, SPARSE, mask, *words, here)
        xmm = (SPARSE, mask, *words, here)
        rows[f"space ex {subset}"] = (Call(control(SPACE_EX, variable=size), slow), subset)
        rows[f"list ex {subset}"] = (Call(control(LIST_EX, variable=size, reps=1), slow), subset)
        word = control(LIST_EX, fast=True, variable=size, reps=1)
        rows[f"list ex {subset}, fast"] = (Call(word, 0, 0, xmm), subset)
    for number, (call, reached) in enumerate(rows.values()):
        ask(vm, number, call)
        bits = sum(1 << n for n, index in enumerate(indices) if index in reached)
        vm.symbol("reached").view("Q")[number] = bits
    vm.symbol("rows").u64 = len(rows)
    vm.launch()
    vm.run_all()
    wrong = dict(zip(rows, vm.symbol("wrong").view("Q"), strict=False))
    assert {name: hex(who) for name, who in wrong.items() if who} == {}
    assert vm.symbol("looks_made").u64 >= 3 * ROUNDS * len(rows)
