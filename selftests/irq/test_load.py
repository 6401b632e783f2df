# SPDX-License-Identifier: Apache-2.0
"""irqfds and routes that change while interrupts arrive, and in a race with each other."""

from __future__ import annotations

import errno
import time

import pytest

from kvmpy import EventFd, Kvm, KvmError, MakeVm, Msi, MsiRoute, VcpuThread, Vm, default_routes, refused
from selftests.conftest import UNDER_LOAD, Beside, turns

pytestmark = pytest.mark.requires("KVM_CAP_IRQFD", "KVM_CAP_IRQ_ROUTING")

GSI = 30
VECTORS = (0x51, 0x62)

# Both vCPUs take both vectors and count them where the host sees it.
GUEST = """
#include <kvmpy/guest.h>

GUEST_SHARED volatile u64 taken[2], ready, stop;

static void count(struct exception_frame *frame)
{
	atomic_inc(&taken[guest_cpu_index()]);
	apic_eoi();
}

void guest_main(void)
{
	guest_exception_install(0x51, count);
	guest_exception_install(0x62, count);
	apic_enable();
	atomic_inc(&ready);
	sti();
	while (!stop)
		cpu_relax();
	cli();
}
"""


@UNDER_LOAD
def test_no_interrupt_is_lost_by_new_routes(make_vm: MakeVm, load_seconds: float) -> None:
    """Each signal of an irqfd is one interrupt, by the old route or the new one, while routes are replaced.

    Documentation/virt/kvm/api.rst, 4.52 KVM_SET_GSI_ROUTING: the table is replaced as a whole.
    """
    vm = make_vm(GUEST, vcpus=2)
    routes = [MsiRoute(GSI, Msi.to(dest, vector)) for dest in (0, 1) for vector in VECTORS]
    vm.irq.set_gsi_routing(routes[:1])
    vm.launch()
    taken, ready = vm.symbol("taken").view("Q"), vm.symbol("ready")
    threads = [VcpuThread(vcpu.run_to_done, vcpu=vcpu).start() for vcpu in vm.vcpus]

    def wait(wanted: int) -> None:
        end = time.monotonic() + vm.deadline
        while taken[0] + taken[1] < wanted:
            assert all(thread.alive for thread in threads), [thread.stop() for thread in threads]
            assert time.monotonic() < end, f"{wanted} signals, {taken[0] + taken[1]} interrupts"
        assert taken[0] + taken[1] == wanted

    def others(_turn: int) -> None:
        with EventFd() as unused:
            vm.irq.irqfd(unused, GSI)
            vm.irq.irqfd(unused, GSI, deassign=True)

    try:
        end = time.monotonic() + vm.deadline
        while ready.u64 < 2:
            assert time.monotonic() < end, "the guest is not ready"
        with EventFd() as event:
            vm.irq.irqfd(event, GSI)
            replace = Beside(lambda turn: vm.irq.set_gsi_routing([routes[turn % len(routes)]]))
            sent = 0
            with replace, Beside(others):
                for _ in turns(load_seconds):
                    event.signal()
                    sent += 1
                    wait(sent)
            assert replace.count
    finally:
        vm.symbol("stop").u64 = 1
    for thread in threads:
        thread.join(vm.deadline)


def test_irqfds_race(two_vms: tuple[Vm, Vm], load_seconds: float) -> None:
    """One eventfd that is assigned, taken back and closed beside new routes in two VMs serves one at a time.

    virt/kvm/eventfd.c: the assignment, its end by ioctl and by the eventfd's last close, and new routes.
    """
    one, other = two_vms
    holder = [EventFd()]
    bad: list[KvmError] = []

    def use(vm: Vm, turn: int) -> None:
        fd = holder[0]
        if not fd.closed:
            for deassign in (turn % 3 == 0, True):
                try:
                    vm.irq.irqfd(fd.fd, GSI, deassign=deassign)
                except KvmError as error:
                    if error.errno not in (errno.EBUSY, errno.EBADF):
                        bad.append(error)
                except ValueError:  # closed meanwhile
                    return

    def reroute(vm: Vm, turn: int) -> None:
        message = MsiRoute(GSI, Msi.to(0, VECTORS[turn % 2]))
        vm.irq.set_gsi_routing([*default_routes(), message] if turn % 3 else [])

    def renew(turn: int) -> None:
        if turn % 8 == 0:
            # The new one first: the number of the old one must not be somebody else's meanwhile.
            old, holder[0] = holder[0], EventFd()
            old.close()
        else:
            holder[0].signal()

    with (
        Beside(lambda turn: use(one, turn)),
        Beside(lambda turn: use(other, turn)),
        Beside(lambda turn: reroute(one, turn)),
        Beside(lambda turn: reroute(other, turn)),
        holder[0],
    ):
        for turn in turns(load_seconds):
            renew(turn)
    assert not bad, bad[0]
    with EventFd() as event:
        one.irq.irqfd(event, GSI)
        with refused(errno.EBUSY):
            other.irq.irqfd(event, GSI)
    holder[0].close()


def test_a_vm_closes_beside_signals(kvm: Kvm, load_seconds: float) -> None:
    """A VM that is closed while its eventfds are signalled gives each up: the next VM may have it.

    virt/kvm/eventfd.c, kvm_irqfd_release().
    """

    def pulse(_turn: int) -> None:
        event.signal()
        event.read()

    with EventFd() as event, Beside(pulse):
        for _ in turns(load_seconds):
            with kvm.create_vm() as vm:
                vm.irq.create_chip()
                vm.irq.irqfd(event, GSI)
                vm.irq.set_gsi_routing([MsiRoute(GSI, Msi.to(0, VECTORS[0]))])
