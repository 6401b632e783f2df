# SPDX-License-Identifier: Apache-2.0
"""The in-kernel i8254 timer: creation, state, and the ticks that a guest gets."""

from __future__ import annotations

import errno
import time

import pytest

from kvmpy import (
    KVM_PIT_FLAGS_HPET_LEGACY,
    KVM_PIT_FLAGS_SPEAKER_DATA_ON,
    KVM_PIT_SPEAKER_DUMMY,
    GuestVm,
    IoExit,
    Kvm,
    MakeVm,
    RedirectionEntry,
    Vm,
    kvm_pit_state2,
    refused,
)
from selftests.conftest import said

pytestmark = pytest.mark.requires("KVM_CAP_PIT2", "KVM_CAP_PIT_STATE2")

VECTOR = 0x51
HZ = 1193182
# 5 ms
PERIOD = 5966
# 55 ms, the longest: hosts that emulate everything need milliseconds for an interrupt
LONG_PERIOD = 65535

GUEST = """
#include "interrupts.h"

#define VECTOR		0x51
#define PIT_CH0		0x40
#define PIT_CH2		0x42
#define PIT_MODE	0x43
#define SPEAKER		0x61

static void load(u8 channel, u8 mode, u16 count)
{
	outb(PIT_MODE, channel << 6 | 3 << 4 | mode << 1);
	outb(PIT_CH0 + channel, count);
	outb(PIT_CH0 + channel, count >> 8);
}

static u16 latched(u8 channel)
{
	u16 low;

	outb(PIT_MODE, channel << 6);
	low = inb(PIT_CH0 + channel);
	return low | inb(PIT_CH0 + channel) << 8;
}

void ticks(u64 mode, u64 count, u64 nr)
{
	u32 n;

	irq_install(VECTOR);
	apic_enable();
	load(0, mode, count);
	GUEST_SYNC('s');
	for (n = 1; n <= nr; n++)
		irq_wait(VECTOR, n);
	GUEST_SYNC('t', irq_count(VECTOR));
	irq_window();
	GUEST_SYNC('t', irq_count(VECTOR));
}

void wait_only(u64 nr)
{
	irq_install(VECTOR);
	apic_enable();
	irq_wait(VECTOR, nr);
	GUEST_SYNC('t', irq_count(VECTOR));
}

void counts(void)
{
	u16 before, after;

	load(0, 0, 0xffff);
	before = latched(0);
	do {
		after = latched(0);
		GUEST_ASSERT_LE(after, before);
	} while (after == before);
}

/* Channel 2 in mode 0: its output goes up after 1 ms, while the gate is open. */
void speaker(void)
{
	outb(SPEAKER, 0);
	load(2, 0, 1193);
	outb(SPEAKER, 1);
	GUEST_ASSERT_EQ(inb(SPEAKER) & 1, 1);
	while (!(inb(SPEAKER) & 0x20))
		;
	load(2, 0, 0xffff);
	GUEST_ASSERT_EQ(inb(SPEAKER) & 0x20, 0);
}

void ports(void)
{
	outb(SPEAKER, 3);
	outb(PIT_MODE, 0x34);
}
"""


def start(make_vm: MakeVm, entry: str, *args: int, flags: int = 0) -> GuestVm:
    """Return a VM with a timer whose ticks come at VECTOR, before its launch; missed ticks are lost."""
    vm = make_vm(GUEST, irqchip="full")
    vm.pit.create2(flags)
    vm.pit.reinject_control(False)
    state = vm.irq.get_ioapic()
    state.redirtbl[0].bits = RedirectionEntry(vector=VECTOR).bits
    vm.irq.set_ioapic(state)
    # GSI 0 leads to the PIC too, which nobody has given a vector base.
    pic = vm.irq.get_pic()
    pic.imr = 0xFF
    vm.irq.set_pic(pic)
    vm.vcpus[0].set_entry(entry, *args)
    return vm


