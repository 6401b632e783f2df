# SPDX-License-Identifier: Apache-2.0
"""The launch of SEV and SEV-ES guests: the states in order, and what is refused out of order."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    KVM_GUESTDBG_ENABLE,
    PAGE_SIZE,
    Kvm,
    SevPolicy,
    SevRet,
    kvm_sev_launch_measure,
    kvm_sev_launch_start,
    kvm_sev_launch_update_data,
    refused,
)
from kvmpy.coco.sev_launch import GuestState, SevInitialised
from selftests.sev.conftest import IN_PLACE, MEMORY, PAGES, Bare, BareMaker, read_only, start_sev

EINVAL = (errno.EINVAL, 0)
WRONG_STATE = (errno.EIO, int(SevRet.SEV_RET_INVALID_GUEST_STATE))
needs_sev = pytest.mark.requires("protection:sev")
needs_es = pytest.mark.requires("protection:sev-es")


def data(guest: Bare, offset: int = 0, size: int = PAGE_SIZE) -> kvm_sev_launch_update_data:
    """Return the argument that encrypts a part of the memory."""
    return kvm_sev_launch_update_data(uaddr=guest.hva + offset, len=size)


@pytest.mark.parametrize("kind", IN_PLACE)
def test_states(bare: BareMaker, kind: str) -> None:
    """GUEST_STATUS follows the launch: LUPDATE, LSECRET after the measurement, RUNNING at the end."""
    guest_vm = bare(kind, vcpus=1)
    launching = start_sev(guest_vm)
    status = launching.status()
    assert (status.state, status.policy, status.handle) == (
        GuestState.LUPDATE,
        4 if kind == "sev-es" else 0,
        launching.handle,
    )
    launching.update_data(MEMORY, PAGE_SIZE)
    if kind == "sev-es":
        launching.update_vmsa()
    assert launching.state == GuestState.LUPDATE
    measured = launching.measure()
    assert measured.state == GuestState.LSECRET
    assert measured.finish().state == GuestState.RUNNING


@pytest.mark.parametrize("kind", IN_PLACE)
def test_two_guests_have_two_handles(bare: BareMaker, kind: str) -> None:
    """The firmware gives each guest a handle of its own, other than 0."""
    handles = [start_sev(bare(kind)).handle for _ in range(2)]
    assert 0 not in handles
    assert handles[0] != handles[1]


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_handle_that_is_none(bare: BareMaker, kind: str) -> None:
    """LAUNCH_START with the handle of a guest that does not exist is refused with INVALID_GUEST."""
    guest = bare(kind)
    arg = kvm_sev_launch_start(handle=0x7FFF_FFFF, policy=4 if kind == "sev-es" else 0)
    assert guest.raw("LAUNCH_START", arg) == (errno.EIO, int(SevRet.SEV_RET_INVALID_GUEST))


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_policy_of_the_other_kind(bare: BareMaker, kind: str) -> None:
    """A policy with ES on a plain SEV VM, or without on an SEV-ES VM, meets the wrong ASID: INVALID_ASID."""
    arg = kvm_sev_launch_start(policy=0 if kind == "sev-es" else 4)
    assert bare(kind).raw("LAUNCH_START", arg) == (errno.EIO, int(SevRet.SEV_RET_INVALID_ASID))


@pytest.mark.parametrize("kind", IN_PLACE)
def test_finish_without_a_measurement(bare: BareMaker, kind: str) -> None:
    """LAUNCH_FINISH before LAUNCH_MEASURE is refused with INVALID_GUEST_STATE."""
    guest = bare(kind)
    start_sev(guest)
    assert guest.raw("LAUNCH_FINISH") == WRONG_STATE


@pytest.mark.parametrize("kind", IN_PLACE)
def test_data_after_the_measurement(bare: BareMaker, kind: str) -> None:
    """LAUNCH_UPDATE_DATA after LAUNCH_MEASURE is refused with INVALID_GUEST_STATE."""
    guest = bare(kind)
    start_sev(guest).update_data(MEMORY, PAGE_SIZE).measure()
    assert guest.raw("LAUNCH_UPDATE_DATA", data(guest, PAGE_SIZE)) == WRONG_STATE


@pytest.mark.parametrize("kind", IN_PLACE)
def test_nothing_after_the_end(bare: BareMaker, kind: str) -> None:
    """After LAUNCH_FINISH every step of the launch is refused with INVALID_GUEST_STATE."""
    guest = bare(kind)
    start_sev(guest).measure().finish()
    assert guest.raw("LAUNCH_UPDATE_DATA", data(guest)) == WRONG_STATE
    assert guest.raw("LAUNCH_FINISH") == WRONG_STATE
    measure = kvm_sev_launch_measure(uaddr=guest.hva, len=48)
    assert guest.raw("LAUNCH_MEASURE", measure) == WRONG_STATE


@pytest.mark.parametrize("kind", IN_PLACE)
def test_the_size_of_a_measurement(bare: BareMaker, kind: str) -> None:
    """LAUNCH_MEASURE without a buffer tells how long one must be, with INVALID_LEN, and changes no state."""
    guest = bare(kind)
    launching = start_sev(guest)
    assert launching.measurement_size() == 48
    assert launching.state == GuestState.LUPDATE


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_measurement_of_silly_size(bare: BareMaker, kind: str) -> None:
    """LAUNCH_MEASURE into more than 16 KiB gives EINVAL, into less than 48 bytes INVALID_LEN."""
    guest = bare(kind)
    start_sev(guest)
    arg = kvm_sev_launch_measure(uaddr=guest.hva, len=(16 << 10) + 1)
    assert guest.raw("LAUNCH_MEASURE", arg) == EINVAL
    arg = kvm_sev_launch_measure(uaddr=guest.hva, len=16)
    assert guest.raw("LAUNCH_MEASURE", arg) == (errno.EIO, int(SevRet.SEV_RET_INVALID_LEN))


@pytest.mark.parametrize("kind", IN_PLACE)
def test_no_data(bare: BareMaker, kind: str) -> None:
    """LAUNCH_UPDATE_DATA of no bytes gives EINVAL."""
    guest = bare(kind)
    start_sev(guest)
    assert guest.raw("LAUNCH_UPDATE_DATA", data(guest, size=0)) == EINVAL


@pytest.mark.parametrize("kind", IN_PLACE)
def test_data_that_is_not_mapped(bare: BareMaker, kind: str) -> None:
    """LAUNCH_UPDATE_DATA of memory that cannot be pinned gives ENOMEM."""
    guest = bare(kind)
    start_sev(guest)
    arg = kvm_sev_launch_update_data(uaddr=PAGE_SIZE, len=PAGE_SIZE)
    assert guest.raw("LAUNCH_UPDATE_DATA", arg) == (errno.ENOMEM, 0)


@pytest.mark.parametrize("kind", IN_PLACE)
def test_data_that_cannot_be_written(bare: BareMaker, kind: str) -> None:
    """LAUNCH_UPDATE_DATA works in place: ENOMEM for a page that can only be read, and the page is as it was.

    Documentation/virt/kvm/x86/amd-memory-encryption.rst; sev_launch_update_data() pins with FOLL_WRITE.
    """
    guest = bare(kind)
    start_sev(guest)
    with read_only(b"\x5a" * PAGE_SIZE) as uaddr:
        arg = kvm_sev_launch_update_data(uaddr=uaddr, len=PAGE_SIZE)
        assert guest.raw("LAUNCH_UPDATE_DATA", arg) == (errno.ENOMEM, 0)
    assert guest.raw("LAUNCH_UPDATE_DATA", data(guest)) == (0, 0)


@pytest.mark.parametrize("kind", IN_PLACE)
def test_data_of_all_memory(bare: BareMaker, kind: str) -> None:
    """LAUNCH_UPDATE_DATA takes a range of many pages at once."""
    guest = bare(kind)
    launching = start_sev(guest)
    launching.update_data(MEMORY, PAGES * PAGE_SIZE)
    assert launching.measure().finish().state == GuestState.RUNNING


# Registered regions.


@pytest.mark.parametrize("kind", IN_PLACE)
def test_regions(bare: BareMaker, kind: str) -> None:
    """A region is registered and given back by its bounds; giving it back twice gives EINVAL."""
    vm = bare(kind).vm
    hva = vm.memory.hva(MEMORY, private=False)
    vm.sev.reg_region(hva, 4 * PAGE_SIZE)
    with refused(errno.EINVAL):
        vm.sev.unreg_region(hva, 2 * PAGE_SIZE)
    vm.sev.unreg_region(hva, 4 * PAGE_SIZE)
    with refused(errno.EINVAL):
        vm.sev.unreg_region(hva, 4 * PAGE_SIZE)


@pytest.mark.parametrize("kind", IN_PLACE)
def test_regions_before_init(bare: BareMaker, kind: str) -> None:
    """Regions belong to SEV guests: ENOTTY before KVM_SEV_INIT2."""
    vm = bare(kind, init=False).vm
    hva = vm.memory.hva(MEMORY, private=False)
    with refused(errno.ENOTTY):
        vm.sev.reg_region(hva, PAGE_SIZE)
    with refused(errno.ENOTTY):
        vm.sev.unreg_region(hva, PAGE_SIZE)


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_region_that_is_not_mapped(bare: BareMaker, kind: str) -> None:
    """A region that cannot be pinned gives ENOMEM, one of no bytes EINVAL."""
    vm = bare(kind).vm
    with refused(errno.ENOMEM):
        vm.sev.reg_region(PAGE_SIZE, PAGE_SIZE)
    with refused(errno.EINVAL):
        vm.sev.reg_region(vm.memory.hva(MEMORY, private=False), 0)


# VMSAs.


@needs_sev
def test_vmsa_without_es(bare: BareMaker) -> None:
    """LAUNCH_UPDATE_VMSA on a plain SEV VM gives ENOTTY."""
    guest = bare("sev", vcpus=1)
    start_sev(guest)
    assert guest.raw("LAUNCH_UPDATE_VMSA") == (errno.ENOTTY, 0)


@needs_es
@pytest.mark.dangerous(unless="snp-finish-twice")
def test_vmsa_twice(bare: BareMaker) -> None:
    """A vCPU's state is encrypted once: EINVAL afterwards."""
    guest = bare("sev-es", vcpus=2)
    start_sev(guest)
    assert guest.raw("LAUNCH_UPDATE_VMSA") == (0, 0)
    assert guest.raw("LAUNCH_UPDATE_VMSA") == EINVAL


