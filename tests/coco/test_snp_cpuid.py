# SPDX-License-Identifier: Apache-2.0
"""The CPUID page of SNP launches."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.coco import snp_cpuid
from kvmpy.coco.snp_cpuid import CpuidFunction
from kvmpy.uapi.structs import kvm_cpuid2, kvm_cpuid_entry2


def _table(*rows: tuple[int, int, int, int, int, int]) -> kvm_cpuid2:
    return kvm_cpuid2.of(
        [
            kvm_cpuid_entry2(function=leaf, index=index, eax=eax, ebx=ebx, ecx=ecx, edx=edx)
            for leaf, index, eax, ebx, ecx, edx in rows
        ]
    )


_U32 = st.integers(0, (1 << 32) - 1)
_U64 = st.integers(0, (1 << 64) - 1)
_FUNCTIONS = st.lists(
    st.builds(CpuidFunction, _U32, _U32, _U32, _U32, _U32, _U32, xcr0=_U64, xss=_U64), max_size=64
)


@given(_FUNCTIONS)
def test_a_page_goes_both_ways(functions: list[CpuidFunction]) -> None:
    """What was packed is read back, and a page is a page."""
    page = snp_cpuid.pack(functions)
    assert len(page) == 4096
    assert snp_cpuid.unpack(page) == functions


def test_where_the_fields_are() -> None:
    """Firmware ABI, CPUID page: count, then 48 bytes for each function."""
    page = snp_cpuid.pack([CpuidFunction(1, 2, 3, 4, 5, 6, xcr0=7, xss=8)])
    assert struct.unpack_from("<IIQ", page) == (1, 0, 0)
    assert struct.unpack_from("<IIQQIIIIQ", page, 16) == (1, 2, 7, 8, 3, 4, 5, 6, 0)


def test_too_many_functions() -> None:
    """A page has room for 64."""
    with pytest.raises(ValueError, match="64 functions, not 65"):
        snp_cpuid.pack([CpuidFunction(n, 0, 1, 0, 0, 0) for n in range(65)])
    with pytest.raises(ValueError, match="this one says 65"):
        snp_cpuid.unpack(struct.pack("<I", 65).ljust(4096, b"\0"))
    with pytest.raises(ValueError, match="not 100"):
        snp_cpuid.unpack(bytes(100))


def test_what_a_vcpu_gives() -> None:
    """Leaves of the hypervisor and empty ones are left out; the XSAVE size is that of reset."""
    table = _table(
        (0x0, 0, 0xD, 1, 2, 3),
        (0x4, 3, 0, 0, 0, 0),
        (0xD, 0, 7, 0x340, 0x340, 0),
        (0xD, 1, 0xF, 0x340, 0, 0),
        (0xD, 2, 0x100, 0x240, 0, 0),
        (0x40000000, 0, 1, 2, 3, 4),
    )
    assert snp_cpuid.functions_of(table) == [
        CpuidFunction(0, 0, 0xD, 1, 2, 3),
        CpuidFunction(0xD, 0, 7, 0x240, 0x340, 0, xcr0=1),
        CpuidFunction(0xD, 1, 0xF, 0x240, 0, 0, xcr0=1),
        CpuidFunction(0xD, 2, 0x100, 0x240, 0, 0),
    ]


def test_a_table_that_is_too_long() -> None:
    """Of too many functions the plain leaves stay, in order."""
    rows = [(0xD, index, 1, 1, 1, 1) for index in range(2, 40)]
    rows += [(leaf, 0, 1, 1, 1, 1) for leaf in range(0x80000000, 0x80000020)]
    functions = snp_cpuid.functions_of(_table(*rows))
    assert len(functions) == 64
    assert {function.leaf for function in functions} >= set(range(0x80000000, 0x80000020))
    assert functions == sorted(functions, key=lambda function: (function.leaf, function.subleaf))


def test_corrections() -> None:
    """What the firmware changed is told field by field."""
    given_ = [CpuidFunction(1, 0, 1, 2, 3, 4), CpuidFunction(7, 1, 0, 1, 0, 0)]
    answer = [CpuidFunction(1, 0, 1, 2, 0, 4), CpuidFunction(9, 0, 0, 0, 0, 1)]
    assert snp_cpuid.corrections(given_, answer) == [
        "0x1.ecx: 0x3 -> 0x0",
        "0x7:0x1: removed",
        "0x9:0x0: added",
    ]