def test_periodic_ticks(make_vm: MakeVm) -> None:
    """Channel 0 in mode 2 interrupts through GSI 0 with every period.

    Documentation/virt/kvm/api.rst, 4.71 KVM_CREATE_PIT2; 8254 data sheet, mode 2.
    """
    vm = start(make_vm, "ticks", 2, PERIOD, 6)
    vm.launch()
    assert said(vm) == ("s",)
    started = time.monotonic()
    assert said(vm)[0] == "t"
    # Six ticks; the first may be on its way when the clock is read.
    assert time.monotonic() - started > 4 * PERIOD / HZ


def test_one_shot(make_vm: MakeVm) -> None:
    """Channel 0 in mode 0 interrupts once.

    8254 data sheet, mode 0 (interrupt on terminal count).
    """
    vm = start(make_vm, "ticks", 0, PERIOD, 1)
    vm.launch()
    assert said(vm) == ("s",)
    assert said(vm) == ("t", 1)
    assert said(vm) == ("t", 1)


def test_count_runs_down(make_vm: MakeVm) -> None:
    """The latched count of a channel that was loaded with 0xffff in mode 0 goes down and never up.

    8254 data sheet (counter latch command).
    """
    vm = start(make_vm, "counts")
    vm.launch()
    vm.vcpus[0].run_to_done()


def test_speaker_port(make_vm: MakeVm) -> None:
    """With KVM_PIT_SPEAKER_DUMMY the guest gates channel 2 and reads its output at port 0x61.

    Documentation/virt/kvm/api.rst, 4.71 KVM_CREATE_PIT2: "emulate speaker port stub".
    """
    vm = start(make_vm, "speaker", flags=KVM_PIT_SPEAKER_DUMMY)
    vm.launch()
    vm.vcpus[0].run_to_done()


def test_speaker_port_is_optional(make_vm: MakeVm) -> None:
    """Without KVM_PIT_SPEAKER_DUMMY port 0x61 is user space's, and the timer's ports are the kernel's.

    Documentation/virt/kvm/api.rst, 4.71 KVM_CREATE_PIT2.
    """
    vm = start(make_vm, "ports")
    vm.launch()
    got = vm.vcpus[0].expect(IoExit)
    assert (got.port, got.value) == (0x61, 3)
    vm.vcpus[0].run_to_done()


def test_speaker_bit_in_state(make_vm: MakeVm) -> None:
    """The speaker's data bit that the guest sets at port 0x61 is in the flags of KVM_GET_PIT2.

    Documentation/virt/kvm/api.rst, 4.72 KVM_GET_PIT2: KVM_PIT_FLAGS_SPEAKER_DATA_ON.
    """
    vm = start(make_vm, "ports", flags=KVM_PIT_SPEAKER_DUMMY)
    vm.launch()
    assert vm.pit.get2().flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON == 0
    vm.vcpus[0].run_to_done()
    assert vm.pit.get2().flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON


def test_state_shows_what_guest_loaded(make_vm: MakeVm) -> None:
    """KVM_GET_PIT2 and the older KVM_GET_PIT show mode, access and count as the guest loaded them.

    Documentation/virt/kvm/api.rst, 4.72 KVM_GET_PIT2.
    """
    vm = start(make_vm, "ticks", 2, PERIOD, 1)
    vm.launch()
    assert said(vm) == ("s",)
    for channel in (vm.pit.get2().channels[0], vm.pit.get().channels[0]):
        assert (channel.mode, channel.rw_mode, channel.count, channel.bcd) == (2, 3, PERIOD, 0)


def test_restored_timer_ticks(make_vm: MakeVm) -> None:
    """A timer that gets its state by KVM_SET_PIT2 ticks without the guest's help.

    Documentation/virt/kvm/api.rst, 4.73 KVM_SET_PIT2.
    """
    vm = start(make_vm, "wait_only", 3)
    state = vm.pit.get2()
    state.channels[0].mode = 2
    state.channels[0].count = PERIOD
    vm.launch()
    vm.pit.set2(state)
    assert said(vm)[0] == "t"


