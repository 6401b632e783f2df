# SPDX-License-Identifier: Apache-2.0
"""Launches into folios of 2 MiB, and any sequence of steps on them, beside a model of the RMP.

AMD APM volume 3 (RMPUPDATE, PSMASH, PVALIDATE); SNP firmware ABI, 8.17 (SNP_LAUNCH_UPDATE).  Linux:
arch/x86/kvm/svm/sev.c, and virt/kvm/guest_memfd.c with the hook behind kvm.large_gmem.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from kvmpy import (
    KVM_MEM_GUEST_MEMFD,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    PAGE_SIZE,
    SIZE_2M,
    Anonymous,
    IdBlock,
    MakeVm,
    SevError,
    SevRet,
    SnpPageType,
    SnpPolicy,
)
from kvmpy.coco.idblock import generate_key
from kvmpy.coco.rmp import Access, Entry, Result, Rmp
from kvmpy.coco.snp_digest import PageType, SnpDigest
from kvmpy.coco.snp_launch import IdBlockPair, SnpInitialised
from selftests.sev.conftest import BareMaker
from selftests.sev.folios import FAIL_SIZEMISMATCH, GPA, HUGE, NOT_VALIDATED, OK, SLOT, UNCHANGED, Folios
from selftests.sev.softrmp import needs_softsev, rmp

pytestmark = [pytest.mark.requires("param:kvm.large_gmem=Y"), needs_softsev]

NORMAL = SnpPageType.KVM_SEV_SNP_PAGE_TYPE_NORMAL
both = pytest.mark.parametrize("size", ["4K", "2M"])
BLOCKS, STEPS = 2, 70


# Launches.


@pytest.mark.requires("protection:snp")
@both
@pytest.mark.parametrize("changed", [False, True], ids=["right", "one-byte-off"])
def test_launch(bare: BareMaker, size: str, changed: bool) -> None:
    """One SNP_LAUNCH_UPDATE of 4 MiB gives the digest of its 1024 pages, in folios of either size.

    KVM brings each page in by itself, so all entries are of 4 KiB.  SNP firmware ABI, 8.17 and 8.18: the
    digest is that of the ID block, or SNP_LAUNCH_FINISH fails with BAD_MEASUREMENT.
    """
    length = 2 * SIZE_2M
    offset = 0 if size == "2M" else PAGE_SIZE
    before = rmp()
    vm = bare("snp", init=False, memory=False).vm
    initialised = SnpInitialised.init2(vm)
    with vm.create_guest_memfd(length + SIZE_2M) as gmem, Anonymous().map(length) as source:
        view = source.view(0, length)
        digest = SnpDigest()
        for page in range(length // PAGE_SIZE):
            view[page * PAGE_SIZE : page * PAGE_SIZE + 8] = (page * 0x1_0001 + 1).to_bytes(8, "little")
            content = view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            digest.add(PageType.NORMAL, int(GPA) + page * PAGE_SIZE, content)
        view[HUGE * PAGE_SIZE + 100] ^= changed
        vm.set_user_memory_region2(
            SLOT, GPA, length, source.hva, KVM_MEM_GUEST_MEMFD, gmem=gmem, gmem_offset=offset
        )
        vm.set_memory_attributes(GPA, length, KVM_MEMORY_ATTRIBUTE_PRIVATE)
        launching = initialised.start(SnpPolicy())
        launching.update(GPA, length, NORMAL, source.hva)

        pages = {pfn: entry for pfn, entry in rmp().items() if pfn not in before and entry.asid}
        assert sorted(entry.gpa for entry in pages.values()) == list(
            range(int(GPA), int(GPA) + length, PAGE_SIZE)
        )
        assert {(entry.large, entry.validated) for entry in pages.values()} == {(False, True)}
        first = {entry.gpa: pfn for pfn, entry in pages.items()}
        in_one_piece = all(
            first[int(GPA) + at] == first[int(GPA)] + at // PAGE_SIZE for at in range(0, SIZE_2M, PAGE_SIZE)
        )
        assert size == "4K" or (in_one_piece and first[int(GPA)] % HUGE == 0)

        block = IdBlock(digest.value, int(SnpPolicy()), bytes(16), bytes(16))
        pair = IdBlockPair(block.to_bytes(), block.sign(generate_key()).to_bytes())
        if changed:
            with pytest.raises(SevError) as caught:
                launching.finish(id_block=pair)
            assert caught.value.firmware == SevRet.SEV_RET_BAD_MEASUREMENT
        else:
            launching.finish(id_block=pair)
    vm.close()
    assert rmp() == before


# Any sequence.


class Modelled:
    """A range, a model of its RMP's entries, and what the file has: KVM and the hook in a few lines.

    Frames and guest addresses of the model are the numbers of pages.
    """

    def __init__(self, folios: Folios) -> None:
        self.folios = folios
        self.rmp = Rmp(folios.pages)
        self.private = [True] * folios.pages
        self.words = [0] * folios.pages
        # Pages that the file has, and the 2 MiB that are one folio.
        self.present: set[int] = set()
        self.whole: set[int] = set()

    def inside(self, page: int) -> range:
        """Return the pages of the 2 MiB around a page."""
        return range(page - page % HUGE, page - page % HUGE + HUGE)

    def allocate(self, page: int) -> None:
        """Give the file a page that it lacks, or 2 MiB that it lacks entirely."""
        block = self.inside(page)
        if page in self.present:
            return
        if self.folios.large and self.present.isdisjoint(block):
            self.present.update(block)
            self.whole.add(block[0])
        else:
            self.present.add(page)

    def fault(self, page: int) -> None:
        """Resolve a guest's private access: allocate, assign, and split what KVM has to map smaller."""
        self.allocate(page)
        block = self.inside(page)
        if not self.rmp.lookup(page).assigned:
            large = block[0] in self.whole and not any(self.rmp.lookup(other).assigned for other in block)
            at = block[0] if large else page
            done = self.rmp.rmpupdate(at, assigned=True, gpa=at * PAGE_SIZE, asid=1, large=large)
            assert done is Result.SUCCESS
        if self.rmp.lookup(page).large and not all(self.private[other] for other in block):
            assert self.rmp.psmash(block[0]) is Result.SUCCESS

    def pvalidate(self, page: int, huge: bool, valid: bool) -> int:
        """Return what PVALIDATE leaves."""
        self.fault(page)
        arguments = (page, page * PAGE_SIZE, 1)
        done = self.rmp.pvalidate(*arguments, large=huge, validate=valid)
        if done is Access.RMP_FAULT:
            assert self.rmp.psmash(self.inside(page)[0]) is Result.SUCCESS
            done = self.rmp.pvalidate(*arguments, large=huge, validate=valid)
        assert isinstance(done, Result)
        return UNCHANGED if done is Result.NO_UPDATE else int(done)

    def punch(self, first: int, pages: int) -> None:
        """Free pages of the file."""
        gone = range(first, first + pages)
        for block in range(0, self.folios.pages, HUGE):
            if set(gone).isdisjoint(self.inside(block)):
                continue
            covered = set(self.inside(block)) <= set(gone)
            self.whole.discard(block)
            if self.rmp.lookup(block).large:
                if covered:
                    assert self.rmp.rmpupdate(block, assigned=False, large=True) is Result.SUCCESS
                else:
                    assert self.rmp.psmash(block) is Result.SUCCESS
        for page in gone:
            self.present.discard(page)
            self.words[page] = 0
            if self.rmp.lookup(page).assigned:
                assert self.rmp.rmpupdate(page, assigned=False) is Result.SUCCESS

    def read(self, page: int) -> int | tuple[int, int]:
        """Return what the guest's private read gives."""
        self.fault(page)
        return self.words[page] if self.rmp.lookup(page).validated else NOT_VALIDATED

    def begin(self) -> None:
        """Let the guest validate what is of 2 MiB: the first split of each has something to keep."""
        for block in range(0, self.folios.pages, HUGE):
            assert self.folios.touch(block) == self.read(block)
            assert self.folios.validate(block, True) == self.pvalidate(block, True, True)
        self.check()

    def check(self) -> None:
        """Compare every entry with the platform's."""
        expected = {
            page: replace(
                entry, gpa=int(GPA) + entry.gpa, asid=self.folios.asid, permissions=Entry().permissions
            )
            for page, entry in self.rmp.assigned()
        }
        assert self.folios.entries() == expected


