# SPDX-License-Identifier: Apache-2.0
"""Conversions that the guest asks for by KVM_HC_MAP_GPA_RANGE, by one vCPU and by several at once."""

from __future__ import annotations

import random

import pytest

from kvmpy import (
    KVM_CAP_EXIT_HYPERCALL,
    KVM_EXIT_HYPERCALL_LONG_MODE,
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
    PAGE_SIZE,
    Exit,
    GuestVcpu,
    GuestVm,
    HypercallExit,
    MemoryFaultExit,
)
from selftests.private_memory.conftest import MakeRegion, Region

pytestmark = [
    pytest.mark.protections("sw-protected"),
    pytest.mark.requires(f"KVM_CAP_EXIT_HYPERCALL&{1 << KVM_HC_MAP_GPA_RANGE}"),
]

ENCRYPTED = KVM_MAP_GPA_RANGE_ENCRYPTED
VALUE, OTHER = 0x6D70_0000, 0x6D71_0000
EINVAL, ENOSYS = -22, -1000

# Each vCPU converts pages of its own, @stride apart, again and again: both contents stay.
OWN_PAGES = """
#include <kvmpy/guest.h>

#define ROUNDS 12

void guest_main(u64 gva, u64 gpa, u64 pages, u64 stride)
{
	u64 cpu = guest_cpu_index();
	u64 round, page;

	for (round = 0; round < ROUNDS; round++) {
		for (page = cpu; page < pages; page += stride) {
			volatile u64 *word = (u64 *)(gva + page * 4096);
			u64 tag = cpu << 32 | page << 16;

			GUEST_ASSERT_EQ(*word, round ? tag | round : 0);
			*word = tag | (round + 1);
			GUEST_ASSERT_EQ(guest_map_gpa_range(gpa + page * 4096, 4096, true), 0);
			GUEST_ASSERT_EQ(*word, round ? tag | 0x8000 | round : 0);
			*word = tag | 0x8000 | (round + 1);
			GUEST_ASSERT_EQ(guest_map_gpa_range(gpa + page * 4096, 4096, false), 0);
			GUEST_ASSERT_EQ(*word, tag | (round + 1));
		}
	}
}
"""

# Each vCPU converts the same pages this way and that, and finds one of their two contents at any time.
SAME_PAGES = """
#include <kvmpy/guest.h>

#define ROUNDS 40

GUEST_SHARED volatile u64 ready;

void guest_main(u64 gva, u64 gpa, u64 pages, u64 shared, u64 private)
{
	u64 cpu = guest_cpu_index();
	u64 round, page;

	if (cpu == 0) {
		GUEST_ASSERT_EQ(guest_map_gpa_range(gpa, pages * 4096, true), 0);
		for (page = 0; page < pages; page++)
			*(volatile u64 *)(gva + page * 4096) = private + page;
		ready = 1;
	}
	while (!ready)
		cpu_relax();
	for (round = 0; round < ROUNDS; round++) {
		u64 first = (round * 5 + cpu * 3) % pages * 4096;

		GUEST_ASSERT_EQ(guest_map_gpa_range(gpa + first, pages * 4096 - first, (round + cpu) & 1), 0);
		for (page = 0; page < pages; page++) {
			u64 value = *(volatile u64 *)(gva + page * 4096);

			GUEST_ASSERT(value == shared + page || value == private + page);
		}
	}
}
"""


def call(region: Region, gpa: int, pages: int, attributes: int, *, cpu: int = 0) -> int:
    """Let the guest make the hypercall and return its result."""
    region.launch()
    return region.agents[cpu].hypercall(KVM_HC_MAP_GPA_RANGE, gpa, pages, attributes)


def carry_out(region: Region) -> list[tuple[int, ...]]:
    """Answer the hypercalls of the region's guest; the list fills with them."""
    seen: list[tuple[int, ...]] = []

    def hook(vcpu: GuestVcpu, exit_: HypercallExit) -> bool:
        del vcpu
        gpa, pages, attributes = exit_.args[:3]
        seen.append((exit_.nr, gpa, pages, attributes, exit_.flags))
        first = (gpa - int(region.gpa(0))) // PAGE_SIZE
        region.convert(first, pages, private=bool(attributes & ENCRYPTED))
        exit_.respond(0)
        return True

    region.vm.on_hypercall = hook
    return seen


