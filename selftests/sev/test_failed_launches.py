# SPDX-License-Identifier: Apache-2.0
"""A launch that fails, wherever it does, leaves nothing taken: as many guests as before can be made."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from kvmpy import (
    KVM_SEV_SNP_PAGE_TYPE_CPUID,
    KVM_SEV_SNP_PAGE_TYPE_NORMAL,
    PAGE_SIZE,
    SevError,
    SevPolicy,
    SevRet,
    SnpPolicy,
)
from kvmpy.coco.sev_launch import SevInitialised
from kvmpy.coco.snp_launch import IdBlockPair
from selftests.sev.asids import Asids
from selftests.sev.conftest import IN_PLACE, MEMORY, TYPES, Bare, BareMaker, start_sev, start_snp

TIMES = 3


def bad_policy(guest: Bare) -> None:
    """Meet a policy of the other kind, which the ASID is not for."""
    assert isinstance(guest.state, SevInitialised)
    guest.state.start(SevPolicy(es=not guest.state.es))


def bad_session(guest_vm: Bare) -> None:
    """Give the firmware a session and a certificate that are none."""
    assert isinstance(guest_vm.state, SevInitialised)
    guest_vm.state.start(SevPolicy(es=guest_vm.state.es), dh_certificate=bytes(0x824), session=bytes(128))


def early_finish(guest: Bare) -> None:
    """End a launch that was not measured."""
    start_sev(guest).update_data(MEMORY, PAGE_SIZE)
    guest.vm.sev.command("LAUNCH_FINISH")


def too_new(guest: Bare) -> None:
    """Ask for a firmware that is newer than any."""
    start_snp(guest, SnpPolicy(abi_major=0xFF, abi_minor=0xFF))


def bad_page(guest: Bare) -> None:
    """Give a page twice."""
    launching = start_snp(guest)
    for _ in range(2):
        launching.update_bytes(MEMORY, bytes(PAGE_SIZE), KVM_SEV_SNP_PAGE_TYPE_NORMAL)


def bad_cpuid(guest: Bare) -> None:
    """Give a CPUID page with more functions than there is room for."""
    table = (65).to_bytes(4, "little").ljust(PAGE_SIZE, b"\0")
    start_snp(guest).update_bytes(MEMORY, table, KVM_SEV_SNP_PAGE_TYPE_CPUID)


def bad_id_block(guest: Bare) -> None:
    """End with an ID block that expects another digest; its version and algorithms are none, too."""
    start_snp(guest).update_bytes(MEMORY, b"\1" * PAGE_SIZE, KVM_SEV_SNP_PAGE_TYPE_NORMAL).finish(
        id_block=IdBlockPair(bytes(96), bytes(4096))
    )


Failure = Callable[[Bare], None]
WRONG = SevRet.SEV_RET_INVALID_GUEST_STATE


def tear(asids: Asids, bare: BareMaker, kind: str, fail: Failure, status: SevRet) -> None:
    """Fail a few times, and compare what is left."""
    before = asids.left(TYPES[kind])
    for _ in range(TIMES):
        guest = bare(kind)
        with pytest.raises(SevError) as caught:
            fail(guest)
        assert (caught.value.errno, caught.value.firmware) == (errno.EIO, int(status))
        guest.vm.close()
    assert asids.left(TYPES[kind]) == before


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize(
    ("fail", "status"),
    [
        (bad_policy, SevRet.SEV_RET_INVALID_ASID),
        (bad_session, SevRet.SEV_RET_INVALID_CERTIFICATE),
        (early_finish, WRONG),
    ],
    ids=["policy", "session", "finish"],
)
def test_sev(asids: Asids, bare: BareMaker, kind: str, fail: Failure, status: SevRet) -> None:
    """A launch in place that fails gives its ASID back."""
    tear(asids, bare, kind, fail, status)


@pytest.mark.requires("protection:snp")
@pytest.mark.parametrize(
    ("fail", "status"),
    [
        (too_new, SevRet.SEV_RET_POLICY_FAILURE),
        (bad_page, SevRet.SEV_RET_SUCCESS),
        (bad_cpuid, SevRet.SEV_RET_INVALID_PARAM),
        (bad_id_block, SevRet.SEV_RET_BAD_MEASUREMENT),
    ],
    ids=["policy", "page", "cpuid", "id-block"],
)
def test_snp(asids: Asids, bare: BareMaker, fail: Failure, status: SevRet) -> None:
    """An SNP launch that fails gives its ASID and its pages back."""
    tear(asids, bare, "snp", fail, status)
