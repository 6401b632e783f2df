# SPDX-License-Identifier: Apache-2.0
"""2 MiB of private memory in one RMP entry, as KVM makes, splits and takes it back, beside 512 of 4 KiB.

AMD APM volume 2, 15.36 (sizes of RMP entries), volume 3 (PSMASH, PVALIDATE, RMPADJUST).  Linux:
sev_gmem_prepare(), sev_gmem_max_mapping_level(), sev_handle_rmp_fault() and sev_gmem_invalidate() in
arch/x86/kvm/svm/sev.c.  guest_memfd itself has pages of 4 KiB: large folios are the work of a hook in the
lab's kernel, kvm.large_gmem.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy import KVM_MP_STATE_RUNNABLE, PAGE_SIZE, SIZE_2M, MakeVm, PfErr, VcpuThread
from kvmpy.coco.rmp import Entry
from kvmpy.testing.fault_injection import FaultInjection
from selftests import direct_map
from selftests.sev.folios import (
    FAIL_SIZEMISMATCH,
    GPA,
    GUEST,
    HUGE,
    NOT_VALIDATED,
    OK,
    UNCHANGED,
    Folios,
    MakeFolios,
    Watch,
)
from selftests.sev.softrmp import host_writes, needs_softsev, rmp

pytestmark = [
    pytest.mark.protections("snp"),
    pytest.mark.requires("param:kvm.large_gmem=Y", "root"),
    needs_softsev,
]

VALUE = 0x1A6E_0000
both = pytest.mark.parametrize("size", ["4K", "2M"])
SPLIT = PfErr.RMP | PfErr.SIZEM


@pytest.fixture
def folios(make_vm: MakeVm) -> MakeFolios:
    def make(size: str, **options: int | str) -> Folios:
        return Folios(make_vm, size, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def watch() -> Iterator[list[Watch]]:
    """Watches to be closed."""
    watches: list[Watch] = []
    yield watches
    for each in watches:
        each.close()


def started(watch: list[Watch], folios: Folios) -> Watch:
    """Watch KVM's events about a range from now on."""
    watch.append(Watch(folios))
    return watch[-1]


def entry(folios: Folios, page: int, *, large: bool, validated: bool = True, vmsa: bool = False) -> Entry:
    """Return a guest's page as the RMP has to have it."""
    return Entry(True, int(GPA) + page * PAGE_SIZE, folios.asid, large=large, validated=validated, vmsa=vmsa)


def small(folios: Folios, *without: int, unvalidated: tuple[int, ...] = ()) -> dict[int, Entry]:
    """Return 4 KiB entries of all pages but *without*."""
    pages = [page for page in range(folios.pages) if page not in without]
    return {page: entry(folios, page, large=False, validated=page not in unvalidated) for page in pages}


def whole(folios: Folios, *, validated: bool = True) -> dict[int, Entry]:
    """Return the entries of a range that is assigned as it can be, 2 MiB or 4 KiB each."""
    step = HUGE if folios.large else 1
    heads = range(0, folios.pages, step)
    return {page: entry(folios, page, large=folios.large, validated=validated) for page in heads}


def place(gpa: int) -> int:
    """Return the number of the page at a guest-physical address."""
    return (gpa - int(GPA)) // PAGE_SIZE


# The first touch.


@both
@pytest.mark.parametrize("page", [0, 1, 300, HUGE - 1], ids=["first", "second", "middle", "last"])
def test_first_touch(folios: MakeFolios, watch: list[Watch], size: str, page: int) -> None:
    """The first access of any page assigns and maps 2 MiB where a folio is that large, else its own 4 KiB.

    None of it is validated: #VC 0x404.  kvm_mmu_spte_requested, vm->stat.pages_2m.
    """
    range_ = folios(size)
    events = started(watch, range_)
    _, before = range_.mapped()
    assert range_.touch(page) == NOT_VALIDATED
    assert range_.mapped()[1] == before + range_.large
    if range_.large:
        assert range_.entries() == {0: entry(range_, 0, large=True, validated=False)}
        assert events.read() == ([], [(page, SIZE_2M)])
        # All of it is there: no page of it faults again.
        assert range_.touch((page + 100) % HUGE) == NOT_VALIDATED
        assert events.read() == ([], [])
    else:
        assert range_.entries() == {page: entry(range_, page, large=False, validated=False)}
        assert events.read() == ([], [(page, PAGE_SIZE)])


