# SPDX-License-Identifier: Apache-2.0
"""The XSAVE area."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.uapi.structs import kvm_xsave
from kvmpy.x86 import xsave
from kvmpy.x86.cpuid import SIGNIFICANT_INDEX, Cpuid, CpuidEntry
from kvmpy.x86.xsave import Component, Layout, XsaveArea


def leaf(index: int, size: int, offset: int, ecx: int = 0) -> CpuidEntry:
    """Return a subleaf of leaf 0xD."""
    return CpuidEntry(0xD, index, SIGNIFICANT_INDEX, size, offset, ecx, 0)


AVX512 = Cpuid(
    [
        CpuidEntry(0xD, 0, SIGNIFICANT_INDEX, 0x2E7, 2696, 2696, 0),
        CpuidEntry(0xD, 1, SIGNIFICANT_INDEX, 0xF, 0, 0, 0),
        leaf(2, 256, 576),
        leaf(5, 64, 1088),
        leaf(6, 512, 1152),
        leaf(7, 1024, 1664),
        leaf(9, 8, 2688),
        leaf(11, 16, 0, ecx=1),
    ]
)
LAYOUT = Layout.from_cpuid(AVX512)


def test_layout_from_cpuid() -> None:
    assert LAYOUT.components == {
        0: Component(0, 0, 160),
        1: Component(1, 160, 256),
        2: Component(2, 576, 256),
        5: Component(5, 1088, 64),
        6: Component(6, 1152, 512),
        7: Component(7, 1664, 1024),
        9: Component(9, 2688, 8),
    }
    assert LAYOUT.size == 2696
    assert "ZMM_HI256" in str(LAYOUT)


def test_layout_without_extensions() -> None:
    assert Layout.from_cpuid(Cpuid()).size == 576
    assert list(Layout.from_cpuid(Cpuid()).components) == [0, 1]


def test_supervisor_components_have_no_place() -> None:
    offered = AVX512.copy()
    entry = offered.find(0xD, 0)
    assert entry is not None
    entry.eax |= 1 << 11
    assert 11 not in Layout.from_cpuid(offered).components


def test_initial_values() -> None:
    area = XsaveArea.initial(LAYOUT)
    assert (area.fcw, area.fsw, area.ftw, area.mxcsr, area.xstate_bv) == (0x37F, 0, 0, 0x1F80, 0)
    assert area.zmm(31) == bytes(64)
    assert area.st(7) == bytes(10)
    assert len(area.to_struct().to_bytes()) == 4096


@pytest.mark.parametrize(
    ("number", "pieces"),
    [
        (0, [(160, 0, 16), (576, 16, 32), (1152, 32, 64)]),
        (15, [(400, 0, 16), (816, 16, 32), (1632, 32, 64)]),
        (16, [(1664, 0, 64)]),
        (31, [(2624, 0, 64)]),
    ],
)
def test_where_zmm_registers_lie(number: int, pieces: list[tuple[int, int, int]]) -> None:
    area = XsaveArea.initial(LAYOUT)
    value = bytes(range(1, 65))
    area.set_zmm(number, value)
    for offset, first, end in pieces:
        assert area.data[offset : offset + end - first] == value[first:end]
    assert area.zmm(number) == value
    assert area.ymm(number) == value[:32]
    assert area.xmm(number) == value[:16]


@given(st.lists(st.tuples(st.integers(0, 31), st.binary(min_size=64, max_size=64)), max_size=20))
def test_registers_do_not_disturb_each_other(writes: list[tuple[int, bytes]]) -> None:
    area = XsaveArea.initial(LAYOUT)
    model = [bytes(64)] * 32
    for number, value in writes:
        area.set_zmm(number, value)
        model[number] = value
    assert [area.zmm(number) for number in range(32)] == model
    assert XsaveArea.from_struct(area.to_struct(), LAYOUT).data == area.data


def test_setting_xmm_keeps_the_upper_part() -> None:
    area = XsaveArea.initial(LAYOUT)
    area.set_ymm(3, b"\x11" * 16 + b"\x22" * 16)
    area.set_xmm(3, b"\x33" * 16)
    assert area.ymm(3) == b"\x33" * 16 + b"\x22" * 16


@pytest.mark.parametrize(
    ("write", "bits"),
    [
        (lambda area: area.set_st(0, bytes(10)), 0x1),
        (lambda area: area.set_xmm(0, bytes(16)), 0x2),
        (lambda area: area.set_ymm(0, bytes(32)), 0x6),
        (lambda area: area.set_opmask(7, 5), 0x20),
        (lambda area: area.set_zmm(0, bytes(64)), 0x46),
        (lambda area: area.set_zmm(16, bytes(64)), 0x80),
        (lambda area: setattr(area, "pkru", 4), 0x200),
        (lambda area: setattr(area, "mxcsr", 0x1FA0), 0x2),
        (lambda area: setattr(area, "fcw", 0x27F), 0x1),
    ],
)
def test_writing_sets_the_bit_in_xstate_bv(write: object, bits: int) -> None:
    area = XsaveArea.initial(LAYOUT)
    write(area)  # type: ignore[operator]
    assert area.xstate_bv == bits
    assert struct.unpack_from("<Q", area.data, 512) == (bits,)


def test_a_component_in_its_initial_state_reads_as_such() -> None:
    # XSAVEOPT leaves stale bytes behind when it clears a bit of XSTATE_BV.
    raw = bytearray(b"\xee" * 2696)
    raw[512:576] = bytes(64)
    area = XsaveArea(raw, LAYOUT)
    assert (area.fcw, area.mxcsr, area.pkru, area.opmask(0)) == (0x37F, 0x1F80, 0, 0)
    assert area.zmm(0) == area.zmm(16) == bytes(64)
    area.set_xmm(1, b"\x01" * 16)
    area.set_opmask(1, 7)
    area.set_st(2, b"\x02" * 10)
    # What becomes visible with the bit must not be stale.
    assert area.xmm(0) == bytes(16)
    assert area.opmask(0) == 0
    assert (area.st(0), area.fcw, area.fsw) == (bytes(10), 0x37F, 0)
    assert area.mxcsr == 0x1F80


def test_x87_registers() -> None:
    area = XsaveArea.initial(LAYOUT)
    one = bytes.fromhex("0000000000000080ff3f")
    area.set_st(1, one)
    area.fsw, area.ftw = 0x3800, 0x80
    assert area.data[48:58] == one
    assert (area.st(1), area.fsw, area.ftw) == (one, 0x3800, 0x80)
    assert "st1 3fff8000000000000000" in str(area)


def test_other_registers() -> None:
    area = XsaveArea.initial(LAYOUT)
    area.pkru, area.mxcsr = 0x5555_5554, 0x1FC0
    area.set_opmask(3, 0xFFFF_0000_FFFF_0000)
    assert (area.pkru, area.mxcsr, area.opmask(3)) == (0x5555_5554, 0x1FC0, 0xFFFF_0000_FFFF_0000)
    assert struct.unpack_from("<I", area.data, 2688) == (0x5555_5554,)


def test_text_shows_what_is_in_use() -> None:
    area = XsaveArea.initial(LAYOUT)
    assert str(area).splitlines()[0] == "in use: nothing"
    area.set_xmm(2, bytes(15) + b"\x80")
    assert str(area).splitlines() == [
        "in use: SSE",
        "fcw 037f fsw 0000 ftw 00 mxcsr 00001f80",
        "xmm2  80000000000000000000000000000000",
    ]
    area.set_ymm(2, bytes(31) + b"\x40")
    assert str(area).splitlines()[-1] == "ymm2  40" + "00" * 31


def test_what_the_cpu_lacks_is_refused() -> None:
    area = XsaveArea.initial(Layout.from_cpuid(Cpuid()))
    with pytest.raises(LookupError, match=r"component 2 \(AVX\)"):
        area.ymm(0)
    with pytest.raises(LookupError, match="ZMM_HI256"):
        area.set_zmm(0, bytes(64))
    assert area.xstate_bv == 0


def test_an_area_without_the_component_says_how_to_get_it() -> None:
    big = Layout({**LAYOUT.components, 18: Component(18, 4096, 8192)}, 12288)
    area = XsaveArea(kvm_xsave().to_bytes(), big)
    with pytest.raises(ValueError, match="KVM_GET_XSAVE2"):
        area.component(18)


def test_compacted_and_short_areas_are_refused() -> None:
    raw = bytearray(4096)
    struct.pack_into("<Q", raw, 520, 1 << 63)
    with pytest.raises(ValueError, match="compacted"):
        XsaveArea(raw, LAYOUT)
    with pytest.raises(ValueError, match="at least 576 bytes"):
        XsaveArea(bytes(512), LAYOUT)


@pytest.mark.parametrize("number", [-1, 32])
def test_register_numbers_are_checked(number: int) -> None:
    area = XsaveArea.initial(LAYOUT)
    with pytest.raises(IndexError):
        area.set_zmm(number, bytes(64))
    with pytest.raises(ValueError, match="16 bytes"):
        area.set_xmm(0, bytes(15))


def test_names_of_components() -> None:
    assert [Component(n, 0, 0).name for n in (0, 1, 2, 9)] == ["X87", "SSE", "AVX", "PKRU"]
    assert xsave.LEGACY_SIZE + xsave.HEADER_SIZE == 576
