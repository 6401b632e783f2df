# SPDX-License-Identifier: Apache-2.0
"""Hyper-V's synthetic timers: messages and direct interrupts, one-shot, periodic, and a slot that is busy."""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass

import pytest

from kvmpy import PAGE_SIZE, Agent, GuestVm, Msr
from kvmpy.x86.hyperv import HvMessage, HvStimer

from .conftest import MakeHyperV

pytestmark = [
    pytest.mark.requires("KVM_CAP_HYPERV_SYNIC2", "KVM_CAP_SYS_HYPERV_CPUID"),
    pytest.mark.protections("none", "cbit"),
]

ENABLE, PERIODIC = int(HvStimer.HV_STIMER_ENABLE), int(HvStimer.HV_STIMER_PERIODIC)
AUTO, DIRECT = int(HvStimer.HV_STIMER_AUTOENABLE), int(HvStimer.HV_STIMER_DIRECT)
SINT, VECTOR = 3, 0x61
ON_SINT = SINT << 16
MILLISECOND = 10_000  # of 100 ns
TIMERS = pytest.mark.parametrize("timer", range(4))

GUEST = """
#include "hyperv.h"

struct hv_timer_message {
	volatile u32 type;
	u8 size;
	volatile u8 flags;
	u8 reserved[2];
	u64 port;
	u32 timer, pad;
	volatile u64 expiration, delivery;
};

static struct hv_timer_message *slot;
static volatile u64 ticks;
u64 expirations[64] GUEST_SHARED;
u64 deliveries[64] GUEST_SHARED;

static void tick(struct exception_frame *frame)
{
	if (slot->type == HVMSG_TIMER_EXPIRED && ticks < 64) {
		expirations[ticks] = slot->expiration;
		deliveries[ticks] = slot->delivery;
		ticks++;
		slot->type = HVMSG_NONE;
		smp_mb();
		if (slot->flags & 1)
			wrmsr(HV_X64_MSR_EOM, 0);
	}
	apic_eoi();
}

/* Take @count messages of the slot at @gva, as they come. */
u64 take_ticks(u64 gva, u64 vector, u64 count)
{
	slot = (void *)gva;
	guest_exception_install(vector, tick);
	cli();
	while (ticks < count) {
		sti_hlt();
		cli();
	}
	return ticks;
}

void guest_main(void)
{
	apic_enable();
	guest_agent();
}
"""


@dataclass(frozen=True)
class Message:
    """What stands in a slot of the message page: of a timer, its payload."""

    kind: int
    size: int
    flags: int
    port: int
    timer: int
    expiration: int
    delivery: int


class Timers:
    """A vCPU with a message page, and one source of interrupts for its timers."""

    def __init__(self, vm: GuestVm) -> None:
        self.vm = vm
        self.page = vm.alloc(PAGE_SIZE, private=False)
        self.slot = self.page + SINT * HvMessage.HV_MESSAGE_SIZE
        self.agent = Agent(vm.vcpus[0])
        self.agent.start()
        vm.vcpus[0].msrs.set(Msr.HV_X64_MSR_SIMP, int(vm.gva_to_gpa(self.page)) | 1)
        self.write(Msr.HV_X64_MSR_SINT0 + SINT, VECTOR)
        self.do("hv_install", VECTOR, 1)

    def write(self, msr: int, value: int) -> None:
        """Write an MSR, which must go well."""
        assert self.agent.wrmsr(msr, value) is None

    def do(self, function: str, *arguments: int) -> int:
        """Call a function of the guest."""
        self.agent.begin_call(function, *arguments)
        return self.agent.value()

    def now(self) -> int:
        """Return the reference counter."""
        value = self.agent.rdmsr(Msr.HV_X64_MSR_TIME_REF_COUNT)
        assert isinstance(value, int)
        return value

    def arm(self, timer: int, config: int, count: int) -> None:
        """Write a timer's count, then its configuration."""
        self.write(Msr.HV_X64_MSR_STIMER0_COUNT + 2 * timer, count)
        self.write(Msr.HV_X64_MSR_STIMER0_CONFIG + 2 * timer, config)

    def config(self, timer: int) -> int:
        """Return a timer's configuration."""
        value = self.agent.rdmsr(Msr.HV_X64_MSR_STIMER0_CONFIG + 2 * timer)
        assert isinstance(value, int)
        return value

    def message(self) -> Message:
        """Read the slot."""
        kind, size, flags, port, timer, _, expiration, delivery = struct.unpack(
            "<IBB2xQIIQQ", self.vm.read(self.slot, 40)
        )
        return Message(kind, size, flags, port, timer, expiration, delivery)

    def free_slot(self) -> None:
        """Mark the slot as taken."""
        self.vm.write(self.slot, bytes(4))


