# SPDX-License-Identifier: Apache-2.0
"""Descriptor tables byte by byte, and the segment state of each mode."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.uapi.structs import kvm_segment, kvm_sregs, kvm_sregs2
from kvmpy.x86 import segments
from kvmpy.x86.registers import cpu_mode, paging_mode
from kvmpy.x86.segments import Descriptor

if TYPE_CHECKING:
    from kvmpy.x86.segments import Sregs

CR3 = 1 << 51 | 0x1000
GDT, IDT, TSS = 0x7FF_0000, 0x7FF_1000, 0x800_1000
NAMES = ("cs", "ds", "es", "ss", "fs", "gs")


def entry(table: bytes, selector: int) -> int:
    """Return the 8-byte descriptor of *selector*."""
    return int(struct.unpack_from("<Q", table, selector & 0xFFF8)[0])


@pytest.mark.parametrize(
    ("selector", "value"),
    [
        (0, 0),
        (segments.KERNEL_CS, 0x00AF_9B00_0000_FFFF),
        (segments.KERNEL_DS, 0x00CF_9300_0000_FFFF),
        (segments.USER_CS32, 0x00CF_FB00_0000_FFFF),
        (segments.USER_DS, 0x00CF_F300_0000_FFFF),
        (segments.USER_CS, 0x00AF_FB00_0000_FFFF),
        (segments.KERNEL_CS32, 0x00CF_9B00_0000_FFFF),
        (segments.KERNEL_CS16, 0x0000_9B00_0000_FFFF),
        (segments.KERNEL_DS16, 0x0000_9300_0000_FFFF),
    ],
)
def test_gdt_entries(selector: int, value: int) -> None:
    assert entry(segments.gdt(), selector) == value


def test_gdt_limit_covers_the_table() -> None:
    assert len(segments.gdt()) == segments.GDT_LIMIT + 1


def test_selectors_fit_syscall_and_sysret() -> None:
    # SYSCALL: CS = STAR[47:32], SS = that + 8.  SYSRET: CS = STAR[63:48] + 16, SS = that + 8, both with RPL
    # 3.
    kernel, user = segments.STAR >> 32 & 0xFFFF, segments.STAR >> 48
    assert (kernel, kernel + 8) == (segments.KERNEL_CS, segments.KERNEL_DS)
    assert ((user + 16) | 3, (user + 8) | 3, user | 3) == (
        segments.USER_CS,
        segments.USER_DS,
        segments.USER_CS32,
    )


def test_tss_descriptor_has_64_bit_base() -> None:
    table = segments.gdt(0xFFFF_8123_4567_89A0)
    low, high = struct.unpack_from("<QQ", table, segments.TSS_SELECTOR)
    assert Descriptor.decode(low) == Descriptor(0x4567_89A0, 103, 9, 0, 0, 1, 0, 0, 0, 0)
    assert high == 0xFFFF_8123


descriptors = st.builds(
    Descriptor,
    base=st.integers(0, 2**32 - 1),
    limit=st.integers(0, 2**20 - 1),
    type=st.integers(0, 15),
    s=st.integers(0, 1),
    dpl=st.integers(0, 3),
    present=st.integers(0, 1),
    avl=st.integers(0, 1),
    l=st.integers(0, 1),
    db=st.integers(0, 1),
    g=st.integers(0, 1),
).map(lambda d: d._replace(limit=d.limit << 12 | 0xFFF) if d.g else d)


@given(descriptors)
def test_descriptors_survive_encoding(descriptor: Descriptor) -> None:
    assert Descriptor.decode(descriptor.encode()) == descriptor


@pytest.mark.parametrize(
    ("limit", "g", "base"), [(0x1000, 1, 0), (0x10_0000, 0, 0), (0, 0, 1 << 32), (-1, 0, 0)]
)
def test_descriptors_that_cannot_be_encoded(limit: int, g: int, base: int) -> None:
    with pytest.raises(ValueError, match="limit"):
        Descriptor(base, limit, 3, 1, 0, 1, 0, 0, 0, g).encode()


def test_tss_fields() -> None:
    raw = segments.tss(rsp0=0x1111, rsp1=0x2222, rsp2=0x3333, ist={1: 0xAAAA_BBBB_CCCC, 7: 0x7777})
    assert len(raw) == 104
    assert struct.unpack_from("<QQQ", raw, 4) == (0x1111, 0x2222, 0x3333)
    assert struct.unpack_from("<7Q", raw, 36) == (0xAAAA_BBBB_CCCC, 0, 0, 0, 0, 0, 0x7777)
    assert struct.unpack_from("<H", raw, 102) == (104,)
    assert raw[:4] + raw[28:36] + raw[92:102] == bytes(22)


def test_tss32_fields() -> None:
    raw = segments.tss32(esp0=0x1234, cr3=0x5000)
    assert len(raw) == 104
    assert struct.unpack_from("<IH", raw, 4) == (0x1234, segments.KERNEL_DS)
    assert struct.unpack_from("<I", raw, 28) == (0x5000,)


def test_task_state_fields() -> None:
    """Offsets of AMD APM volume 2, figures 12-6 and 12-5."""
    raw = segments.tss32(eip=1, eflags=2, eax=3, esp=4, edi=5, es=6, cs=7, gs=8, trap=0x68_0001, link=10)
    assert struct.unpack_from("<III", raw, 32) == (1, 2, 3)
    assert struct.unpack_from("<I", raw, 56) == (4,)
    assert struct.unpack_from("<III", raw, 68) == (5, 6, 7)
    assert struct.unpack_from("<IIHH", raw, 92) == (8, 0, 1, 0x68)
    assert struct.unpack_from("<I", raw) == (10,)
    small = segments.tss16(link=1, ip=2, flags=3, ax=4, di=5, es=6, ds=7, ldt=8)
    assert (len(small), struct.unpack_from("<3H", small, 14)) == (44, (2, 3, 4))
    assert struct.unpack_from("<2H", small, 32) == (5, 6)
    assert struct.unpack_from("<2H", small, 40) == (7, 8)


def test_gate32() -> None:
    """AMD APM volume 2, figure 4-18 and 4-22."""
    gate = segments.gate32(0x1234_5678, 0x40, segments.CALL_GATE32, dpl=3, count=5)
    assert gate.to_bytes(8, "little") == bytes.fromhex("7856 4000 05 ec 3412")
    assert segments.gate32(0, 0x68, segments.TASK_GATE).to_bytes(8, "little") == bytes.fromhex(
        "0000 6800 00 85 0000"
    )


@pytest.mark.parametrize("index", [0, 8, -1])
def test_ist_index_is_checked(index: int) -> None:
    with pytest.raises(ValueError, match="IST index"):
        segments.tss(ist={index: 0x1000})


def test_idt_gates() -> None:
    table = segments.idt(0xFFFF_8000_1234_5670, stride=16, ist={8: 1, 2: 2}, dpl3=(3, 4))
    assert len(table) == 4096
    for vector in range(256):
        low, selector, ist, access, middle, high, zero = struct.unpack_from("<HHBBHII", table, vector * 16)
        assert high << 32 | middle << 16 | low == 0xFFFF_8000_1234_5670 + vector * 16
        assert (selector, zero) == (segments.KERNEL_CS, 0)
        assert ist == {8: 1, 2: 2}.get(vector, 0)
        assert access == (0xEE if vector in (3, 4) else 0x8E)


def test_idt32_gates() -> None:
    table = segments.idt32(0x12_3450, stride=32)
    assert len(table) == 2048
    for vector in (0, 3, 255):
        low, selector, zero, access, high = struct.unpack_from("<HHBBH", table, vector * 8)
        assert high << 16 | low == 0x12_3450 + vector * 32
        assert (selector, zero, access) == (segments.KERNEL_CS32, 0, 0xEE if vector == 3 else 0x8E)


def test_bad_gate() -> None:
    with pytest.raises(ValueError, match="IST index 8"):
        segments.gate(0x1000, ist=8)


@pytest.mark.parametrize("selector", [0x58, 0x0C, 0x0, segments.TSS_SELECTOR])
def test_load_refuses_what_the_table_lacks(selector: int) -> None:
    with pytest.raises(ValueError, match=f"selector {selector:#x}"):
        segments.load(kvm_segment(), selector, segments.gdt())


def long_mode(sregs: Sregs) -> None:
    """64-bit mode, ring 0."""
    segments.long_mode_sregs(sregs, CR3, GDT, IDT, TSS)


def five_levels(sregs: Sregs) -> None:
    """64-bit mode with 5-level paging."""
    segments.long_mode_sregs(sregs, CR3, GDT, IDT, TSS, levels=5)


def compatibility(sregs: Sregs) -> None:
    """32-bit compatibility mode, ring 0."""
    segments.compat_mode_sregs(sregs, CR3, GDT, IDT, TSS)


def compatibility_user(sregs: Sregs) -> None:
    """32-bit compatibility mode, ring 3."""
    segments.compat_mode_sregs(sregs, CR3, GDT, IDT, TSS, user=True)


def user(sregs: Sregs) -> None:
    """64-bit mode, ring 3."""
    segments.long_mode_sregs(sregs, CR3, GDT, IDT, TSS)
    segments.user_mode_sregs(sregs)


def protected(sregs: Sregs) -> None:
    """32-bit protected mode without paging."""
    segments.protected_mode_sregs(sregs, GDT, IDT, TSS)


def protected_paging(sregs: Sregs) -> None:
    """32-bit protected mode with 2-level paging."""
    segments.protected_mode_sregs(sregs, GDT, IDT, TSS, cr3=0x5000)


def real(sregs: Sregs) -> None:
    """Real mode."""
    segments.real_mode_sregs(sregs, 0x1234)


@pytest.mark.parametrize("kind", [kvm_sregs, kvm_sregs2])
@pytest.mark.parametrize(
    ("make", "mode", "paging", "cpl"),
    [
        (long_mode, "64-bit", "4-level", 0),
        (five_levels, "64-bit", "5-level", 0),
        (compatibility, "compatibility 32-bit", "4-level", 0),
        (compatibility_user, "compatibility 32-bit", "4-level", 3),
        (user, "64-bit", "4-level", 3),
        (protected, "protected 32-bit", "off", 0),
        (protected_paging, "protected 32-bit", "32-bit", 0),
        (real, "real", "off", 0),
    ],
)
def test_modes(
    kind: type[kvm_sregs] | type[kvm_sregs2], make: Callable[[Sregs], None], mode: str, paging: str, cpl: int
) -> None:
    # Garbage first: a set-up must not depend on what was there.
    sregs = kind.from_bytes(b"\xa5" * kind().size)
    make(sregs)
    assert cpu_mode(sregs.cr0, sregs.efer, sregs.cs.l, sregs.cs.db) == mode
    assert paging_mode(sregs.cr0, sregs.cr4, sregs.efer) == paging
    assert (sregs.ss.dpl, sregs.cs.dpl) == (cpl, cpl)
    assert all(getattr(sregs, name).present and not getattr(sregs, name).unusable for name in NAMES)
    assert sregs.ldt.unusable
    assert not sregs.ldt.present
    assert sregs.tr.present
    assert (sregs.tr.type, sregs.tr.s) == (segments.TSS_BUSY, 0)


@pytest.mark.parametrize(
    "make", [long_mode, five_levels, compatibility, compatibility_user, user, protected, protected_paging]
)
def test_segment_registers_are_what_the_gdt_says(make: Callable[[Sregs], None]) -> None:
    sregs = kvm_sregs()
    make(sregs)
    assert (sregs.gdt.base, sregs.gdt.limit) == (GDT, len(segments.gdt()) - 1)
    for name in NAMES:
        segment = getattr(sregs, name)
        descriptor = Descriptor.decode(entry(segments.gdt(), segment.selector))
        assert descriptor == Descriptor(
            segment.base, segment.limit, segment.type, segment.s, segment.dpl, segment.present,
            segment.avl, segment.l, segment.db, segment.g,
        )  # fmt: skip


def test_long_mode_registers() -> None:
    sregs = kvm_sregs(cr8=3, apic_base=0xFEE0_0900)
    segments.long_mode_sregs(
        sregs,
        CR3,
        GDT,
        IDT,
        TSS,
        fs_base=0x1111,
        gs_base=0xFFFF_8000_0000_0000,
        cr0=1 << 18,
        cr4=1 << 16,
        efer=1 << 15,
    )
    assert sregs.cr0 == 0x8005_0033
    assert sregs.cr4 == 0x1_06A0
    assert sregs.efer == 0x8D01
    assert sregs.cr3 == CR3
    assert (sregs.fs.base, sregs.gs.base) == (0x1111, 0xFFFF_8000_0000_0000)
    assert (sregs.idt.base, sregs.idt.limit) == (IDT, 4095)
    assert (sregs.tr.base, sregs.tr.limit, sregs.tr.selector) == (TSS, 103, segments.TSS_SELECTOR)
    assert (sregs.cr8, sregs.apic_base) == (3, 0xFEE0_0900)


def test_user_mode_keeps_the_bases() -> None:
    sregs = kvm_sregs()
    segments.long_mode_sregs(sregs, CR3, GDT, IDT, TSS, fs_base=0x1111, gs_base=0x2222)
    segments.user_mode_sregs(sregs)
    assert (sregs.fs.base, sregs.gs.base, sregs.cs.selector, sregs.ss.selector) == (
        0x1111,
        0x2222,
        0x2B,
        0x23,
    )


def test_real_mode_bases() -> None:
    sregs = kvm_sregs()
    segments.real_mode_sregs(sregs, 0xF000)
    assert {getattr(sregs, name).base for name in NAMES} == {0xF_0000}
    assert {getattr(sregs, name).limit for name in NAMES} == {0xFFFF}
    assert (sregs.idt.base, sregs.idt.limit, sregs.cr0) == (0, 0x3FF, 0x10)
    with pytest.raises(ValueError, match="16-bit"):
        segments.real_mode_sregs(sregs, 0x1_0000)
