# SPDX-License-Identifier: Apache-2.0
"""The RMP model: states, what changes them, who may access what."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvmpy.coco.rmp import PAGE_SIZE, PAGES_2M, Access, Entry, PageState, Result, Rmp

ASID, GPA = 7, 0x4000_0000


def guest_page(rmp: Rmp, pfn: int = 3, gpa: int = GPA) -> None:
    """Assign one page and validate it."""
    assert rmp.rmpupdate(pfn, assigned=True, gpa=gpa, asid=ASID) is Result.SUCCESS
    assert rmp.pvalidate(pfn, gpa, ASID, large=False, validate=True) is Result.SUCCESS


@pytest.mark.parametrize(
    ("entry", "state"),
    [
        (Entry(), PageState.HYPERVISOR),
        (Entry(True), PageState.RECLAIM),
        (Entry(True, immutable=True), PageState.FIRMWARE),
        (Entry(True, immutable=True, vmsa=True), PageState.CONTEXT),
        (Entry(True, immutable=True, gpa=0x1000), PageState.METADATA),
        (Entry(True, asid=1, immutable=True), PageState.PRE_GUEST),
        (Entry(True, asid=1, immutable=True, validated=True), PageState.PRE_SWAP),
        (Entry(True, asid=1), PageState.GUEST_INVALID),
        (Entry(True, asid=1, validated=True), PageState.GUEST_VALID),
    ],
    ids=lambda value: value.value if isinstance(value, PageState) else "",
)
def test_states_have_the_firmwares_names(entry: Entry, state: PageState) -> None:
    assert entry.state is state


def test_a_launched_page_goes_from_the_host_to_the_guest_and_back() -> None:
    rmp = Rmp(8)
    assert rmp.rmpupdate(3, assigned=True, gpa=GPA, asid=ASID, immutable=True) is Result.SUCCESS
    assert rmp.lookup(3).state is PageState.PRE_GUEST
    assert rmp.rmpupdate(3, assigned=False) is Result.FAIL_PERMISSION
    assert rmp.launch_update(3) is Result.SUCCESS
    assert rmp.lookup(3).state is PageState.GUEST_VALID
    assert rmp.launch_update(3) is Result.FAIL_PERMISSION
    assert rmp.rmpupdate(3, assigned=False) is Result.SUCCESS
    assert rmp.lookup(3) == Entry()


def test_a_firmware_page_must_be_reclaimed_before_it_is_freed() -> None:
    rmp = Rmp(8)
    rmp.rmpupdate(0, assigned=True, immutable=True)
    assert rmp.lookup(0).state is PageState.FIRMWARE
    assert rmp.rmpupdate(0, assigned=False) is Result.FAIL_PERMISSION
    assert rmp.reclaim(0) is Result.SUCCESS
    assert rmp.lookup(0).state is PageState.RECLAIM
    assert rmp.host_access(0, write=True) is Access.RMP_FAULT
    assert rmp.rmpupdate(0, assigned=False) is Result.SUCCESS
    assert rmp.reclaim(0) is Result.FAIL_PERMISSION


def test_moving_a_valid_page_to_another_address_takes_its_validation() -> None:
    """What keeps a host from exchanging two pages behind the guest's back."""
    rmp = Rmp(8)
    guest_page(rmp)
    assert rmp.rmpupdate(3, assigned=True, gpa=GPA, asid=ASID) is Result.SUCCESS
    assert rmp.lookup(3).validated
    assert rmp.rmpupdate(3, assigned=True, gpa=GPA + PAGE_SIZE, asid=ASID) is Result.SUCCESS
    assert not rmp.lookup(3).validated
    access = rmp.guest_access(3, GPA + PAGE_SIZE, ASID, private=True, write=False)
    assert access is Access.NOT_VALIDATED


