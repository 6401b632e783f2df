# SPDX-License-Identifier: Apache-2.0
"""Proofs of the bugs of memory slots and guest_memfd."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from kvmpy import (
    AGENT,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_READONLY,
    PAGE_SIZE,
    SIZE_2M,
    Agent,
    Anonymous,
    Gpa,
    Gva,
    Kvm,
    MakeVm,
    SnpPolicy,
    Vm,
    VmType,
    kvm_sev_snp_launch_update,
    refused,
)
from kvmpy.coco.snp_launch import SnpInitialised

HOST = 0x1000_0000
NORMAL_PAGE = 1


@pytest.fixture
def protected(kvm: Kvm) -> Iterator[Vm]:
    with kvm.create_vm(int(VmType.KVM_X86_SW_PROTECTED_VM)) as vm:
        yield vm


@pytest.mark.bug(120)
def test_read_only(protected: Vm) -> None:
    gmem = protected.create_guest_memfd(PAGE_SIZE)
    flags = KVM_MEM_GUEST_MEMFD | KVM_MEM_READONLY
    with refused(errno.EINVAL):
        protected.set_user_memory_region2(0, 0x10_0000, PAGE_SIZE, HOST, flags, gmem=gmem)


@pytest.mark.bug(121)
def test_overlap(protected: Vm) -> None:
    gmem = protected.create_guest_memfd(2 * PAGE_SIZE)
    protected.set_user_memory_region2(0, 0x10_0000, PAGE_SIZE, HOST, KVM_MEM_GUEST_MEMFD, gmem=gmem)
    with refused(errno.EEXIST):
        protected.set_user_memory_region2(1, 0x20_0000, 2 * PAGE_SIZE, HOST, KVM_MEM_GUEST_MEMFD, gmem=gmem)


@pytest.mark.bug(122)
@pytest.mark.protections("none")
def test_moved(make_vm: MakeVm) -> None:
    # No whole number of large pages, so that the tracking has as many at both places.
    where, size = Gpa(0x4000_0000), 2 * SIZE_2M - 16 * PAGE_SIZE
    vm = make_vm(AGENT)
    slot = vm.add_slot(where, size, backing=Anonymous(huge="thp"))
    for page in range(size // PAGE_SIZE):
        slot.mapping.view(page * PAGE_SIZE, 1)[0] = page & 0xFF
    moved = where + PAGE_SIZE
    vm.set_user_memory_region(slot.slot, moved, size, slot.hva)
    window = Gva(0x6000_0000)
    vm.map(window, moved, 8 * PAGE_SIZE, page_size=PAGE_SIZE, private=False)
    agent = Agent(vm.vcpus[0])
    assert [agent.read(window + page * PAGE_SIZE, 1) for page in range(8)] == list(range(8))


@pytest.mark.bug(124)
@pytest.mark.requires("protection:snp")
def test_shared(kvm: Kvm) -> None:
    with kvm.create_vm(int(VmType.KVM_X86_SNP_VM)) as vm:
        state = SnpInitialised.init2(vm)
        vm.add_slot(Gpa(0x10_0000), PAGE_SIZE, gmem=vm.create_guest_memfd(PAGE_SIZE))
        state.start(SnpPolicy())
        hva = vm.memory.hva(Gpa(0x10_0000), private=False)
        arg = kvm_sev_snp_launch_update(gfn_start=0x100, uaddr=hva, len=PAGE_SIZE, type=NORMAL_PAGE)
        assert vm.sev.command_raw("SNP_LAUNCH_UPDATE", arg).errno == errno.EIO


@pytest.mark.bug(125)
def test_offset(protected: Vm) -> None:
    gmem = protected.create_guest_memfd(2 * PAGE_SIZE)
    with refused(errno.EINVAL):
        protected.set_user_memory_region2(
            0, 0x10_0000, 2 * PAGE_SIZE, HOST, KVM_MEM_GUEST_MEMFD, gmem=gmem,
            gmem_offset=(1 << 63) - PAGE_SIZE,
        )  # fmt: skip
