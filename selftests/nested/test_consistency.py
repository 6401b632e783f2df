# SPDX-License-Identifier: Apache-2.0
"""What VMRUN checks: a VMCB that is not legal exits with VMEXIT_INVALID and is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import pytest

from kvmpy import CR0, CR4, EFER, L2, Cpuid, Event, EventType, SvmExit, Vector
from kvmpy.x86.svm_exits import event_words
from kvmpy.x86.vmcb import VMCB, IntCtl, MiscCtl
from kvmpy.x86.vmsa import SegmentAttribute
from selftests.nested.conftest import offered
from selftests.regs.control import CR4_ALWAYS, CR4_FEATURES, EFER_FEATURES

pytestmark = [pytest.mark.protections("none"), pytest.mark.requires("cpuid:svm")]

NOP = b"\x90"
# What the exit itself writes.
EXIT_FIELDS = ("exit_code", "exit_info_1", "exit_info_2", "exit_int_info", "event_inj", "event_inj_err")
EXCEPTIONS = {int(vector) for vector in Vector} - {Vector.NMI, Vector.CSO, Vector.VE}


class Row(NamedTuple):
    """Changes of the VMCB, bits to turn over by field; *put* has values in place of bits."""

    name: str
    bits: Mapping[str, int] = {}
    put: Mapping[str, int] = {}


def _bits(field: str, numbers: Iterator[int] | range | list[int]) -> Iterator[Row]:
    return (Row(f"{field} bit {number}", {field: 1 << number}) for number in numbers)


def _physical_bits(l2: L2) -> int:
    return Cpuid.from_struct(l2.vcpu.cpuid.get()).maxphyaddr


def control_registers(l2: L2) -> Iterator[Row]:
    """CR0, CR3, CR4 and EFER: reserved bits, and what must be together."""
    yield Row("CR0.NW without CD", {"cr0": CR0.NW})
    yield from _bits("cr0", range(32, 64))
    cpuid = Cpuid.from_struct(l2.vcpu.cpuid.get())
    allowed = int(CR4_ALWAYS) | sum(int(bit) for bit, name in CR4_FEATURES.items() if cpuid.has(name))
    unknown = [bit for bit in range(64) if not allowed >> bit & 1 and 1 << bit not in (CR4.CET, CR4.LAM_SUP)]
    yield from _bits("cr4", unknown)
    yield Row("CR4.PAE clear in long mode", {"cr4": CR4.PAE})
    yield Row("CR0.PE clear in long mode", {"cr0": CR0.PE})
    yield from _bits("cr3", range(_physical_bits(l2), 52))
    known = EFER.SCE | EFER.LME | EFER.LMA | EFER.NXE | EFER.SVME
    known |= sum(int(bit) for bit, name in EFER_FEATURES.items() if cpuid.has(name))
    yield from _bits("efer", [bit for bit in range(64) if not int(known) >> bit & 1 and bit not in (13, 15)])
    yield Row("EFER.SVME clear", {"efer": EFER.SVME})
    yield Row("CS.L and CS.D in long mode", {"cs.attrib": SegmentAttribute.DB})


def debug_registers(_: L2) -> Iterator[Row]:
    """DR6 and DR7: the upper halves."""
    yield from _bits("dr6", range(32, 64))
    yield from _bits("dr7", range(32, 64))


def control_area(l2: L2) -> Iterator[Row]:
    """What the control area must have."""
    yield Row("VMRUN not intercepted", {"intercept_4": 1})
    yield Row("ASID 0", put={"asid": 0})
    bits = _physical_bits(l2)
    for name, size in (("msrpm_base_pa", 0x2000), ("iopm_base_pa", 0x3000)):
        yield from (Row(f"{name} bit {bit}", put={name: 1 << bit}) for bit in range(bits, 64))
        yield Row(f"{name} ends behind memory", put={name: (1 << bits) - size + 0x1000})
    if offered(l2, "npt"):
        for bit in range(bits, 52):
            row = {"misc_ctl": int(MiscCtl.NP), "nested_cr3": 1 << bit}
            yield Row(f"nested CR3 bit {bit}", put=row)
    if offered(l2, "vnmi"):
        yield Row("V_NMI without the NMI intercept", {"int_ctl": IntCtl.V_NMI_ENABLE})


def injections(_: L2) -> Iterator[Row]:
    """Events that there are not."""
    for kind in (1, 5, 6, 7):
        yield Row(f"event of type {kind}", put={"event_inj": Event(kind, 0x30).word})
    for vector in (*range(34), 64, 127, 128, 255):
        if vector not in EXCEPTIONS:
            word = Event(EventType.EXCEPTION, vector).word
            yield Row(f"exception {vector}", put={"event_inj": word})


def apply(l2: L2, row: Row) -> None:
    """Bring the VMCB into its first state, with the changes of *row*."""
    l2.reset()
    l2.load(NOP)
    for name, bits in row.bits.items():
        l2.vmcb[name] ^= int(bits)
    for name, value in row.put.items():
        l2.vmcb[name] = value


def refused(l2: L2, row: Row) -> list[str]:
    """Run a VMCB that is not legal; return what was not as it must be."""
    apply(l2, row)
    before = bytes(l2.vmcb.page)
    exit_ = l2.resume()
    if exit_ != (SvmExit.INVALID, 0, 0):
        return [f"{row.name}: {exit_}, expected {event_words(SvmExit.INVALID)}"]
    after = bytearray(l2.vmcb.page)
    for name in EXIT_FIELDS:
        place = VMCB[name]
        after[place.offset : place.offset + place.size] = before[place.offset : place.offset + place.size]
    # VMSAVE after the exit writes FS, GS, TR, LDTR and MSRs: the same as before.
    changed = sorted(name for name, place in VMCB.places.items() if place.read(after) != place.read(before))
    return [f"{row.name}: changed {', '.join(changed)}"] if changed else []


@pytest.mark.parametrize("rows", [control_registers, debug_registers, control_area, injections])
def test_refused(l2: L2, rows: Callable[[L2], Iterator[Row]]) -> None:
    """Each illegal field exits with VMEXIT_INVALID; nothing else of the VMCB changes, and L1 goes on.

    AMD APM volume 2, 15.5.1 (Canonicalization and Consistency Checks) and 15.20 (Event Injection).
    """
    l2.reset()
    wrong = [line for row in rows(l2) for line in refused(l2, row)]
    assert not wrong, "\n".join(wrong)
    l2.reset()
    assert l2.run(NOP).code == SvmExit.VMMCALL


def oddities(l2: L2) -> Iterator[Row]:
    """What looks wrong and is not checked."""
    yield Row("reserved bits of DR6 and DR7 below 32", put={"dr6": 0, "dr7": 0})
    yield Row("RFLAGS bit 1 clear", put={"rflags": 0})
    yield Row("CR0.ET clear", {"cr0": CR0.ET})
    yield Row("CPL 0 with DPL 3 of DS", {"ds.attrib": SegmentAttribute.DPL1 | SegmentAttribute.DPL2})
    yield Row("low bits of the maps' addresses", {"msrpm_base_pa": 0xFFF, "iopm_base_pa": 0x801})
    yield Row("an event that is not valid", put={"event_inj": 0x7FF})
    yield Row(
        "reserved bits of an event", put={"event_inj": Event(EventType.SOFT, 3).word & 0x7FFF_FFFF | 0x7000}
    )
    yield Row("reserved bits of int_state", {"int_state": 0xFFFF_FFFC})
    yield Row("all clean bits", put={"clean": 0})
    yield Row("a TLB control that there is not", put={"tlb_ctl": 2})
    yield Row("a high ASID", put={"asid": 0xFFFF_FFFF})
    if l2.npt is None:
        yield Row("g_pat without nested paging", put={"g_pat": 0x0202_0202_0202_0202})
        yield Row("nested CR3 without nested paging", put={"nested_cr3": 1 << 62})


def test_not_checked(l2: L2) -> None:
    """Fields that VMRUN ignores, or whose reserved bits it does, are no reason to refuse.

    AMD APM volume 2, 15.5.1 names all that is checked.
    """
    l2.reset()
    wrong = []
    for row in oddities(l2):
        apply(l2, row)
        exit_ = l2.resume()
        if exit_.code != SvmExit.VMMCALL:
            wrong.append(f"{row.name}: {exit_}")
    assert not wrong, "\n".join(wrong)


def test_global_interrupt_flag(l2: L2) -> None:
    """GIF is clear after the exit, also after one of a VMCB that was refused, until L1 executes STGI.

    AMD APM volume 2, 15.6 #VMEXIT and 15.17 Global Interrupt Flag.
    """
    l2.reset()
    state = l2.vcpu.nested.get
    flags = []
    for asid in (0, 1):
        l2.load(NOP)
        l2.vmcb["asid"] = asid
        # vmrun %rax; out %al, $0x42: the host looks before STGI.
        l2.agent.begin(b"\x0f\x01\xdd\x0f\x01\xd8\xe6\x42\x0f\x01\xdc", rax=l2.pa(l2.vmcb_gva))
        l2.vcpu.next()
        l2.vcpu.complete_io()
        flags.append((l2.vmcb["exit_code"], state().flags))
        l2.agent.end()
        flags.append((0, state().flags))
    gif = 1 << 8
    assert flags == [(SvmExit.INVALID, 0), (0, gif), (SvmExit.VMMCALL, 0), (0, gif)]


def test_page_attribute_table(l2: L2) -> None:
    """With nested paging a PAT with a type that there is not is refused, unless L2 shares L1's.

    AMD APM volume 2, 15.25.4 (G_PAT); KVM_X86_QUIRK_NESTED_SVM_SHARED_PAT.
    """
    if l2.npt is None:
        pytest.skip("L2 has a PAT of its own only with nested paging")
    from kvmpy import KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_NESTED_SVM_SHARED_PAT

    good = 0x0007_0406_0007_0406
    bad = [good & ~(0xFF << 8 * at) | kind << 8 * at for at in range(8) for kind in (2, 3, 8, 0xFF)]
    l2.reset()
    for value in bad:
        apply(l2, Row("shared", put={"g_pat": value}))
        assert l2.resume().code == SvmExit.VMMCALL, f"{value:#x}"
    l2.vm.enable_cap(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_NESTED_SVM_SHARED_PAT)
    rows = [Row(f"PAT {value:#x}", put={"g_pat": value}) for value in bad]
    wrong = [line for row in rows for line in refused(l2, row)]
    assert not wrong, "\n".join(wrong)