@both
def test_all_of_it(folios: MakeFolios, size: str) -> None:
    """2 MiB that are validated are zero, and hold what the guest writes; the next 2 MiB stay untouched."""
    range_ = folios(size, blocks=2)
    range_.touch(0)
    range_.accept(0, HUGE)
    assert range_.touch(17) == 0
    range_.fill(VALUE, 0, HUGE)
    range_.check(VALUE, 0, HUGE)
    assert range_.entries() == {page: e for page, e in whole(range_).items() if page < HUGE}


def test_what_is_no_2m(folios: MakeFolios, watch: list[Watch]) -> None:
    """The end of a file that is no whole 2 MiB has pages of 4 KiB, beside a folio of 2 MiB."""
    range_ = folios("2M", more=HUGE - 1)
    events = started(watch, range_)
    page = HUGE + 100
    assert range_.touch(page) == NOT_VALIDATED
    assert range_.touch(3) == NOT_VALIDATED
    assert events.read() == ([], [(page, PAGE_SIZE), (3, SIZE_2M)])
    assert range_.entries() == {
        0: entry(range_, 0, large=True, validated=False),
        page: entry(range_, page, large=False, validated=False),
    }


def test_whole_2m_split_no_direct_map(folios: MakeFolios) -> None:
    """An entry of 2 MiB needs no split of the direct map, and 2 MiB of writes fault; the sum of it stays.

    adjust_direct_map(), arch/x86/virt/svm/sev.c; direct_map_level2_splits in /proc/vmstat.
    """
    range_ = folios("2M", blocks=4)
    splits, size = direct_map.splits(), sum(direct_map.sizes().values())
    for block in range(0, range_.pages, HUGE):
        range_.touch(block)
    assert direct_map.splits() == splits
    frames = range_.frames()
    assert len(frames) == range_.pages
    assert not any(host_writes(frames[page]) for page in range(0, range_.pages, 37))
    # One page of it does: its 2 MiB are mapped in 4 KiB then, and the others stay out of reach.
    range_.punch(HUGE + 5)
    assert host_writes(frames[HUGE + 5])
    assert not any(host_writes(frames[page]) for page in range(HUGE, 2 * HUGE) if page != HUGE + 5)
    level2 = "direct_map_level2_splits"
    assert direct_map.splits()[level2] - splits[level2] in (0, 1)
    assert sum(direct_map.sizes().values()) == size


# PVALIDATE.


@both
def test_pvalidate_of_2m(folios: MakeFolios, watch: list[Watch], size: str) -> None:
    """2 MiB at once: done and a second time unchanged on an entry of 2 MiB; FAIL_SIZEMISMATCH on 4 KiB.

    AMD APM volume 3, PVALIDATE.
    """
    range_ = folios(size)
    events = started(watch, range_)
    range_.touch(0)
    if range_.large:
        assert range_.validate(0, True) == OK
        assert range_.validate(0, True) == UNCHANGED
        assert range_.validate(0, True, False) == OK
        assert range_.touch(5) == NOT_VALIDATED
        assert range_.validate(0, True) == OK
    else:
        assert range_.validate(0, True) == FAIL_SIZEMISMATCH
        assert range_.entries() == {0: entry(range_, 0, large=False, validated=False)}
        range_.accept()
        assert range_.validate(0, True) == FAIL_SIZEMISMATCH
        assert range_.validate(0, True, False) == FAIL_SIZEMISMATCH
    assert range_.entries() == whole(range_)
    assert events.read()[0] == []


