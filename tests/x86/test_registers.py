# SPDX-License-Identifier: Apache-2.0
"""Registers as words."""

from __future__ import annotations

import pytest

from kvmpy.uapi.structs import kvm_debugregs, kvm_regs, kvm_segment, kvm_sregs
from kvmpy.x86 import registers, segments
from kvmpy.x86.bits import CR0, CR4, EFER


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0x2, ""),
        (0x246, "PF ZF IF"),
        (0x3002, "IOPL3"),
        (0x1_0102, "TF RF"),
        (0, "bit1-clear!"),
        (1 << 40 | 2, "bit40"),
    ],
)
def test_rflags(value: int, words: str) -> None:
    assert registers.rflags_words(value) == words


def test_control_registers() -> None:
    assert registers.cr0_words(0x8005_0033) == "PE MP ET NE WP AM PG"
    assert registers.cr4_words(0x3_06B0) == "PSE PAE PGE OSFXSR OSXMMEXCPT FSGSBASE PCIDE"
    assert registers.cr4_words(1 << 12 | 1 << 23 | 1 << 32) == "LA57 CET FRED"
    assert registers.efer_words(0xD01) == "SCE LME LMA NXE"
    assert registers.efer_words(0x1000 | 1 << 33) == "SVME bit33"
    assert registers.xcr0_words(0x2E7) == "X87 SSE AVX OPMASK ZMM_HI256 HI16_ZMM PKRU"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0xFFFF_0FF0, ""),
        (0xFFFF_4FF0, "BS"),
        (0xFFFF_0FF5, "B0 B2"),
        (0xFFFE_0FF0, "RTM"),
        (0xFFFF_07F0, "BLD"),
        (0xFFFF_2FF0, "BD"),
    ],
)
def test_dr6(value: int, words: str) -> None:
    assert registers.dr6_words(value) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0x400, ""),
        (0x401, "L0:execute/1"),
        (0x0D_0402, "G0:write/4"),
        (0x00B0_0704, "L1:read/write/8 LE GE"),
        (0xF000_0480, "G3:read/write/4"),
        (0x2400, "GD"),
        (0, "bit10-clear!"),
    ],
)
def test_dr7(value: int, words: str) -> None:
    assert registers.dr7_words(value) == words


@pytest.mark.parametrize(
    ("cr0", "efer", "cs_l", "cs_db", "rflags", "mode"),
    [
        (0x10, 0, 0, 0, 2, "real"),
        (0x11, 0, 0, 1, 2, "protected 32-bit"),
        (0x11, 0, 0, 0, 2, "protected 16-bit"),
        (0x11, 0, 0, 0, 1 << 17, "virtual-8086"),
        (1 << 31 | 1, 0x500, 1, 0, 2, "64-bit"),
        (1 << 31 | 1, 0x500, 0, 1, 2, "compatibility 32-bit"),
        (1 << 31 | 1, 0x500, 0, 0, 2, "compatibility 16-bit"),
    ],
)
def test_cpu_mode(cr0: int, efer: int, cs_l: int, cs_db: int, rflags: int, mode: str) -> None:
    assert registers.cpu_mode(cr0, efer, cs_l, cs_db, rflags) == mode


@pytest.mark.parametrize(
    ("cr0", "cr4", "efer", "mode"),
    [
        (CR0.PE, CR4.PAE, EFER.LMA, "off"),
        (CR0.PG, 0, 0, "32-bit"),
        (CR0.PG, CR4.PAE, 0, "PAE"),
        (CR0.PG, CR4.PAE, EFER.LMA, "4-level"),
        (CR0.PG, CR4.PAE | CR4.LA57, EFER.LMA, "5-level"),
    ],
)
def test_paging_mode(cr0: int, cr4: int, efer: int, mode: str) -> None:
    assert registers.paging_mode(cr0, cr4, efer) == mode


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"unusable": 1}, "unusable"),
        ({"type": 0xB, "s": 1, "l": 1, "present": 1}, "code/read dpl0 64-bit"),
        ({"type": 0xF, "s": 1, "db": 1, "present": 1, "dpl": 3}, "code/read conforming dpl3 32-bit"),
        ({"type": 0x3, "s": 1, "db": 1, "present": 1}, "data/write dpl0 32-bit"),
        ({"type": 0x5, "s": 1, "present": 0}, "data expand-down dpl0 16-bit not present"),
        ({"type": 0xB, "present": 1}, "tss busy dpl0"),
        ({"type": 0xC, "present": 1}, "system type 12 dpl0"),
    ],
)
def test_segments(fields: dict[str, int], words: str) -> None:
    assert registers.segment_words(kvm_segment(**fields)) == words


def test_general_registers_are_all_told() -> None:
    regs = kvm_regs(
        **{name: number + 1 for number, name in enumerate(registers.GENERAL)}, rip=0x40_1000, rflags=0x46
    )
    text = registers.format_regs(regs)
    assert text.splitlines()[0] == "rip 0000000000401000  rflags 00000046 [PF ZF]"
    for number, name in enumerate(registers.GENERAL):
        assert f"{name:<3} {number + 1:016x}" in text
    assert set(kvm_regs.fields()) == {*registers.GENERAL, "rip", "rflags"}


def test_system_registers_are_told() -> None:
    sregs = kvm_sregs(cr2=0xDEAD_B000, apic_base=0xFEE0_0900)
    segments.long_mode_sregs(sregs, 0x8_0000_1000, 0x7FF_0000, 0x7FF_1000, 0x800_1000, gs_base=0x800_0000)
    sregs.cr2 = 0xDEAD_B000
    lines = registers.format_sregs(sregs).splitlines()
    assert lines[0] == "mode 64-bit, cpl 0, paging 4-level"
    assert lines[1] == "cr0 0000000080010033 [PE MP ET NE WP PG]"
    assert lines[2] == "cr2 00000000deadb000  cr3 0000000800001000  cr8 0"
    assert lines[4:6] == ["efer d01 [SCE LME LMA NXE]", "apic base 0xfee00900 [bsp xapic]"]
    assert "gs  0010 base 0000000008000000 limit ffffffff data/write dpl0 32-bit" in lines
    assert "tr  0030 base 0000000008001000 limit 00000067 tss busy dpl0" in lines
    assert lines[-1] == "idt      base 0000000007ff1000 limit 00000fff"


def test_debug_registers_are_told() -> None:
    debug = kvm_debugregs(dr6=0xFFFF_4FF1, dr7=0x401)
    debug.db[0] = 0x40_1234
    assert registers.format_debugregs(debug).splitlines() == [
        "db0 0000000000401234  db1 0000000000000000  db2 0000000000000000  db3 0000000000000000",
        "dr6 ffff4ff1 [B0 BS]",
        "dr7 00000401 [L0:execute/1]",
    ]
