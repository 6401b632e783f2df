# SPDX-License-Identifier: Apache-2.0
"""Pages of a guest that KSM merges: they read as before, and are copied when a vCPU writes one."""

from __future__ import annotations

import fcntl
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy import AGENT, PAGE_SIZE, Agent, Anonymous, Gpa, Gva, MakeLoad, MakeVm
from selftests.conftest import UNDER_LOAD, wait_until

KSM = Path("/sys/kernel/mm/ksm")
# It is a switch of the whole host, and other processes' memory is merged then, too.
pytestmark = [
    pytest.mark.requires("root", f"path:{KSM / 'run'}"),
    pytest.mark.parametrize("ring", [3], ids=["ring3"], indirect=True),
]

REGION_GPA, REGION_GVA = Gpa(0x1000_0000), Gva(0x6000_0000)
PAGES = 64
EAGER = {"pages_to_scan": 4000, "sleep_millisecs": 1, "run": 1}


@pytest.fixture
def ksm() -> Iterator[None]:
    """Let the kernel look for equal pages without rest, and bring its settings back."""
    with (KSM / "run").open() as switch:
        # Another process's test would take these settings for the host's.
        fcntl.flock(switch, fcntl.LOCK_EX)
        before = {name: (KSM / name).read_text() for name in EAGER}
        try:
            for name, value in EAGER.items():
                (KSM / name).write_text(str(value))
            yield
        finally:
            for name in reversed(EAGER):
                (KSM / name).write_text(before[name])


def merged() -> int:
    """Return how many pages of this process are merged."""
    return int(Path("/proc/self/ksm_merging_pages").read_text())


@pytest.mark.usefixtures("ksm")
@pytest.mark.protections("none")
def test_merged_pages_are_copied(make_vm: MakeVm, ring: int) -> None:
    """A guest reads merged pages as before; one that it writes is its own again, the others are as they were.

    Documentation/admin-guide/mm/ksm.rst; virt/kvm/kvm_main.c, kvm_mmu_notifier_invalidate_range_start().
    """
    vm = make_vm(AGENT)
    size = PAGES * PAGE_SIZE
    slot = vm.add_memory(REGION_GPA, size, backing=Anonymous("never"), private=False)
    vm.map(REGION_GVA, REGION_GPA, size, page_size=PAGE_SIZE, user=True, nx=True, private=False)
    agent = Agent(vm.vcpus[0], ring=ring)
    agent.start()
    same = 0x5A5A_0000_1234_A5A5
    for page in range(PAGES):
        agent.write(REGION_GVA + page * PAGE_SIZE, same)
    slot.mapping.madvise(mmap.MADV_MERGEABLE)
    wait_until(lambda: merged() >= PAGES - 1, f"{merged()} pages are merged", seconds=30)
    for page in range(PAGES):
        assert agent.read(REGION_GVA + page * PAGE_SIZE) == same
    assert merged() >= PAGES - 1
    expected = [same] * PAGES
    for page in range(0, PAGES, 3):
        expected[page] = page
        agent.write(REGION_GVA + page * PAGE_SIZE, page)
        assert agent.read(REGION_GVA + (page + 1) % PAGES * PAGE_SIZE) == expected[(page + 1) % PAGES]
    assert [agent.read(REGION_GVA + page * PAGE_SIZE) for page in range(PAGES)] == expected
    with slot.mapping.view(0, size) as memory:
        assert [memory.cast("Q")[page * 512] for page in range(PAGES)] == expected


@pytest.mark.usefixtures("ksm")
@UNDER_LOAD
def test_merging_under_load(make_load: MakeLoad, ring: int) -> None:
    """While KSM looks for equal pages, merges and parts them, vCPUs find in their memory what they wrote.

    Documentation/admin-guide/mm/ksm.rst.
    """
    region = make_load(pages=PAGES, ring=ring, readers=1, backing=Anonymous("never"), loss="zero")
    scans = KSM / "full_scans"
    with region.load as load:
        region.mapping.madvise(mmap.MADV_MERGEABLE)
        first = int(scans.read_text())
        for turn in load.turns(visits=20):
            # Pages of zeroes are equal.
            region.mapping.madvise(
                mmap.MADV_DONTNEED, turn % 2 * PAGES // 2 * PAGE_SIZE, PAGES // 2 * PAGE_SIZE
            )
            region.check()
        wait_until(lambda: int(scans.read_text()) > first, "KSM does not scan", seconds=30)
    region.check()
