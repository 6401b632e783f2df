# SPDX-License-Identifier: Apache-2.0
"""A guest that executes CPUID, and changes what CPUID depends on, as the host asks it to."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmpy import AGENT, Agent, Cpuid, Fault, GuestVcpu, GuestVm, MakeVm, kvm_cpuid2


class CpuidGuest:
    """A running VM with that guest; the methods act on its first vCPU unless told otherwise.

    ``agents`` are those of its vCPUs.
    """

    def __init__(self, vm: GuestVm) -> None:
        self.vm = vm
        self.agents = [Agent(vcpu) for vcpu in vm.vcpus]
        for agent in self.agents:
            agent.start()

    @property
    def vcpu(self) -> GuestVcpu:
        """The first vCPU."""
        return self.vm.vcpus[0]

    def cpuid(self, leaf: int, subleaf: int = 0, *, vcpu: int = 0) -> tuple[int, int, int, int]:
        """Execute CPUID and return EAX, EBX, ECX, EDX."""
        return self.agents[vcpu].cpuid(leaf, subleaf)

    def has(self, feature: str) -> bool:
        """Tell whether the guest sees a feature, by Linux's name."""
        from kvmpy.x86.cpuid import REGISTERS, feature_bit

        (leaf, subleaf, register), bit = feature_bit(feature)
        return bool(self.cpuid(leaf, subleaf)[REGISTERS.index(register)] >> bit & 1)

    def change_cr4(self, *, clear: int = 0, put: int = 0) -> None:
        """Clear and set bits of CR4; a fault fails the test."""
        assert self.agents[0].change_cr(4, clear=clear, put=put) is None

    def wrmsr(self, index: int, value: int) -> None:
        """Write an MSR; a fault fails the test."""
        assert self.agents[0].wrmsr(index, value) is None

    def rdmsr(self, index: int) -> int | None:
        """Return an MSR, None where it faults."""
        value = self.agents[0].rdmsr(index)
        return None if isinstance(value, Fault) else value


CpuidGuestMaker = Callable[..., CpuidGuest]


def changed(change: Callable[[Cpuid], None] | None) -> Callable[[kvm_cpuid2], kvm_cpuid2]:
    """Return what make_vm() takes as *cpuid*, from a function that edits a Cpuid."""

    def edit(table: kvm_cpuid2) -> kvm_cpuid2:
        cpuid = Cpuid.from_struct(table)
        if change is not None:
            change(cpuid)
        return cpuid.to_struct()

    return edit


@pytest.fixture
def cpuid_guest(make_vm: MakeVm) -> CpuidGuestMaker:
    """Make the guest; *change* edits the CPUID that KVM supports, the others are as for make_vm()."""

    def make(
        change: Callable[[Cpuid], None] | None = None,
        *,
        before_vcpus: Callable[[GuestVm], None] | None = None,
        vcpus: int = 1,
    ) -> CpuidGuest:
        return CpuidGuest(make_vm(AGENT, cpuid=changed(change), before_vcpus=before_vcpus, vcpus=vcpus))

    return make
