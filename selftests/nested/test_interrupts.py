# SPDX-License-Identifier: Apache-2.0
"""Virtual interrupts of L2, and interrupts, NMIs, SMIs and INIT for L1 while L2 runs."""

from __future__ import annotations

import pytest

from kvmpy import KVM_MP_STATE_RUNNABLE, L2, Agent, MakeVm, SvmExit
from kvmpy.x86.vmcb import IntCtl, IntState
from selftests.nested.conftest import NOTING, Notes, offered

pytestmark = [pytest.mark.protections("none"), pytest.mark.requires("cpuid:svm")]

IF = 1 << 9
NOP, STI = b"\x90", b"\xfb"
VECTOR, OTHER = 0x61, 0x52


def v_irq(priority: int = 6, tpr: int = 0) -> int:
    """Return int_ctl with a virtual interrupt."""
    return IntCtl.V_IRQ | IntCtl.V_INTR_MASKING | priority << 16 | tpr


@pytest.mark.parametrize(
    ("int_ctl", "rflags", "code", "arrives"),
    [
        pytest.param(v_irq(), IF, NOP, True, id="open"),
        pytest.param(v_irq(), 0, NOP, False, id="IF-clear"),
        pytest.param(v_irq(), 0, STI + NOP + NOP, True, id="behind-STI"),
        pytest.param(v_irq(6, 6), IF, NOP, False, id="TPR-as-high"),
        pytest.param(v_irq(6, 5), IF, NOP, True, id="TPR-lower"),
        pytest.param(v_irq(6, 7), IF, NOP, False, id="TPR-higher"),
        pytest.param(v_irq(6, 15) | IntCtl.V_IGN_TPR, IF, NOP, True, id="TPR-ignored"),
        pytest.param(v_irq(0, 0), IF, NOP, False, id="priority-0"),
        pytest.param(v_irq() & ~IntCtl.V_IRQ, IF, NOP, False, id="none"),
    ],
)
def test_virtual_interrupt(notes: Notes, int_ctl: int, rflags: int, code: bytes, arrives: bool) -> None:
    """V_IRQ is delivered once where RFLAGS.IF and V_TPR allow it, and is clear then; else it stays pending.

    AMD APM volume 2, 15.21.4 Injecting Virtual (INTR) Interrupts.
    """
    l2 = notes.l2
    l2.load(code)
    l2.vmcb["rflags"] |= rflags
    l2.vmcb["int_ctl"], l2.vmcb["int_vector"] = int_ctl, VECTOR
    assert l2.resume().code == SvmExit.VMMCALL
    seen = notes.take()
    assert {vector: note.times for vector, note in seen.items()} == ({VECTOR: 1} if arrives else {})
    left = l2.vmcb["int_ctl"] & IntCtl.V_IRQ
    assert left == (0 if arrives else int_ctl & IntCtl.V_IRQ)
    if arrives:
        assert (seen[VECTOR].in_l2, l2.vmcb["int_ctl"] & 0xFF) == (1, int_ctl & 0xFF)


@pytest.mark.parametrize(
    ("rflags", "code", "at"),
    [
        pytest.param(IF, NOP, 0, id="at-once"),
        # STI lets one more instruction go.
        pytest.param(0, NOP + STI + NOP + NOP, 3, id="behind-STI"),
        pytest.param(0, NOP, None, id="never"),
    ],
)
def test_virtual_interrupt_intercepted(notes: Notes, rflags: int, code: bytes, at: int | None) -> None:
    """With VINTR intercepted L2 exits where it would take the interrupt, which stays pending.

    AMD APM volume 2, 15.13.5 VINTR Intercept.
    """
    l2 = notes.l2
    l2.load(code)
    l2.intercept(SvmExit.VINTR)
    l2.vmcb["rflags"] |= rflags
    l2.vmcb["int_ctl"], l2.vmcb["int_vector"] = v_irq(), VECTOR
    got = l2.resume()
    expected = (SvmExit.VMMCALL, len(code)) if at is None else (SvmExit.VINTR, at)
    assert (got.code, l2.offset) == expected, str(got)
    assert l2.vmcb["int_ctl"] & IntCtl.V_IRQ
    assert notes.take() == {}


def test_interrupt_shadow(notes: Notes) -> None:
    """An interrupt shadow that L1 gives to VMRUN holds V_IRQ back for one instruction, and is gone then.

    AMD APM volume 2, 15.21.5 Interrupt Shadows.
    """
    l2 = notes.l2
    l2.load(NOP + NOP)
    l2.vmcb["rflags"] |= IF
    l2.vmcb["int_ctl"], l2.vmcb["int_vector"] = v_irq(), VECTOR
    l2.vmcb["int_state"] = IntState.INTERRUPT_SHADOW
    assert l2.resume().code == SvmExit.VMMCALL
    assert notes.take()[VECTOR].rip == int(l2.code) + 1
    assert l2.vmcb["int_state"] & IntState.INTERRUPT_SHADOW == 0


