# SPDX-License-Identifier: Apache-2.0
"""One nested table on two paths with different permissions: each access has those of its own path."""

from __future__ import annotations

import itertools

import pytest

from kvmpy import L1, L2, PAGE_SIZE, SIZE_2M, Gpa, Gva, MakeVm, SvmExit
from kvmpy.x86.entry import NO_EXECUTE, WRITABLE

pytestmark = [pytest.mark.protections("none", "cbit"), pytest.mark.requires("cpuid:svm", "cpuid:npt")]

LOW, NEXT = 0x20_0000_0000, 1 << 30
WINDOW = Gva(0x7000_0000_0000)
READ, WRITE, CALL = b"\x48\x8b\x07", b"\x48\x89\x07", b"\xff\xd7"
RET = b"\xc3"


class Paths(L2):
    """Two pages, each behind a page directory entry of its own, on two paths that share that directory."""

    def __init__(self, make_vm: MakeVm) -> None:
        vm = make_vm(L1)
        super().__init__(vm.vcpus[0], npt=True)
        assert self.npt is not None
        for index, far in enumerate((0, SIZE_2M)):
            page = vm.alloc(PAGE_SIZE, nx=False)
            vm.write(page, RET)
            self.npt.map(Gva(LOW + far), vm.gva_to_gpa(page), PAGE_SIZE, user=True)
            for path in range(2):
                place = self.place(path, index)
                vm.map(place, Gpa(LOW + path * NEXT + far), PAGE_SIZE, page_size=PAGE_SIZE, nx=False)
        self.steps = {step.level: step for step in self.npt.walk(Gva(LOW)).steps}
        pointers, entry = self.words(3), self.steps[3].index
        pointers[entry + 1] = pointers[entry]

    def place(self, path: int, page: int) -> Gva:
        """Return where L2 has a page on a path."""
        return WINDOW + (2 * page + path) * PAGE_SIZE

    def words(self, level: int) -> memoryview:
        """Return the nested table of a level."""
        gpa, _ = self.vm.from_raw(self.steps[level].table)
        return self.vm.memory.view(gpa, PAGE_SIZE).cast("Q")

    def forbid(self, level: int, entry: int, *, write: bool = False, execute: bool = False) -> None:
        """Take permissions from an entry, counted from the one that leads to the first page."""
        table, index = self.words(level), self.steps[level].index + entry
        table[index] = table[index] & ~(WRITABLE if write else 0) | (NO_EXECUTE if execute else 0)

    def works(self, code: bytes, path: int, page: int) -> bool:
        """Tell whether an access works; otherwise it is a nested page fault."""
        got = self.attempt(code, int(self.place(path, page)))
        assert got.code in (SvmExit.VMMCALL, SvmExit.NPF)
        return got.code == SvmExit.VMMCALL


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_writes(make_vm: MakeVm, order: tuple[int, ...]) -> None:
    """A write works where every entry of its own path allows it, whatever was accessed before by another.

    AMD APM volume 2, 5.6 (permissions of all levels together) and 15.25.
    """
    guest = Paths(make_vm)
    guest.forbid(3, 1, write=True)
    guest.forbid(2, 0, write=True)
    # Only the first path allows writes, and only to the second page.
    expected = {(path, page): (path, page) == (0, 1) for path in range(2) for page in range(2)}
    cases = list(expected)
    wrong = []
    for path, page in (cases[number] for number in order):
        assert guest.works(READ, path, page)
        if guest.works(WRITE, path, page) != expected[path, page]:
            wrong.append(f"path {path}, page {page}: a write did not do as its path says")
    for path, page in cases:
        if guest.works(WRITE, path, page) != expected[path, page]:
            wrong.append(f"path {path}, page {page}, again: a write that is not as the path allows")
    assert not wrong, "\n".join(wrong)


def test_fetches(make_vm: MakeVm) -> None:
    """The same of fetches, where an upper entry of one path forbids them."""
    guest = Paths(make_vm)
    guest.forbid(3, 1, execute=True)
    for page, path in itertools.product(range(2), range(2)):
        assert guest.works(READ, path, page)
    got = {(path, page): guest.works(CALL, path, page) for page in range(2) for path in range(2)}
    assert got == {(path, page): path == 0 for page in range(2) for path in range(2)}
