# SPDX-License-Identifier: Apache-2.0
"""The host and the guest agree on addresses and formats."""

from __future__ import annotations

import itertools
import re
import struct

import pytest

from kvmpy.guest import layout
from kvmpy.guest.layout import AssertKind, UcallCmd
from kvmpy.guest.toolchain import runtime_dir


def _header() -> dict[str, int]:
    text = (runtime_dir() / "include/kvmpy/layout.h").read_text()
    return {
        name: int(value, 0)
        for name, value in re.findall(r"^#define\s+KVMPY_(\w+)\s+(\w+)$", text, re.MULTILINE)
    }


def _host() -> dict[str, int]:
    values = {
        name: int(value)
        for name, value in vars(layout).items()
        if name.isupper()
        and not name.startswith("_")
        and isinstance(value, int)
        and not isinstance(value, bool)
    }
    values.update({f"UCALL_CMD_{cmd.name}": int(cmd) for cmd in UcallCmd})
    values.update({f"ASSERT_{kind.name}": int(kind) for kind in AssertKind})
    return values


def test_header_and_module_say_the_same() -> None:
    assert _host() == _header()


def test_the_linker_script_begins_the_image_where_the_layout_says() -> None:
    script = (runtime_dir() / "guest.lds").read_text()
    assert f". = {layout.IMAGE_BASE:#010x};" in script
    assert f"ASSERT(. <= {layout.GDT_GVA:#010x}," in script
    assert f"FLAGS({layout.PF_SHARED | 6:#010x})" in script
    assert f"FLAGS({layout.PF_USER | 5:#010x})" in script
    assert f"FLAGS({layout.PF_USER | 6:#010x})" in script


def test_regions_do_not_overlap() -> None:
    count = layout.MAX_VCPUS
    regions = [
        (layout.GDT_GVA, layout.XAPIC_GVA + 0x1000),
        (layout.PERCPU_BASE, layout.PERCPU_BASE + count * layout.PERCPU_SIZE),
        (layout.UCALL_BASE, layout.UCALL_BASE + count * layout.UCALL_PAGE_SIZE),
        (layout.STACK_BASE, layout.STACK_BASE + count * layout.STACK_SIZE),
        (layout.HEAP_BASE, layout.HEAP_BASE + 1),
    ]
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(regions))


def test_ucall_slots_form_a_chain_that_ends_in_itself() -> None:
    page = bytearray(0x1000)
    layout.fill_ucall_page(page, 3, 0x5000, 0xC003000)
    slots = [struct.unpack_from("<QI", page, offset) for offset in range(0, 0x1000, 512)]
    following = [
        struct.unpack_from("<Q", page, offset + layout.UCALL_NEXT)[0] for offset in range(0, 0x1000, 512)
    ]
    assert [gpa for gpa, _ in slots] == [0x5000 + 512 * n for n in range(8)]
    assert [number for _, number in slots] == [24, 25, 26, 27, 28, 29, 30, 0xFFFFFFFF]
    assert following == [0xC003000 + 512 * n for n in (1, 2, 3, 4, 5, 6, 7, 7)]


def test_guest_cpu_holds_what_the_guest_reads() -> None:
    raw = layout.pack_guest_cpu(
        index=2,
        apic_id=5,
        percpu=0x8008000,
        ucall_slot=0xC002000,
        stack_top=0x10030000,
        entry=0x400123,
        args=(7, -1),
    )
    assert len(raw) == layout.CPU_SIZE
    assert struct.unpack_from("<QIIQQQ6Q", raw) == (
        0x8008000, 2, 5, 0xC002000, 0x10030000, 0x400123, 7, 0xFFFFFFFFFFFFFFFF, 0, 0, 0, 0,
    )  # fmt: skip
    assert not any(raw[layout.CPU_FAULT :])


def test_a_seventh_argument_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 6"):
        layout.pack_guest_cpu(
            index=0, apic_id=0, percpu=0, ucall_slot=0, stack_top=0, entry=0, args=(1, 2, 3, 4, 5, 6, 7)
        )
