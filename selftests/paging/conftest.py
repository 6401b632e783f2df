# SPDX-License-Identifier: Apache-2.0
"""What the paging tests share: a guest that reads, writes, runs and flushes as told, and tells faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import pytest

from kvmpy import PAGE_SIZE, Gpa, GuestVm, Gva, MakeVm, RawGpa
from kvmpy.x86.entry import WalkStep

GUEST = """
#include <kvmpy/guest.h>

enum { READ, WRITE, FETCH, INVLPG, WRITE_CR3, WRITE_CR0, READ_CR4 };

#define CR4_PKE		BIT(22)

struct order {
	u64 op;
	u64 address;
	u64 value;
	u64 ring;
	u64 cr4;	/* set during the access, which must be one of ring 0 */
	u64 pkru;	/* so is this, where cr4 has PKE */
};

GUEST_SHARED struct order orders[4];

static u64 user_stacks[4][256] GUEST_USER_DATA;
static struct order user_orders[4] GUEST_USER_DATA;
static u64 fetching[4];
static struct guest_fault fetch_faults[4];

static GUEST_USER u64 user_read(u64 address)
{
	return mmio_read64((void *)(uintptr_t)address);
}

static GUEST_USER u64 user_write(u64 me)
{
	mmio_write64((void *)(uintptr_t)user_orders[me].address, user_orders[me].value);
	return 0;
}

/* The fault of a fetch is at the target; go back to the caller. */
static void fetch_faulted(struct exception_frame *frame)
{
	u32 me = guest_cpu_index();

	if (frame->rip != fetching[me])
		guest_exception_unexpected(frame);
	fetch_faults[me] = (struct guest_fault) {
		.vector = frame->vector, .error_code = frame->error_code, .cr2 = read_cr2(), .faulted = true,
	};
	frame->rip = *(u64 *)(uintptr_t)frame->rsp;
	frame->rsp += 8;
}

static __noinline u64 kernel_fetch(u64 address, struct guest_fault *fault)
{
	u64 (*function)(void) = (void *)(uintptr_t)address;
	u32 me = guest_cpu_index();
	u64 value;

	fetching[me] = address;
	fetch_faults[me].faulted = false;
	guest_exception_install(PF_VECTOR, fetch_faulted);
	value = function();
	guest_exception_install(PF_VECTOR, NULL);
	*fault = fetch_faults[me];
	return value;
}

static void wrpkru(u32 value)
{
	asm volatile(".byte 0x0f, 0x01, 0xef" : : "a"(value), "c"(0), "d"(0) : "memory");
}

static u64 in_ring_0(const struct order *o, struct guest_fault *fault)
{
	u64 cr4 = o->cr4 ? read_cr4() : 0;
	u64 value = 0;

	if (o->cr4)
		write_cr4(cr4 | o->cr4);
	if (o->cr4 & CR4_PKE)
		wrpkru(o->pkru);
	switch (o->op) {
	case READ:
		*fault = GUEST_TRY("movq (%1), %0", : "=&r"(value) : "r"(o->address) : "memory");
		break;
	case WRITE:
		*fault = GUEST_TRY("movq %0, (%1)", : : "r"(o->value), "r"(o->address) : "memory");
		break;
	case FETCH:
		value = kernel_fetch(o->address, fault);
		break;
	}
	if (o->cr4)
		write_cr4(cr4);
	return value;
}

static u64 in_ring_3(const struct order *o, struct guest_fault *fault)
{
	u32 me = guest_cpu_index();
	u64 *stack = user_stacks[me] + ARRAY_SIZE(user_stacks[me]);
	struct guest_user_exit exit = { 0 };

	user_orders[me] = *o;
	switch (o->op) {
	case READ:
		exit = guest_user_run(user_read, o->address, stack);
		break;
	case WRITE:
		exit = guest_user_run(user_write, me, stack);
		break;
	case FETCH:
		exit = guest_user_run((u64 (*)(u64))(uintptr_t)o->address, 0, stack);
		break;
	}
	*fault = exit.fault;
	return exit.value;
}