def test_smashing_keeps_owner_and_validation() -> None:
    rmp = Rmp(2 * PAGES_2M)
    assert rmp.rmpupdate(PAGES_2M, assigned=True, gpa=GPA, asid=ASID, large=True) is Result.SUCCESS
    assert rmp.pvalidate(PAGES_2M, GPA, ASID, large=True, validate=True) is Result.SUCCESS
    assert rmp.owned_gpa(PAGES_2M + 5) == GPA + 5 * PAGE_SIZE
    assert rmp.psmash(PAGES_2M) is Result.SUCCESS
    for page in (0, 1, 511):
        entry = rmp.lookup(PAGES_2M + page)
        assert (entry.large, entry.validated, entry.gpa, entry.asid) == (
            False,
            True,
            GPA + page * PAGE_SIZE,
            ASID,
        )
    assert rmp.psmash(PAGES_2M) is Result.FAIL_BADADDR


@pytest.mark.parametrize("pfn", [0, 1, PAGES_2M])
def test_only_the_head_of_a_large_entry_can_be_smashed(pfn: int) -> None:
    rmp = Rmp(2 * PAGES_2M)
    rmp.rmpupdate(0, assigned=True, gpa=GPA, asid=ASID, large=True, immutable=pfn == 0)
    assert rmp.psmash(pfn) is (Result.FAIL_INPUT if pfn == 1 else Result.FAIL_BADADDR)


def test_sizes_must_agree_for_pvalidate() -> None:
    rmp = Rmp(2 * PAGES_2M)
    rmp.rmpupdate(0, assigned=True, gpa=GPA, asid=ASID)
    assert rmp.pvalidate(0, GPA, ASID, large=True, validate=True) is Result.FAIL_SIZEMISMATCH
    rmp.rmpupdate(PAGES_2M, assigned=True, gpa=2 * GPA, asid=ASID, large=True)
    assert rmp.pvalidate(PAGES_2M, 2 * GPA, ASID, large=False, validate=True) is Access.RMP_FAULT
    assert rmp.pvalidate(0, GPA + PAGE_SIZE, ASID, large=True, validate=True) is Result.FAIL_INPUT


def test_a_second_pvalidate_sets_the_carry_flag() -> None:
    rmp = Rmp(8)
    guest_page(rmp)
    assert rmp.pvalidate(3, GPA, ASID, large=False, validate=True) is Result.NO_UPDATE
    assert rmp.pvalidate(3, GPA, ASID, large=False, validate=False) is Result.SUCCESS
    assert rmp.pvalidate(3, GPA, ASID, large=False, validate=False) is Result.NO_UPDATE


@pytest.mark.parametrize(("gpa", "asid"), [(GPA + PAGE_SIZE, ASID), (GPA, ASID + 1), (GPA, 0)])
def test_pages_of_others_are_faults(gpa: int, asid: int) -> None:
    rmp = Rmp(8)
    guest_page(rmp)
    assert rmp.pvalidate(3, gpa, asid, large=False, validate=False) is Access.RMP_FAULT
    assert rmp.rmpadjust(3, gpa, asid, caller=0, target=1, permissions=1) is Access.RMP_FAULT
    assert rmp.guest_access(3, gpa, asid, private=True, write=False) is Access.RMP_FAULT


def test_rmpadjust_gives_no_more_than_the_caller_has() -> None:
    rmp = Rmp(8)
    guest_page(rmp)
    for caller, target, permissions, result in (
        (0, 0, 1, Result.FAIL_PERMISSION),
        (1, 2, 1, Result.FAIL_PERMISSION),
        (0, 1, 3, Result.SUCCESS),
        (1, 2, 4, Result.FAIL_PERMISSION),
        (1, 2, 1, Result.SUCCESS),
        (1, 0, 1, Result.FAIL_PERMISSION),
        (0, 4, 1, Result.FAIL_INPUT),
        (0, 1, 16, Result.FAIL_INPUT),
    ):
        got = rmp.rmpadjust(3, GPA, ASID, caller=caller, target=target, permissions=permissions)
        assert got is result, (caller, target, permissions)
    assert rmp.guest_access(3, GPA, ASID, private=True, write=True, vmpl=1) is Access.ALLOWED
    assert rmp.guest_access(3, GPA, ASID, private=True, write=False, vmpl=2) is Access.ALLOWED
    assert rmp.guest_access(3, GPA, ASID, private=True, write=True, vmpl=2) is Access.VMPL_FAULT
    assert rmp.guest_access(3, GPA, ASID, private=True, write=False, vmpl=3) is Access.VMPL_FAULT


