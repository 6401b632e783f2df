# SPDX-License-Identifier: Apache-2.0
"""What selftests of several areas share."""

from __future__ import annotations

import pytest

from kvmpy import PAGE_SIZE, Gpa, GuestVm, Gva, MakeVm, MmioExit

# Does what `order` says, in ring 0 or 3, and shows the result.
GUEST = """
#include <kvmpy/guest.h>

struct order {
	u64 address;
	u64 value;
	u32 size;
	u32 write;
	u64 ring;
};

GUEST_SHARED struct order order;
static struct order mine GUEST_USER_DATA;
static u64 user_stack[256] GUEST_USER_DATA;

static GUEST_USER u64 access(u64 unused)
{
	void *where = (void *)(uintptr_t)mine.address;

	(void)unused;
	switch (mine.size | mine.write << 8) {
	case 1:
		return mmio_read8(where);
	case 2:
		return mmio_read16(where);
	case 4:
		return mmio_read32(where);
	case 8:
		return mmio_read64(where);
	case 0x101:
		mmio_write8(where, mine.value);
		break;
	case 0x102:
		mmio_write16(where, mine.value);
		break;
	case 0x104:
		mmio_write32(where, mine.value);
		break;
	case 0x108:
		mmio_write64(where, mine.value);
		break;
	}
	return 0;
}

void guest_main(void)
{
	GUEST_SYNC();
	for (;;) {
		struct guest_user_exit exit = { .returned = true };

		mine = order;
		if (mine.ring)
			exit = guest_user_run(access, 0, user_stack + ARRAY_SIZE(user_stack));
		else
			exit.value = access(0);
		GUEST_ASSERT(exit.returned);
		GUEST_SYNC(exit.value);
	}
}
"""


class Accessor:
    """A VM whose guest reads and writes memory as it is told, one access at a time.

    The first access launches it: add memory and :meth:`map` before.
    """

    def __init__(self, vm: GuestVm, ring: int) -> None:
        self.vm = vm
        self.vcpu = vm.vcpus[0]
        self.ring = ring

    def order(self, gva: Gva, size: int, value: int | None = None) -> None:
        """Tell the guest its next access; it does it when the vCPU runs."""
        if not self.vm.launched:
            self.vm.launch()
            self.vcpu.sync()
        self.vm.symbol("order").set(
            address=gva, value=value or 0, size=size, write=value is not None, ring=self.ring
        )

    def read(self, gva: Gva, size: int = 8) -> int:
        """Let the guest read memory and return what it saw."""
        self.order(gva, size)
        return self.result()

    def write(self, gva: Gva, value: int, size: int = 8) -> None:
        """Let the guest write memory."""
        self.order(gva, size, value)
        self.result()

    def exit_of(self, gva: Gva, size: int = 8, value: int | None = None) -> MmioExit:
        """Let the guest read (or write *value*) where nothing is, and return the exit."""
        self.order(gva, size, value)
        return self.vcpu.expect(MmioExit)

    def result(self) -> int:
        """Return the result of the access under way."""
        return self.vcpu.sync().args[0]

    def map(self, gva: Gva, gpa: Gpa, size: int) -> None:
        """Map guest-physical addresses as shared memory, for both rings."""
        self.vm.map(gva, gpa, size, page_size=PAGE_SIZE, user=True, nx=True, private=False)


@pytest.fixture
def open_registers(protection: str) -> None:
    """Skip under protections that keep the vCPUs' registers from the host after launch."""
    from kvmpy.coco import ladder

    if not ladder.get(protection).traits.can_read_registers:
        pytest.skip(f"protection {protection} keeps vCPU registers from the host")


@pytest.fixture(params=[0, 3], ids=["ring0", "ring3"])
def ring(request: pytest.FixtureRequest) -> int:
    """The ring that the guest's access comes from: hosts that emulate ring 0 run ring 3 on the CPU."""
    return int(request.param)


@pytest.fixture
def accessor(make_vm: MakeVm, ring: int) -> Accessor:
    """A guest with 64 MiB of memory at address 0 that does one access at a time."""
    return Accessor(make_vm(GUEST), ring)


@pytest.fixture
def open_tables(protection: str) -> None:
    """Skip under protections that keep code, page and descriptor tables from the host after launch."""
    from kvmpy.coco import ladder

    if not ladder.get(protection).traits.host_sees_tables:
        pytest.skip(f"protection {protection} keeps code and page tables from the host")
