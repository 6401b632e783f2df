# SPDX-License-Identifier: Apache-2.0
"""Interrupts between processors, in xAPIC and x2APIC mode: who gets them by destination and shorthand."""

from __future__ import annotations

import pytest

from kvmpy import (
    KVM_CAP_X2APIC_API,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK,
    Agent,
    GuestVm,
    MakeVm,
    Msi,
    apic,
)
from kvmpy.x86.apic import Delivery, Shorthand

pytestmark = pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP")

VECTOR = 0x51
XAPIC, X2APIC = False, True
BOTH_MODES = pytest.mark.parametrize("x2apic", [XAPIC, X2APIC], ids=["xapic", "x2apic"])
NO_QUIRK = int(KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK)

GUEST = """
#include "../irq/interrupts.h"

#define VECTOR	0x51

static volatile u32 nmis[INTERRUPTS_CPUS];

static void nmi_handler(struct exception_frame *frame)
{
	nmis[guest_cpu_index()]++;
}

void send(u64 dest, u64 icr)
{
	apic_send(dest, icr);
}

void send_self(u64 vector)
{
	x2apic_write(APIC_SELF_IPI, vector);
}

/* Interrupts, and NMIs in the upper half. */
u64 counts(void)
{
	irq_window();
	return irq_count(VECTOR) | (u64)nmis[guest_cpu_index()] << 32;
}

void guest_main(u64 x2apic, u64 ldr)
{
	irq_install(VECTOR);
	guest_exception_install(NMI_VECTOR, nmi_handler);
	if (x2apic) {
		x2apic_enable();
	} else {
		apic_enable();
		apic_write(APIC_LDR, ldr << 24);
	}
	guest_agent();
}

/* What was sent can be read back, and it is on its way at once. */
void command(u64 x2apic)
{
	u32 low = APIC_DM_FIXED | APIC_INT_ASSERT | VECTOR;

	irq_install(VECTOR);
	if (x2apic) {
		x2apic_enable();
		x2apic_write(APIC_ICR, 77ull << 32 | low);
		GUEST_ASSERT_EQ(x2apic_read(APIC_ICR), 77ull << 32 | low);
	} else {
		apic_enable();
		xapic_write(APIC_ICR2, 77u << 24);
		GUEST_ASSERT_EQ(xapic_read(APIC_ICR2), 77u << 24);
		xapic_write(APIC_ICR, low);
		GUEST_ASSERT_EQ(xapic_read(APIC_ICR), low);
		/* The upper half alone sends nothing. */
		xapic_write(APIC_ICR2, 0);
		irq_window();
		GUEST_ASSERT_EQ(irq_count(VECTOR), 0u);
	}
}

static void command_is_kept(u64 x2apic, u64 high, u32 low)
{
	if (x2apic) {
		x2apic_write(APIC_ICR, high << 32 | low);
		GUEST_ASSERT_EQ(x2apic_read(APIC_ICR), high << 32 | low);
	} else {
		xapic_write(APIC_ICR2, high << 24);
		xapic_write(APIC_ICR, low);
		GUEST_ASSERT_EQ(xapic_read(APIC_ICR), low);
		GUEST_ASSERT_EQ(xapic_read(APIC_ICR2), high << 24);
	}
}

/* Every vector to oneself, and everything to those who are not there; the host looks at each SYNC. */
void commands(u64 x2apic)
{
	if (x2apic)
		x2apic_enable();
	else
		apic_enable();
	for (u32 vector = 16; vector < 256; vector++)
		command_is_kept(x2apic, 0, APIC_DEST_SELF | APIC_INT_ASSERT | vector);
	GUEST_SYNC(0, APIC_DEST_SELF | APIC_INT_ASSERT | 255);
	for (u32 vector = 16; vector < 256; vector++)
		command_is_kept(x2apic, 0, APIC_DEST_OTHERS | APIC_INT_ASSERT | vector);
	GUEST_SYNC(0, APIC_DEST_OTHERS | APIC_INT_ASSERT | 255);
	for (u32 mode = 0; mode < 8; mode++) {
		u32 low = mode << 8 | VECTOR;

		for (u32 destination = 1; destination < 255; destination++) {
			command_is_kept(x2apic, destination, low);
			command_is_kept(x2apic, destination, low | APIC_INT_ASSERT);
			/* In x2APIC mode bit 0 is this processor. */
			command_is_kept(x2apic, destination & ~1u, low | APIC_DEST_LOGICAL);
		}
		command_is_kept(x2apic, 0x5a, low | APIC_INT_ASSERT | APIC_INT_LEVEL);
		GUEST_SYNC(0x5a, low | APIC_INT_ASSERT | APIC_INT_LEVEL);
	}
	GUEST_DONE();
}

/* One halts until it is called, the other calls; then the other way round. */
void ping_pong(u64 x2apic, u64 rounds)
{
	u32 me = guest_cpu_index();
	u32 n;

	irq_install(VECTOR);
	if (x2apic)
		x2apic_enable();
	else
		apic_enable();
	GUEST_SYNC('r');
	for (n = 1; n <= rounds; n++) {
		if (me == 0)
			apic_send_ipi(1, VECTOR);
		irq_wait(VECTOR, n);
		if (me == 1)
			apic_send_ipi(0, VECTOR);
	}
	GUEST_ASSERT_EQ(irq_count(VECTOR), rounds);
}
"""


