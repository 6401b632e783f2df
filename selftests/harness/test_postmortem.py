# SPDX-License-Identifier: Apache-2.0
"""What a failing guest leaves behind: each kind of failure is told with where, what and why."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from kvmpy import (
    GuestAssertionError,
    GuestError,
    GuestExceptionError,
    GuestTimeoutError,
    GuestVm,
    Gva,
    InternalErrorExit,
    MakeVm,
    ShutdownExit,
    UnexpectedExitError,
    ioctls,
)

ASSERTION = """
#include <kvmpy/guest.h>

static __attribute__((noinline)) int inner(int x)
{
	GUEST_ASSERT_EQ(x, 4);
	return x + 1;
}

void guest_main(void)
{
	GUEST_SYNC(0x11, 0x22);
	GUEST_PRINTF("the last words\\n");
	inner(3);
}
"""

WILD_WRITE = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	*(volatile u64 *)0x123456789000 = 5;
}
"""

FOREVER = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	for (;;)
		cpu_relax();
}
"""

# Without an IDT every exception, and the double fault after it, fails.
TRIPLE_FAULT = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) none = { 0, 0 };

	asm volatile("lidt %0; ud2" : : "m"(none));
}
"""


# The last call of a function, and a function that needs no stack.
SMALL = """
#include <kvmpy/guest.h>

static __attribute__((noinline, noclone)) void poke(volatile u64 *p)
{
	*p = 1;
}

void guest_main(void)
{
	poke((u64 *)0x123456789000);
}
"""

HALTED = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	asm volatile("cli; hlt");
}
"""

REQUESTED = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	x2apic_enable();
	cli();
	apic_send_self(0x51);
	apic_send_self(0x52);
	hlt();
}
"""


def failure(vm: GuestVm, timeout: float | None = None) -> GuestError:
    vm.launch()
    with pytest.raises(GuestError) as caught:
        vm.vcpus[0].run_to_done(timeout)
    return caught.value


def line_of(text: str) -> int:
    """The first line of this file that has *text*: that of the guest source."""
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def test_assertion(make_vm: MakeVm) -> None:
    """A failed guest assertion names both values, the test's own source line, and the call chain."""
    vm = make_vm(ASSERTION)
    error = failure(vm)
    assert isinstance(error, GuestAssertionError)
    assert "x == 4" in error.message
    assert "got 3" in error.message
    assert "expected 4" in error.message
    where = f"{__file__}:{line_of('GUEST_ASSERT_EQ(x, 4);')}"
    assert where in error.message
    trace = re.search(r"--- backtrace\n(.*?)---", error.postmortem, re.DOTALL)
    if vm.protection.traits.can_read_registers and vm.protection.traits.host_sees_private:
        assert trace is not None
        frames = [line.split()[2].split("+")[0].split(".")[0] for line in trace.group(1).splitlines()]
        assert frames == ["inner", "guest_main", "_start"]
    assert "ucall SYNC 0x11 0x22\n  ucall PRINTF\n" in error.postmortem
    assert "ucall ABORT 0x3 0x4" in error.postmortem
    assert "the last words" in error.postmortem


def test_unexpected_exception(make_vm: MakeVm) -> None:
    """An exception nobody handles is told with vector, error code, address, line, and the walk of CR2."""
    error = failure(make_vm(WILD_WRITE))
    assert isinstance(error, GuestExceptionError)
    assert (error.vector, error.error_code) == (14, 2)
    assert "#PF" in error.message
    assert f"{__file__}:{line_of('0x123456789000 = 5')}" in error.message
    assert "page-table walk of CR2 0x123456789000" in error.postmortem
    assert re.search(r"=> 0x[0-9a-f]+: mov qword ptr", error.postmortem)


def test_walks_show_the_encryption_bit(make_vm: MakeVm) -> None:
    """The post-mortem's walk of RIP shows each raw entry, with its encryption bit where there is one."""
    vm = make_vm(WILD_WRITE)
    error = failure(vm)
    walk = re.search(r"page-table walk of RIP .*?\n(.*?)---", error.postmortem, re.DOTALL)
    assert walk is not None
    if not vm.protection.traits.host_sees_tables:
        assert "hidden" in walk.group(1)
        return
    entries = [int(value, 16) for value in re.findall(r"= (0x[0-9a-f]{16})", walk.group(1))]
    assert len(entries) == 4
    mask = vm.encryption.mask if vm.encryption is not None else 0
    assert [entry & mask for entry in entries] == [mask] * 4
    assert walk.group(1).count("private") == (5 if mask else 0)


def test_last_ioctls(make_vm: MakeVm) -> None:
    """What this VM was asked last is in the post-mortem with its result, what another was asked is not."""
    vm, other = make_vm(WILD_WRITE), make_vm(WILD_WRITE)
    vm.launch()
    result, number = vm.ioctl_raw(ioctls.KVM_CREATE_VCPU, 0)
    other.ioctl_raw(ioctls.KVM_CREATE_VCPU, 0)
    assert (result, number) == (-1, errno.EEXIST)
    with pytest.raises(GuestError) as caught:
        vm.vcpus[0].run_to_done()
    error = caught.value
    last = re.search(rf"last ioctls of {vm.name} .*?\n(.*?)---", error.postmortem, re.DOTALL)
    assert last is not None
    lines = [line.strip() for line in last.group(1).splitlines()]
    assert f"{vm.name} KVM_CREATE_VCPU 0x0 = -1 EEXIST" in lines
    assert all(line.split()[0].split("/")[0] == vm.name for line in lines)
    # The post-mortem's own questions come after the failure.
    assert not any("KVM_GET_STATS_FD" in line for line in lines)


