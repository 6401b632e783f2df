# SPDX-License-Identifier: Apache-2.0
"""The GHCB decoder: what a guest wrote, checked against the specification."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

import pytest

from kvmpy.coco import ghcb
from kvmpy.coco.ghcb import PscEntry
from kvmpy.x86.ghcb import GHCB, VmgExit, set_valid

GPA = 0x7000
BUFFER = GPA + 0x800


def page(exit_code: int, info_1: int = 0, info_2: int = 0, **fields: int) -> bytearray:
    """Return a GHCB as a guest fills it."""
    content = bytearray(4096)
    for name, value in {
        "sw_exit_code": exit_code,
        "sw_exit_info_1": info_1,
        "sw_exit_info_2": info_2,
        **fields,
    }.items():
        set_valid(content, name, value)
    GHCB.write(content, "protocol_version", 2)
    return content


def psc(*entries: PscEntry | int, current: int = 0, last: int | None = None, reserved: int = 0) -> bytearray:
    """Return a GHCB with a page state change."""
    ghcb_page = page(VmgExit.PSC, sw_scratch=BUFFER)
    end = len(entries) - 1 if last is None else last
    struct.pack_into("<HHI", ghcb_page, 0x800, current, end, reserved)
    for number, entry in enumerate(entries):
        struct.pack_into("<Q", ghcb_page, 0x808 + 8 * number, int(entry))
    return ghcb_page


GOOD = {
    "out": page(0x7B, 0xE6 << 16 | 0x240, 0, rax=1),
    "in": page(0x7B, 0xE6 << 16 | 0x211, 0),
    "rep outsb": page(0x7B, 0xE6 << 16 | 0x21C, 100, sw_scratch=BUFFER),
    "cpuid": page(0x72, rax=1, rcx=0),
    "cpuid 0xd": page(0x72, rax=0xD, rcx=0, xcr0=1),
    "rdmsr": page(0x7C, 0, rcx=0x10),
    "wrmsr": page(0x7C, 1, rcx=0x10, rax=1, rdx=0),
    "vmmcall": page(0x81, rax=12, cpl=0),
    "mmio read": page(VmgExit.MMIO_READ, 0xFEE00020, 4, sw_scratch=BUFFER),
    "mmio write": page(VmgExit.MMIO_WRITE, 0xFEE00020, 8, sw_scratch=BUFFER),
    "psc": psc(PscEntry(0x200, 1, True, 0), PscEntry(0x401, 2, False, 0)),
    "guest request": page(VmgExit.GUEST_REQUEST, 0x8000, 0x9000),
    "extended request": page(VmgExit.EXT_GUEST_REQUEST, 0x8000, 0x9000, rax=0xA000, rbx=1),
    "ap creation": page(VmgExit.AP_CREATION, 1 << 32 | 1, 0x5000, rax=1),
    "ap destroy": page(VmgExit.AP_CREATION, 1 << 32 | 2, 0),
    "features": page(VmgExit.HV_FEATURES),
    "termination": page(VmgExit.TERM_REQUEST),
    "wbinvd": page(0x89),
}

BAD: dict[str, tuple[Callable[[bytearray], None], str]] = {
    "version": (lambda p: GHCB.write(p, "protocol_version", 9), "protocol version 9"),
    "usage": (lambda p: GHCB.write(p, "ghcb_usage", 1), "usage 0x1"),
    "reserved": (lambda p: p.__setitem__(0x20, 7), "reserved bytes 0x0 to"),
    "reserved tail": (lambda p: p.__setitem__(0xFF4, 7), r"at 0xff4: 0x7"),
    "no code": (
        lambda p: p.__setitem__(slice(0x3F0, 0x400), bytes(16)),
        "sw_exit_code is not declared valid",
    ),
    "bitmap": (lambda p: p.__setitem__(0x3F0, 1), "valid bitmap names quadword 0x0"),
}


@pytest.mark.parametrize("name", GOOD)
def test_nothing_wrong(name: str) -> None:
    """A request as the specification wants it has no problems."""
    assert ghcb.decode(GOOD[name], gpa=GPA).problems == ()


@pytest.mark.parametrize("name", BAD)
def test_the_page_itself(name: str) -> None:
    """Version, usage, reserved bytes and the bitmap are checked for every event."""
    change, words = BAD[name]
    ghcb_page = page(VmgExit.HV_FEATURES)
    change(ghcb_page)
    problems = ghcb.decode(ghcb_page, gpa=GPA).problems
    assert any(re.search(words, problem) for problem in problems), problems


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (page(0x123), "exit code 0x123 is none"),
        (page(0x7B, 0xE6 << 16 | 0x240), "rax is not declared valid"),
        (page(0x7B, 0xE6 << 16 | 0x270, rax=1), "names 3 operand sizes"),
        (page(0x7B, 0xE6 << 16 | 0x201), "names 0 operand sizes"),
        (page(0x7B, 0xE6 << 16 | 0x391), "several address sizes"),
        (page(0x7B, 0xE6 << 16 | 0x213), "reserved bits set"),
        (page(0x7B, 0xE6 << 16 | 0x21C, 1), "sw_scratch is not declared valid"),
        (page(0x7B, 0xE6 << 16 | 0x21C, 2033, sw_scratch=BUFFER), "outside the shared buffer"),
        (page(0x72, rax=0xD, rcx=0), "xcr0 is not declared valid"),
        (page(0x72, rax=1), "rcx is not declared valid"),
        (page(0x7C, 2, rcx=1, rax=0, rdx=0), "neither a read"),
        (page(0x7C, 1, rcx=1, rax=1), "rdx is not declared valid"),
        (page(0x81, rax=1), "cpl is not declared valid"),
        (page(VmgExit.MMIO_READ, 0, 9, sw_scratch=BUFFER), "MMIO access of 9 bytes"),
        (page(VmgExit.MMIO_WRITE, 0, 4, sw_scratch=GPA), "outside the shared buffer"),
        (page(VmgExit.MMIO_READ, 0, 4), "sw_scratch is not declared valid"),
        (psc(PscEntry(0x201, 1, True, 0)), "gfn 0x201 does not begin"),
        (psc(PscEntry(0x300, 1, True, 0)), "gfn 0x300 does not begin"),
        (psc(PscEntry(1, 7, False, 0)), "operation 7 is unknown"),
        (psc(PscEntry(1, 1, False, 2)), "2 pages are said to be done"),
        (psc(1 << 63 | int(PscEntry(1, 1, False, 0))), "reserved bits are set"),
        (psc(PscEntry(1, 1, False, 0), last=253), "the last entry is 253"),
        (psc(PscEntry(1, 1, False, 0), current=2), "current entry 2 is behind"),
        (psc(PscEntry(1, 1, False, 0), reserved=1), "header of the page state change"),
        (page(VmgExit.GUEST_REQUEST, 0x8001, 0x9000), "request page 0x8001 is not aligned"),
        (page(VmgExit.GUEST_REQUEST, 0x8000, 0x8000), "the same page"),
        (page(VmgExit.EXT_GUEST_REQUEST, 0x8000, 0x9000, rax=1), "rbx is not declared valid"),
        (page(VmgExit.AP_CREATION, 1, 0x5001, rax=1), "not page aligned"),
        (page(VmgExit.AP_CREATION, 1, 0x200000, rax=1), "begins a 2 MiB page"),
        (page(VmgExit.AP_CREATION, 5, 0x5000, rax=1), "request 0x5 is unknown"),
        (page(VmgExit.AP_CREATION, 1, 0x5000), "rax is not declared valid"),
    ],
)
def test_an_event(made: bytearray, words: str) -> None:
    """Each event's own rules are checked, and nothing else is complained about."""
    decoded = ghcb.decode(made, gpa=GPA).problems
    assert len(decoded) == 1, decoded
    assert words in decoded[0]


def test_after_kvm_took_the_request() -> None:
    """KVM clears the bitmap: what is read at an exit shows its fields all the same."""
    value = GOOD["cpuid"][:]
    value[0x3F0:0x400] = bytes(16)
    assert ghcb.decode(value, gpa=GPA).problems != ()
    problems = ghcb.decode(value, gpa=GPA, taken=True)
    assert problems.problems == ()
    assert problems.fields["rax"] == 1


def test_as_text() -> None:
    """The lines say what was asked for and what is wrong."""
    lines = list(ghcb.decode(page(0x7C, 1, rcx=0x10, rax=1), gpa=GPA).lines())
    assert lines == [
        "MSR (0x7c) info 0x1 0x0, protocol 2",
        "rax 0x1 rcx 0x10",
        "wrong: rdx is not declared valid",
    ]


def test_a_page_cut_short() -> None:
    """A GHCB is a page."""
    with pytest.raises(ValueError, match="4096 bytes, not 100"):
        ghcb.decode(bytes(100))