class Cluster:
    """A VM whose vCPUs wait for interrupts; the first one sends."""

    def __init__(
        self, make_vm: MakeVm, *, x2apic: bool, ids: tuple[int, ...] = (0, 1, 2), quirk: bool = True
    ) -> None:
        def before(vm: GuestVm) -> None:
            if not quirk:
                vm.enable_cap(KVM_CAP_X2APIC_API, NO_QUIRK)

        self.vm = make_vm(GUEST, vcpu_ids=ids, before_vcpus=before)
        for vcpu in self.vm.vcpus:
            vcpu.set_entry("guest_main", int(x2apic), 1 << vcpu.index)
        self.agents = [Agent(vcpu) for vcpu in self.vm.vcpus]
        for agent in self.agents:
            agent.start()

    def counts(self) -> list[tuple[int, int]]:
        """Return each vCPU's interrupts and NMIs after a window for them."""
        for agent in self.agents:
            agent.begin_call("counts")
        words = [agent.value() for agent in self.agents]
        return [(word & 0xFFFF_FFFF, word >> 32) for word in words]

    def send(
        self,
        dest: int,
        *,
        delivery: Delivery = Delivery.FIXED,
        shorthand: Shorthand = Shorthand.NONE,
        logical: bool = False,
    ) -> list[tuple[int, int]]:
        """Let vCPU 0 send an interrupt; return everybody's counts."""
        command = VECTOR | delivery << 8 | int(logical) << 11 | 1 << 14 | shorthand << 18
        self.agents[0].begin_call("send", dest, command)
        self.agents[0].value()
        return self.counts()

    def send_self(self) -> list[tuple[int, int]]:
        """Let vCPU 0 use the SELF IPI register; return everybody's counts."""
        self.agents[0].begin_call("send_self", VECTOR)
        self.agents[0].value()
        return self.counts()


def got(*interrupts: int) -> list[tuple[int, int]]:
    """Return counts with these numbers of interrupts and no NMI."""
    return [(count, 0) for count in interrupts]


@BOTH_MODES
def test_physical(make_vm: MakeVm, x2apic: bool) -> None:
    """A fixed interrupt to an APIC id reaches the vCPU with that id, and no other.

    Intel SDM 3A, 12.6.2.1 (physical destination mode).
    """
    cluster = Cluster(make_vm, x2apic=x2apic)
    assert cluster.send(1) == got(0, 1, 0)
    assert cluster.send(2) == got(0, 1, 1)
    assert cluster.send(0) == got(1, 1, 1)


@BOTH_MODES
def test_nobody(make_vm: MakeVm, x2apic: bool) -> None:
    """An interrupt to an id that no vCPU has reaches nobody.

    Intel SDM 3A, 12.6.2.1.
    """
    cluster = Cluster(make_vm, x2apic=x2apic)
    assert cluster.send(77) == got(0, 0, 0)


