# SPDX-License-Identifier: Apache-2.0
"""Pages that KVM's instruction emulator writes for the guest are dirty, too."""

from __future__ import annotations

import pytest

from kvmpy import AGENT, KVM_MEM_LOG_DIRTY_PAGES, PAGE_SIZE, Agent, Gpa, Gva, MakeVm

pytestmark = [
    pytest.mark.requires("trait:kvm_emulates", "param:kvm.force_emulation_prefix=1"),
    pytest.mark.protections("none"),
]

PREFIX = b"\x0f\x0bkvm"
REGION_GPA, REGION, PAGES = Gpa(0x1000_0000), Gva(0x6000_0000), 8
# Each writes at RDI.
WRITES = {
    "mov": b"\x89\x07",
    "add": b"\x01\x07",
    "lock-add": b"\xf0\x01\x07",
    "lock-inc": b"\xf0\xff\x07",
    "xchg": b"\x87\x07",
    "lock-cmpxchg": b"\xf0\x0f\xb1\x0f",
    "cmpxchg-that-fails": b"\xf0\x0f\xb1\x17",
    "lock-xadd": b"\xf0\x0f\xc1\x07",
    "lock-bts": b"\xf0\x0f\xba\x2f\x03",
    "stos": b"\xab",
    "movs": b"\xa5",
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("page", [0, PAGES - 1], ids=["first", "last"])
def test_an_emulated_write_is_in_the_log(make_vm: MakeVm, write: str, page: int) -> None:
    """KVM_GET_DIRTY_LOG reports the page that an emulated instruction wrote to, and no other.

    Documentation/virt/kvm/api.rst, 4.9 KVM_GET_DIRTY_LOG (any pages dirtied since the last call).
    """
    vm = make_vm(AGENT)
    slot = vm.add_memory(REGION_GPA, PAGES * PAGE_SIZE, flags=KVM_MEM_LOG_DIRTY_PAGES)
    vm.map(REGION, REGION_GPA, PAGES * PAGE_SIZE, private=False)
    agent = Agent(vm.vcpus[0])
    place = REGION + page * PAGE_SIZE
    assert agent.write(place, 0) is None
    assert list(vm.dirty.get_log(slot.slot)) == [page]
    assert list(vm.dirty.get_log(slot.slot)) == []
    agent.must(
        PREFIX + WRITES[write],
        rdi=int(place),
        rsi=int(REGION + PAGE_SIZE),
        rax=0,
        rcx=5,
        rdx=7,
    )
    assert list(vm.dirty.get_log(slot.slot)) == [page]