@pytest.mark.protections("snp")
@pytest.mark.timeout(300)
@both
def test_any_sequence(make_vm: MakeVm, seed: int, size: str) -> None:
    """Guest and host convert, validate, punch, allocate, write and read any pages in any order: results,
    contents and, after each step, all entries of the RMP are the model's.
    """
    choose = random.Random(seed)
    folios = Folios(make_vm, size, blocks=BLOCKS)
    model = Modelled(folios)
    done: set[str] = set()
    model.begin()
    for step in range(STEPS):
        # Few pages, so that steps meet; among them the first and the last of each 2 MiB.
        block = choose.randrange(BLOCKS) * HUGE
        page = block + choose.choice([0, 1, 2, 255, 256, 510, 511])
        count = choose.choice([1, 1, 2, HUGE - page % HUGE, HUGE])
        count = min(count, folios.pages - page)
        op = choose.choice(
            ["read", "write", "pvalidate", "pvalidate 2M", "share", "private", "host shares", "host takes"]
            + (["punch", "allocate", "discard", "private 2M"] if choose.random() < 0.5 else [])
        )
        accessible = (
            all(model.private[page - page % HUGE + i] for i in range(HUGE))
            if "2M" in op
            else model.private[page]
        )
        if op in ("read", "write", "pvalidate", "pvalidate 2M", "share") and not accessible:
            op = "private 2M" if "2M" in op else "private"
        done.add(op)
        print(f"step {step}: {op}, page {page:#x}, {count} pages")
        if op == "read":
            assert folios.touch(page) == model.read(page)
        elif op == "write":
            if model.read(page) == NOT_VALIDATED:
                assert folios.validate(page, False) == model.pvalidate(page, False, True)
            model.words[page] = step + 1
            folios.fill(step + 1, page, 1)
        elif op.startswith("pvalidate"):
            huge, valid = op == "pvalidate 2M", choose.random() < 0.7
            page = block if huge else page
            got = folios.validate(page, huge, valid)
            assert got == model.pvalidate(page, huge, valid)
            assert got in (OK, UNCHANGED, FAIL_SIZEMISMATCH)
        elif op == "share":
            folios.share(page)
            model.pvalidate(page, False, False)
            model.private[page] = False
        elif op == "private":
            folios.change(page, False, True)
            model.private[page] = True
        elif op == "private 2M":
            folios.change(block, True, True)
            model.private[block : block + HUGE] = [True] * HUGE
        elif op in ("host shares", "host takes", "discard"):
            private = op == "host takes"
            folios.convert(page, count, private=private)
            model.private[page : page + count] = [private] * count
            if op == "discard":
                folios.punch(page, count)
                model.punch(page, count)
        elif op == "punch":
            folios.punch(page, count)
            model.punch(page, count)
        else:
            folios.gmem.allocate(folios.offset + page * PAGE_SIZE, count * PAGE_SIZE)
            for each in range(page, page + count):
                model.allocate(each)
        model.check()
    assert len(done) >= 9
    folios.convert(0, folios.pages, private=True)
    model.private = [True] * folios.pages
    for page in (0, 1, 2, 255, 256, 510, 511, 512, 513, 767, 1023):
        assert folios.touch(page) == model.read(page)
    model.check()
    folios.gmem.close()
    folios.vm.close()
    assert rmp() == folios.before