def test_the_exit_says_what_the_guest_asked_for(region: Region) -> None:
    """The exit has number, address, pages and attributes as the guest gave them, and LONG_MODE in its flags.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_HYPERCALL; x86/hypercalls.rst 9.
    """
    seen = carry_out(region)
    wanted = [(3, 2, ENCRYPTED), (0, 16, ENCRYPTED | 1), (5, 1, 0), (0, 16, 2)]
    for first, pages, attributes in wanted:
        assert call(region, int(region.gpa(first)), pages, attributes) == 0
    assert seen == [
        (KVM_HC_MAP_GPA_RANGE, int(region.gpa(first)), pages, attributes, KVM_EXIT_HYPERCALL_LONG_MODE)
        for first, pages, attributes in wanted
    ]


def test_the_guest_converts_its_memory(region: Region) -> None:
    """What the guest asked for holds when the hypercall returns: contents as for any conversion.

    Documentation/virt/kvm/x86/hypercalls.rst 9, KVM_HC_MAP_GPA_RANGE.
    """
    carry_out(region)
    region.fill(0, 16, VALUE)
    assert call(region, int(region.gpa(4)), 8, ENCRYPTED) == 0
    region.check_zero(4, 8)
    region.fill(4, 8, OTHER)
    assert call(region, int(region.gpa(4)), 8, 0) == 0
    region.check(0, 16, VALUE)
    assert call(region, int(region.gpa(6)), 2, ENCRYPTED) == 0
    region.check(6, 2, OTHER + 2)


@pytest.mark.parametrize("answer", [0, -1, -22, 7, -(1 << 63)])
def test_the_answer_is_the_guests_result(region: Region, answer: int) -> None:
    """The guest finds in RAX what user space answered, all 64 bits.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_HYPERCALL: the "ret" field.
    """

    def hook(vcpu: GuestVcpu, exit_: HypercallExit) -> bool:
        del vcpu
        exit_.respond(answer)
        return True

    region.vm.on_hypercall = hook
    assert call(region, int(region.gpa(0)), 1, 0) == answer


@pytest.mark.parametrize(
    ("gpa", "pages"),
    [
        (0x8000_0001, 1),
        (0x8000_0FFF, 1),
        (0x8000_0000, 0),
        (0x8000_0000, (1 << 64) - 1),
        ((1 << 64) - PAGE_SIZE, (1 << 64) - (1 << 51)),
    ],
    ids=["gpa+1", "gpa-1", "no-pages", "overflow", "overflow-from-the-end"],
)
def test_kvm_refuses_ranges_that_are_none(region: Region, gpa: int, pages: int) -> None:
    """An unaligned address, no pages and a range that overflows are -KVM_EINVAL, without an exit.

    ____kvm_emulate_hypercall(), arch/x86/kvm/x86.c.
    """
    seen = carry_out(region)
    assert call(region, gpa, pages, ENCRYPTED) == EINVAL
    assert seen == []


def test_without_the_capability(region: Region) -> None:
    """Unless user space enabled the exit the hypercall does not exist: -KVM_ENOSYS.

    Documentation/virt/kvm/api.rst 7, KVM_CAP_EXIT_HYPERCALL.
    """
    seen = carry_out(region)
    region.vm.enable_cap(KVM_CAP_EXIT_HYPERCALL, 0)
    assert call(region, int(region.gpa(0)), 1, ENCRYPTED) == ENOSYS
    assert seen == []
    region.vm.enable_cap(KVM_CAP_EXIT_HYPERCALL, 1 << KVM_HC_MAP_GPA_RANGE)
    assert call(region, int(region.gpa(0)), 1, ENCRYPTED) == 0
    assert len(seen) == 1


