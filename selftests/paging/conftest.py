# SPDX-License-Identifier: Apache-2.0
"""What the paging tests share: a guest that reads, writes, runs and flushes as told, and tells faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import pytest

from kvmpy import AGENT, CR4, PAGE_SIZE, Agent, Fault, Gpa, GuestVm, Gva, MakeVm, RawGpa, Vector
from kvmpy.x86.entry import WalkStep

# Where the guest finds page tables that it changes.
WINDOWS = Gva(0x5000_0000_0000)


class Prober:
    """A VM whose vCPU accesses memory as told; the first access launches it."""

    def __init__(self, vm: GuestVm, ring: int = 0, index: int = 0) -> None:
        self.vm = vm
        self.vcpu = vm.vcpus[index]
        self.ring = ring
        self.agent = Agent(self.vcpu, ring=ring)
        # What only the kernel may do.
        self.kernel = Agent(self.vcpu)
        self._windows: dict[RawGpa, Gva] = {}

    def on_vcpu(self, index: int) -> Prober:
        """Return a prober for another vCPU of the same VM."""
        return Prober(self.vm, self.ring, index)

    # What the guest does.

    @contextmanager
    def _state(self, cr4: int, pkru: int) -> Iterator[None]:
        """Set bits of CR4, and PKRU where they have PKE, around accesses of ring 0."""
        if cr4:
            assert self.kernel.change_cr(4, put=cr4) is None
        if cr4 & CR4.PKE:
            self.kernel.must(b"\x0f\x01\xef", rax=pkru)
        yield
        if cr4:
            assert self.kernel.change_cr(4, clear=cr4) is None

    def read(self, gva: Gva, *, ring: int | None = None, cr4: int = 0, pkru: int = 0) -> int | Fault:
        """Read 8 bytes, in another ring, or with bits of CR4 and PKRU set during the access."""
        with self._state(cr4, pkru):
            return self.agent.read(gva, ring=ring)

    def write(
        self, gva: Gva, value: int, *, ring: int | None = None, cr4: int = 0, pkru: int = 0
    ) -> Fault | None:
        """Write 8 bytes; None when it went well."""
        with self._state(cr4, pkru):
            return self.agent.write(gva, value, ring=ring)

    def fetch(self, gva: Gva, *, ring: int | None = None, cr4: int = 0) -> int | Fault:
        """Call the function at *gva* and return its result."""
        with self._state(cr4, 0):
            return self.agent.call(gva, ring=ring)

    # What the host does.

    def page(
        self, gva: Gva, content: int | bytes = 0, *, private: bool | None = None, **keywords: bool
    ) -> Gpa:
        """Map a new page (for both rings unless user=False) that begins with *content*."""
        gpa = self.new(private=private)
        self.vm.memory.write(gpa, content.to_bytes(8, "little") if isinstance(content, int) else content)
        self.vm.map(gva, gpa, PAGE_SIZE, page_size=PAGE_SIZE, **{"user": True, **keywords})
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


@dataclass
class MakeProber:
    """Makes a prober with a VM of its own."""

    make_vm: MakeVm

    def __call__(self, *, ring: int = 0, **options: Any) -> Prober:
        """Make a prober for *ring*; *options* are those of ``make_vm``."""
        return Prober(self.make_vm(AGENT, **options), ring)


@pytest.fixture
def make_prober(make_vm: MakeVm) -> MakeProber:
    return MakeProber(make_vm)


@pytest.fixture
def prober(make_prober: MakeProber, ring: int) -> Prober:
    """A guest whose accesses come from ring 0, and from ring 3."""
    return make_prober(ring=ring)


@pytest.fixture
def page_fault() -> PageFault:
    """A page fault with an error code at an address."""
    return lambda error, address: Fault(Vector.PF, int(error), int(address))