def test_only_vmpl0_makes_a_save_area() -> None:
    rmp = Rmp(8)
    guest_page(rmp)
    assert rmp.rmpadjust(3, GPA, ASID, caller=0, target=1, permissions=0xF) is Result.SUCCESS
    refused = rmp.rmpadjust(3, GPA, ASID, caller=1, target=2, permissions=0, vmsa=True)
    assert refused is Result.FAIL_PERMISSION
    assert rmp.rmpadjust(3, GPA, ASID, caller=0, target=1, permissions=0, vmsa=True) is Result.SUCCESS
    assert rmp.lookup(3).vmsa


def test_rmpadjust_of_an_unvalidated_page_is_a_vc() -> None:
    rmp = Rmp(8)
    rmp.rmpupdate(3, assigned=True, gpa=GPA, asid=ASID)
    assert rmp.rmpadjust(3, GPA, ASID, caller=0, target=1, permissions=1) is Access.NOT_VALIDATED


def test_a_host_write_through_a_large_mapping_meets_any_assigned_page() -> None:
    rmp = Rmp(2 * PAGES_2M)
    guest_page(rmp, pfn=PAGES_2M + 9)
    host = rmp.host_access
    assert host(PAGES_2M + 9, write=False, mapping_pages=PAGES_2M) is Access.ALLOWED
    assert host(PAGES_2M + 8, write=True) is Access.ALLOWED
    assert host(PAGES_2M + 9, write=True) is Access.RMP_FAULT
    assert host(PAGES_2M + 8, write=True, mapping_pages=PAGES_2M) is Access.RMP_FAULT
    assert host(8, write=True, mapping_pages=512 * PAGES_2M) is Access.ALLOWED


def test_a_guest_writes_shared_only_to_pages_of_the_host() -> None:
    rmp = Rmp(8)
    guest_page(rmp)
    assert rmp.guest_access(3, GPA, ASID, private=False, write=True) is Access.RMP_FAULT
    assert rmp.guest_access(3, GPA, ASID, private=False, write=False) is Access.ALLOWED
    assert rmp.guest_access(4, GPA, ASID, private=False, write=True) is Access.ALLOWED


@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        ({"pfn": 1, "assigned": True, "gpa": 0, "asid": 1, "large": True}, Result.FAIL_INPUT),
        ({"pfn": 0, "assigned": True, "gpa": PAGE_SIZE, "asid": 1, "large": True}, Result.FAIL_INPUT),
        ({"pfn": PAGES_2M, "assigned": True, "gpa": 0, "asid": 1, "large": True}, Result.FAIL_INPUT),
        ({"pfn": 0, "assigned": False, "asid": 1}, Result.FAIL_INPUT),
        ({"pfn": 0, "assigned": True, "gpa": 1, "asid": 1}, Result.FAIL_INPUT),
    ],
)
def test_rmpupdate_refuses_what_makes_no_sense(arguments: dict[str, int], result: Result) -> None:
    assert Rmp(PAGES_2M + 8).rmpupdate(**arguments) is result  # type: ignore[arg-type]


def test_sizes_cannot_overlap() -> None:
    rmp = Rmp(2 * PAGES_2M)
    guest_page(rmp)
    assert rmp.rmpupdate(0, assigned=True, gpa=GPA, asid=ASID, large=True) is Result.FAIL_OVERLAP
    rmp.rmpupdate(PAGES_2M, assigned=True, gpa=GPA, asid=ASID, large=True)
    assert rmp.rmpupdate(PAGES_2M + 1, assigned=False) is Result.FAIL_OVERLAP


