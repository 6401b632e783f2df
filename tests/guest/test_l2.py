# SPDX-License-Identifier: Apache-2.0
"""The layout that the host's L2 and the guest's kvmpy/svm.h share, and the C of the VMCB."""

from __future__ import annotations

import pytest

from kvmpy.guest import l2
from kvmpy.guest.program import GuestProgram
from kvmpy.x86.svm_exits import SvmExit
from kvmpy.x86.vmcb import VMCB, VMCB_SIZE

SOURCE = """
struct guest_l2 probe;
struct vmcb block;
const u64 exits[] = { SVM_EXIT_CPUID, SVM_EXIT_NPF, SVM_EXIT_INVALID };
"""


@pytest.fixture(scope="module")
def program() -> GuestProgram:
    return GuestProgram.from_c(l2.L1 + SOURCE)


def test_struct_guest_l2(program: GuestProgram) -> None:
    """The host packs what the header declares."""
    kind = program.type_of("probe")
    assert kind.size <= 4096
    places = {
        name: kind.member(name).offset for name in ("regs", "stack_top", "function", "tried", "context")
    }
    assert places == {
        "regs": l2._HEAD.size,
        "stack_top": l2._STACK_TOP,
        "function": l2._STACK_TOP + 8,
        "tried": l2._STACK_TOP + 8 + l2._FUNCTION.size,
        "context": l2._CONTEXT,
    }
    assert kind.member("context").type.size == l2._CONTEXT_SIZE
    assert kind.member("tried").type.size == l2._TRIED.size
    registers = kind.member("regs").type
    assert [member.name for member in registers.members] == list(l2._REGISTERS)
    fault = kind.member("tried").type.member("fault").type
    assert [member.name for member in fault.members] == ["error_code", "rip", "cr2", "vector", "faulted"]


def test_struct_vmcb(program: GuestProgram) -> None:
    """The generated struct has each field where the layout has it."""
    kind = program.type_of("block")
    assert kind.size == VMCB_SIZE
    for name, place in VMCB.places.items():
        outer, _, part = name.partition(".")
        member = kind.member(outer)
        at, size = member.offset, member.type.size
        if part:
            inner = member.type.member(part)
            at, size = at + inner.offset, inner.type.size
        assert (at, size) == (place.offset, place.size), name


def test_numbers(program: GuestProgram) -> None:
    """An exit has one number in Python and in C."""
    symbol = program.symbol("exits")
    segment = next(each for each in program.segments if each.gva <= symbol.gva < each.gva + each.memsize)
    at = int(symbol.gva) - int(segment.gva)
    words = memoryview(bytes(segment.data[at : at + 24])).cast("Q").tolist()
    assert words == [SvmExit.CPUID, SvmExit.NPF, SvmExit.INVALID]