def test_interrupt_shadow_at_the_exit(notes: Notes) -> None:
    """An exit in the shadow of STI says so.

    AMD APM volume 2, 15.21.5 Interrupt Shadows.
    """
    l2 = notes.l2
    l2.intercept(SvmExit.CPUID)
    assert l2.run(STI + b"\x0f\xa2").code == SvmExit.CPUID
    assert l2.vmcb["int_state"] & IntState.INTERRUPT_SHADOW
    assert l2.run(STI + NOP + b"\x0f\xa2").code == SvmExit.CPUID
    assert not l2.vmcb["int_state"] & IntState.INTERRUPT_SHADOW


@pytest.mark.parametrize("masking", [False, True], ids=["shared-IF", "V_INTR_MASKING"])
@pytest.mark.parametrize("l1_open", [False, True], ids=["L1-closed", "L1-open"])
@pytest.mark.parametrize("l2_open", [False, True], ids=["L2-closed", "L2-open"])
@pytest.mark.parametrize("intercepted", [False, True], ids=["passes", "intercepted"])
def test_interrupt(notes: Notes, masking: bool, l1_open: bool, l2_open: bool, intercepted: bool) -> None:
    """An interrupt of L1 is held back by L2's RFLAGS.IF, with V_INTR_MASKING by the one that L1 had.

    Then it exits, or is delivered through L2's IDT.  AMD APM volume 2, 15.21.1 and 15.13.1 (INTR).
    """
    l2 = notes.l2
    notes.call("pend_interrupt", OTHER)
    l2.load(NOP)
    l2.intercept(SvmExit.INTR, on=intercepted)
    l2.vmcb["rflags"] |= IF if l2_open else 0
    l2.vmcb["int_ctl"] = IntCtl.V_INTR_MASKING if masking else 0
    got = notes.run_open() if l1_open else l2.resume()
    seen = notes.take()
    # Not intercepted it is L2's IDT that delivers it, where L2's own flag counts, too.
    counts = (l1_open if masking else l2_open) and (intercepted or l2_open)
    if masking and not intercepted:
        counts = l1_open
    exits = intercepted and counts
    assert (got.code, l2.offset) == ((SvmExit.INTR, 0) if exits else (SvmExit.VMMCALL, 1)), str(got)
    if counts and not intercepted:
        assert (seen[OTHER].times, seen[OTHER].in_l2) == (1, 1)
    elif l1_open:
        # It was pending all the time: STGI lets it in.
        assert (seen[OTHER].times, seen[OTHER].in_l2) == (1, 0)
    else:
        assert seen == {}


def test_both_interrupts(notes: Notes) -> None:
    """Of a virtual interrupt and one for L1 the latter exits first; the other waits for the next VMRUN.

    AMD APM volume 2, 15.21.4: physical interrupts take priority over virtual ones.
    """
    l2 = notes.l2
    notes.call("pend_interrupt", OTHER)
    l2.load(NOP)
    l2.intercept(SvmExit.INTR)
    l2.vmcb["rflags"] |= IF
    l2.vmcb["int_ctl"], l2.vmcb["int_vector"] = v_irq(), VECTOR
    got = notes.run_open()
    assert (got.code, l2.offset) == (SvmExit.INTR, 0), str(got)
    assert l2.vmcb["int_ctl"] & IntCtl.V_IRQ
    assert {vector: note.in_l2 for vector, note in notes.take().items()} == {OTHER: 0}
    assert l2.resume().code == SvmExit.VMMCALL
    assert {vector: note.in_l2 for vector, note in notes.take().items()} == {VECTOR: 1}


def test_task_priority(notes: Notes) -> None:
    """With V_INTR_MASKING L2's CR8 is V_TPR, which the exit returns, and L1's CR8 stays.

    AMD APM volume 2, 15.21.2 Virtualizing APIC.TPR.
    """
    l2 = notes.l2
    assert l2.agent.write_cr(8, 3) is None
    l2.load(b"\x44\x0f\x20\xc1" + b"\x44\x0f\x22\xc0", rax=9)  # mov %cr8, %rcx; mov %rax, %cr8
    l2.vmcb["int_ctl"] = IntCtl.V_INTR_MASKING | 5
    assert l2.resume().code == SvmExit.VMMCALL
    assert (l2.register("rcx"), l2.vmcb["int_ctl"] & 0xFF, l2.agent.read_cr(8)) == (5, 9, 3)


