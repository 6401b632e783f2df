# SPDX-License-Identifier: Apache-2.0
"""Guests that hang in many ways, and guests whose ucalls are noise: each ends as that, in time."""

from __future__ import annotations

import collections
import time

import pytest

from kvmpy.coco.kvm import Kvm
from kvmpy.core.exits import Exit
from kvmpy.guest import layout
from kvmpy.guest.errors import GuestError, GuestTimeoutError
from kvmpy.guest.program import GuestProgram
from kvmpy.guest.ucall import Ucall
from kvmpy.guest.vm import GuestVm
from tests.torture.conftest import Torture

DEADLINE = 0.15
# A post-mortem and a busy machine take their time, too.
LATEST = 15.0

HANGS = """
#include <kvmpy/guest.h>

static volatile u64 *const nowhere = (u64 *)0x123456789000;
static volatile u64 never;

static __attribute__((noinline)) void at_loop(void)
{
	while (!never)
		cpu_relax();
}

static __attribute__((noinline)) void at_halt(void)
{
	cli();
	for (;;)
		hlt();
}

static __attribute__((noinline)) void at_syncs(void)
{
	for (;;)
		GUEST_SYNC(1);
}

static __attribute__((noinline)) void at_words(void)
{
	for (;;)
		GUEST_PRINTF("and on");
}

static void again(struct exception_frame *frame)
{
	barrier();
}

static __attribute__((noinline)) void at_fault(void)
{
	guest_exception_install(PF_VECTOR, again);
	*nowhere = 1;
}

static void stay(struct exception_frame *frame)
{
	at_loop();
}

static __attribute__((noinline)) void at_handled(void)
{
	guest_exception_install(PF_VECTOR, stay);
	*nowhere = 1;
}

static void once_more(struct exception_frame *frame)
{
	*nowhere = 2;
}

static __attribute__((noinline)) void at_nested(void)
{
	guest_exception_install(PF_VECTOR, once_more);
	*nowhere = 1;
}

static void (*const ways[])(void) = {
	at_loop, at_halt, at_syncs, at_words, at_fault, at_handled, at_nested,
};

static __attribute__((noinline)) void go(u64 way, u64 depth)
{
	if (depth)
		go(way, depth - 1);
	else
		ways[way]();
	barrier();
}

void hang(u64 way, u64 depth)
{
	go(way, depth);
}
"""
WAYS = ("at_loop", "at_halt", "at_syncs", "at_words", "at_fault", "at_handled", "at_nested")

NOISE = """
#include <kvmpy/guest.h>

u32 id GUEST_SHARED;

void guest_main(void)
{
	for (;;)
		outl(KVMPY_UCALL_PORT, READ_ONCE(id));
}
"""


def run(vm: GuestVm) -> None:
    """Run it in the way that fits the number of its vCPUs."""
    if len(vm.vcpus) == 1:
        vm.vcpus[0].run_to_done()
    else:
        vm.run_all()


def test_every_hang_ends_at_its_deadline_and_names_its_place(kvm: Kvm, torture: Torture) -> None:
    """Whatever a guest does for ever, it ends in time, and the error says in which function."""
    program = GuestProgram.from_c(HANGS)
    latest, hangs = 0.0, 0
    hung: list[str] = []
    misplaced: list[str] = []
    for _ in torture.rounds(least=len(WAYS)):
        ways = [torture.random.randrange(len(WAYS)) for _ in range(torture.random.choice((1, 1, 1, 2)))]
        if hangs < len(WAYS):
            ways = [hangs]
        with kvm.create_vm(program, vcpus=len(ways), protection="none", deadline=DEADLINE) as vm:
            for vcpu, way in zip(vm.vcpus, ways, strict=True):
                vcpu.set_entry("hang", way, torture.random.randrange(20))
            vm.launch()
            started = time.monotonic()
            with pytest.raises(GuestError) as caught:
                run(vm)
            late = time.monotonic() - started - DEADLINE
        error, names = caught.value, [WAYS[way] for way in ways]
        # Faults in faults come to the end of the stack, maybe before the deadline.
        assert isinstance(error, GuestTimeoutError) or "at_nested" in names, error
        for name in names:
            if (len(ways) == 1 or isinstance(error, GuestTimeoutError)) and name not in str(error):
                misplaced.append(f"{names}: {error}")
        if late >= LATEST:
            hung.append(f"{names}: {late:.1f} s late")
        latest = max(latest, late)
        hangs += 1
    torture.figure("hangs", hangs)
    torture.figure("latest end behind its deadline, with its post-mortem", latest, "s")
    torture.figure("hung", len(hung))
    torture.figure("wrong place", len(misplaced))
    assert (hung, misplaced) == ([], [])


def test_noise_in_ucalls_is_data(kvm: Kvm, torture: Torture) -> None:
    """A ucall page of random bytes is a ucall, an exit or a guest's failure with a post-mortem; no traceback.

    Nothing that a terminal would obey is in what is told of it.
    """
    program, chance = GuestProgram.from_c(NOISE), torture.random
    ends: collections.Counter[str] = collections.Counter()
    with kvm.create_vm(program, protection="none", deadline=20) as vm:
        vm.launch()
        vcpu = vm.vcpus[0]
        for _ in torture.rounds(least=30):
            page = bytearray(chance.randbytes(layout.UCALL_SLOTS * layout.UCALL_SLOT_SIZE))
            for slot in range(layout.UCALL_SLOTS):
                offset = slot * layout.UCALL_SLOT_SIZE
                if chance.random() < 0.8:
                    word = chance.choice((*layout.UcallCmd, 7, 0x101)) | chance.randrange(12) << 16
                    page[offset + layout.UCALL_CMD : offset + layout.UCALL_CMD + 4] = (
                        word | chance.choice((0, layout.UCALL_HAS_TEXT))
                    ).to_bytes(4, "little")
                if chance.random() < 0.5:
                    words = [chance.choice((0, 1, 14, 1 << 63, (1 << 64) - 1, 0x400010)) for _ in range(8)]
                    page[offset + layout.UCALL_ARGS : offset + layout.UCALL_NEXT] = b"".join(
                        word.to_bytes(8, "little") for word in words
                    )
            vm.memory.shared_view(vm.gva_to_gpa(vm.program.address_of("id")), 4)[:] = chance.choice(
                (chance.randrange(8), 0xFFFF_FFFF, chance.randrange(1 << 32))
            ).to_bytes(4, "little")
            vcpu._slots[:] = page
            try:
                got = vcpu.next(1)
            except GuestError as error:
                ends[type(error).__name__] += 1
                told = str(error)
                assert "=== post-mortem of" in told
                assert all(sign.isprintable() or sign in "\n\t" for sign in told), repr(told)
            else:
                assert isinstance(got, (Ucall, Exit))
                ends[type(got).__name__] += 1
                assert repr(got).isprintable()
    assert len(ends) > 2, ends
    torture.figure("pages of noise", sum(ends.values()))
