# SPDX-License-Identifier: Apache-2.0
"""Ucalls: what the guest says arrives whole, in order, and from where it was said."""

from __future__ import annotations

import pytest

from kvmpy import IoExit, MakeVm, Ucall, UnexpectedExitError
from kvmpy.guest import layout, ucall

ARGUMENTS = """
#include <kvmpy/guest.h>

static u64 calls;

static u64 next(void)
{
	return calls++;
}

void guest_main(void)
{
	GUEST_SYNC();
	GUEST_SYNC(1);
	GUEST_SYNC(1, 2, 3, 4, 5, 6, 7, 8);
	GUEST_SYNC((s8)-1, (u8)255, true, 'x', &calls, ~0ull);
	GUEST_SYNC(next(), next(), next());
	GUEST_UCALL(KVMPY_UCALL_CMD_USER + 5, 77);
}
"""


def test_arguments(make_vm: MakeVm) -> None:
    """GUEST_SYNC carries up to eight values of any integer or pointer type, evaluated from left to right."""
    vm = make_vm.start(ARGUMENTS)
    calls = list(vm.vcpus[0].syncs())
    assert [call.args for call in calls] == [
        (),
        (1,),
        (1, 2, 3, 4, 5, 6, 7, 8),
        ((1 << 64) - 1, 255, 1, ord("x"), int(vm.program.address_of("calls")), (1 << 64) - 1),
        (0, 1, 2),
        (77,),
    ]
    assert [call.name for call in calls] == ["SYNC"] * 5 + ["USER+5"]


REPLIES = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	u64 value = 1;

	for (int i = 0; i < 3; i++)
		value = GUEST_ASK(KVMPY_UCALL_CMD_USER, value, i);
	GUEST_ASSERT_EQ(value, 1000u);
}
"""


def test_replies(make_vm: MakeVm) -> None:
    """GUEST_ASK returns what the host replied before it ran the vCPU again."""
    vm = make_vm.start(REPLIES)
    for call in vm.vcpus[0].syncs():
        call.reply(call.args[0] * 10)
    assert vm.vcpus[0].done


NESTED = """
#include <kvmpy/guest.h>

static u32 depth;

static void handler(struct exception_frame *frame)
{
	GUEST_SYNC(100, frame->vector, depth);
	GUEST_PRINTF("depth %u\\n", depth);
	if (++depth < 3)
		asm volatile("ud2");
	GUEST_SYNC(200, --depth);
	frame->rip += 2;
}

void guest_main(void)
{
	struct guest_ucall_slot *slot = guest_ucall_current();

	guest_exception_install(UD_VECTOR, handler);

	/* A call that is half filled when an exception comes. */
	slot->cmd = KVMPY_UCALL_CMD_SYNC | 2 << KVMPY_UCALL_NARGS_SHIFT;
	slot->args[0] = 1;
	asm volatile("ud2" : : : "memory");
	slot->args[1] = 2;
	guest_ucall_send(slot);
	GUEST_SYNC(3);
}
"""


def test_nested_calls(make_vm: MakeVm) -> None:
    """A ucall that handlers interrupt with ucalls of their own, three deep, arrives as it was meant."""
    vm = make_vm.start(NESTED)
    calls = list(vm.vcpus[0].syncs())
    assert [call.args for call in calls] == [
        (100, 6, 0),
        (100, 6, 1),
        (100, 6, 2),
        (200, 2),
        (200, 1),
        (200, 0),
        (1, 2),
        (3,),
    ]
    assert [call.slot for call in calls] == [1, 2, 3, 3, 2, 1, 0, 0]
    assert vm.console == "depth 0\ndepth 1\ndepth 2\n"


TOO_DEEP = """
#include <kvmpy/guest.h>

static void handler(struct exception_frame *frame)
{
	GUEST_SYNC(1);
	asm volatile("ud2");
}

