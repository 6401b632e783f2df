# SPDX-License-Identifier: Apache-2.0
"""The lab's RMP beside a model of it, from launch to close: owner, address, size and state of every page.

AMD APM volume 3 (RMPUPDATE, PVALIDATE, RMPADJUST); SEV Secure Nested Paging Firmware ABI, chapter 5 (page
states).  Linux: sev_gmem_prepare() assigns a page at its first use, sev_gmem_invalidate() takes it back when
guest_memfd frees it, sev_free_vcpu() the VMSAs.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from kvmpy import PAGE_SIZE, SIZE_2M, Agent, Gpa, GuestVm, MakeVm
from kvmpy.coco.rmp import Access, Entry, PageState, Result, Rmp
from selftests import direct_map
from selftests.sev.softrmp import host_writes, needs_softsev, rmp

pytestmark = [pytest.mark.protections("snp"), needs_softsev]

# KVM's INITIAL_VMSA_GPA: where the firmware's entry says that each VMSA is.
VMSA_GPA = 0xFFFF_FFFF_F000
PAGES = 6
STEPS = 60
BLOCK = SIZE_2M // PAGE_SIZE

GUEST = """
#include <kvmpy/guest.h>

u64 convert(void *page, u64 private)
{
	return guest_set_private(page, 4096, private);
}

/* The code; the carry flag in the upper half. */
u64 validate(void *page, u64 valid)
{
	struct pvalidate_result result = pvalidate(page, false, valid);

	return result.code | (u64)result.unchanged << 32;
}

u64 adjust(void *page, u64 attributes)
{
	return rmpadjust(page, false, attributes);
}

void guest_main(void)
{
	guest_agent();
}
"""
UNCHANGED = 1 << 32


class Modelled:
    """An SNP guest and a model of its RMP entries, which the model keeps by guest frame number.

    VMSAs, whose entries all say VMSA_GPA, are kept behind the frames of memory.
    """

    def __init__(self, vm: GuestVm, before: dict[int, Entry]) -> None:
        self.vm = vm
        self.before = before
        launched = [
            gpa.gfn + offset for gpa, size in vm.private.image() for offset in range(size // PAGE_SIZE)
        ]
        self.frames = max(launched) + 1
        self.model = Rmp(self.frames + len(vm.vcpus))
        [self.asid] = {entry.asid for pfn, entry in rmp().items() if pfn not in before} - {0}
        for gfn in launched:
            self.launch(gfn, gfn * PAGE_SIZE)
        for vcpu in range(len(vm.vcpus)):
            self.launch(self.frames + vcpu, VMSA_GPA, vmsa=True)

    def launch(self, frame: int, gpa: int, *, vmsa: bool = False) -> None:
        """Assign a page and bring it in, as SNP_LAUNCH_UPDATE and SNP_LAUNCH_FINISH do."""
        done = self.model.rmpupdate(frame, assigned=True, gpa=gpa, asid=self.asid, immutable=True)
        assert (done, self.model.launch_update(frame, vmsa=vmsa)) == (Result.SUCCESS, Result.SUCCESS)

    def assign(self, gpa: Gpa) -> None:
        """Assign a page to the guest, as KVM does at a fault."""
        done = self.model.rmpupdate(gpa.gfn, assigned=True, gpa=int(gpa), asid=self.asid)
        assert done is Result.SUCCESS

    def take_back(self, gpa: Gpa) -> None:
        """Give a page back to the hypervisor, as KVM does when guest_memfd frees it."""
        assert self.model.rmpupdate(gpa.gfn, assigned=False) is Result.SUCCESS

    def pvalidate(self, gpa: Gpa, validate: bool) -> int:
        """Return PVALIDATE's code, or UNCHANGED; a page that is not assigned is, and it goes on."""
        done = self.model.pvalidate(gpa.gfn, int(gpa), self.asid, large=False, validate=validate)
        if done is Access.RMP_FAULT:
            self.assign(gpa)
            done = self.model.pvalidate(gpa.gfn, int(gpa), self.asid, large=False, validate=validate)
        assert isinstance(done, Result)
        return UNCHANGED if done is Result.NO_UPDATE else int(done)

    def state(self, gpa: Gpa) -> PageState:
        """Return the state of a page in the model."""
        return self.model.lookup(gpa.gfn).state

    def check(self) -> None:
        """Compare every entry of this guest's ASID with the model."""
        shown = [entry for entry in rmp().values() if entry.asid == self.asid]
        expected = [replace(entry, permissions=Entry().permissions) for _, entry in self.model.assigned()]
        assert sorted(shown, key=repr) == sorted(expected, key=repr)