def test_one_vcpu_converts_for_another(make_region: MakeRegion) -> None:
    """A conversion holds for all vCPUs of the VM: what another one had mapped is taken from it.

    Documentation/virt/kvm/api.rst 4.141.
    """
    region = make_region(16, vcpus=2)
    carry_out(region)
    region.write(5, VALUE, cpu=1)
    assert call(region, int(region.gpa(5)), 1, ENCRYPTED, cpu=0) == 0
    assert region.read(5, cpu=1) == 0
    region.write(5, OTHER, cpu=1)
    assert call(region, int(region.gpa(5)), 1, 0, cpu=0) == 0
    assert (region.read(5, cpu=0), region.read(5, cpu=1)) == (VALUE, VALUE)


@pytest.mark.parametrize("vcpus", [2, 4])
def test_vcpus_convert_pages_of_their_own(make_region: MakeRegion, vcpus: int) -> None:
    """vCPUs that convert neighbouring pages at once do not disturb each other: every page keeps its contents.

    Documentation/virt/kvm/api.rst 4.141.
    """
    region = make_region(16, vcpus=vcpus, program=OWN_PAGES)
    seen = carry_out(region)
    for vcpu in region.vm.vcpus:
        vcpu.set_entry("guest_main", int(region.gva(0)), int(region.gpa(0)), 16, vcpus)
    region.vm.launch()
    region.vm.run_all(60, on_exit=a_race)
    assert len(seen) == 16 * 2 * 12


def a_race(vcpu: GuestVcpu, exit_: Exit) -> bool:
    """A memory fault of an access that met a conversion under way: it is tried again."""
    del vcpu
    return isinstance(exit_, MemoryFaultExit)


def test_vcpus_convert_the_same_pages(make_region: MakeRegion) -> None:
    """vCPUs that convert one range to and fro at once always find one of its contents, and lose neither.

    Documentation/virt/kvm/api.rst 4.140 and 4.141.
    """
    region = make_region(12, slots=[5, 7], vcpus=4, program=SAME_PAGES)
    carry_out(region)
    for vcpu in region.vm.vcpus:
        vcpu.set_entry("guest_main", int(region.gva(0)), int(region.gpa(0)), 12, VALUE, OTHER)
    for page in range(12):
        region.host_write(page, VALUE + page)
    region.vm.launch()
    region.vm.run_all(60, on_exit=a_race)
    assert [region.host_read(page) for page in range(12)] == [VALUE + page for page in range(12)]


def test_the_harness_answers_by_itself(make_region: MakeRegion, rng: random.Random) -> None:
    """Without a hook a conversion that the guest asks for is carried out and noted: bitmap, attributes and
    KVM agree.

    Documentation/virt/kvm/x86/hypercalls.rst 9.
    """
    region = make_region(16)
    vm: GuestVm = region.vm
    gva = vm.alloc(32 * PAGE_SIZE, private=False)
    gpa = vm.gva_to_gpa(gva)
    region.launch()
    private: set[int] = set()
    for _ in range(12):
        first = rng.randrange(32)
        pages = rng.randint(1, 32 - first)
        encrypted = rng.random() < 0.5
        assert call(region, int(gpa + first * PAGE_SIZE), pages, ENCRYPTED if encrypted else 0) == 0
        frames = range(first, first + pages)
        private = private.union(frames) if encrypted else private.difference(frames)
        assert {page for page in range(32) if vm.memory.is_private(gpa + page * PAGE_SIZE)} == private
    assert vm.private.compare(gpa, 32 * PAGE_SIZE) == []


def test_the_harness_refuses_what_is_no_memory(make_region: MakeRegion) -> None:
    """Without a hook a range outside guest memory is -KVM_EINVAL for the guest, and nothing changes.

    Documentation/virt/kvm/x86/hypercalls.rst 9.
    """
    region = make_region(16)
    region.launch()
    assert call(region, int(region.gpa(0)), 1, ENCRYPTED) == EINVAL
    region.write(0, VALUE)
    assert region.host_read(0) == VALUE