void guest_main(void)
{
	const struct order *mine = &orders[guest_cpu_index()];

	GUEST_SYNC();
	for (;;) {
		struct guest_fault fault = { 0 };
		struct order o = *mine;
		u64 value = 0;

		switch (o.op) {
		case INVLPG:
			invlpg((void *)(uintptr_t)o.address);
			break;
		case WRITE_CR3:
			write_cr3(o.value ? o.value : read_cr3());
			break;
		case WRITE_CR0:
			write_cr0((read_cr0() & ~o.address) | o.value);
			break;
		case READ_CR4:
			value = read_cr4();
			break;
		default:
			value = o.ring ? in_ring_3(&o, &fault) : in_ring_0(&o, &fault);
			break;
		}
		GUEST_SYNC(value, fault.faulted, fault.vector, fault.error_code, fault.cr2);
	}
}
"""

READ, WRITE, FETCH, INVLPG, WRITE_CR3, WRITE_CR0, READ_CR4 = range(7)
PF_VECTOR = 14

# Where the guest finds page tables that it changes.
WINDOWS = Gva(0x5000_0000_0000)


@dataclass(frozen=True)
class Fault:
    """How an access faulted; *address* is CR2, 0 unless it was a page fault."""

    vector: int
    error: int
    address: int = 0

    def __repr__(self) -> str:
        return f"Fault(vector {self.vector}, error {self.error:#x}, address {self.address:#x})"


class Prober:
    """A VM whose vCPU accesses memory as told; the first access launches it."""

    def __init__(self, vm: GuestVm, ring: int = 0, index: int = 0) -> None:
        self.vm = vm
        self.vcpu = vm.vcpus[index]
        self.ring = ring
        self._index = index
        self._started = False
        self._windows: dict[RawGpa, Gva] = {}

    def on_vcpu(self, index: int) -> Prober:
        """Return a prober for another vCPU of the same VM."""
        return Prober(self.vm, self.ring, index)

    # What the guest does.

    def _do(
        self, op: int, gva: int = 0, value: int = 0, *, ring: int | None = None, cr4: int = 0, pkru: int = 0
    ) -> int | Fault:
        if not self.vm.launched:
            self.vm.launch()
        if not self._started:
            self.vcpu.sync()
            self._started = True
        order = self.vm.symbol("orders")[self._index]
        order.set(
            op=op, address=gva, value=value, ring=self.ring if ring is None else ring, cr4=cr4, pkru=pkru
        )
        got, faulted, vector, error, cr2 = self.vcpu.sync().args
        return Fault(vector, error, cr2) if faulted else got

    def read(self, gva: Gva, **how: int) -> int | Fault:
        """Read 8 bytes; keywords ring, cr4 and pkru."""
        return self._do(READ, int(gva), **how)

    def write(self, gva: Gva, value: int, **how: int) -> Fault | None:
        """Write 8 bytes; None when it went well."""
        got = self._do(WRITE, int(gva), value, **how)
        return got if isinstance(got, Fault) else None

    def fetch(self, gva: Gva, **how: int) -> int | Fault:
        """Call the function at *gva* and return its result."""
        return self._do(FETCH, int(gva), **how)

    def invlpg(self, gva: Gva) -> None:
        """Drop the translation of one address."""
        self._do(INVLPG, int(gva))

    def write_cr3(self, raw: int = 0) -> None:
        """Load CR3, 0 for the value it has."""
        self._do(WRITE_CR3, 0, raw)

    def write_cr0(self, *, clear: int = 0, set_: int = 0) -> None:
        """Change bits of CR0."""
        self._do(WRITE_CR0, clear, set_)

    def read_cr4(self) -> int:
        """Return CR4."""
        got = self._do(READ_CR4)
        assert isinstance(got, int)
        return got

    # What the host does.

    def page(self, gva: Gva, content: int | bytes = 0, *, private: bool | None = None, **how: bool) -> Gpa:
        """Map a new page (for both rings unless user=False) that begins with *content*."""
        gpa = self.new(private=private)
        self.vm.memory.write(gpa, content.to_bytes(8, "little") if isinstance(content, int) else content)
        self.vm.map(gva, gpa, PAGE_SIZE, page_size=PAGE_SIZE, **{"user": True, **how})
        return gpa

    def new(self, pages: int = 1, *, private: bool | None = None, align: int = PAGE_SIZE) -> Gpa:
        """Allocate pages that the host can write: shared ones once private memory is out of its reach."""
        if private is None and self.vm.memory.seal is not None:
            private = False
        return self.vm.allocator.alloc(pages, private=private, align=align)

    def entry(self, gva: Gva, level: int) -> WalkStep:
        """Return the entry of *level* (1 = PTE) that *gva* uses."""
        return next(step for step in self.vm.pages.walk(gva).steps if step.level == level)

    def change_entry(self, gva: Gva, level: int, *, set_: int = 0, clear: int = 0) -> None:
        """Set and clear bits of the entry of *level* that *gva* uses, as they stand."""
        step = self.entry(gva, level)
        self._store(step, step.value & ~clear | set_)

    def edit(self, change: Callable[[], None], *gvas: Gva) -> None:
        """Let the host *change* the tables and the guest repeat it, entry by entry, for the walks of *gvas*.

        A KVM that shadows page tables notices the guest's writes only (Documentation/virt/kvm/x86/mmu.rst,
        "Synchronized and unsynchronized pages"): what the guest has used already is not the host's to change.
        """
        before = {
            (step.table, step.index): step.value for gva in gvas for step in self.vm.pages.walk(gva).steps
        }
        change()
        for gva in gvas:
            for step in self.vm.pages.walk(gva).steps:
                if before.get((step.table, step.index), step.value) != step.value:
                    self._store(step, step.value)

    def _store(self, step: WalkStep, value: int) -> None:
        gpa, private = self.vm.from_raw(step.table)
        if self.vm.launched:
            assert self.write(self.show(step.table) + 8 * step.index, value, ring=0) is None
            return
        view = self.vm.memory.private_view if private else self.vm.memory.shared_view
        view(gpa + 8 * step.index, 8)[:] = value.to_bytes(8, "little")

    def show(self, table: RawGpa) -> Gva:
        """Map a page table for ring 0 of the guest and return where it is."""
        if table not in self._windows:
            self._windows[table] = WINDOWS + len(self._windows) * PAGE_SIZE
            gpa, private = self.vm.from_raw(table)
            self.vm.map(self._windows[table], gpa, PAGE_SIZE, page_size=PAGE_SIZE, nx=True, private=private)
        return self._windows[table]


class PageFault(Protocol):
    """What a page fault looks like."""

    def __call__(self, error: int, address: Gva) -> Fault: ...


class MakeProber(Protocol):
    """Makes a prober with a VM of its own; keywords as those of ``make_vm``."""

    def __call__(
        self, *, ring: int = 0, vcpus: int = 1, memory: int | None = None, levels: int = 4
    ) -> Prober: ...


@pytest.fixture
def make_prober(make_vm: MakeVm) -> MakeProber:
    """Probers with more vCPUs, memory or levels than the usual."""

    def make(*, ring: int = 0, vcpus: int = 1, memory: int | None = None, levels: int = 4) -> Prober:
        return Prober(make_vm(GUEST, vcpus=vcpus, memory=memory, levels=levels), ring)

    return make


@pytest.fixture
def prober(make_prober: MakeProber, ring: int) -> Prober:
    """A guest whose accesses come from ring 0, and from ring 3."""
    return make_prober(ring=ring)


@pytest.fixture
def page_fault() -> PageFault:
    """A page fault with an error code at an address."""
    return lambda error, address: Fault(PF_VECTOR, int(error), int(address))


@pytest.fixture
def live_tables(protection: str) -> None:
    """Page tables that the host can change while the guest runs."""
    from kvmpy.coco import ladder

    if not ladder.get(protection).traits.host_sees_tables:
        pytest.skip(f"protection {protection} keeps the page tables from the host")