@both
@pytest.mark.parametrize("page", [0, 77, HUGE - 1], ids=["first", "middle", "last"])
def test_pvalidate_of_4k(folios: MakeFolios, watch: list[Watch], size: str, page: int) -> None:
    """4 KiB on an entry of 2 MiB is a nested fault with SIZEM and RMP: KVM splits the entry, and the guest
    validates this page alone.

    AMD APM volume 3, PVALIDATE; PSMASH in sev_handle_rmp_fault().
    """
    range_ = folios(size)
    events = started(watch, range_)
    range_.touch(page)
    assert range_.validate(page, False) == OK
    faults, mappings = events.read()
    if range_.large:
        [fault] = faults
        assert fault.error.flags & (SPLIT | PfErr.ENC) == SPLIT | PfErr.ENC
        assert (place(fault.address), fault.size, fault.psmash) == (page, SIZE_2M, 0)
        assert [each.error.value for each in events.faults].count(fault.error.value) == 1
        # KVM looks for a cause of its own before it asks the RMP.
        assert mappings == [(page, SIZE_2M), (page, SIZE_2M), (page, PAGE_SIZE)]
        others = tuple(other for other in range(HUGE) if other != page)
        assert range_.entries() == small(range_, unvalidated=others)
    else:
        assert (faults, mappings) == ([], [(page, PAGE_SIZE)])
        assert range_.entries() == {page: entry(range_, page, large=False)}
    assert range_.touch(page) == 0
    assert range_.touch(page ^ 1) == NOT_VALIDATED
    assert range_.validate(page, False) == UNCHANGED
    assert range_.validate(0, True) == FAIL_SIZEMISMATCH


# Conversions of one page.


@both
@pytest.mark.parametrize("discard", [False, True], ids=["kept", "punched"])
@pytest.mark.parametrize("page", [0, 200, HUGE - 1], ids=["first", "middle", "last"])
def test_the_guest_shares_a_page(folios: MakeFolios, size: str, page: int, discard: bool) -> None:
    """One page of 2 MiB that the guest shares and makes private again: others keep content and validation.

    The entry is split when the guest rescinds the page, and never joined again.  GHCB specification, 4.1.6.
    """
    range_ = folios(size)
    range_.discard = discard
    range_.touch(0)
    range_.accept()
    range_.fill(VALUE)
    _, large = range_.mapped()

    range_.share(page)

    assert range_.entries() == (small(range_, page) if discard else small(range_, unvalidated=(page,)))
    range_.shared.view(page * PAGE_SIZE, 8)[:] = (4711).to_bytes(8, "little")
    assert range_.touch(page, shared=True) == 4711
    range_.check_but(VALUE, page)

    range_.change(page, False, True)

    assert range_.touch(page) == NOT_VALIDATED
    assert range_.entries() == small(range_, unvalidated=(page,))
    assert range_.validate(page, False) == OK
    assert range_.touch(page) == (0 if discard else VALUE + page)
    range_.check_but(VALUE, page)
    assert range_.entries() == small(range_)
    assert range_.mapped()[1] == large - range_.large
    assert range_.shared_word(page) == 4711


@both
def test_the_host_shares_a_page(folios: MakeFolios, watch: list[Watch], size: str) -> None:
    """The host shares a page, unasked, and gives it back: the guest's use of a neighbour splits the entry.

    KVM maps 4 KiB then, less than the RMP's entry: an RMP fault.  No page loses content or validation.
    """
    page = 200
    range_ = folios(size)
    range_.touch(0)
    range_.accept()
    range_.fill(VALUE)
    events = started(watch, range_)

    range_.convert(page, 1, private=False)

    assert range_.entries() == whole(range_)
    range_.check_but(VALUE, page)
    faults, mappings = events.read()
    assert {at for _, at in mappings} == ({PAGE_SIZE} if range_.large else {at for _, at in mappings})
    if range_.large:
        assert (faults[0].error.flags & SPLIT, faults[0].size, faults[0].psmash) == (SPLIT, SIZE_2M, 0)
        assert {fault.size for fault in faults[1:]} <= {PAGE_SIZE}
    else:
        assert faults == []
    assert range_.entries() == small(range_)

    range_.convert(page, 1, private=True)

    range_.check(VALUE)
    faults, mappings = events.read()
    assert faults == []
    assert {at for _, at in mappings} == {PAGE_SIZE}
    assert range_.entries() == small(range_)


