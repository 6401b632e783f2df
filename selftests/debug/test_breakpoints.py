# SPDX-License-Identifier: Apache-2.0
"""Breakpoints of a debugger: INT3 in the code, and debug registers."""

from __future__ import annotations

import pytest

from kvmpy import (
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_INJECT_BP,
    KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP,
    RFLAGS,
    DebugPoint,
    Vector,
)
from selftests.debug.conftest import LineMaker

pytestmark = [
    pytest.mark.requires("KVM_CAP_SET_GUEST_DEBUG"),
    pytest.mark.usefixtures("open_registers", "open_tables"),
]
rings = pytest.mark.parametrize("ring", ["kernel", "user"])

INT3 = b"\xcc"
DR6_ACTIVE_LOW = 0xFFFF_0FF0
UNTOUCHED = (3, 0, 0, 0, 0)


@rings
def test_software_breakpoint(line: LineMaker, ring: str) -> None:
    """An INT3 that the debugger put into the code exits with #BP and its address, unseen by the guest.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG, KVM_GUESTDBG_USE_SW_BP.
    """
    guest = line(ring)
    where = guest.at("b")
    code = guest.vm.read(where, 1)
    guest.vm.write(where, INT3)
    guest.vcpu.debug.set(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP)
    got = guest.hit()
    assert (got.exception, got.pc) == (Vector.BP, where)
    regs = guest.vcpu.regs.get()
    assert (regs.rip, regs.rax) == (where, 1)
    guest.vm.write(where, code)
    assert guest.finish() == UNTOUCHED


@pytest.mark.parametrize("control", [0, int(KVM_GUESTDBG_ENABLE)], ids=["off", "on"])
def test_int3_of_the_guest(line: LineMaker, control: int) -> None:
    """Without KVM_GUESTDBG_USE_SW_BP an INT3 goes to the guest's own handler.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG ("not running off into the normal guest vector").
    """
    guest = line("user")
    where = guest.at("d")
    guest.vm.write(where, INT3)
    guest.vcpu.debug.set(control)
    assert guest.finish() == (3, 0, 0, 1, where + 1)


@rings
def test_int3_handed_on(line: LineMaker, ring: str) -> None:
    """A #BP that is not the debugger's own can be given to the guest, which then goes on behind its INT3.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG, KVM_GUESTDBG_INJECT_BP.
    """
    guest = line(ring)
    where = guest.at("d")
    guest.vm.write(where, INT3)
    control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP
    guest.vcpu.debug.set(control)
    assert guest.hit().pc == where
    guest.vcpu.debug.set(control | KVM_GUESTDBG_INJECT_BP)
    assert guest.finish() == (3, 0, 0, 1, where + 1)


@pytest.mark.usefixtures("debug_registers")
@rings
@pytest.mark.parametrize("slot", [0, 1, 2, 3])
def test_hardware_breakpoint(line: LineMaker, ring: str, slot: int) -> None:
    """A breakpoint in any of the four registers exits before its instruction, with the register's bit in DR6.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG, KVM_GUESTDBG_USE_HW_BP; Intel SDM volume 3,
    18.2.3.
    """
    guest = line(ring)
    elsewhere = [DebugPoint(guest.at("end") + 0x1000)] * slot
    guest.vcpu.debug.set_points([*elsewhere, DebugPoint(guest.at("c"))])
    got = guest.hit()
    assert (got.exception, got.pc, got.dr6) == (Vector.DB, guest.at("c"), DR6_ACTIVE_LOW | 1 << slot)
    assert guest.vcpu.regs.get().rax == 2
    guest.vcpu.debug.set(0)
    assert guest.finish() == UNTOUCHED


@pytest.mark.usefixtures("debug_registers")
def test_several_hardware_breakpoints(line: LineMaker) -> None:
    """Each of several breakpoints exits when the guest comes to it, in the order of the code.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG, KVM_GUESTDBG_USE_HW_BP.
    """
    guest = line()
    points = [DebugPoint(guest.at(label)) for label in ("read", "a", "c")]
    nowhere = DebugPoint(guest.at("end") + 0x1000)
    seen = []
    for _ in range(3):
        guest.vcpu.debug.set_points(points)
        got = guest.hit()
        seen.append((got.pc, got.dr6 & 0xF))
        points = [nowhere if point.address == got.pc else point for point in points]
    assert seen == [(guest.at("a"), 2), (guest.at("c"), 4), (guest.at("read"), 1)]
    guest.vcpu.debug.set_points(points)
    assert guest.finish() == UNTOUCHED


@pytest.mark.usefixtures("debug_registers")
@rings
def test_resume_flag(line: LineMaker, ring: str) -> None:
    """With RFLAGS.RF set the instruction under a breakpoint runs once, and the breakpoint stays.

    Intel SDM volume 3, 18.3.1.1 Instruction-Breakpoint Exception Condition (RF flag).
    """
    guest = line(ring)
    guest.vcpu.debug.set_points([DebugPoint(guest.at("b"))])
    assert guest.hit().pc == guest.at("b")
    regs = guest.vcpu.regs.get()
    regs.rflags |= int(RFLAGS.RF)
    guest.vcpu.regs.set(regs)
    assert guest.finish() == UNTOUCHED


def test_hardware_breakpoint_needs_its_enable_bit(line: LineMaker) -> None:
    """An address whose enable bits in DR7 are clear does not exit.

    Intel SDM volume 3, 18.2.4 Debug Control Register (L0 to G3).
    """
    guest = line()
    registers = {0: int(guest.at("b")), 7: 0x400}
    guest.vcpu.debug.set(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP, registers)
    assert guest.finish() == UNTOUCHED


@pytest.mark.usefixtures("debug_registers")
@pytest.mark.parametrize("keep", [0, int(KVM_GUESTDBG_USE_HW_BP)], ids=["zero", "without-enable"])
def test_switched_off(line: LineMaker, keep: int) -> None:
    """Without KVM_GUESTDBG_ENABLE breakpoints do not exit any more, whatever other bits are given.

    Documentation/virt/kvm/api.rst, 4.87 KVM_SET_GUEST_DEBUG, KVM_GUESTDBG_ENABLE.
    """
    guest = line()
    guest.vcpu.debug.set_points([DebugPoint(guest.at("b")), DebugPoint(guest.at("d"))])
    assert guest.hit().pc == guest.at("b")
    registers = {1: int(guest.at("d")), 7: 0x408}
    guest.vcpu.debug.set(keep, registers)
    assert guest.finish() == UNTOUCHED
