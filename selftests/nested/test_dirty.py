# SPDX-License-Identifier: Apache-2.0
"""Dirty logging of what L2 writes: it is told in L1's frame numbers."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from kvmpy import KVM_MEM_LOG_DIRTY_PAGES, L1, L2, PAGE_SIZE, Gpa, Gva, MakeVm, SvmExit

pytestmark = [pytest.mark.protections("none", "cbit"), pytest.mark.requires("cpuid:svm")]

REGION = Gpa(0x1000_0000)
PAGES = 64
WHERE = Gva(0x7400_0000_0000)
# With nested paging L2 has the region at another physical address.
ELSEWHERE = Gpa(0x3_0000_0000)
READ, WRITE = b"\x48\x8b\x07", b"\xc7\x07\x01\x00\x00\x00"


class Logged(L2):
    """An L2 with a region of logged memory at WHERE."""

    def __init__(self, make_vm: MakeVm, npt: bool) -> None:
        vm = make_vm(L1)
        size = PAGES * PAGE_SIZE
        self.region = vm.add_memory(REGION, size, flags=KVM_MEM_LOG_DIRTY_PAGES, private=False)
        super().__init__(vm.vcpus[0], npt=npt)
        vm.map(WHERE, ELSEWHERE if npt else REGION, size, page_size=PAGE_SIZE, private=False)
        if self.npt is not None:
            shared = None if vm.encryption is None else False
            self.npt.map(Gva(int(ELSEWHERE)), REGION, size, user=True, private=shared)
        self.reset()

    def touch(self, code: bytes, pages: Iterable[int]) -> None:
        """Let L2 access pages."""
        for page in pages:
            assert self.run(code, rdi=int(WHERE) + page * PAGE_SIZE).code == SvmExit.VMMCALL

    def log(self) -> list[int]:
        """Return what KVM_GET_DIRTY_LOG reports."""
        return list(self.vm.dirty.get_log(self.region.slot))


@pytest.fixture
def logged(make_vm: MakeVm, npt: bool) -> Logged:
    return Logged(make_vm, npt)


def test_written_pages(logged: Logged) -> None:
    """The log has the pages that L2 wrote, each time anew, and none that it read.

    Documentation/virt/kvm/api.rst, 4.8 KVM_GET_DIRTY_LOG.
    """
    assert logged.log() == []
    logged.touch(READ, [1, 2, 3])
    assert logged.log() == []
    logged.touch(WRITE, [2, 40, 63])
    assert logged.log() == [2, 40, 63]
    assert logged.log() == []
    logged.touch(READ, [2, 40])
    assert logged.log() == []
    logged.touch(WRITE, [40, 5])
    assert logged.log() == [5, 40]


def test_both_guests(logged: Logged) -> None:
    """Writes of L1 and of L2 to one page, in any order, are in the log of their time.

    Documentation/virt/kvm/api.rst, 4.8.
    """
    vm = logged.vm
    mine = Gva(0x7500_0000_0000)
    vm.map(mine, REGION, PAGES * PAGE_SIZE, page_size=PAGE_SIZE, private=False)

    def by_l1(page: int) -> None:
        assert logged.agent.write(mine + page * PAGE_SIZE, 2, 4) is None

    logged.touch(WRITE, [7])
    by_l1(8)
    assert logged.log() == [7, 8]
    by_l1(7)
    assert logged.log() == [7]
    logged.touch(WRITE, [7, 8])
    assert logged.log() == [7, 8]
    assert vm.memory.read(REGION + 7 * PAGE_SIZE, 4) == bytes([1, 0, 0, 0])


def test_large_nested_page(make_vm: MakeVm) -> None:
    """With a nested large page only the small pages that L2 writes are dirty.

    Documentation/virt/kvm/api.rst, 4.8.
    """
    vm = make_vm(L1)
    size = 2 << 20
    slot = vm.add_memory(REGION, size, flags=KVM_MEM_LOG_DIRTY_PAGES, private=False)
    l2 = L2(vm.vcpus[0], npt=True)
    shared = None if vm.encryption is None else False
    vm.map(WHERE, ELSEWHERE, size, page_size=size, private=False)
    assert l2.npt is not None
    l2.npt.map(Gva(int(ELSEWHERE)), REGION, size, page_size=size, user=True, private=shared)
    for page in (3, 200, 511):
        assert l2.run(WRITE, rdi=int(WHERE) + page * PAGE_SIZE).code == SvmExit.VMMCALL
    assert list(vm.dirty.get_log(slot.slot)) == [3, 200, 511]
