# SPDX-License-Identifier: Apache-2.0
"""What a failing guest leaves behind: each kind of failure is told with where, what and why."""

from __future__ import annotations

import errno
import re
import sys
import threading
from pathlib import Path

import pytest

from kvmpy import (
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    DebugExit,
    GuestAssertionError,
    GuestError,
    GuestExceptionError,
    GuestTimeoutError,
    GuestVcpu,
    GuestVm,
    Gva,
    InternalErrorExit,
    MakeVm,
    ShutdownExit,
    UnexpectedExitError,
    VcpuKickedError,
    VcpuThread,
    ioctls,
)
from kvmpy.core.threads import ThreadTimeoutError, run_threads

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
    assert f"{vm.name} KVM_CREATE_VCPU 0 = -1 EEXIST" in lines
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
    vcpu = make_vm.start(HALTED).vcpus[0]
    with pytest.raises(GuestTimeoutError):
        vcpu.run_to_done(0.5)
    events = vcpu.events.get()
    events.nmi.masked = 1
    vcpu.events.set(events)
    with pytest.raises(GuestTimeoutError) as caught:
        vcpu.run_to_done(0.5)
    section = caught.value.postmortem.split("--- interrupts\n")[1].split("---")[0]
    assert section.splitlines() == ["  events: NMI masked", "  local APIC disabled by software"]


@pytest.mark.protections("none")
def test_no_local_apic(make_vm: MakeVm) -> None:
    """A VM whose local APIC is not KVM's says so."""
    postmortem = failure(make_vm(WILD_WRITE, irqchip=None)).postmortem
    assert "  events: none\n  no local APIC in KVM\n" in postmortem


FAULTS = """
#include <kvmpy/guest.h>

static volatile u64 *const nowhere = (u64 *)0x123456789000;

static __attribute__((noinline)) void toucher(void)
{
	*nowhere = 1;
}

static void again(struct exception_frame *frame)
{
	GUEST_PRINTF("%llx", frame->vector);
}

void loop(void)
{
	guest_exception_install(PF_VECTOR, again);
	toucher();
}

static void deeper(struct exception_frame *frame)
{
	GUEST_SYNC(5);
	*nowhere = 2;
}

void nest(void)
{
	guest_exception_install(PF_VECTOR, deeper);
	toucher();
}

static void overflow(struct exception_frame *frame)
{
	*nowhere = 3;
}

void fill_the_stack(void)
{
	guest_exception_install(PF_VECTOR, overflow);
	toucher();
}
"""
PAGE_FAULT = r"#PF page fault \(0x2: supervisor write, page not present\)"


def fail_at(make_vm: MakeVm, program: str, entry: str, timeout: float | None = None) -> GuestError:
    vm = make_vm(program)
    vm.vcpus[0].set_entry(entry)
    return failure(vm, timeout)


# Whoever may not read the guest's registers and stack can say no more than that.
readable = pytest.mark.requires("trait:host_sees_private")


def backtrace_of(error: GuestError) -> str:
    return error.postmortem.partition("--- backtrace\n")[2].partition("\n--- page-table")[0]


@readable
def test_loop_of_faults(make_vm: MakeVm) -> None:
    """A fault that comes again after its handler is told with the function that faults, always."""
    for _ in range(5):  # the deadline finds it in the handler, in a stub, at the fault
        error = fail_at(make_vm, FAULTS, "loop", 0.1)
        assert isinstance(error, GuestTimeoutError)
        assert re.search(r"\btoucher\+0x[0-9a-f]+ at ", error.message), error.message
        assert re.search(r"(?s)\btoucher\+.*\bloop\+.*_start\+", backtrace_of(error)), backtrace_of(error)


