# SPDX-License-Identifier: Apache-2.0
"""What the tests of dirty tracking share: a guest that writes the pages it is told to, on every vCPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from kvmpy import KVM_MEM_LOG_DIRTY_PAGES, PAGE_SIZE, Backing, Gpa, GuestVm, Gva, MakeVm, MemorySlot, Ucall

REGION_GPA = Gpa(0x1000_0000)
REGION_GVA = Gva(0x6000_0000)
PAGES = 128
ONLY_READ = 1 << 63

# The host answers each question with the address of the next access, the top bit meaning a read.
GUEST = """
#include <kvmpy/guest.h>

#define ONLY_READ	(1ULL << 63)

struct access {
	u64 address;
	u64 read;
};

static GUEST_USER u64 in_ring3(u64 what)
{
	volatile u64 *where = (volatile u64 *)(what & ~ONLY_READ);

	if (what & ONLY_READ)
		return *where;
	*where = what;
	return 0;
}

static u64 user_stacks[4][256] GUEST_USER_DATA;

void guest_main(u64 ring)
{
	u64 *stack = user_stacks[guest_cpu_index()] + ARRAY_SIZE(user_stacks[0]);

	for (;;) {
		u64 what = GUEST_ASK(KVMPY_UCALL_CMD_USER);

		if (ring) {
			struct guest_user_exit exit = guest_user_run(in_ring3, what, stack);

			GUEST_ASSERT(exit.returned);
		} else {
			in_ring3(what);
		}
	}
}
"""


class Writers:
    """A VM with a region of logged memory, and a guest on each vCPU that accesses it page by page."""

    def __init__(self, vm: GuestVm, region: MemorySlot) -> None:
        self.vm = vm
        self.region = region
        self._asked: list[Ucall | None] = [None] * len(vm.vcpus)

    def order(self, page: int, *, vcpu: int = 0, read: bool = False) -> None:
        """Tell the guest its next access; it does it when the vCPU runs."""
        asked = self._asked[vcpu] or self.vm.vcpus[vcpu].sync()
        asked.reply((int(REGION_GVA) + page * PAGE_SIZE) | (ONLY_READ if read else 0))

    def asked(self, call: Ucall, vcpu: int = 0) -> None:
        """Take the guest's next question, where the test ran the vCPU itself."""
        self._asked[vcpu] = call

    def finish(self, vcpu: int = 0) -> None:
        """Run the vCPU until the ordered access is done."""
        self._asked[vcpu] = self.vm.vcpus[vcpu].sync()

    def write(self, pages: Iterable[int], *, vcpu: int = 0) -> None:
        """Let the guest write to each page, in this order."""
        for page in pages:
            self.order(page, vcpu=vcpu)
            self.finish(vcpu)

    def read(self, pages: Iterable[int], *, vcpu: int = 0) -> None:
        """Let the guest read each page, in this order."""
        for page in pages:
            self.order(page, vcpu=vcpu, read=True)
            self.finish(vcpu)

    def log(self) -> list[int]:
        """Return the pages that KVM_GET_DIRTY_LOG reports."""
        return list(self.vm.dirty.get_log(self.region.slot))


class MakeWriters:
    """What the fixture ``make_writers`` gives."""

    def __init__(self, make_vm: MakeVm, ring: int) -> None:
        self._make_vm = make_vm
        self._ring = ring

    def __call__(
        self,
        *,
        vcpus: int = 1,
        pages: int = PAGES,
        flags: int = KVM_MEM_LOG_DIRTY_PAGES,
        backing: Backing | None = None,
        page_size: int = PAGE_SIZE,
        before_vcpus: Callable[[GuestVm], None] | None = None,
    ) -> Writers:
        """Make the VM, add the region and launch."""
        vm = self._make_vm(GUEST, vcpus=vcpus, before_vcpus=before_vcpus)
        region = vm.add_memory(REGION_GPA, pages * PAGE_SIZE, flags=flags, backing=backing, private=False)
        vm.map(
            REGION_GVA, REGION_GPA, pages * PAGE_SIZE, page_size=page_size, user=True, nx=True, private=False
        )
        for vcpu in vm.vcpus:
            vcpu.set_entry("guest_main", self._ring)
        vm.launch()
        return Writers(vm, region)


@pytest.fixture
def make_writers(make_vm: MakeVm, ring: int) -> MakeWriters:
    """Make VMs whose guests write to a region with dirty tracking, from the ring of the test."""
    return MakeWriters(make_vm, ring)
