# SPDX-License-Identifier: Apache-2.0
"""System management interrupts while L2 runs, and a guest that is saved in the middle of their handler."""

from __future__ import annotations

import errno

import pytest

from kvmpy import L2, Gpa, IoExit, MakeVm, SvmExit, SvmNestedState, refused
from selftests.nested.conftest import NOTING, Notes

pytestmark = [
    # System management mode starts without page tables, so without an encryption bit.
    pytest.mark.protections("none"),
    pytest.mark.requires("cpuid:svm", "KVM_CAP_X86_SMM", "KVM_CAP_MULTI_ADDRESS_SPACE>=2"),
]

SMBASE, SMRAM_SIZE = Gpa(0x30000), 0x10000
PORT, L2_PORT = 0x10, 0x42
# mov $0x5a, %al; out %al, $0x10; rsm
HANDLER = bytes.fromhex("b05a e610 0faa")
CODE = b"\xe6\x42\x90"  # out %al, $0x42; nop


@pytest.fixture
def standing(make_vm: MakeVm, npt: bool) -> Notes:
    """An L2 that stands behind an OUT, in a VM with a handler of SMIs."""
    vm = make_vm(NOTING)
    l2 = L2(vm.vcpus[0], npt=npt)
    vm.memory.write(SMBASE + 0x8000, HANDLER)
    # lifetime: the slot shows guest memory, which the VM keeps.
    vm.set_user_memory_region(1 << 16, SMBASE, SMRAM_SIZE, vm.memory.hva(SMBASE))
    return Notes(l2)


def begin(l2: L2, *, intercepted: bool) -> None:
    """Let L2 stand behind its OUT."""
    l2.load(CODE, rbx=0x1234, rax=0x77)
    l2.intercept(SvmExit.SMI, on=intercepted)
    l2.begin()
    assert l2.vcpu.expect(IoExit).port == L2_PORT
    l2.vcpu.complete_io()


def in_l2(l2: L2) -> bool:
    """Tell whether the vCPU is in guest mode."""
    return SvmNestedState.of(l2.vcpu.nested.get()).guest_mode


def handler_exit(l2: L2) -> None:
    """Take the exit of the handler."""
    got = l2.vcpu.expect(IoExit)
    assert (got.port, got.value) == (PORT, 0x5A)
    assert l2.vcpu.events.get().smi.smm == 1


@pytest.mark.parametrize("moved", [False, True], ids=["runs-on", "restored"])
def test_passes(standing: Notes, moved: bool) -> None:
    """An SMI that L1 does not intercept is handled out of L2, and RSM goes back into it, where it was.

    AMD APM volume 2, 15.22.2 Response to SMI; also if the vCPU is restored in the handler.
    """
    l2 = standing.l2
    begin(l2, intercepted=False)
    l2.vcpu.events.smi()
    handler_exit(l2)
    l2.vcpu.complete_io()
    assert not in_l2(l2)
    if moved:
        saved = l2.vcpu.save()
        l2.vcpu.restore(saved)
        assert not saved.differences(l2.vcpu.save())
    got = l2.end()
    assert (got.code, l2.offset) == (SvmExit.VMMCALL, len(CODE)), str(got)
    assert (l2.register("rbx"), l2.register("rax")) == (0x1234, 0x77)
    assert l2.vcpu.events.get().smi.smm == 0


def test_intercepted(standing: Notes) -> None:
    """An SMI that L1 intercepts exits, and is handled out of L1 once GIF is set.

    AMD APM volume 2, 15.13.3 SMI Intercept.
    """
    l2 = standing.l2
    begin(l2, intercepted=True)
    l2.vcpu.events.smi()
    # STGI in L1 comes before what L1 does with the exit.
    handler_exit(l2)
    assert not in_l2(l2)
    got = l2.end()
    assert (got.code, l2.offset) == (SvmExit.SMI, 2), str(got)


def test_no_l2_in_the_handler(standing: Notes) -> None:
    """In the handler a state with L2 running is refused: management mode switches SVM off.

    arch/x86/kvm/svm/nested.c, svm_set_nested_state().
    """
    l2 = standing.l2
    begin(l2, intercepted=False)
    inside = l2.vcpu.nested.get()
    l2.vcpu.events.smi()
    handler_exit(l2)
    l2.vcpu.complete_io()
    with refused(errno.EINVAL):
        l2.vcpu.nested.set(inside)
    assert l2.end().code == SvmExit.VMMCALL
