# SPDX-License-Identifier: Apache-2.0
"""Layouts of the VMSA, the VMCB and the GHCB, and the GHCB MSR protocol as words."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.x86 import ghcb
from kvmpy.x86.ghcb import GHCB, event_name, is_valid, msr_words, set_valid, valid_bit, valid_fields
from kvmpy.x86.save_area import Layout, Place, row
from kvmpy.x86.vmcb import SAVE_OFFSET, VMCB
from kvmpy.x86.vmsa import SAVE_AREA_END, VMSA

HEADER = "arch/x86/include/asm/svm.h"


def test_offsets_of_the_vmsa() -> None:
    """APM volume 2, table B-4."""
    expected = {
        "cs.selector": 0x10,
        "cs.base": 0x18,
        "tr.base": 0x98,
        "vmpl": 0xCA,
        "cpl": 0xCB,
        "efer": 0xD0,
        "xss": 0x140,
        "cr3": 0x150,
        "rip": 0x178,
        "dr3_addr_mask": 0x1B8,
        "rsp": 0x1D8,
        "rax": 0x1F8,
        "cr2": 0x240,
        "g_pat": 0x268,
        "tsc_aux": 0x2EC,
        "rbx": 0x318,
        "rbp": 0x328,
        "r15": 0x378,
        "sev_features": 0x3B0,
        "virtual_tom": 0x3C8,
        "xcr0": 0x3E8,
        "mxcsr": 0x408,
        "x87_fcw": 0x410,
        "fpreg_ymm": 0x570,
    }
    assert {name: VMSA[name].offset for name in expected} == expected


def test_the_fields_of_the_vmsa_end_where_the_save_area_does() -> None:
    last = list(VMSA.places.values())[-1]
    assert last.offset + last.size == SAVE_AREA_END == 1648


def test_offsets_of_the_vmcb() -> None:
    """APM volume 2, tables B-1 and B-2."""
    expected = {
        "intercept_cr": 0x00,
        "intercept_exceptions": 0x08,
        "intercept_4": 0x10,
        "pause_filter_count": 0x3E,
        "msrpm_base_pa": 0x48,
        "asid": 0x58,
        "tlb_ctl": 0x5C,
        "int_ctl": 0x60,
        "int_state": 0x68,
        "exit_info_2": 0x80,
        "misc_ctl": 0x90,
        "event_inj": 0xA8,
        "nested_cr3": 0xB0,
        "next_rip": 0xC8,
        "insn_bytes": 0xD1,
        "bus_lock_counter": 0x120,
        "cs.attrib": 0x412,
        "tr.base": 0x498,
        "cpl": 0x4CB,
        "efer": 0x4D0,
        "rip": 0x578,
        "rax": 0x5F8,
        "g_pat": 0x668,
        "spec_ctrl": 0x6E0,
    }
    assert {name: VMCB[name].offset for name in expected} == expected
    assert "xss" not in VMCB.places


def test_offsets_of_the_ghcb() -> None:
    """GHCB specification, table 3."""
    expected = {
        "cpl": 0xCB,
        "rax": 0x1F8,
        "rcx": 0x308,
        "sw_exit_code": 0x390,
        "sw_scratch": 0x3A8,
        "valid_bitmap": 0x3F0,
        "x87_state_gpa": 0x400,
        "shared_buffer": 0x800,
        "protocol_version": 0xFFA,
        "ghcb_usage": 0xFFC,
    }
    assert {name: GHCB[name].offset for name in expected} == expected


def _kernel_header() -> Path:
    """KVMPY_LINUX_SOURCE names a kernel tree; else one of /usr/src."""
    trees = [Path(os.environ["KVMPY_LINUX_SOURCE"])] if "KVMPY_LINUX_SOURCE" in os.environ else []
    trees += sorted(Path("/usr/src").glob("linux*")) if Path("/usr/src").is_dir() else []
    for tree in trees:
        text = (tree / HEADER).read_text() if (tree / HEADER).is_file() else ""
        if "struct sev_es_save_area" in text and "struct ghcb_save_area" in text:
            return tree / HEADER
    pytest.skip(f"no {HEADER} of a kernel tree (set KVMPY_LINUX_SOURCE to one)")


def _struct(text: str, name: str) -> str:
    return re.search(rf"^struct {name} {{.*?^}} __packed;", text, re.MULTILINE | re.DOTALL)[0]  # type: ignore[index]


def _control_area(text: str) -> str:
    return re.search(r"^struct .*vmcb_control_area {.*?^};", text, re.MULTILINE | re.DOTALL)[0]  # type: ignore[index]


@pytest.mark.parametrize(("layout", "struct"), [(VMSA, "sev_es_save_area"), (GHCB, "ghcb"), (VMCB, "vmcb")])
def test_layouts_are_those_of_the_kernel(layout: Layout, struct: str, tmp_path: Path) -> None:
    """Every field lies where the kernel's own header puts it, and has its size."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed (apt-get install gcc libc6-dev)")
    text = _kernel_header().read_text()
    # KVM knows this field of a VMSA as one of the VMCB, which has the same layout there.
    structs = {"spec_ctrl": "vmcb_save_area"} if struct == "sev_es_save_area" else {}
    if struct == "vmcb":
        words = {
            f"intercept_{name}": f"control.intercepts[{number}]"
            for number, name in enumerate(("cr", "dr", "exceptions", "3", "4", "5"))
        }
        paths = {
            name: words.get(name, f"{'save' if place.offset >= SAVE_OFFSET else 'control'}.{name}")
            for name, place in layout.places.items()
        }
    else:
        paths = {
            name: name
            if struct != "ghcb" or name in ("shared_buffer", "protocol_version", "ghcb_usage")
            else f"save.{name}"
            for name in layout.places
        }
    source = [
        "#include <stddef.h>\n#include <stdio.h>\n#include <stdint.h>",
        "#define __packed __attribute__((packed))",
        "typedef uint8_t u8; typedef uint16_t u16; typedef uint32_t u32; typedef uint64_t u64;",
        "#define GHCB_SHARED_BUF_SIZE 2032\n#define MAX_INTERCEPT 6",
        "struct hv_vmcb_enlightenments { u8 bytes[32]; };",
        _control_area(text),
        *(_struct(text, name) for name in ("vmcb_seg", "vmcb_save_area")),
        *(_struct(text, name) for name in ("sev_es_save_area", "ghcb_save_area", "ghcb")),
        "struct vmcb { struct vmcb_control_area control; struct vmcb_save_area save; } __packed;",
        "int main(void) {",
        *(
            f'printf("{name} %zu %zu\\n", offsetof(struct {structs.get(name, struct)}, {path}),'
            f" sizeof(((struct {structs.get(name, struct)} *)0)->{path}));"
            for name, path in paths.items()
        ),
        "return 0; }",
    ]
    (tmp_path / "probe.c").write_text("\n".join(source))
    subprocess.run(["gcc", "-o", tmp_path / "probe", tmp_path / "probe.c"], check=True, timeout=60)
    output = subprocess.run(
        [tmp_path / "probe"], check=True, capture_output=True, text=True, timeout=10
    ).stdout
    lines = [line.split() for line in output.splitlines()]
    assert {name: (int(gpa), int(size)) for name, gpa, size in lines} == {
        name: (place.offset, place.size) for name, place in layout.places.items()
    }


