# SPDX-License-Identifier: Apache-2.0
"""What user space reads of a vCPU whose L2 stands between two instructions, and gets back when it sets it."""

from __future__ import annotations

import itertools

import pytest

from kvmpy import L2, IoExit, SvmNestedState
from kvmpy.testing.host import platform_name

pytestmark = [pytest.mark.protections("none", "cbit"), pytest.mark.requires("cpuid:svm")]

OUT = b"\xe6\x42"
TSC = 0x10
AHEAD = 1 << 50
# QEMU without KVM loses the shadow where the host's timer comes between the two instructions: seldom.
TRIES = 4 if platform_name().startswith("lab") else 1


def stand(l2: L2, before: bytes) -> SvmNestedState:
    """Let L2 run *before* and stand at the OUT behind it; return the state."""
    l2.load(before + OUT)
    l2.begin()
    l2.vcpu.expect(IoExit)
    return SvmNestedState.of(l2.vcpu.nested.get())


SHADOWS = {
    "none": (b"\x90", 0),
    "sti": (b"\xfb", 1),
    "sti, an instruction before": (b"\xfb\x90", 0),
    "mov ss": (b"\x8c\xd0\x8e\xd0", 1),
}


@pytest.mark.parametrize("shadow", SHADOWS.values(), ids=[name.replace(" ", "-") for name in SHADOWS])
def test_interrupt_shadow(l2: L2, shadow: tuple[bytes, int]) -> None:
    """The VMCB of the state has L2's interrupt shadow of now, which the vCPU's events say, too.

    Documentation/virt/kvm/api.rst, 4.113 KVM_GET_NESTED_STATE; AMD APM volume 2, 15.21.5.
    """
    before, expected = shadow
    for _ in range(TRIES):
        saved = stand(l2, before)
        assert saved.vmcb is not None
        told = saved.vmcb["int_state"] & 1, int(l2.vcpu.events.get().interrupt.shadow != 0)
        l2.end()
        if told == (expected, expected):
            return
    pytest.fail(f"L2's shadow is {expected}: the saved VMCB has {told[0]}, the vCPU's events {told[1]}")


def test_flags_are_kept(l2: L2) -> None:
    """GIF and a VMRUN that is still to come are what user space set, in every combination."""
    state = stand(l2, b"\x90")
    wrong = []
    for gif, pending in itertools.product((True, False), repeat=2):
        state.gif, state.run_pending = gif, pending
        l2.vcpu.nested.set(state.to_struct())
        got = SvmNestedState.of(l2.vcpu.nested.get())
        if (got.guest_mode, got.gif, got.run_pending) != (True, gif, pending):
            wrong.append(f"GIF {gif}, pending {pending}: got {got.gif}, {got.run_pending}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("offset", [AHEAD, -AHEAD & (1 << 64) - 1], ids=["ahead", "behind"])
def test_time_stamp_counter(l2: L2, offset: int) -> None:
    """KVM_GET_MSRS returns L1's TSC while L2 runs, as KVM_SET_MSRS takes it: set back, nothing jumps.

    Documentation/virt/kvm/api.rst, 4.18 KVM_GET_MSRS; AMD APM volume 2, 15.7.5 (TSC_OFFSET is added in L2).
    """
    l2.reset()
    first = l2.vcpu.msrs.get(TSC)
    l2.vmcb["tsc_offset"] = offset
    stand(l2, b"\x90")
    in_l2 = l2.vcpu.msrs.get(TSC)
    assert 0 <= in_l2 - first < AHEAD // 2, "the count is not L1's while L2 runs"
    l2.vcpu.msrs.set(TSC, in_l2)
    l2.end()
    after = l2.agent.rdmsr(TSC)
    assert isinstance(after, int)
    assert 0 <= after - in_l2 < AHEAD // 2, "L1's count jumped"
