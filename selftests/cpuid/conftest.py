# SPDX-License-Identifier: Apache-2.0
"""A guest that executes CPUID, and changes what CPUID depends on, as the host asks it to."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmpy import Cpuid, GuestVcpu, GuestVm, MakeVm, kvm_cpuid2

_CPUID, _CR4, _WRMSR, _RDMSR = 1, 2, 3, 4

GUEST = """
#include <kvmpy/guest.h>

GUEST_SHARED u64 operands[2];

void guest_main(void)
{
	struct cpuid_regs r = { 0 };
	struct guest_fault fault = { 0 };
	u64 value = 0;

	for (;;) {
		switch (GUEST_ASK(KVMPY_UCALL_CMD_USER, r.eax, r.ebx, r.ecx, r.edx, fault.faulted, value)) {
		case 1:
			r = cpuid(operands[0], operands[1]);
			break;
		case 2:
			fault = write_cr4_safe((read_cr4() & ~operands[0]) | operands[1]);
			break;
		case 3:
			fault = wrmsr_safe(operands[0], operands[1]);
			break;
		case 4:
			fault = rdmsr_safe(operands[0], &value);
			break;
		}
	}
}
"""


class CpuidGuest:
    """A running VM with that guest; the methods act on its first vCPU unless told otherwise."""

    def __init__(self, vm: GuestVm) -> None:
        self.vm = vm
        vm.launch()
        self._calls = {vcpu.index: vcpu.sync() for vcpu in vm.vcpus}

    @property
    def vcpu(self) -> GuestVcpu:
        """The first vCPU."""
        return self.vm.vcpus[0]

    def _ask(self, what: int, first: int, second: int, index: int = 0) -> tuple[int, ...]:
        self.vm.symbol("operands").bytes = first.to_bytes(8, "little") + second.to_bytes(8, "little")
        self._calls[index].reply(what)
        self._calls[index] = self.vm.vcpus[index].sync()
        return self._calls[index].args

    def cpuid(self, leaf: int, subleaf: int = 0, *, vcpu: int = 0) -> tuple[int, int, int, int]:
        """Execute CPUID and return EAX, EBX, ECX, EDX."""
        eax, ebx, ecx, edx = self._ask(_CPUID, leaf, subleaf, vcpu)[:4]
        return eax, ebx, ecx, edx

    def has(self, feature: str) -> bool:
        """Tell whether the guest sees a feature, by Linux's name."""
        from kvmpy.x86.cpuid import REGISTERS, feature_bit

        (leaf, subleaf, register), bit = feature_bit(feature)
        return bool(self.cpuid(leaf, subleaf)[REGISTERS.index(register)] >> bit & 1)

    def change_cr4(self, *, clear: int = 0, put: int = 0) -> None:
        """Clear and set bits of CR4; a fault fails the test."""
        assert not self._ask(_CR4, clear, put)[4]

    def wrmsr(self, index: int, value: int) -> None:
        """Write an MSR; a fault fails the test."""
        assert not self._ask(_WRMSR, index, value)[4]

    def rdmsr(self, index: int) -> int | None:
        """Return an MSR, None where it faults."""
        _, _, _, _, faulted, value = self._ask(_RDMSR, index, 0)
        return None if faulted else value


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
        return CpuidGuest(make_vm(GUEST, cpuid=changed(change), before_vcpus=before_vcpus, vcpus=vcpus))

    return make