@BOTH_MODES
@pytest.mark.parametrize(
    ("shorthand", "counts"),
    [(Shorthand.SELF, (1, 0, 0)), (Shorthand.ALL, (1, 1, 1)), (Shorthand.ALL_BUT_SELF, (0, 1, 1))],
)
def test_shorthand(make_vm: MakeVm, x2apic: bool, shorthand: Shorthand, counts: tuple[int, ...]) -> None:
    """Self, all, and all but self are destinations of their own; the destination field means nothing then.

    Intel SDM 3A, 12.6.1 (destination shorthand).
    """
    cluster = Cluster(make_vm, x2apic=x2apic)
    assert cluster.send(2, shorthand=shorthand) == got(*counts)


@pytest.mark.parametrize(
    ("x2apic", "everybody"), [(XAPIC, 0xFF), (X2APIC, 0xFFFF_FFFF)], ids=["xapic", "x2apic"]
)
def test_broadcast(make_vm: MakeVm, x2apic: bool, everybody: int) -> None:
    """The id of all ones is everybody: 8 bits in xAPIC mode, 32 bits in x2APIC mode.

    Intel SDM 3A, 12.6.2.1 and 12.12.9 (ICR operation in x2APIC mode).
    """
    cluster = Cluster(make_vm, x2apic=x2apic)
    assert cluster.send(everybody) == got(1, 1, 1)


@pytest.mark.requires(f"KVM_CAP_X2APIC_API&{NO_QUIRK}", "KVM_CAP_MAX_VCPU_ID>=256")
@pytest.mark.parametrize(("quirk", "counts"), [(True, (1, 1, 1)), (False, (0, 0, 1))])
def test_broadcast_quirk(make_vm: MakeVm, quirk: bool, counts: tuple[int, ...]) -> None:
    """A message to 0xff is everybody in x2APIC mode too, unless the quirk is disabled.

    Documentation/virt/kvm/api.rst, 7.7 KVM_CAP_X2APIC_API: KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK.
    """
    cluster = Cluster(make_vm, x2apic=X2APIC, ids=(0, 1, 0xFF), quirk=quirk)
    cluster.vm.irq.signal_msi(Msi.to(0xFF, VECTOR))
    assert cluster.counts() == got(*counts)


@pytest.mark.requires("KVM_CAP_MAX_VCPU_ID>=256")
def test_id_255(make_vm: MakeVm) -> None:
    """An interrupt that a vCPU in x2APIC mode sends to 0xff reaches the vCPU with that id alone.

    Intel SDM 3A, 12.12.9: the destination has 32 bits, only 0xffffffff is everybody.
    """
    cluster = Cluster(make_vm, x2apic=X2APIC, ids=(0, 1, 0xFF))
    assert cluster.send(0xFF) == got(0, 0, 1)


def test_logical_flat(make_vm: MakeVm) -> None:
    """In xAPIC mode a logical destination is a set of bits: whoever has one of them is meant.

    Intel SDM 3A, 12.6.2.2 (flat model).
    """
    cluster = Cluster(make_vm, x2apic=XAPIC)
    assert cluster.send(0b110, logical=True) == got(0, 1, 1)
    assert cluster.send(0b001, logical=True) == got(1, 1, 1)
    assert cluster.send(0b1000, logical=True) == got(1, 1, 1)


@pytest.mark.requires(f"KVM_CAP_X2APIC_API&{NO_QUIRK}")
def test_logical_cluster(make_vm: MakeVm) -> None:
    """In x2APIC mode a logical destination is a cluster of 16 and a set of bits in it.

    Intel SDM 3A, 12.12.10.1 (logical destination mode in x2APIC mode).
    """
    cluster = Cluster(make_vm, x2apic=X2APIC, ids=(0, 17, 18), quirk=False)
    assert cluster.send(1 << 16 | 0b110, logical=True) == got(0, 1, 1)
    assert cluster.send(0 << 16 | 0b111, logical=True) == got(1, 1, 1)
    assert cluster.send(1 << 16 | 0b100, logical=True) == got(1, 1, 2)


