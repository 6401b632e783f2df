# SPDX-License-Identifier: Apache-2.0
"""The guest's debug registers, as the host sets them and as the guest sees them."""

from __future__ import annotations

import errno

import pytest

from kvmpy import AGENT, Agent, Fault, MakeVm, Vcpu, Vector, kvm_debugregs, refused

pytestmark = pytest.mark.requires("KVM_CAP_DEBUGREGS")

DR6_INIT = 0xFFFF_0FF0
DR7_INIT = 0x400
NUMBERS = (0, 1, 2, 3, 6, 7)
ADDRESSES = [0x1000, 0x0000_7FFF_FFFF_F000, 0xFFFF_8000_0000_0000, 0xFFFF_FFFF_FFFF_FFF8]


def test_initial(vcpu: Vcpu) -> None:
    """A new vCPU has its debug registers as after reset.

    Documentation/virt/kvm/api.rst, 4.33 KVM_GET_DEBUGREGS; Intel SDM volume 3, table 10-1 (DR0 to DR7).
    """
    regs = vcpu.debug.get_regs()
    assert list(regs.db) == [0, 0, 0, 0]
    assert (regs.dr6, regs.dr7, regs.flags) == (DR6_INIT, DR7_INIT, 0)


def test_round_trip(vcpu: Vcpu) -> None:
    """KVM_GET_DEBUGREGS returns what KVM_SET_DEBUGREGS set.

    Documentation/virt/kvm/api.rst, 4.33 KVM_GET_DEBUGREGS and 4.34 KVM_SET_DEBUGREGS.
    """
    given = kvm_debugregs(db=ADDRESSES, dr6=DR6_INIT | 0x4005, dr7=DR7_INIT | 0xF001_0303)
    vcpu.debug.set_regs(given)
    assert vcpu.debug.get_regs() == given


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flags", 1),
        ("flags", 1 << 63),
        ("dr6", DR6_INIT | 1 << 32),
        ("dr6", DR6_INIT | 1 << 63),
        ("dr7", DR7_INIT | 1 << 32),
        ("dr7", DR7_INIT | 1 << 63),
    ],
)
def test_refused(vcpu: Vcpu, field: str, value: int) -> None:
    """Flags, and upper halves of DR6 and DR7, are refused with EINVAL and change nothing.

    Documentation/virt/kvm/api.rst, 4.34 KVM_SET_DEBUGREGS ("must be cleared"); Intel SDM volume 3, 18.2
    (bits 63:32).
    """
    before = vcpu.debug.get_regs()
    given = before.copy()
    given.db = ADDRESSES
    setattr(given, field, value)
    with refused(errno.EINVAL):
        vcpu.debug.set_regs(given)
    assert vcpu.debug.get_regs() == before


@pytest.mark.usefixtures("open_registers")
def test_guest_and_host_agree(make_vm: MakeVm) -> None:
    """The guest reads the debug registers that the host set, and the host those that the guest wrote.

    Documentation/virt/kvm/api.rst, 4.33 KVM_GET_DEBUGREGS and 4.34 KVM_SET_DEBUGREGS.
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    agent.start()
    vcpu = agent.vcpu
    # No breakpoint is enabled: they would count from here on.
    vcpu.debug.set_regs(kvm_debugregs(db=ADDRESSES, dr6=DR6_INIT | 0x4001, dr7=DR7_INIT | 0xD000_0000))
    values = [*ADDRESSES, DR6_INIT | 0x4001, DR7_INIT | 0xD000_0000]
    assert [agent.read_dr(number) for number in NUMBERS] == values
    values = [0x111_1000, 0x222_2000, 0x333_3000, 0xFFFF_8000_0000_4000, DR6_INIT | 2, DR7_INIT | 0x1_0000]
    for number, value in zip(NUMBERS, values, strict=True):
        assert agent.write_dr(number, value) is None
    regs = vcpu.debug.get_regs()
    assert [*regs.db, regs.dr6, regs.dr7] == values


def test_guest_upper_halves(make_vm: MakeVm) -> None:
    """A guest that writes the upper half of DR6 or DR7 gets #GP(0).

    Intel SDM volume 3, 18.2 Debug Registers ("Bits 63:32 ... must be written with zeros").
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    assert agent.write_dr(6, DR6_INIT | 1 << 32) == Fault(Vector.GP, 0)
    assert agent.write_dr(7, DR7_INIT | 1 << 63) == Fault(Vector.GP, 0)
