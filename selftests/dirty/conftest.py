# SPDX-License-Identifier: Apache-2.0
"""What the tests of dirty tracking share: agents that write the pages they are told to, on every vCPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from kvmpy import (
    AGENT,
    KVM_MEM_LOG_DIRTY_PAGES,
    PAGE_SIZE,
    Agent,
    Backing,
    Fault,
    Gpa,
    GuestVm,
    Gva,
    MakeVm,
    MemorySlot,
)

REGION_GPA = Gpa(0x1000_0000)
REGION_GVA = Gva(0x6000_0000)
PAGES = 128


class Writers:
    """A VM with a region of logged memory, and an agent on each vCPU that accesses it page by page."""

    def __init__(self, vm: GuestVm, region: MemorySlot, ring: int) -> None:
        self.vm = vm
        self.region = region
        self.agents = [Agent(vcpu, ring=ring) for vcpu in vm.vcpus]

    def begin(self, page: int, *, vcpu: int = 0) -> None:
        """Order a write to a page; the vCPU carries it out when it runs."""
        gva = REGION_GVA + page * PAGE_SIZE
        self.agents[vcpu].begin_write(gva, int(gva))

    def write(self, pages: Iterable[int], *, vcpu: int = 0) -> None:
        """Let the guest write to each page, in this order."""
        for page in pages:
            self.begin(page, vcpu=vcpu)
            self.agents[vcpu].value()

    def read(self, pages: Iterable[int], *, vcpu: int = 0) -> None:
        """Let the guest read each page, in this order."""
        for page in pages:
            assert not isinstance(self.agents[vcpu].read(REGION_GVA + page * PAGE_SIZE), Fault)

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
        vm = self._make_vm(AGENT, vcpus=vcpus, before_vcpus=before_vcpus)
        size = pages * PAGE_SIZE
        region = vm.add_memory(REGION_GPA, size, flags=flags, backing=backing, private=False)
        vm.map(REGION_GVA, REGION_GPA, size, page_size=page_size, user=True, nx=True, private=False)
        writers = Writers(vm, region, self._ring)
        for agent in writers.agents:
            agent.start()
        return writers


@pytest.fixture
def make_writers(make_vm: MakeVm, ring: int) -> MakeWriters:
    """Make VMs whose guests write to a region with dirty tracking, from the ring of the test."""
    return MakeWriters(make_vm, ring)