@both
def test_2m_there_and_back(folios: MakeFolios, watch: list[Watch], size: str) -> None:
    """2 MiB that the host shares and takes back at once keep their entry and are mapped in one piece."""
    range_ = folios(size)
    range_.touch(0)
    range_.accept()
    range_.fill(VALUE)
    before = range_.mapped()
    events = started(watch, range_)
    range_.convert(0, HUGE, private=False)
    range_.convert(0, HUGE, private=True)
    range_.check(VALUE)
    faults, mappings = events.read()
    assert faults == []
    assert {at for _, at in mappings} == {SIZE_2M if range_.large else PAGE_SIZE}
    assert range_.entries() == whole(range_)
    assert range_.mapped() == before


@both
def test_2m_by_the_guest(folios: MakeFolios, size: str) -> None:
    """2 MiB that the guest shares (they are punched) and makes private again are a fresh folio, one entry."""
    range_ = folios(size)
    range_.discard = True
    range_.touch(0)
    range_.accept()
    range_.fill(VALUE)
    if range_.large:
        assert range_.validate(0, True, False) == OK
    else:
        range_.call("validate_each", range_.gva(0), range_.size, 0)
    range_.change(0, True, False)
    assert range_.entries() == {}
    range_.change(0, True, True)
    assert range_.touch(9) == NOT_VALIDATED
    range_.accept()
    assert range_.touch(9) == 0
    range_.fill(VALUE)
    range_.check(VALUE)
    assert range_.entries() == whole(range_)


@both
@pytest.mark.parametrize("odd", [False, True], ids=["even", "odd"])
def test_alternating_pages(folios: MakeFolios, size: str, odd: bool) -> None:
    """Each second page of 2 MiB is shared and punched: one split, and the others stay as they are."""
    range_ = folios(size)
    range_.discard = True
    range_.touch(0)
    range_.accept()
    range_.fill(VALUE)
    pages = tuple(range(int(odd), HUGE, 2))
    for page in pages:
        range_.share(page)
    assert range_.entries() == small(range_, *pages)
    range_.check_but(VALUE, *pages)
    for page in pages:
        range_.change(page, False, True)
    for page in pages:
        assert range_.validate(page, False) == OK
    assert range_.touch(pages[3]) == 0
    range_.check_but(VALUE, *pages)
    assert range_.entries() == small(range_)


# RMPADJUST.

MXCSR_OF_OURS = 0x1F00
AP = GUEST.replace(
    "void guest_main(void)",
    """
#define VMSA_MXCSR	0x408

void ap_main(void)
{
	u32 mxcsr;

	asm volatile("stmxcsr %0" : "=m"(mxcsr));
	for (;;)
		GUEST_SYNC(mxcsr);
}

u64 make_vmsa(u8 *vmsa, u64 cpu, u64 stack, u64 mxcsr)
{
	snp_vmsa_init(vmsa, (u64)ap_main, stack - 8, 0, cpu, 1);
	*(u32 *)(vmsa + VMSA_MXCSR) = mxcsr;
	return rmpadjust(vmsa, false, 1 | RMPADJUST_VMSA);
}

u64 ap(u64 request, u64 gpa)
{
	return snp_ap_create(request, 1, gpa, 1);
}

void guest_main(void)""",
)
AP_CREATE, AP_DESTROY = 1, 2


@both
def test_a_vmsa_page(folios: MakeFolios, watch: list[Watch], size: str) -> None:
    """RMPADJUST of 4 KiB that makes a VMSA of one page splits an entry of 2 MiB, and marks that page alone.

    AMD APM volume 3, RMPADJUST: 2 MiB at once are no VMSA of 4 KiB, and FAIL_SIZEMISMATCH on 4 KiB.
    """
    page = 100
    range_ = folios(size)
    range_.touch(0)
    range_.accept()
    range_.fill(VALUE)
    events = started(watch, range_)
    assert range_.call("adjust", range_.gva(page), 0, 1 | 1 << 16) == OK
    faults = events.read()[0]
    assert [(place(fault.address), fault.error.flags & SPLIT, fault.size) for fault in faults] == (
        [(page, SPLIT, SIZE_2M)] if range_.large else []
    )
    assert range_.entries() == small(range_) | {page: entry(range_, page, large=False, vmsa=True)}
    assert range_.call("adjust", range_.gva(0), 1, 1) == FAIL_SIZEMISMATCH
    assert range_.call("adjust", range_.gva(page), 0, 1) == OK
    range_.check(VALUE)
    assert range_.entries() == small(range_)


