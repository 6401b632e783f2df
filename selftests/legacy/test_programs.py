# SPDX-License-Identifier: Apache-2.0
"""Guest programs in 32-bit protected mode: ucalls, assertions, printf, exceptions, backtraces."""

from __future__ import annotations

import pytest

from kvmpy import CR0, CR4, GuestAssertionError, GuestExceptionError, MakeVm
from selftests.legacy.conftest import ON_THE_CPU

pytestmark = pytest.mark.protections("none")

GUEST = """
#include <kvmpy/guest.h>

u64 big = 123456789012345ull;
u64 shared_word GUEST_SHARED;

static u32 __noinline inner(u32 value)
{
	GUEST_ASSERT_EQ(value, 7);
	return value + 1;
}

static u32 __noinline outer(u32 value)
{
	return inner(value) + 1;
}

void guest_main(u64 first, u64 second)
{
	GUEST_PRINTF("%llu %lld %s %#x|", big, -big, "text", 0xabc);
	GUEST_SYNC(first, second, outer(7), &big, sizeof(long));
	shared_word = 0x1122334455667788;
	GUEST_SYNC(big / 1000, big % 1000, -7ll / 2, -7ll % 2);
	GUEST_SYNC(read_cr0(), read_cr4());
}

void assertion(void)
{
	outer(8);
}

void exception(void)
{
	asm volatile("ud2");
}

static u32 seen;

static void step_over(struct exception_frame *frame)
{
	seen = frame->vector;
	GUEST_SYNC(frame->rip);
	frame->rip += 2;
}

void handlers(void)
{
	struct guest_fault fault = GUEST_TRY("movl %0, 0xdead0000", : : "r"(1));

	GUEST_SYNC(fault.vector, fault.error_code, fault.cr2);
	guest_exception_install(UD_VECTOR, step_over);
	asm volatile("ud2");
	GUEST_SYNC(seen);
}
"""
LEVELS = pytest.mark.parametrize(
    "levels",
    [
        pytest.param(0, id="no-paging"),
        pytest.param(2, id="2-level", marks=ON_THE_CPU),
        pytest.param(3, id="pae", marks=ON_THE_CPU),
    ],
)


@LEVELS
def test_ucalls(make_vm: MakeVm, levels: int) -> None:
    """A C program has ucalls with 64-bit values, printf, division, and the arguments that the host gives."""
    vm = make_vm.start(GUEST, "guest_main", 1 << 40, 2, levels=levels)
    first, second, third = vm.vcpus[0].syncs()
    big = 123456789012345
    assert list(first.args) == [1 << 40, 2, 9, int(vm.program.address_of("big")), 4]
    assert list(second.args) == [big // 1000, big % 1000, (1 << 64) - 3, (1 << 64) - 1]
    assert vm.console == f"{big} {-big} text 0xabc|"
    assert vm.symbol("shared_word").u64 == 0x1122334455667788
    cr0, cr4 = third.args
    assert (bool(cr0 & CR0.PG), bool(cr4 & CR4.PAE)) == (levels > 0, levels == 3)


@LEVELS
def test_assertion(make_vm: MakeVm, levels: int) -> None:
    """A failed assertion tells values, line and the calls that led to it."""
    vm = make_vm.start(GUEST, "assertion", levels=levels)
    with pytest.raises(GuestAssertionError, match=r"value == 7") as caught:
        vm.vcpus[0].run_to_done()
    text = caught.value.postmortem
    for words in ("protected 32-bit", "inner", "outer", "assertion+"):
        assert words in text, words


@LEVELS
def test_exception(make_vm: MakeVm, levels: int) -> None:
    """An exception that nobody expects tells where, and what led there."""
    vm = make_vm.start(GUEST, "exception", levels=levels)
    with pytest.raises(GuestExceptionError, match="#UD") as caught:
        vm.vcpus[0].run_to_done()
    assert "exception+" in caught.value.postmortem
    assert "_start+" in caught.value.postmortem


@ON_THE_CPU
@pytest.mark.parametrize("levels", [2, 3], ids=["2-level", "pae"])
def test_handlers(make_vm: MakeVm, levels: int) -> None:
    """Fix-ups and handlers return from exceptions."""
    vm = make_vm.start(GUEST, "handlers", levels=levels)
    fault, rip, seen = vm.vcpus[0].syncs()
    assert fault.args == (14, 2, 0xDEAD0000)
    assert vm.program.function(rip.args[0]) is not None
    assert seen.args == (6,)


def test_a_program_of_the_wrong_size(make_vm: MakeVm) -> None:
    """A program and the page tables of the other mode are refused with both named."""
    vm = make_vm(GUEST)
    with pytest.raises(ValueError, match=r"levels=3 runs 32-bit programs, .* is one of 64 bits"):
        make_vm(vm.program, levels=3)