@pytest.fixture
def timers(make_hyperv: MakeHyperV) -> Timers:
    """One vCPU."""
    return Timers(make_hyperv(GUEST, synic=True))


@TIMERS
def test_one_shot(timers: Timers, timer: int) -> None:
    """A one-shot timer sends one message when its time has come, not before, and is disabled then.

    TLFS, synthetic timers.
    """
    timers.arm(timer, ENABLE | ON_SINT, timers.now() + 60_000 * MILLISECOND)
    assert timers.config(timer) == ENABLE | ON_SINT
    timers.do("hv_spin", 2 * MILLISECOND)
    assert timers.do("hv_counted", VECTOR) == 0
    count = timers.now() + 3 * MILLISECOND
    timers.write(Msr.HV_X64_MSR_STIMER0_COUNT + 2 * timer, count)
    assert timers.do("hv_await", VECTOR, 1) == 1
    after = timers.now()
    message = timers.message()
    expected = Message(HvMessage.HVMSG_TIMER_EXPIRED, 24, 0, 0, timer, count, message.delivery)
    assert message == expected
    assert count <= message.delivery <= after
    assert timers.config(timer) == ON_SINT
    # The other slots are as they were.
    page = bytearray(timers.vm.read(timers.page, PAGE_SIZE))
    start = SINT * HvMessage.HV_MESSAGE_SIZE
    page[start : start + 40] = bytes(40)
    assert page == bytearray(PAGE_SIZE)


@TIMERS
def test_past(timers: Timers, timer: int) -> None:
    """A one-shot timer whose time is over expires at once.

    TLFS, synthetic timers: one-shot timers.
    """
    timers.arm(timer, ENABLE | ON_SINT, 1)
    assert timers.do("hv_counted", VECTOR) == 1
    assert (timers.message().timer, timers.message().expiration) == (timer, 1)
    assert timers.config(timer) == ON_SINT


@TIMERS
def test_periodic(timers: Timers, timer: int) -> None:
    """A periodic timer's messages are whole periods apart, none before its time, until it is disabled.

    TLFS, synthetic timers.
    """
    period, wanted = 2 * MILLISECOND, 8
    began = timers.now()
    timers.arm(timer, ENABLE | PERIODIC | ON_SINT, period)
    assert timers.do("take_ticks", timers.slot, VECTOR, wanted) >= wanted
    assert timers.config(timer) == ENABLE | PERIODIC | ON_SINT
    timers.write(Msr.HV_X64_MSR_STIMER0_CONFIG + 2 * timer, ON_SINT)
    times = list(timers.vm.symbol("expirations").view("Q"))[:wanted]
    deliveries = list(timers.vm.symbol("deliveries").view("Q"))[:wanted]
    assert times[0] >= began + period
    assert all(later > earlier for earlier, later in itertools.pairwise(times))
    assert {(each - times[0]) % period for each in times} == {0}
    assert all(delivery >= time for time, delivery in zip(times, deliveries, strict=True))
    timers.do("hv_install", VECTOR, 1)
    timers.free_slot()
    seen = timers.do("hv_counted", VECTOR)
    timers.do("hv_spin", 2 * period)
    assert timers.do("hv_counted", VECTOR) == seen


@TIMERS
def test_auto_enable(timers: Timers, timer: int) -> None:
    """With auto-enable, writing a count enables the timer; a count of 0 disables it.

    TLFS, synthetic timers.
    """
    config, count = Msr.HV_X64_MSR_STIMER0_CONFIG + 2 * timer, Msr.HV_X64_MSR_STIMER0_COUNT + 2 * timer
    timers.write(config, AUTO | ON_SINT)
    assert timers.config(timer) == AUTO | ON_SINT
    timers.write(count, timers.now() + 60_000 * MILLISECOND)
    assert timers.config(timer) == ENABLE | AUTO | ON_SINT
    timers.write(count, 0)
    assert timers.config(timer) == AUTO | ON_SINT
    timers.write(count, timers.now() + MILLISECOND)
    assert timers.do("hv_await", VECTOR, 1) == 1
    assert timers.config(timer) == AUTO | ON_SINT