# Several vCPUs.

CROWD = (
    GUEST
    + """
#define ROUNDS 6

/* Every fourth page: given up, shared, written, private again, validated, and written. */
u64 crowd(u64 private, u64 shared, u64 gpa, u64 first)
{
	for (u64 round = 1; round <= ROUNDS; round++) {
		for (u64 page = first; page < 64; page += 4) {
			volatile u64 *there = (u64 *)(private + page * 4096), *here = (u64 *)(shared + page * 4096);
			struct pvalidate_result result = pvalidate((void *)there, false, false);

			GUEST_ASSERT_EQ(result.code, 0);
			GUEST_ASSERT_EQ(change(gpa + page * 4096, false, false), 0);
			*here = round << 16 | page;
			GUEST_ASSERT_EQ(change(gpa + page * 4096, false, true), 0);
			result = pvalidate((void *)there, false, true);
			GUEST_ASSERT_EQ(result.code, 0);
			*there = round << 32 | page;
			GUEST_ASSERT_EQ(*there, round << 32 | page);
		}
	}
	return ROUNDS;
}
"""
)


@both
def test_an_ap_of_a_page_in_2m(folios: MakeFolios, size: str) -> None:
    """A vCPU starts from a VMSA in the middle of 2 MiB; once it is destroyed the guest takes the page back.

    GHCB specification, 4.1.9 (SNP AP creation).  The other 511 pages keep their content and stay the guest's.
    """
    page = 100
    range_ = folios(size, vcpus=2, program=AP)
    range_.touch(0)
    range_.accept()
    range_.fill(VALUE)
    second = range_.vm.vcpus[1]
    second.set_mp_state(KVM_MP_STATE_RUNNABLE)
    cpu, stack = int(second.percpu), int(second.stack_top)
    gpa = int(GPA) + page * PAGE_SIZE
    assert range_.call("make_vmsa", range_.gva(page), cpu, stack, MXCSR_OF_OURS) == OK
    assert range_.call("ap", AP_CREATE, gpa) == 0
    assert second.sync().args == (MXCSR_OF_OURS,)
    assert range_.entries() == small(range_) | {page: entry(range_, page, large=False, vmsa=True)}
    range_.check_but(VALUE, page)
    assert range_.call("ap", AP_DESTROY, 0) == 0
    assert range_.call("adjust", range_.gva(page), 0, 1) == OK
    range_.fill(VALUE + page, page, 1)
    range_.check(VALUE)
    assert range_.entries() == small(range_)


# Without memory.


@pytest.mark.requires("fault-injection")
def test_no_memory_for_a_folio(folios: MakeFolios, watch: list[Watch]) -> None:
    """Where there is no page of 2 MiB KVM assigns 4 KiB; the next range has 2 MiB again.

    fail_page_alloc with min-order 9.
    """
    range_ = folios("2M", blocks=2)
    events = started(watch, range_)
    with FaultInjection(min_order=9) as faults:
        assert range_.touch(5) == NOT_VALIDATED
    assert (faults.failed, faults.borne) == ({}, {"KVM_RUN": 1})
    assert events.read() == ([], [(5, PAGE_SIZE)])
    assert range_.touch(6) == NOT_VALIDATED
    assert range_.touch(HUGE + 6) == NOT_VALIDATED
    assert range_.entries() == {
        5: entry(range_, 5, large=False, validated=False),
        6: entry(range_, 6, large=False, validated=False),
        HUGE: entry(range_, HUGE, large=True, validated=False),
    }
    range_.accept(HUGE, HUGE)
    range_.fill(VALUE, HUGE, HUGE)
    range_.check(VALUE, HUGE, HUGE)


