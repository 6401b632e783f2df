# SPDX-License-Identifier: Apache-2.0
"""A VMCB by names, what an exit says in words, and nested state as a value."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.uapi.structs import kvm_nested_state
from kvmpy.x86 import pferr
from kvmpy.x86.exceptions import Vector
from kvmpy.x86.nested_state import SvmNestedState
from kvmpy.x86.svm_exits import INTERCEPTS, SvmExit
from kvmpy.x86.vmcb import (
    VMCB,
    VMCB_SIZE,
    Event,
    EventType,
    IntCtl,
    Vmcb,
    exit_words,
    int_ctl_words,
    intercept_names,
    msrpm_bit,
)


def test_fields_by_name() -> None:
    page = bytearray(VMCB_SIZE)
    block = Vmcb(page)
    block["rip"] = 0x1234
    block["cs.attrib"] = 0x29B
    assert page[0x578:0x57A] == b"\x34\x12"
    assert (block["rip"], block["cs.attrib"]) == (0x1234, 0x29B)
    with pytest.raises(KeyError, match="did you mean rip"):
        block["ripp"]
    with pytest.raises(OverflowError, match="does not fit"):
        block["tlb_ctl"] = 256
    with pytest.raises(TypeError, match="is a copy"):
        Vmcb(bytes(page))["rip"] = 1


@given(st.sets(st.integers(0, INTERCEPTS - 1)), st.sets(st.integers(0, INTERCEPTS - 1)))
def test_intercepts_by_number(put: set[int], clear: set[int]) -> None:
    block = Vmcb(bytearray(VMCB_SIZE))
    block.intercept(*put)
    block.intercept(*clear, on=False)
    assert block.intercepts == put - clear
    assert len(intercept_names(block.page)) == len(put - clear)


def test_where_intercepts_are() -> None:
    """APM volume 2, table B-1: the vector at 0Ch begins with INTR, that at 10h with VMRUN."""
    block = Vmcb(bytearray(VMCB_SIZE))
    block.intercept(SvmExit.VMRUN, SvmExit.INTR, SvmExit.WRITE_CR3, SvmExit.EXCP_BASE + Vector.PF, 0xAF)
    assert (block["intercept_4"], block["intercept_3"], block["intercept_cr"]) == (1, 1, 1 << 19)
    assert block["intercept_exceptions"] == 1 << 14
    assert intercept_names(block.page) == ["CR3 write", "#PF", "INTR", "VMRUN", "bit175"]
    with pytest.raises(ValueError, match=r"NPF.* has no intercept bit"):
        block.intercept(SvmExit.NPF)


@pytest.mark.parametrize(
    ("code", "info1", "info2", "words"),
    [
        (SvmExit.IOIO, 0x00E6_0240, 0x401005, "out port 0xe6, 4 bytes; next rip 0x401005"),
        (SvmExit.IOIO, 0x0080_1C1D, 5, "rep ins port 0x80, 1 byte, segment 7; next rip 0x5"),
        (SvmExit.IOIO, 0x0080_021D, 5, "rep ins port 0x80, 1 byte, es, 64-bit addresses; next rip 0x5"),
        (SvmExit.MSR, 1, 0, "WRMSR"),
        (SvmExit.MSR, 0, 0, "RDMSR"),
        (SvmExit.READ_CR3, 1 << 63 | 3, 0, "MOV, general register 3"),
        (SvmExit.WRITE_DR7, 5, 0, "general register 5"),
        (SvmExit.SWINT, 0x80, 0, "INT 0x80"),
        (SvmExit.INVLPG, 0x7000, 0, "address 0x7000"),
        (SvmExit.TASK_SWITCH, 0x28, 1 << 44 | 1 << 36 | 7, "to selector 0x28 by IRET, error code 0x7"),
        (SvmExit.EXCP_BASE + 14, 2, 0x9000, "address 0x9000: supervisor write, page not present"),
        (SvmExit.EXCP_BASE + 13, 0x62, 0, "IDT vector 12"),
        (SvmExit.EXCP_BASE + 6, 0x62, 0, ""),
        (
            SvmExit.NPF, 1 << 32 | 5, 0x5000,
            "guest-physical address 0x5000: " + str(pferr.decode(1 << 32 | 5)),
        ),
        (SvmExit.CPUID, 1, 2, ""),
    ],
)  # fmt: skip
def test_what_an_exit_says(code: int, info1: int, info2: int, words: str) -> None:
    assert exit_words(code, info1, info2) == words


@pytest.mark.parametrize(
    ("event", "word", "text"),
    [
        (Event(EventType.INTR, 0x30), 0x8000_0030, "interrupt 0x30"),
        (Event(EventType.NMI, 2), 0x8000_0202, "NMI"),
        (Event(EventType.EXCEPTION, 13, 0x62), 0x8000_0B0D, "#GP general protection (0x62: IDT vector 12)"),
        (Event(EventType.EXCEPTION, 6), 0x8000_0306, "#UD invalid opcode"),
        (Event(EventType.SOFT, 0x80), 0x8000_0480, "INT 0x80"),
        (Event(5, 1), 0x8000_0501, "type 5, vector 0x1"),
    ],
)
def test_events(event: Event, word: int, text: str) -> None:
    """APM volume 2, figure 15-4."""
    assert (event.word, str(event)) == (word, text)
    block = Vmcb(bytearray(VMCB_SIZE))
    seen = [block.injected]
    for each in (event, None):
        block.inject(each)
        seen.append(block.injected)
    assert seen == [None, event, None]
    assert (block["event_inj"], block["event_inj_err"]) == (0, 0)


def test_an_exit_as_text() -> None:
    block = Vmcb(VMCB.pack({"exit_code": 0x4E, "exit_info_2": 0x8000, "exit_int_info": 0x8000_0B08}))
    assert block.exit_text() == (
        "exception #PF (0x4e): address 0x8000: supervisor read, page not present; "
        "while delivering #DF double fault (0x0: always zero)"
    )
    assert Vmcb(VMCB.pack({"exit_code": 2**64 - 1})).exit_text() == "invalid state (0xffffffffffffffff)"


def test_interrupt_control_as_words() -> None:
    assert int_ctl_words(0x0305_0103) == "V_TPR=0x3 V_INTR_PRIO=5 V_IRQ V_INTR_MASKING V_GIF_ENABLE"
    assert int_ctl_words(IntCtl.V_GIF) == "V_GIF"


@pytest.mark.parametrize(
    ("msr", "bit"),
    [(0, 0), (0x1FFF, 0x3FFE), (0xC000_0080, 0x4100), (0xC001_0000, 0x8000), (0xC001_1FFF, 0xBFFE)],
)
def test_bits_of_msrs(msr: int, bit: int) -> None:
    """APM volume 2, 15.11: 2 KiB for each of three ranges."""
    assert msrpm_bit(msr) == bit


@pytest.mark.parametrize("msr", [0x2000, 0xBFFF_FFFF, 0xC000_2000, 0xC001_2000, 0x4B56_4D00])
def test_msrs_without_bits(msr: int) -> None:
    with pytest.raises(ValueError, match=f"MSR {msr:#x} has no bits"):
        msrpm_bit(msr)


def test_nested_state() -> None:
    outside = SvmNestedState(gif=False)
    struct = outside.to_struct()
    assert (struct.flags, struct.format, struct.size) == (0, 1, kvm_nested_state.SIZE)
    assert SvmNestedState.of(struct) == outside
    page = Vmcb(bytearray(VMCB.pack({"asid": 7, "rip": 0x400})))
    inside = SvmNestedState(guest_mode=True, run_pending=True, vmcb_pa=0x5000, gpat=6, vmcb=page)
    struct = inside.to_struct()
    assert (struct.flags, struct.size) == (0x103, kvm_nested_state.SIZE + VMCB_SIZE)
    again = SvmNestedState.of(kvm_nested_state.from_bytes(struct.to_bytes()))
    assert (again.guest_mode, again.run_pending, again.gif) == (True, True, True)
    assert (again.vmcb_pa, again.gpat) == (0x5000, 6)
    assert again.vmcb is not None
    assert (again.vmcb["asid"], again.vmcb["rip"]) == (7, 0x400)
    struct.format = 0
    with pytest.raises(ValueError, match="is not SVM's"):
        SvmNestedState.of(struct)
