# SPDX-License-Identifier: Apache-2.0
"""Proofs of the bugs of memory slots and guest_memfd."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from kvmpy import KVM_MEM_GUEST_MEMFD, KVM_MEM_READONLY, PAGE_SIZE, Kvm, Vm, VmType, refused

HOST = 0x1000_0000


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
