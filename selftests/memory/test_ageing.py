# SPDX-License-Identifier: Apache-2.0
"""Pages that are marked idle, and become young by a guest's accesses (KVM's MMU notifiers)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

import pytest

from kvmpy import AGENT, PAGE_SIZE, Agent, Anonymous, Fault, Gpa, Gva, MakeVm, Mapping

BITMAP = "/sys/kernel/mm/page_idle/bitmap"
pytestmark = [
    pytest.mark.requires("root", f"path:{BITMAP}"),
    pytest.mark.protections("none"),
    # Hosts that emulate ring 0 map nothing for it.
    pytest.mark.parametrize("ring", [3], ids=["ring3"], indirect=True),
]

REGION_GPA, REGION_GVA = Gpa(0x1000_0000), Gva(0x6000_0000)
PAGES = 512
# The kernel keeps some pages of each CPU off its lists, where they cannot be marked.
MOST = 9 * PAGES // 10
PRESENT = 1 << 63


def frames(mapping: Mapping) -> list[int]:
    """Return the page frame number of each page; all are present."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        raw = os.pread(fd, 8 * PAGES, mapping.hva // PAGE_SIZE * 8)
    finally:
        os.close(fd)
    entries = struct.unpack(f"<{PAGES}Q", raw)
    assert all(entry & PRESENT for entry in entries)
    return [entry & (1 << 55) - 1 for entry in entries]


class Idle:
    """The kernel's idle bit of each page."""

    def __init__(self, mapping: Mapping) -> None:
        self.frames = frames(mapping)
        self.fd = os.open(BITMAP, os.O_RDWR)

    def close(self) -> None:
        os.close(self.fd)

    def mark(self) -> set[int]:
        """Mark all pages idle; return those that took it."""
        for frame in self.frames:
            os.pwrite(self.fd, struct.pack("<Q", 1 << frame % 64), frame // 64 * 8)
        return self.pages()

    def pages(self) -> set[int]:
        """Return the pages that are idle."""
        idle = set()
        for page, frame in enumerate(self.frames):
            (word,) = struct.unpack("<Q", os.pread(self.fd, 8, frame // 64 * 8))
            if word >> frame % 64 & 1:
                idle.add(page)
        return idle


@pytest.mark.parametrize("write", [False, True], ids=["reads", "writes"])
def test_accesses_make_pages_young(make_vm: MakeVm, ring: int, write: bool) -> None:
    """Pages that a guest's vCPUs read or write are no longer idle, those that they leave alone still are.

    Documentation/admin-guide/mm/idle_page_tracking.rst; virt/kvm/kvm_main.c,
    kvm_mmu_notifier_clear_young().
    """
    vm = make_vm(AGENT, vcpus=2)
    slot = vm.add_memory(REGION_GPA, PAGES * PAGE_SIZE, backing=Anonymous("never"), private=False)
    vm.map(REGION_GVA, REGION_GPA, PAGES * PAGE_SIZE, page_size=PAGE_SIZE, user=True, nx=True, private=False)
    agents = [Agent(vcpu, ring=ring) for vcpu in vm.vcpus]
    for agent in agents:
        agent.start()

    def access(agent: Agent, pages: Iterable[int]) -> None:
        for page in pages:
            gva = REGION_GVA + page * PAGE_SIZE
            assert not isinstance(agent.write(gva, page) if write else agent.read(gva), Fault)

    with slot.mapping.view(0, PAGES * PAGE_SIZE) as memory:
        memory[::PAGE_SIZE] = b"\1" * PAGES
    for agent in agents:
        access(agent, range(PAGES))
    idle = Idle(slot.mapping)
    try:
        for number, agent in enumerate(agents):
            marked = idle.mark()
            assert len(marked) >= MOST, f"{len(marked)} of {PAGES} pages can be marked"
            touched = set(range(number, PAGES, 2))
            access(agent, sorted(touched))
            left = idle.pages()
            assert len(touched & marked - left) >= 9 * len(touched & marked) // 10
            assert len(left - touched) >= 9 * len(marked - touched) // 10
    finally:
        idle.close()