@readable
def test_nested_exceptions(make_vm: MakeVm) -> None:
    """Exceptions in handlers are told with vector and place of the innermost and the outermost."""
    error = fail_at(make_vm, FAULTS, "nest", 10)
    assert isinstance(error, UnexpectedExitError)
    assert re.search(
        r"nested deeper than 7, the innermost <SYNC\(0x5\) of vcpu0> in deeper\+.*"
        rf"in {PAGE_FAULT} of deeper\+.*"
        rf"in {PAGE_FAULT} of toucher\+.*\(7 exceptions deep\)",
        error.message,
    ), error.message
    shown = backtrace_of(error)
    assert re.search(r"\.\.\. and the same 5 times more\n", shown), shown
    assert re.search(rf"(?s)--- {PAGE_FAULT} ---\n +#\d+  0x\w+ toucher\+.*nest\+.*_start\+", shown), shown


@readable
def test_exceptions_to_the_end_of_the_stack(make_vm: MakeVm) -> None:
    """A double fault after exceptions that filled the stack is told with the fault that was the first."""
    error = fail_at(make_vm, FAULTS, "fill_the_stack", 10)
    assert isinstance(error, UnexpectedExitError)
    assert "the innermost an unexpected #DF" in error.message
    assert re.search(r"of toucher\+.*\(\d+ exceptions deep\)", error.message), error.message


AT_RET = """
#include <kvmpy/guest.h>

asm(".pushsection .text\\n"
    ".type leaves, @function\\n"
    "leaves: push %rbp; mov %rsp, %rbp; pop %rbp; 1: ret\\n"
    ".size leaves, . - leaves\\n"
    ".popsection\\n");
void leaves(void);

static __attribute__((noinline)) void caller(void)
{
	leaves();
	barrier();
}

void guest_main(void)
{
	caller();
}
"""


@readable
def test_at_the_end_of_a_function(make_vm: MakeVm) -> None:
    """At a RET the frame pointer is the caller's already: the caller is in the backtrace all the same."""
    vm = make_vm(AT_RET)
    vcpu, at_ret = vm.vcpus[0], int(vm.program.address_of("leaves")) + 5
    vm.launch()
    vcpu.debug.set(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP)
    while vcpu.expect(DebugExit, 10).pc != at_ret:
        pass
    shown = backtrace_of(GuestError("", vm.postmortem(vcpu, "at RET")))
    assert re.search(r"(?s)#0  0x\w+ leaves\+0x5.*caller\+.*guest_main\+", shown), shown


INLINED = """
#include <kvmpy/guest.h>

static __always_inline void inner(u64 x)
{
	GUEST_ASSERT_EQ(x, 2);
}

static __always_inline void outer(u64 x)
{
	inner(x + 1);
}

void guest_main(void)
{
	outer(0);
}
"""


@readable
def test_inlined_calls(make_vm: MakeVm) -> None:
    """Calls that the compiler inlined are frames of their own, as `addr2line -i` shows them."""
    shown = backtrace_of(failure(make_vm(INLINED)))
    lines = [re.sub(r"^ *#(\d+)  0x\w+ (.*) at .*:(\d+)$", r"\1 \2 \3", line) for line in shown.splitlines()]
    first = int(lines[0].rpartition(" ")[2])
    assert lines[:2] == [f"0 inner (inlined) {first}", f"1 outer (inlined) {first + 5}"]
    assert re.fullmatch(rf"2 guest_main\+0x\w+ {first + 10}", lines[2])


PEERS = """
#include <kvmpy/guest.h>

volatile u64 flag;

static __attribute__((noinline)) void wait_for_flag(void)
{
	while (!flag)
		cpu_relax();
}

static __attribute__((noinline)) void sleep_for_ever(void)
{
	cli();
	hlt();
}

void waiter(void)
{
	wait_for_flag();
}

void culprit(void)
{
	sleep_for_ever();
	flag = 1;
}

void ready(void)
{
}
"""