void guest_main(void)
{
	guest_exception_install(UD_VECTOR, handler);
	asm volatile("ud2");
}
"""


def test_calls_nested_too_deeply(make_vm: MakeVm) -> None:
    """A guest whose handlers nest deeper than there are slots ends with an error that says so."""
    vcpu = make_vm.start(TOO_DEEP).vcpus[0]
    for _ in range(layout.UCALL_SLOTS - 2):
        vcpu.sync()
    with pytest.raises(UnexpectedExitError, match="nested deeper than 7"):
        vcpu.sync()


FOREIGN = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	outl(KVMPY_UCALL_PORT, 8);
}
"""


def test_a_slot_of_another_vcpu(make_vm: MakeVm) -> None:
    """A number on the ucall port that names no slot of the vCPU is an error, not another vCPU's call."""
    vm = make_vm.start(FOREIGN, vcpus=2)
    with pytest.raises(UnexpectedExitError, match=r"0x8 .*names no slot of this vCPU"):
        vm.vcpus[0].next()


NARROW = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	outb(KVMPY_UCALL_PORT + 1, 5);
	outl(KVMPY_UCALL_PORT + 2, 6);
}
"""


def test_neighbouring_ports_are_the_test_s_own(make_vm: MakeVm) -> None:
    """Ports beside the ucall port come back as ordinary PIO exits."""
    vm = make_vm.start(NARROW)
    first, second = vm.vcpus[0].expect(IoExit), vm.vcpus[0].expect(IoExit)
    assert (first.port, first.size, first.value) == (layout.UCALL_PORT + 1, 1, 5)
    assert (second.port, second.size, second.value) == (layout.UCALL_PORT + 2, 4, 6)


UNKNOWN = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	GUEST_UCALL(0x42, 1);
}
"""


def test_an_unknown_command(make_vm: MakeVm) -> None:
    """A command between those of kvmpy and those of tests is an error that names it."""
    vm = make_vm.start(UNKNOWN)
    with pytest.raises(UnexpectedExitError, match="unknown command 0x42"):
        vm.vcpus[0].next()


STORM = """
#include <kvmpy/guest.h>

void guest_main(u64 calls)
{
	for (u64 i = 0; i < calls; i++)
		GUEST_SYNC(guest_cpu_index(), i, i * guest_cpu_index());
}
"""


def test_all_vcpus_at_once(make_vm: MakeVm) -> None:
    """Ucalls of eight vCPUs that run at the same time keep to their vCPU, order and arguments."""
    count, calls = 8, 200
    vm = make_vm.start(STORM, "guest_main", calls, vcpus=count)
    seen: list[list[Ucall]] = [[] for _ in range(count)]
    vm.run_all(on_sync=lambda vcpu, call: seen[vcpu.index].append(call))
    for index, mine in enumerate(seen):
        assert [call.args for call in mine] == [(index, i, i * index) for i in range(calls)]
        assert {call.vcpu for call in mine} == {index}


ENTRIES = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	GUEST_SYNC(0);
}

void other(u64 a, u64 b, u64 c, u64 d, u64 e, u64 f)
{
	GUEST_SYNC(a, b, c, d, e, f, guest_cpu_index(), guest_cpu()->apic_id);
}
"""


def test_entries_and_arguments(make_vm: MakeVm) -> None:
    """A vCPU starts in the function that the host names, with up to six 64-bit arguments."""
    vm = make_vm(ENTRIES, vcpus=2)
    vm.vcpus[1].set_entry("other", 1, 2, 3, 4, 5, (1 << 64) - 6)
    vm.launch()
    assert vm.vcpus[0].sync().args == (0,)
    assert vm.vcpus[1].sync().args == (1, 2, 3, 4, 5, (1 << 64) - 6, 1, vm.vcpus[1].vcpu_id)


def test_a_vcpu_that_is_done_says_so_again(make_vm: MakeVm) -> None:
    """Running a vCPU after its guest_main returned gives DONE once more."""
    vm = make_vm.run(ENTRIES)
    again = vm.vcpus[0].next()
    assert isinstance(again, Ucall)
    assert again.cmd == ucall.DONE