def test_shared_task_priority(notes: Notes) -> None:
    """Without V_INTR_MASKING L2's CR8 is L1's own.

    AMD APM volume 2, 15.21.2.
    """
    l2 = notes.l2
    assert l2.agent.write_cr(8, 3) is None
    assert l2.run(b"\x44\x0f\x20\xc1" + b"\x44\x0f\x22\xc0", rax=9).code == SvmExit.VMMCALL
    assert (l2.register("rcx"), l2.agent.read_cr(8)) == (3, 9)


@pytest.mark.parametrize("intercepted", [False, True], ids=["passes", "intercepted"])
def test_nmi(notes: Notes, intercepted: bool) -> None:
    """An NMI exits before L2's next instruction and is L1's after STGI, or is delivered through L2's IDT.

    AMD APM volume 2, 15.13.2 NMI Intercept.
    """
    l2 = notes.l2
    l2.load(b"\xe6\x42" + NOP)  # out %al, $0x42
    l2.intercept(SvmExit.NMI, on=intercepted)
    l2.begin()
    l2.vcpu.next()
    l2.vcpu.complete_io()
    l2.vcpu.events.nmi()
    got = l2.end()
    assert (got.code, l2.offset) == ((SvmExit.NMI, 2) if intercepted else (SvmExit.VMMCALL, 3)), str(got)
    seen = notes.take()
    assert {vector: (note.times, note.in_l2) for vector, note in seen.items()} == {
        2: (1, int(not intercepted))
    }
    if not intercepted:
        assert seen[2].rip == int(l2.code) + 2


def test_virtual_gif(notes: Notes) -> None:
    """With V_GIF_ENABLE STGI and CLGI of L2 are of its own flag, which holds V_IRQ back.

    AMD APM volume 2, 15.33.3 Virtual GIF.
    """
    l2 = notes.l2
    if not offered(l2, "vgif"):
        pytest.skip("L1's CPUID lacks vgif")
    clgi, stgi = b"\x0f\x01\xdd", b"\x0f\x01\xdc"
    vgif = int(IntCtl.V_GIF_ENABLE)
    for code, before, arrives_at, after in (
        (clgi + NOP, vgif | IntCtl.V_GIF, None, 0),
        (NOP + stgi + NOP, vgif, 4, IntCtl.V_GIF),
        (NOP, vgif, None, 0),
        (NOP, vgif | IntCtl.V_GIF, 0, IntCtl.V_GIF),
    ):
        # CLGI comes first where V_IRQ must not.
        l2.reset()
        l2.load(code)
        l2.vmcb["rflags"] |= IF if arrives_at is not None or not before & IntCtl.V_GIF else 0
        l2.vmcb["int_ctl"], l2.vmcb["int_vector"] = v_irq() | before, VECTOR
        got = l2.resume()
        assert got.code == SvmExit.VMMCALL, str(got)
        seen = notes.take()
        rips = [note.rip - int(l2.code) for note in seen.values()]
        assert rips == ([] if arrives_at is None else [arrives_at]), code.hex()
        assert l2.vmcb["int_ctl"] & IntCtl.V_GIF == after, code.hex()
        # L1's own flag was never touched: it is set after the exit's STGI.
        assert l2.vcpu.nested.get().flags == 1 << 8


@pytest.mark.parametrize("intercepted", [False, True], ids=["passes", "intercepted"])
def test_init(make_vm: MakeVm, npt: bool, intercepted: bool) -> None:
    """INIT from another vCPU exits where L1 intercepts it; else it resets the vCPU, out of L2.

    AMD APM volume 2, 15.13.4 INIT Intercept.
    """
    vm = make_vm(NOTING, vcpus=2)
    l2 = L2(vm.vcpus[0], npt=npt)
    other = Agent(vm.vcpus[1])
    notes = Notes(l2)
    other.call("apic_enable")
    l2.load(b"\xe6\x42" + NOP)
    l2.intercept(SvmExit.INIT, on=intercepted)
    l2.begin()
    l2.vcpu.next()
    l2.vcpu.complete_io()
    assert isinstance(other.call("apic_send", l2.vcpu.vcpu_id, 0x4500), int)
    if intercepted:
        got = l2.end()
        assert (got.code, l2.offset) == (SvmExit.INIT, 2), str(got)
    else:
        # Looking at the state makes KVM take the INIT; a boot processor does not wait for a SIPI.
        assert l2.vcpu.get_mp_state() == KVM_MP_STATE_RUNNABLE
        assert l2.vcpu.nested.get().flags & 1 == 0
        assert l2.vcpu.regs.get().rip == 0xFFF0
    assert notes.take() == {}