@readable
def test_who_waits_and_who_is_to_blame(make_vm: MakeVm) -> None:
    """A time-out of run_all() says where every vCPU stood, with a backtrace of each."""
    vm = make_vm(PEERS, vcpus=3)
    for vcpu, entry in zip(vm.vcpus, ("waiter", "culprit", "ready"), strict=True):
        vcpu.set_entry(entry)
    vm.launch()
    with pytest.raises(GuestTimeoutError) as caught:
        vm.run_all(0.2)
    message, shown = caught.value.message, caught.value.postmortem
    assert re.search(r"vcpu0\b.*wait_for_flag\+", message), message
    assert re.search(r"vcpu1\b.*sleep_for_ever\+.* \(halted\)", message), message
    assert re.search(r"vcpu2: DONE", message), message
    assert re.search(r"#\d+  0x\w+ waiter\+", shown), shown
    assert re.search(r"#\d+  0x\w+ culprit\+", shown), shown


def test_blocked_callback(make_vm: MakeVm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback of run_all() that does not come back is told with its stack; its vCPU runs no more."""
    monkeypatch.setattr("kvmpy.guest.vm.CALLBACK_GRACE", 0.1)
    monkeypatch.setattr("kvmpy.core.threads.STOP_SECONDS", 0.1)
    vm = make_vm.start(SYNCS, vcpus=2)
    go_on, left = threading.Event(), threading.Event()

    def block(vcpu: GuestVcpu, _call: object) -> None:
        if vcpu.index == 1:
            try:
                assert go_on.wait(20)
            finally:
                left.set()

    with pytest.raises(ThreadTimeoutError, match=r"(?s)vcpu1 was still running.*in block\n.*go_on\.wait"):
        vm.run_all(0.1, on_sync=block)
    exits = vm.vcpus[1].exits
    go_on.set()
    assert left.wait(20)
    with pytest.raises(VcpuKickedError):
        vm.vcpus[1].next()
    assert vm.vcpus[1].exits == exits


SYNCS = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	if (guest_cpu()->index)
		for (;;)
			GUEST_SYNC(1);
}
"""


@pytest.mark.parametrize("command", ["KVMPY_UCALL_CMD_ABORT", "KVMPY_UCALL_CMD_EXCEPTION", "0x77"])
@pytest.mark.parametrize("words", [0, 3, 7])
def test_ucall_with_words_missing(make_vm: MakeVm, command: str, words: int) -> None:
    """A ucall that says less than its command should is a guest's failure like any other."""
    ucall = f"GUEST_UCALL({', '.join([command, *['0'] * words])});"
    error = failure(make_vm(f"#include <kvmpy/guest.h>\nvoid guest_main(void) {{ {ucall} }}\n"))
    assert "--- registers" in error.postmortem


HOSTILE = r"""
#include <kvmpy/guest.h>

void guest_main(void)
{
	GUEST_PRINTF("\033[31mred\r\x07\n\xc2\x9bK");
	GUEST_FAIL("\033]0;title\007");
}
"""


def test_what_a_guest_says_to_the_terminal(make_vm: MakeVm) -> None:
    """Text of the guest's reaches the error without what a terminal obeys; vm.console has it as it was."""
    vm = make_vm(HOSTILE)
    error = failure(vm)
    assert vm.console == "\x1b[31mred\r\x07\n\x9bK"
    assert r"\x1b]0;title\x07" in error.message
    assert r"\x1b[31mred" in error.postmortem
    assert r"\x9bK" in error.postmortem
    assert all(sign.isprintable() or sign in "\n\t" for sign in str(error))


def test_memory_from_many_threads(make_vm: MakeVm) -> None:
    """vm.alloc() of four threads at once hands every page and every address out once."""
    vm = make_vm(INLINED)
    places: list[Gva] = []

    def allocate() -> None:
        places.extend(vm.alloc(4096) for _ in range(50))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        run_threads([VcpuThread(allocate) for _ in range(4)], 60)
    finally:
        sys.setswitchinterval(before)
    assert len(set(places)) == 200
    assert len({vm.gva_to_gpa(gva) for gva in places}) == 200