def test_guest_that_loops_for_ever(make_vm: MakeVm) -> None:
    """A guest that never exits is stopped at its deadline; the post-mortem says where it was, or why not."""
    vm = make_vm(FOREVER)
    error = failure(vm, timeout=0.3)
    assert isinstance(error, GuestTimeoutError)
    assert "deadline" in error.message
    readable = vm.protection.traits.can_read_registers
    assert ("guest_main" if readable else "keeps registers from the host") in error.postmortem


def test_triple_fault(make_vm: MakeVm) -> None:
    """A triple fault is told as such: KVM_EXIT_SHUTDOWN where DONE was waited for."""
    error = failure(make_vm(TRIPLE_FAULT))
    assert isinstance(error, UnexpectedExitError)
    assert isinstance(error.got, ShutdownExit)
    assert "triple fault" in error.message


@pytest.mark.protections("none")
def test_internal_error(make_vm: MakeVm) -> None:
    """A KVM_EXIT_INTERNAL_ERROR is told with its suberror (api.rst, KVM_EXIT_INTERNAL_ERROR)."""
    # The code page lies where no memory slot is: an instruction fetch from MMIO cannot be emulated.
    vm = make_vm(WILD_WRITE)
    vm.map(Gva(0x7000_0000), vm.memory.segments()[-1].gpa + vm.memory.segments()[-1].size, 0x1000, nx=False)
    vm.vcpus[0].set_entry(Gva(0x7000_0000))
    error = failure(vm)
    assert isinstance(error, UnexpectedExitError)
    assert isinstance(error.got, InternalErrorExit)
    assert error.got.suberror == 1
    assert "(KVM_INTERNAL_ERROR_EMULATION)" in error.message
    assert "no code is mapped here" in error.postmortem


@pytest.mark.protections("none")
def test_hidden_is_said_to_be_hidden(make_vm: MakeVm) -> None:
    """What the host may not see appears in a post-mortem as hidden, and the failure itself is kept."""
    error = failure(make_vm(WILD_WRITE, protection="cbit", strict_private=True))
    assert isinstance(error, GuestExceptionError)
    assert "hidden: the page table at gpa" in error.postmortem
    assert "=== post-mortem" in error.postmortem


@pytest.mark.requires("trait:host_sees_private")
def test_backtrace_of_small_functions(make_vm: MakeVm) -> None:
    """A function without locals and the function whose last statement calls it are both in the backtrace."""
    vm = make_vm(SMALL)
    trace = re.search(r"--- backtrace\n(.*?)---", failure(vm).postmortem, re.DOTALL)
    assert trace is not None
    frames = [line.split()[2].split("+")[0] for line in trace.group(1).splitlines()]
    assert frames == ["poke", "guest_main", "_start"]


def test_halted_with_interrupts_off(make_vm: MakeVm) -> None:
    """A vCPU that waits for an interrupt it cannot take is told apart from one that loops."""
    vm = make_vm(HALTED)
    if not vm.protection.traits.can_read_registers:
        pytest.skip("needs a protection under which the host reads registers")
    postmortem = failure(vm, timeout=0.5).postmortem
    assert "mp state KVM_MP_STATE_HALTED, interrupts off: no interrupt wakes it" in postmortem


@pytest.mark.requires("KVM_CAP_IRQCHIP")
def test_interrupts_nobody_takes(make_vm: MakeVm) -> None:
    """The local APIC's requested vectors are told, under every protection: KVM holds them, not the guest."""
    postmortem = failure(make_vm(REQUESTED), timeout=0.5).postmortem
    section = postmortem.split("--- interrupts\n")[1].split("---")[0]
    assert "requested: 81-82\n" in section
    assert "in service: none\n" in section
    assert "lvt_timer" in section


def test_pending_events(make_vm: MakeVm) -> None:
    """Events that KVM holds for the vCPU are told, and an APIC as reset leaves it takes one line."""
    vm = make_vm(HALTED)
    vm.launch()
    vcpu = vm.vcpus[0]
    with pytest.raises(GuestTimeoutError):
        vcpu.run_to_done(0.5)
    events = vcpu.get_vcpu_events()
    events.nmi.masked = 1
    vcpu.set_vcpu_events(events)
    with pytest.raises(GuestTimeoutError) as caught:
        vcpu.run_to_done(0.5)
    section = caught.value.postmortem.split("--- interrupts\n")[1].split("---")[0]
    assert section.splitlines() == ["  events: NMI masked", "  local APIC disabled by software"]


@pytest.mark.protections("none")
def test_no_local_apic(make_vm: MakeVm) -> None:
    """A VM whose local APIC is not KVM's says so."""
    postmortem = failure(make_vm(WILD_WRITE, irqchip=None)).postmortem
    assert "  events: none\n  no local APIC in KVM\n" in postmortem