@both
@pytest.mark.parametrize("discard", [False, True], ids=["kept", "punched"])
def test_several_vcpus(folios: MakeFolios, size: str, discard: bool) -> None:
    """Four vCPUs convert pages of their own in the same 2 MiB at once; nobody loses a page.

    The splits of one entry by several vCPUs at once: sev_handle_rmp_fault() finds 4 KiB, and goes on.
    """
    range_ = folios(size, vcpus=4, program=CROWD)
    range_.discard = discard
    range_.touch(0)
    range_.accept()
    range_.fill(VALUE)

    def run(cpu: int) -> int:
        return range_.call("crowd", range_.gva(0), range_.gva(0, shared=True), int(GPA), cpu, cpu=cpu)

    threads = [VcpuThread(functools.partial(run, cpu), vcpu=range_.vm.vcpus[cpu]) for cpu in range(4)]
    for thread in threads:
        thread.start()
    assert [thread.join(60) for thread in threads] == [6] * 4
    assert [range_.touch(page) for page in range(64)] == [6 << 32 | page for page in range(64)]
    assert [range_.shared_word(page) for page in range(64)] == [6 << 16 | page for page in range(64)]
    range_.check(VALUE + 64, 64)
    assert range_.entries() == small(range_)


# Holes.


@both
@pytest.mark.parametrize(
    ("first", "pages"),
    [(0, 1), (77, 1), (HUGE - 1, 1), (HUGE, 1), (10, 300), (HUGE - 2, 5), (0, HUGE), (100, HUGE + 100)],
    ids=["first", "middle", "last", "second", "many", "across", "2M", "2M-and-more"],
)
def test_holes(folios: MakeFolios, size: str, first: int, pages: int) -> None:
    """A hole takes the entries of its pages and no others: the host may write there, and new pages are zero.

    sev_gmem_invalidate(): PSMASH where only a part of 2 MiB goes.
    """
    range_ = folios(size, blocks=2)
    for block in (0, HUGE):
        range_.touch(block)
    range_.accept()
    range_.fill(VALUE)
    frames = range_.frames()
    gone = range(first, first + pages)

    range_.punch(first, pages)

    expected: dict[int, Entry] = {}
    for block in (0, HUGE):
        inside = range(block, block + HUGE)
        if range_.large and not set(inside) & set(gone):
            expected[block] = entry(range_, block, large=True)
        else:
            expected |= {page: entry(range_, page, large=False) for page in inside if page not in gone}
    assert range_.entries() == expected
    for page in {first, first + pages - 1}:
        assert host_writes(frames[page])
    for page in {first - 1, first + pages} & frames.keys():
        assert not host_writes(frames[page])
    range_.check_but(VALUE, *gone)
    assert range_.touch(first) == NOT_VALIDATED
    range_.accept(first, pages)
    assert range_.touch(first) == 0
    assert range_.touch(first + pages - 1) == 0


@both
def test_pages_stay_where_they_are(folios: MakeFolios, size: str) -> None:
    """Compaction moves none of them: the mapping of a guest_memfd is unmovable."""
    compact = Path("/proc/sys/vm/compact_memory")
    range_ = folios(size)
    range_.touch(0)
    range_.accept()
    range_.fill(VALUE)
    frames = range_.frames()
    compact.write_text("1\n", encoding="ascii")
    assert range_.frames() == frames
    range_.check(VALUE)


# The end.


@both
def test_the_end(folios: MakeFolios, size: str) -> None:
    """The end of a VM gives back whole entries, split ones and those with holes: the host may write again."""
    range_ = folios(size, blocks=4)
    for block in range(0, range_.pages, HUGE):
        range_.touch(block)
    range_.accept(0, 3 * HUGE)
    range_.fill(VALUE, 0, 3 * HUGE)
    range_.share(HUGE + 5)
    range_.punch(2 * HUGE + 9, 3)
    frames = set(range_.frames().values())
    assert len(frames) == 3 * HUGE - 3 + (HUGE if range_.large else 1)
    assert not any(host_writes(pfn) for pfn in itertools.islice(sorted(frames), 0, None, 101))

    range_.gmem.close()
    range_.vm.close()

    assert rmp() == range_.before
    assert all(host_writes(pfn) for pfn in frames)