@given(
    st.dictionaries(
        st.sampled_from([n for n, p in VMSA.places.items() if p.size == 8]), st.integers(0, 2**64 - 1)
    )
)
def test_what_is_packed_is_read_back(values: dict[str, int]) -> None:
    page = VMSA.pack(values)
    assert len(page) == 4096
    fields = VMSA.unpack(page)
    assert {name: fields[name] for name in values} == values
    assert not any(fields[name] for name in fields if name not in values and isinstance(fields[name], int))


def test_bytes_between_the_fields_are_told() -> None:
    page = bytearray(VMSA.pack({"rip": 0xFFF0}))
    page[0xD9] = 7
    page[0x700:0x703] = b"\1\0\2"
    assert list(VMSA.nameless(page)) == [(0xD9, b"\7"), (0x700, b"\1\0\2")]


def test_refusals() -> None:
    with pytest.raises(KeyError, match="did you mean rip"):
        VMSA.pack({"ripp": 1})
    with pytest.raises(OverflowError, match=r"vmsa\.cpl: 0x100 does not fit 1 bytes"):
        VMSA.pack({"cpl": 0x100})
    with pytest.raises(ValueError, match="81 bytes do not fit 80"):
        VMSA.pack({"fpreg_x87": bytes(81)})
    with pytest.raises(ValueError, match="4097 were given"):
        VMSA.pack({}, bytes(4097))
    with pytest.raises(ValueError, match=r"x\.b at 0x4 overlaps"):
        Layout("x", 16, [Place("a", 0, 8), Place("b", 4, 4)])
    with pytest.raises(ValueError, match="twice"):
        Layout("x", 16, row(0, 8, "a", "a"))


def test_a_short_page_gives_the_fields_it_holds() -> None:
    assert list(VMSA.unpack(bytes(0x20))) == [
        *(f"es.{part}" for part in ("selector", "attrib", "limit", "base")),
        *(f"cs.{part}" for part in ("selector", "attrib", "limit", "base")),
    ]


def test_valid_bitmap() -> None:
    page = bytearray(4096)
    set_valid(page, "sw_exit_code", 0x72)
    set_valid(page, "rax", 5)
    page[0x3F0 + 15] |= 0x80
    assert valid_bit("sw_exit_code") == 0x72
    assert valid_fields(page) == ["rax", "sw_exit_code", "quadword 0x7f"]
    assert is_valid(page, "rax")
    assert not is_valid(page, "rcx")
    with pytest.raises(ValueError, match="no bit"):
        valid_bit("shared_buffer")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0x1234000, "GPA: GPA 0x1234000"),
        (0x0002_0001_3300_0001, "SEV_INFO_RESP: protocol 1 to 2, C-bit 51"),
        (0x002, "SEV_INFO_REQ"),
        (0x8000_001F_4000_0004, "CPUID_REQ: leaf 0x8000001f, EBX"),
        (0x0000_0033_C000_0005, "CPUID_RESP: EDX = 0x33"),
        (0x0010_0000_0012_3014, "PSC_REQ: gfn 0x123 to private"),
        (0x0020_0000_0012_3014, "PSC_REQ: gfn 0x123 to shared"),
        (0x8000_0000_0000_0015, "PSC_RESP: result 0x80000000"),
        (0x23081, "HV_FT_RESP: features SNP SNP_AP_CREATION MULTI_VMPL"),
        (0xFFFF_FFFF_FFFF_F011, "PREF_GPA_RESP: no GPA"),
        (0x1100, "TERM_REQ: Linux: the GHCB's GPA could not be registered"),
        (0x02_0100, "TERM_REQ: SEV-SNP features not supported"),
        (0x05_3100, "TERM_REQ: reason 0x5 of set 0x3"),
        (0xABC_FED, "info 0xfed: data 0xabc"),
    ],
)
def test_msr_protocol(value: int, words: str) -> None:
    assert msr_words(value) == words


def test_events() -> None:
    assert event_name(0x8000_0010) == "PSC"
    assert event_name(0x72) == "CPUID"
    assert event_name(0x4E) == "exception #PF"
    assert ghcb.GHCB_MSR == 0xC0010130
