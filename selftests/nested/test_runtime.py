# SPDX-License-Identifier: Apache-2.0
"""A nested guest runs, and its ucalls, assertions, prints and faults reach the host as any guest's do."""

from __future__ import annotations

import pytest

from kvmpy import L2, GuestAssertionError, GuestExceptionError, MakeVm, SvmExit, VmExit

pytestmark = [pytest.mark.protections("none", "cbit", "sw-protected"), pytest.mark.requires("cpuid:svm")]

GUEST = """
#include <kvmpy/guest.h>

u64 intercept_io;

static __noinline u64 deep(u64 value)
{
	GUEST_ASSERT_EQ(value, 5);
	return value;
}

static void talks(void)
{
	GUEST_PRINTF("L%d says %s", 2, "hello");
	GUEST_SYNC(1, read_cr3());
	struct guest_fault fault = GUEST_TRY("ud2");
	GUEST_SYNC(2, fault.vector);
}

static void asserts(void)
{
	GUEST_SYNC(deep(6));
}

static void faults(void)
{
	*(volatile u64 *)0x123456789000 = 1;
}

static void run(void (*entry)(void))
{
	struct guest_l2 *l2 = guest_l2();

	l2_reset(l2, entry);
	if (intercept_io)
		l2_intercept_port(l2, KVMPY_UCALL_PORT, true);
	GUEST_ASSERT_EQ(l2_run(l2), SVM_EXIT_VMMCALL);
	GUEST_SYNC(3, read_cr3());
	GUEST_DONE();
}

void guest_main(void)
{
	run(talks);
}

void l1_asserts(void)
{
	run(asserts);
}

void l1_faults(void)
{
	run(faults);
}
"""


@pytest.mark.parametrize("through_l1", [False, True], ids=["straight", "through-L1"])
def test_ucalls(make_vm: MakeVm, npt: bool, through_l1: bool) -> None:
    """L2's ucalls arrive in order, whether L1 intercepts the port or not."""
    vm = make_vm(GUEST)
    L2(vm.vcpus[0], npt=npt)
    vm.symbol("intercept_io").u64 = through_l1
    vm.launch()
    calls = [call.args for call in vm.vcpus[0].syncs()]
    assert [call[0] for call in calls] == [1, 2, 3]
    assert calls[1][1] == 6
    assert calls[0][1] == calls[2][1]
    assert vm.console == "L2 says hello"


def test_assertions(make_vm: MakeVm, npt: bool) -> None:
    """A failed assertion of L2 ends the test with its values, its place and L2's stack."""
    vm = make_vm(GUEST)
    L2(vm.vcpus[0], npt=npt)
    vm.vcpus[0].set_entry("l1_asserts")
    vm.launch()
    with pytest.raises(GuestAssertionError, match="value == 5") as caught:
        vm.vcpus[0].sync()
    text = str(caught.value)
    assert "got 6" in text or "0x6" in text
    assert "in L2" in text
    assert "deep" in text
    # L2's stack is private where there is private memory.
    assert "asserts+" in text or not vm.protection.traits.host_sees_private


def test_exceptions(make_vm: MakeVm, npt: bool) -> None:
    """An exception of L2 that neither L1 nor L2 expects ends the test as L1's own does."""
    vm = make_vm(GUEST)
    L2(vm.vcpus[0], npt=npt)
    vm.vcpus[0].set_entry("l1_faults")
    vm.launch()
    with pytest.raises(GuestExceptionError, match="#PF") as caught:
        vm.vcpus[0].sync()
    assert caught.value.vector == 14
    assert "faults" in str(caught.value)


def test_registers(l2: L2) -> None:
    """VMRUN and the exit carry every general register to L2 and back, and L1 keeps its own."""
    names = ("rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))
    l2.reset()
    # inc of each register: REX.W(B) FF /0
    numbers = [0, 1, 2, 3, 5, 6, 7, *range(8, 16)]
    code = b"".join(bytes((0x48 | number >> 3, 0xFF, 0xC0 | number & 7)) for number in numbers)
    values = {name: 0x1111_2222_3333_0000 * (number + 1) & (1 << 64) - 1 for number, name in enumerate(names)}
    assert l2.run(code, **values) == VmExit(SvmExit.VMMCALL, 0, 0)
    assert {name: l2.register(name) for name in names} == {name: values[name] + 1 for name in names}
    assert l2.offset == len(code)
    assert l2.agent.must(b"").rflags & 1 << 9 == 0


def test_attempts(l2: L2) -> None:
    """What L2 tries ends with its value, or with its exception."""
    assert l2.attempt(b"\x48\x8d\x47\x01", 41).code == SvmExit.VMMCALL  # lea 1(%rdi), %rax
    assert (l2.fault, l2.value) == (None, 42)
    assert l2.attempt(b"\x0f\x0b").code == SvmExit.VMMCALL
    assert l2.fault is not None
    assert (l2.fault.vector, l2.fault.rip) == (6, l2.code)
