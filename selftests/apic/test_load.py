# SPDX-License-Identifier: Apache-2.0
"""Local APICs that change mode, id and base in a race, while KVM looks receivers up."""

from __future__ import annotations

import contextlib
import resource

import pytest

from kvmpy import KVM_CAP_MAX_VCPUS, EventFd, Kvm, KvmError, Msi, Msr, Vcpu, Vm, apic
from selftests.conftest import Beside, turns

BASE = int(Msr.MSR_IA32_APICBASE)
ENABLED, X2APIC = 1 << 11, 1 << 10
GSI, VECTOR = 30, 0x51


def make_vcpus(vm: Vm, wanted: int) -> list[Vcpu]:
    """Make as many vCPUs as KVM and the limit of open files allow."""
    most = min(wanted, vm.check_extension(KVM_CAP_MAX_VCPUS))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    vcpus = [vm.create_vcpu(number) for number in range(max(2, min(most, (soft - 64) // 3)))]
    for vcpu in vcpus:
        vcpu.cpuid.set(vm.kvm.supported_cpuid)
    return vcpus


def check_reachable(vm: Vm, vcpus: list[Vcpu]) -> None:
    """Send a message to each vCPU, and find it there."""
    for vcpu in vcpus:
        vcpu.lapic.set_reg(apic.SPIV, 0x1FF)
        vm.irq.signal_msi(Msi.to(vcpu.vcpu_id, VECTOR))
        requested = vcpu.lapic.get_reg(apic.IRR + 0x10 * (VECTOR // 32))
        assert requested & 1 << VECTOR % 32, f"{vcpu.name} did not get its message"


# Before 4364b287982b (in v6.4) KVM wrote behind the map's end.
@pytest.mark.dangerous
def test_bases_change_while_states_are_loaded(kvm: Kvm, load_seconds: float) -> None:
    """KVM_SET_LAPIC of one vCPU beside APIC base writes of all others: the map of APICs stays whole.

    arch/x86/kvm/lapic.c, kvm_recalculate_apic_map().  What is sent to each vCPU in the end finds it.
    """
    with kvm.create_vm() as vm:
        vm.irq.create_chip()
        vcpus = make_vcpus(vm, 1024)
        last = vcpus[-1]
        last.msrs.set(BASE, last.msrs.get(BASE) | ENABLED | X2APIC)
        state = last.lapic.get()
        failures: list[KvmError] = []

        def load(_turn: int) -> None:
            try:
                last.lapic.set(state)
            except KvmError as error:
                failures.append(error)

        with Beside(load) as beside:
            for turn in turns(load_seconds):
                vcpu = vcpus[turn % (len(vcpus) - 1)]
                base = vcpu.msrs.get(BASE)
                vcpu.msrs.set(BASE, base & ~(ENABLED | X2APIC))
                vcpu.msrs.set(BASE, base | ENABLED)
                vcpu.msrs.set(BASE, base | ENABLED | X2APIC)
        assert beside.count
        assert not failures, failures[0]
        check_reachable(vm, vcpus[:256])


def test_messages_find_their_way_while_ids_change(kvm: Kvm, load_seconds: float) -> None:
    """Messages that are sent while APICs change their mode harm nothing: later ones find every APIC.

    arch/x86/kvm/lapic.c, kvm_irq_delivery_to_apic_fast().
    """
    with kvm.create_vm() as vm:
        vm.irq.create_chip()
        vcpus = make_vcpus(vm, 64)
        images = [vcpu.lapic.get() for vcpu in vcpus]

        def send(turn: int) -> None:
            with contextlib.suppress(KvmError):
                vm.irq.signal_msi(Msi.to(turn % len(vcpus), VECTOR, logical=turn % 3 == 0))

        with EventFd() as event, Beside(send) as beside:
            vm.irq.irqfd(event, GSI)
            for turn in turns(load_seconds):
                vcpu, image = vcpus[turn % len(vcpus)], images[turn % len(vcpus)]
                base = vcpu.msrs.get(BASE)
                vcpu.msrs.set(BASE, base | ENABLED | X2APIC)
                event.signal()
                vcpu.msrs.set(BASE, base & ~(ENABLED | X2APIC))
                vcpu.msrs.set(BASE, base | ENABLED)
                vcpu.lapic.set(image)
        assert beside.count
        check_reachable(vm, vcpus)