@BOTH_MODES
def test_lowest_priority(make_vm: MakeVm, x2apic: bool) -> None:
    """With lowest-priority delivery exactly one of the logical destinations is interrupted.

    Intel SDM 3A, 12.6.2.4.
    """
    cluster = Cluster(make_vm, x2apic=x2apic)
    counts = cluster.send(0b110, logical=True, delivery=Delivery.LOWEST)
    assert counts[0] == (0, 0)
    assert sorted(counts[1:]) == got(0, 1)


@BOTH_MODES
def test_nmi(make_vm: MakeVm, x2apic: bool) -> None:
    """NMI delivery raises an NMI at the destination, whose vector is always 2.

    Intel SDM 3A, 12.6.1 (delivery mode).
    """
    cluster = Cluster(make_vm, x2apic=x2apic)
    assert cluster.send(1, delivery=Delivery.NMI) == [(0, 0), (0, 1), (0, 0)]
    counts = cluster.send(0, delivery=Delivery.NMI, shorthand=Shorthand.ALL_BUT_SELF)
    assert counts == [(0, 0), (0, 2), (0, 1)]


def test_self_ipi_register(make_vm: MakeVm) -> None:
    """x2APIC's SELF IPI register interrupts the vCPU that writes it.

    Intel SDM 3A, 12.12.11.
    """
    cluster = Cluster(make_vm, x2apic=X2APIC)
    assert cluster.send_self() == got(1, 0, 0)


@BOTH_MODES
def test_disabled_receiver(make_vm: MakeVm, x2apic: bool) -> None:
    """A vCPU whose APIC is disabled by software takes no fixed interrupts, but NMIs.

    Intel SDM 3A, 12.4.7.2 (state after it has been software disabled).
    """
    cluster = Cluster(make_vm, x2apic=x2apic)
    cluster.vm.vcpus[1].lapic.set_reg(0xF0, 0xFF)
    assert cluster.send(1) == got(0, 0, 0)
    assert cluster.send(1, delivery=Delivery.NMI) == [(0, 0), (0, 1), (0, 0)]


@BOTH_MODES
def test_command_register(make_vm: MakeVm, x2apic: bool) -> None:
    """The interrupt command register reads back what was sent, with the delivery status clear.

    Intel SDM 3A, 12.6.1 (ICR) and 12.12.9 (ICR operation in x2APIC mode).
    """
    make_vm.run(GUEST, "command", int(x2apic))


@BOTH_MODES
@pytest.mark.usefixtures("open_registers")
def test_every_command(make_vm: MakeVm, x2apic: bool) -> None:
    """The ICR keeps each vector, delivery mode and destination as written, and KVM_GET_LAPIC shows it.

    Those for oneself are requested once they were sent, and those for nobody change nothing else.  Intel SDM
    3A, 12.6.1 (ICR) and 12.12.9 (ICR operation in x2APIC mode); api.rst, 4.57 KVM_GET_LAPIC.
    """
    vcpu = make_vm.start(GUEST, "commands", int(x2apic)).vcpus[0]
    seen = 0
    for call in vcpu.syncs():
        high, low = call.args
        state = [vcpu.lapic.get_reg(register) for register in (apic.ICR, apic.ICR2)]
        assert state == [low, high if x2apic else high << 24]
        requested = [vcpu.lapic.get_reg(apic.IRR + 16 * word) for word in range(8)]
        assert requested == [0xFFFF_0000] + [0xFFFF_FFFF] * 7
        assert [vcpu.lapic.get_reg(apic.ISR + 16 * word) for word in range(8)] == [0] * 8
        seen += 1
    assert seen == 10


@BOTH_MODES
def test_wakes_halted(make_vm: MakeVm, x2apic: bool) -> None:
    """An interrupt wakes the vCPU that halted for it, back and forth between two running vCPUs.

    Documentation/virt/kvm/api.rst, 4.38 KVM_GET_MP_STATE: a halted vCPU waits for an interrupt.
    """
    vm = make_vm.start(GUEST, "ping_pong", int(x2apic), 50, vcpus=2)
    for vcpu in vm.vcpus:
        assert vcpu.sync().args == (ord("r"),)
    vm.run_all()