def test_pages_beyond_the_table_are_an_error() -> None:
    with pytest.raises(ValueError, match="beyond the 0x8 pages"):
        Rmp(8).lookup(8)
    with pytest.raises(ValueError, match="at least one page"):
        Rmp(0)


class Conversions(RuleBasedStateMachine):
    """Large and small pages given and taken at random, against a dictionary of single pages."""

    pages = 3 * PAGES_2M

    def __init__(self) -> None:
        super().__init__()
        self.rmp = Rmp(self.pages)
        self.owner: dict[int, int] = {}
        self.valid: set[int] = set()
        self.large: set[int] = set()

    def head(self, pfn: int) -> int:
        return pfn & -PAGES_2M

    @rule(pfn=st.integers(0, pages - 1), shift=st.integers(0, 2))
    def assign_small(self, pfn: int, shift: int) -> None:
        gpa = (pfn + shift) * PAGE_SIZE
        result = self.rmp.rmpupdate(pfn, assigned=True, gpa=gpa, asid=ASID)
        if self.head(pfn) in self.large:
            assert result is Result.FAIL_OVERLAP
            return
        assert result is Result.SUCCESS
        if self.owner.get(pfn) != gpa:
            self.valid.discard(pfn)
        self.owner[pfn] = gpa

    @rule(block=st.integers(0, 2))
    def assign_large(self, block: int) -> None:
        pfn = block * PAGES_2M
        covered = range(pfn, pfn + PAGES_2M)
        result = self.rmp.rmpupdate(pfn, assigned=True, gpa=pfn * PAGE_SIZE, asid=ASID, large=True)
        if pfn not in self.large and any(page in self.owner for page in covered):
            assert result is Result.FAIL_OVERLAP
            return
        assert result is Result.SUCCESS
        self.large.add(pfn)
        for page in covered:
            self.owner[page] = page * PAGE_SIZE

    @rule(pfn=st.integers(0, pages - 1))
    def take(self, pfn: int) -> None:
        large = self.head(pfn) in self.large
        pfn = self.head(pfn) if large else pfn
        assert self.rmp.rmpupdate(pfn, assigned=False, large=large) is Result.SUCCESS
        self.large.discard(pfn)
        for page in range(pfn, pfn + (PAGES_2M if large else 1)):
            self.owner.pop(page, None)
            self.valid.discard(page)

    @rule(block=st.integers(0, 2))
    def smash(self, block: int) -> None:
        pfn = block * PAGES_2M
        result = self.rmp.psmash(pfn)
        assert result is (Result.SUCCESS if pfn in self.large else Result.FAIL_BADADDR)
        self.large.discard(pfn)

    @rule(pfn=st.integers(0, pages - 1), validate=st.booleans())
    def validate(self, pfn: int, validate: bool) -> None:
        large = self.head(pfn) in self.large
        pfn = self.head(pfn) if large else pfn
        if pfn not in self.owner:
            return
        result = self.rmp.pvalidate(pfn, self.owner[pfn], ASID, large=large, validate=validate)
        assert result is (Result.NO_UPDATE if (pfn in self.valid) == validate else Result.SUCCESS)
        covered = range(pfn, pfn + (PAGES_2M if large else 1))
        if validate:
            self.valid.update(covered)
        else:
            self.valid.difference_update(covered)

    @invariant()
    def every_page_agrees(self) -> None:
        for pfn in range(0, self.pages, 61):
            entry = self.rmp.lookup(pfn)
            assert self.rmp.owned_gpa(pfn) == self.owner.get(pfn)
            assert entry.validated == (pfn in self.valid)
            assert (self.rmp.host_access(pfn, write=True) is Access.RMP_FAULT) == (pfn in self.owner)
            if pfn in self.owner:
                expected = Access.ALLOWED if pfn in self.valid else Access.NOT_VALIDATED
                access = self.rmp.guest_access(pfn, self.owner[pfn], ASID, private=True, write=True)
                assert access is expected


TestConversions = Conversions.TestCase
TestConversions.settings = settings(max_examples=40, stateful_step_count=30)