@TIMERS
def test_without_auto_enable(timers: Timers, timer: int) -> None:
    """Without auto-enable a count alone starts nothing.

    TLFS, synthetic timers.
    """
    timers.write(Msr.HV_X64_MSR_STIMER0_CONFIG + 2 * timer, ON_SINT)
    timers.write(Msr.HV_X64_MSR_STIMER0_COUNT + 2 * timer, 1)
    timers.do("hv_spin", MILLISECOND)
    assert (timers.do("hv_counted", VECTOR), timers.message().kind) == (0, 0)


@TIMERS
@pytest.mark.parametrize("periodic", [False, True], ids=["one-shot", "periodic"])
def test_direct(timers: Timers, timer: int, periodic: bool) -> None:
    """In direct mode a timer is an interrupt without a message, of its own vector.

    TLFS, synthetic timers: DirectMode and ApicVector.
    """
    vector = 0x72
    timers.do("hv_install", vector, 1)
    count = MILLISECOND if periodic else timers.now() + MILLISECOND
    config = DIRECT | vector << 4 | (PERIODIC if periodic else 0)
    timers.arm(timer, config | ENABLE, count)
    wanted = 3 if periodic else 1
    assert timers.do("hv_await", vector, wanted) >= wanted
    assert timers.config(timer) == config | (ENABLE if periodic else 0)
    timers.write(Msr.HV_X64_MSR_STIMER0_CONFIG + 2 * timer, 0)
    assert timers.vm.read(timers.page, PAGE_SIZE) == bytes(PAGE_SIZE)
    assert timers.do("hv_counted", VECTOR) == 0


def test_busy_slot(timers: Timers) -> None:
    """A message that finds its slot taken waits, with the pending flag set, for the end of message.

    TLFS, synthetic timers: the guest writes EOM once it has seen the flag.
    """
    timers.vm.write(timers.slot, (77).to_bytes(4, "little"))
    timers.arm(0, ENABLE | ON_SINT, 1)
    assert timers.do("hv_counted", VECTOR) == 0
    busy = timers.message()
    assert (busy.kind, busy.flags, busy.expiration) == (77, 1, 0)
    # Not the message alone: as long as the slot is taken, EOM brings nothing.
    timers.write(Msr.HV_X64_MSR_EOM, 0)
    assert timers.do("hv_counted", VECTOR) == 0
    assert timers.config(0) == ENABLE | ON_SINT
    timers.free_slot()
    timers.write(Msr.HV_X64_MSR_EOM, 0)
    assert timers.do("hv_counted", VECTOR) == 1
    assert timers.message().kind == HvMessage.HVMSG_TIMER_EXPIRED
    assert timers.config(0) == ON_SINT


def test_busy_slot_of_a_periodic_timer(timers: Timers) -> None:
    """A periodic timer that finds its slot taken drops the tick: no flag, and the next one comes in its time.

    TLFS, synthetic timers: periodic timers skip what the guest could not take.
    """
    timers.vm.write(timers.slot, (77).to_bytes(4, "little"))
    timers.arm(1, ENABLE | PERIODIC | ON_SINT, MILLISECOND)
    timers.do("hv_spin", 4 * MILLISECOND)
    busy = timers.message()
    assert (busy.kind, busy.flags, busy.expiration) == (77, 0, 0)
    assert timers.do("hv_counted", VECTOR) == 0
    timers.free_slot()
    assert timers.do("hv_await", VECTOR, 1) >= 1
    assert timers.message().timer == 1


def test_four_at_once(timers: Timers) -> None:
    """Four timers with one source: each message comes, one after the other, as the slot gets free.

    TLFS, synthetic timers.
    """
    soon = timers.now() + 20 * MILLISECOND
    for timer in range(4):
        timers.arm(timer, ENABLE | ON_SINT, soon + timer)
    assert timers.do("take_ticks", timers.slot, VECTOR, 4) == 4
    assert sorted(timers.vm.symbol("expirations").view("Q"))[-4:] == [soon + timer for timer in range(4)]


def test_far_future(timers: Timers) -> None:
    """A count so far ahead that its nanoseconds overflow does not fire.

    TLFS, synthetic timers: the count is a 64-bit number of 100 ns.
    """
    for timer, count in enumerate(((1 << 64) - 1, (1 << 63), (1 << 63) // 100 + timers.now(), 1 << 62)):
        timers.arm(timer, ENABLE | ON_SINT, count)
    timers.do("hv_spin", 3 * MILLISECOND)
    assert timers.do("hv_counted", VECTOR) == 0
    assert [timers.config(timer) for timer in range(4)] == [ENABLE | ON_SINT] * 4
