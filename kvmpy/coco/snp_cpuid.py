# SPDX-License-Identifier: Apache-2.0
"""The CPUID page of an SNP launch: what the firmware vouches for, built from a vCPU's CPUID.

SEV Secure Nested Paging Firmware ABI, section 8.17.2.6 (the check) and its CPUID page: a count, then up to 64
functions of 48 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kvmpy.core.address import PAGE_SIZE
from kvmpy.uapi.structs import kvm_cpuid2

MAX_FUNCTIONS = 64
_HEADER = struct.Struct("<IIQ")
_FUNCTION = struct.Struct("<IIQQIIIIQ")
# Bytes of an XSAVE area with the legacy state and the header alone.
_XSAVE_MINIMUM = 0x240
_HYPERVISOR_LEAVES = range(0x4000_0000, 0x5000_0000)


@dataclass(frozen=True)
class CpuidFunction:
    """One CPUID function: the input (leaf, subleaf, XCR0 and XSS) and what it returns."""

    leaf: int
    subleaf: int
    eax: int
    ebx: int
    ecx: int
    edx: int
    xcr0: int = 0
    xss: int = 0

    def differences(self, other: CpuidFunction) -> list[str]:
        """Return what *other* has otherwise, such as ``0x1.ecx: 0x1 -> 0x0``."""
        where = f"{self.leaf:#x}" + (f":{self.subleaf:#x}" if self.subleaf else "")
        return [
            f"{where}.{name}: {getattr(self, name):#x} -> {getattr(other, name):#x}"
            for name in ("xcr0", "xss", "eax", "ebx", "ecx", "edx")
            if getattr(self, name) != getattr(other, name)
        ]


def functions_of(cpuid: kvm_cpuid2) -> list[CpuidFunction]:
    """Return the functions for the page of a vCPU with this CPUID, at most 64.

    Leaves of the hypervisor are none of the firmware's, and functions that return nothing need no entry.
    """
    results = []
    for entry in cpuid.entries_list():
        leaf, subleaf = int(entry.function), int(entry.index)
        function = CpuidFunction(
            leaf, subleaf, int(entry.eax), int(entry.ebx), int(entry.ecx), int(entry.edx)
        )
        if leaf in _HYPERVISOR_LEAVES or not (entry.eax or entry.ebx or entry.ecx or entry.edx):
            continue
        if leaf == 0xD and subleaf in (0, 1):
            # The size of the XSAVE area depends on XCR0 and XSS: stated for those of reset.
            function = replace(function, ebx=_XSAVE_MINIMUM, xcr0=1)
        results.append(function)
    # The plain leaves first: they are what guests need, when there are too many.
    results.sort(key=lambda function: (function.subleaf > 1, function.leaf, function.subleaf))
    return sorted(results[:MAX_FUNCTIONS], key=lambda function: (function.leaf, function.subleaf))


def pack(functions: Sequence[CpuidFunction]) -> bytes:
    """Return the page; ValueError for more than 64 functions."""
    if len(functions) > MAX_FUNCTIONS:
        raise ValueError(f"a CPUID page holds {MAX_FUNCTIONS} functions, not {len(functions)}")
    body = b"".join(
        _FUNCTION.pack(f.leaf, f.subleaf, f.xcr0, f.xss, f.eax, f.ebx, f.ecx, f.edx, 0) for f in functions
    )
    return (_HEADER.pack(len(functions), 0, 0) + body).ljust(PAGE_SIZE, b"\0")


def unpack(page: bytes | bytearray | memoryview) -> list[CpuidFunction]:
    """Read a page; ValueError when it is cut short or counts more than 64 functions."""
    if len(page) < PAGE_SIZE:
        raise ValueError(f"a CPUID page has {PAGE_SIZE} bytes, not {len(page)}")
    count = _HEADER.unpack_from(page)[0]
    if count > MAX_FUNCTIONS:
        raise ValueError(f"a CPUID page holds {MAX_FUNCTIONS} functions, this one says {count}")
    rows = []
    for number in range(count):
        leaf, subleaf, xcr0, xss, eax, ebx, ecx, edx, _ = _FUNCTION.unpack_from(
            page, _HEADER.size + number * _FUNCTION.size
        )
        rows.append(CpuidFunction(leaf, subleaf, eax, ebx, ecx, edx, xcr0, xss))
    return rows


def corrections(given: Iterable[CpuidFunction], answered: Iterable[CpuidFunction]) -> list[str]:
    """Return what the firmware changed, function by function."""
    answers = {(function.leaf, function.subleaf): function for function in answered}
    collected = []
    for function in given:
        answer = answers.pop((function.leaf, function.subleaf), None)
        if answer is None:
            collected.append(f"{function.leaf:#x}:{function.subleaf:#x}: removed")
        else:
            collected += function.differences(answer)
    return collected + [f"{leaf:#x}:{subleaf:#x}: added" for leaf, subleaf in answers]