@needs_es
def test_vmsa_of_a_vcpu_that_is_debugged(bare: BareMaker) -> None:
    """LAUNCH_UPDATE_VMSA with guest debugging on gives EINVAL, and works when it is off again."""
    guest = bare("sev-es", vcpus=1)
    start_sev(guest)
    vcpu = guest.vm.vcpus[0]
    vcpu.debug.set(KVM_GUESTDBG_ENABLE)
    assert guest.raw("LAUNCH_UPDATE_VMSA") == EINVAL
    vcpu.debug.set(0)
    assert guest.raw("LAUNCH_UPDATE_VMSA") == (0, 0)


@needs_es
def test_vmsa_with_breakpoints(bare: BareMaker) -> None:
    """LAUNCH_UPDATE_VMSA with a breakpoint enabled in DR7 gives EINVAL."""
    guest = bare("sev-es", vcpus=1)
    start_sev(guest)
    vcpu = guest.vm.vcpus[0]
    registers = vcpu.debug.get_regs()
    registers.dr7 = 0x400 | 3
    vcpu.debug.set_regs(registers)
    assert guest.raw("LAUNCH_UPDATE_VMSA") == EINVAL


# The older ioctls.


@pytest.mark.parametrize("kind", IN_PLACE)
def test_old_init_launches(kvm: Kvm, kind: str) -> None:
    """A default VM that KVM_SEV_INIT or ES_INIT made a guest goes through the same states."""
    with kvm.create_vm() as vm:
        state = SevInitialised.legacy_init(vm, es=kind == "sev-es")
        measured = state.start(SevPolicy(es=kind == "sev-es")).measure()
        assert measured.finish().state == GuestState.RUNNING