@pytest.mark.parametrize("vcpus", [1, 2])
def test_launch_and_close(make_vm: MakeVm, vcpus: int) -> None:
    """After the launch image and VMSAs are valid pages of the guest; after the end the table is as before."""
    before = rmp()
    vm = make_vm.start(GUEST, vcpus=vcpus)
    modelled = Modelled(vm, before)
    modelled.check()
    vm.vcpus[0].sync()
    modelled.check()

    vm.close()

    assert rmp() == before


def test_conversions(make_vm: MakeVm, seed: int) -> None:
    """Guest and host convert, validate and discard pages in any order: results and table are the model's."""
    choose = random.Random(seed)
    before = rmp()
    vm = make_vm(GUEST)
    first = vm.alloc(PAGES * PAGE_SIZE)
    agent = Agent(vm.vcpus[0])
    agent.start()
    modelled = Modelled(vm, before)
    shared: set[Gpa] = set()
    done: set[str] = set()
    for step in range(STEPS):
        gva = first + choose.randrange(PAGES) * PAGE_SIZE
        gpa = vm.gva_to_gpa(gva)
        valid = modelled.state(gpa) is PageState.GUEST_VALID
        if gpa in shared:
            ops = ["accept", "discard shared"]
        else:
            # RMPADJUST of a page that is not validated is a #VC: see test_page_states.py.
            ops = ["accept", "share", "pvalidate", "discard private", "host there and back"]
            ops += ["adjust"] if valid else []
        # What was not done yet goes first: few steps do everything.
        op = choose.choice([each for each in ops if each not in done] or ops)
        done.add(op)
        print(f"step {step}: {op} {gpa:#x}, {modelled.state(gpa).value}")
        if op == "accept":
            assert agent.call("convert", int(gva), 1) == 0
            assert modelled.pvalidate(gpa, True) in (0, UNCHANGED)
            shared.discard(gpa)
        elif op == "share":
            assert agent.call("convert", int(gva), 0) == 0
            assert modelled.pvalidate(gpa, False) in (0, UNCHANGED)
            shared.add(gpa)
        elif op == "pvalidate":
            validate = choose.random() < 0.5
            assert agent.call("validate", int(gva), validate) == modelled.pvalidate(gpa, validate)
        elif op == "adjust":
            # What VMPL 1 may do, and that the page is a VMSA; then that it is none.
            for vmsa in (True, False):
                expected = modelled.model.rmpadjust(
                    gpa.gfn, int(gpa), modelled.asid, caller=0, target=1, permissions=1, vmsa=vmsa
                )
                assert agent.call("adjust", int(gva), 1 | 1 << 8 | vmsa << 16) == expected
                modelled.check()
        else:
            vm.memory.set_shared(gpa, PAGE_SIZE, discard=op.startswith("discard"))
            if op.startswith("discard"):
                modelled.take_back(gpa)
            if gpa not in shared:
                vm.memory.set_private(gpa, PAGE_SIZE)
        modelled.check()
    assert len(done) == 7
    vm.close()
    assert rmp() == before


def test_the_host_writes_to_all_but_assigned_pages(make_vm: MakeVm) -> None:
    """Of each 2 MiB around a guest's pages, the host may write to exactly those that are not assigned.

    A write by a mapping of 2 MiB faults if one of its pages is assigned, so the kernel splits the direct map
    first: DirectMap4k grows by 2 MiB for each split that /proc/vmstat counts.  AMD APM volume 2, 15.36.10;
    adjust_direct_map() in arch/x86/virt/svm/sev.c (Linux commit 661b1c6169e2).
    """
    before = rmp()
    splits, sizes = direct_map.splits(), direct_map.sizes()
    vm = make_vm.start(GUEST)

    entries = rmp()
    new = sorted(entries.keys() - before.keys())
    blocks = sorted({pfn // BLOCK for pfn in new})
    assert new
    for block in [*blocks[:6], *blocks[6::8]]:
        pages = range(block * BLOCK, (block + 1) * BLOCK)
        large = entries.get(pages[0], Entry()).large
        assigned = [pfn for pfn in pages if large or pfn in entries]
        assert [pfn for pfn in pages if not host_writes(pfn)] == assigned
    vm.close()
    assert all(host_writes(pfn) for pfn in new)

    after = direct_map.splits()
    moved = {name: after[name] - splits[name] for name in after}
    # Before 6.15 the kernel joins nothing again, and counts no collapses.
    level2, level3 = (
        moved[f"direct_map_level{level}_splits"] - moved.get(f"direct_map_level{level}_collapses", 0)
        for level in (2, 3)
    )
    grown = {name: size - sizes[name] for name, size in direct_map.sizes().items()}
    assert grown["DirectMap4k"] == level2 * 2048
    assert grown["DirectMap2M"] == (level3 * 512 - level2) * 2048