def test_reinject_makes_up(make_vm: MakeVm) -> None:
    """In reinject mode no tick is lost: as many interrupts arrive as periods went by.

    Documentation/virt/kvm/api.rst, 4.99 KVM_REINJECT_CONTROL: "KVM queues elapsed i8254 ticks".
    """
    vm = start(make_vm, "ticks", 2, LONG_PERIOD, 10)
    vm.pit.reinject_control(True)
    vm.launch()
    assert said(vm) == ("s",)
    # Ten periods go by while the guest is kept from running.
    end = time.monotonic() + 11 * LONG_PERIOD / HZ
    while time.monotonic() < end:
        vm.pit.get2()
    started = time.monotonic()
    assert said(vm)[0] == "t"
    # Were ticks lost, more than eight periods would have to go by: 440 ms, ten interrupts take far less.
    assert time.monotonic() - started < 8 * LONG_PERIOD / HZ


def test_state_is_kept(vm: Vm) -> None:
    """What KVM_SET_PIT2 writes KVM_GET_PIT2 reads back, the HPET legacy flag included.

    Documentation/virt/kvm/api.rst, 4.72 KVM_GET_PIT2 and 4.73 KVM_SET_PIT2.
    """
    vm.irq.create_chip()
    vm.pit.create2()
    state = kvm_pit_state2(flags=KVM_PIT_FLAGS_HPET_LEGACY)
    for number in range(3):
        channel = state.channels[number]
        channel.mode, channel.rw_mode, channel.count, channel.gate = number, 3, 1000 + number, 1
    vm.pit.set2(state)
    got = vm.pit.get2()
    assert got.flags == KVM_PIT_FLAGS_HPET_LEGACY
    for number in range(3):
        channel = got.channels[number]
        assert (channel.mode, channel.rw_mode, channel.count, channel.gate) == (number, 3, 1000 + number, 1)


def test_older_form_is_kept(vm: Vm) -> None:
    """KVM_SET_PIT writes the same channels as KVM_SET_PIT2.

    Documentation/virt/kvm/api.rst, 4.72 KVM_GET_PIT2: it replaces the obsolete KVM_GET_PIT.
    """
    vm.irq.create_chip()
    vm.pit.create2()
    state = vm.pit.get()
    state.channels[1].mode = 3
    state.channels[1].count = 4321
    vm.pit.set(state)
    channel = vm.pit.get2().channels[1]
    assert (channel.mode, channel.count) == (3, 4321)


def test_needs_irqchip(vm: Vm) -> None:
    """KVM_CREATE_PIT2 is valid only after KVM_CREATE_IRQCHIP: ENOENT before.

    Documentation/virt/kvm/api.rst, 4.71 KVM_CREATE_PIT2.
    """
    with refused(errno.ENOENT):
        vm.pit.create2()


@pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP")
def test_split_irqchip_has_no_pit(kvm: Kvm) -> None:
    """With a split irqchip the timer is left to user space as well: ENOENT.

    Documentation/virt/kvm/api.rst, 7.5 KVM_CAP_SPLIT_IRQCHIP: IOAPIC, PIC and PIT are emulated by the VMM.
    """
    with kvm.create_vm() as vm:
        vm.irq.create_split_chip()
        with refused(errno.ENOENT):
            vm.pit.create2()


def test_second_timer(vm: Vm) -> None:
    """A VM has one such timer: a second one is refused with EEXIST.

    Documentation/virt/kvm/api.rst, 4.71 KVM_CREATE_PIT2.
    """
    vm.irq.create_chip()
    vm.pit.create2()
    with refused(errno.EEXIST):
        vm.pit.create2()


def test_state_without_timer(vm: Vm) -> None:
    """Without a timer its state can be neither read nor written, nor its reinjection controlled: ENXIO.

    Documentation/virt/kvm/api.rst, 4.72 KVM_GET_PIT2 and 4.99 KVM_REINJECT_CONTROL.
    """
    vm.irq.create_chip()
    with refused(errno.ENXIO):
        vm.pit.get2()
    with refused(errno.ENXIO):
        vm.pit.set2(kvm_pit_state2())
    with refused(errno.ENXIO):
        vm.pit.get()
    with refused(errno.ENXIO):
        vm.pit.reinject_control(True)
