# SPDX-License-Identifier: Apache-2.0
"""Post-mortems of vCPUs in legacy mode: code of its size, by segments, through the right page tables."""

from __future__ import annotations

import pytest

from kvmpy import IoExit, LegacyMode
from selftests.legacy.conftest import ON_THE_CPU, LegacyMaker

pytestmark = pytest.mark.protections("none")

# out %al, $0x5f; mov $0x1234, %ax (32-bit: with the next two bytes, %eax); nop; nop; nop
CODE = b"\xe6\x5f\xb8\x34\x12\x90\x90\x90"


@pytest.mark.parametrize(
    ("mode", "levels", "words"),
    [
        (LegacyMode.REAL, 0, ("mode real", "mov ax, 0x1234", "paging is off: gpa 0x8012")),
        (LegacyMode.PROTECTED16, 0, ("protected 16-bit", "mov ax, 0x1234", "paging is off")),
        (LegacyMode.PROTECTED32, 0, ("protected 32-bit", "mov eax, 0x90901234", "paging is off")),
        pytest.param(
            LegacyMode.PROTECTED32,
            2,
            ("paging 32-bit", "mov eax, 0x90901234", "[  8] = 0x000080", "4 KiB page 0x8000"),
            marks=ON_THE_CPU,
        ),
        pytest.param(
            LegacyMode.PROTECTED32,
            3,
            ("paging PAE", "mov eax, 0x90901234", "[  8] = 0x00000000000080", "4 KiB page 0x8000", "PDPTE"),
            marks=ON_THE_CPU,
        ),
        pytest.param(
            LegacyMode.VM86,
            2,
            ("mode virtual-8086", "mov ax, 0x1234", "4 KiB page 0x8000"),
            marks=ON_THE_CPU,
        ),
    ],
)
def test_state_is_decoded_by_mode(
    legacy: LegacyMaker, mode: LegacyMode, levels: int, words: tuple[str, ...]
) -> None:
    """Registers, disassembly and page-table walk are those of the mode that the vCPU is in."""
    cpu = legacy(mode, levels=levels)
    cpu.allow_ports(0x5F)
    cpu.begin(CODE)
    cpu.vcpu.expect(IoExit)
    cpu.vcpu.complete_io()
    text = cpu.vm.postmortem(cpu.vcpu, "looked at by a test")
    assert [word for word in words if word not in text] == []


def test_segment_bases_count(legacy: LegacyMaker) -> None:
    """The code section shows what lies at CS's base plus IP."""
    cpu = legacy(LegacyMode.REAL)
    cpu.sregs.cs.selector, cpu.sregs.cs.base = 0x800, 0x8000
    cpu.begin(CODE)
    cpu.vcpu.expect(IoExit)
    cpu.vcpu.complete_io()
    assert "=> 0x8012: mov ax, 0x1234" in cpu.vm.postmortem(cpu.vcpu, "looked at by a test")
