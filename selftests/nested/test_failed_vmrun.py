# SPDX-License-Identifier: Apache-2.0
"""A VMRUN that fails its checks is an exit as every other: all that an exit does has happened."""

from __future__ import annotations

import pytest

from kvmpy import L1, L2, Event, EventType, MakeVm, SvmExit, SvmNestedState, Vector
from kvmpy.x86.vmcb import VMCB_SIZE

pytestmark = [pytest.mark.protections("none", "cbit"), pytest.mark.requires("cpuid:svm")]

VMRUN = b"\x0f\x01\xd8"
INVALID = (1 << 64) - 1
# What makes the checks fail (AMD APM volume 2, 15.5.1, Canonicalization and Consistency Checks).
WRONG = {
    "no address space": {"asid": 0},
    "no SVM": {"efer": 0xD01},
    "not cached and written": {"cr0": 0xA005_0033},
    "reserved bits of CR4": {"cr4": 1 << 40},
    "reserved bits of DR6": {"dr6": 1 << 40},
}


@pytest.fixture
def guest(make_vm: MakeVm) -> L2:
    l2 = L2(make_vm(L1).vcpus[0])
    l2.reset()
    return l2


def vmrun(l2: L2) -> None:
    """Let L1 execute VMRUN alone; GIF is then what the exit left."""
    l2.agent.must(VMRUN, rax=l2.pa(l2.vmcb_gva))


@pytest.mark.parametrize("wrong", WRONG.values(), ids=[name.replace(" ", "-") for name in WRONG])
def test_what_an_exit_does(guest: L2, wrong: dict[str, int]) -> None:
    """The exit code is -1 in 64 bits, GIF is clear, the injection is gone, and L1 goes on behind VMRUN.

    AMD APM volume 2, 15.6 #VMEXIT, and appendix C (VMEXIT_INVALID is -1); 15.20 (EVENTINJ is cleared).
    """
    for name, value in wrong.items():
        guest.vmcb[name] = value
    guest.vmcb.inject(Event(EventType.EXCEPTION, Vector.GP, 0))
    guest.vmcb["exit_info_1"] = guest.vmcb["exit_info_2"] = 0x5A
    vmrun(guest)
    state = SvmNestedState.of(guest.vcpu.nested.get())
    got = {
        "exit code": hex(guest.vmcb["exit_code"]),
        "exit_info_1": guest.vmcb["exit_info_1"],
        "exit_info_2": guest.vmcb["exit_info_2"],
        "injection": guest.vmcb["event_inj"],
        "in guest mode": state.guest_mode,
        "GIF": state.gif,
    }
    assert got == {
        "exit code": hex(INVALID), "exit_info_1": 0, "exit_info_2": 0, "injection": 0, "in guest mode": False,
        "GIF": False,
    }  # fmt: skip


def test_not_counted(guest: L2) -> None:
    """The statistic nested_run counts what reached L2: a VMRUN that failed is none, the next good one is.

    arch/x86/kvm/svm/svm.c: ++vcpu->stat.nested_run ("VMRUNs that have made past consistency checking").
    """

    def runs() -> int:
        return int(guest.vcpu.stats.get()["nested_run"].value)

    good = bytes(guest.vmcb.page)
    assert guest.run(b"").code == SvmExit.VMMCALL
    before = runs()
    for wrong in WRONG.values():
        for name, value in wrong.items():
            guest.vmcb[name] = value
        vmrun(guest)
        guest.vmcb.page[:VMCB_SIZE] = good  # type: ignore[index]
    assert runs() == before, "VMRUNs that failed were counted"
    assert guest.run(b"").code == SvmExit.VMMCALL
    assert runs() == before + 1
