# SPDX-License-Identifier: Apache-2.0
"""Figures of private memory: conversions beside the bare ioctl, faults of private beside shared pages."""

from __future__ import annotations

import time
from collections.abc import Iterator

from kvmpy.coco.kvm import Kvm
from kvmpy.core.address import PAGE_SIZE, SIZE_2M, Gpa, Gva
from kvmpy.core.backing import Anonymous
from kvmpy.guest.program import GuestProgram
from kvmpy.guest.vm import GuestVm
from kvmpy.testing.bench.bare import Bare
from kvmpy.testing.bench.samples import Figure, Samples
from kvmpy.uapi.constants import KVM_CAP_PRE_FAULT_MEMORY

PROTECTION = "sw-protected"
_GPA, _GVA = Gpa(0x8000_0000), Gva(0x70_0000_0000)
_PAGES = 2048
_SIZE = _PAGES * PAGE_SIZE
_TIMEOUT = 120.0

# Touches each page of a range between two words.
_TOUCH = """
#include <kvmpy/guest.h>
void guest_main(u64 address, u64 pages)
{
	for (;;) {
		GUEST_SYNC();
		for (u64 i = 0; i < pages; i++)
			*(volatile u64 *)(address + i * 4096) = i;
	}
}
"""


def _vm(kvm: Kvm) -> GuestVm:
    vm = kvm.create_vm(GuestProgram.from_c(_TOUCH), protection=PROTECTION)
    vm.add_memory(_GPA, _SIZE, backing=Anonymous("never"))
    vm.map(_GVA, _GPA, _SIZE, page_size=PAGE_SIZE)
    vm.vcpus[0].set_entry("guest_main", int(_GVA), _PAGES)
    vm.launch()
    return vm


def _conversions(vm: GuestVm, bare: Bare, rounds: int) -> Iterator[Figure]:
    for name, size, count, target in (
        ("4k", PAGE_SIZE, 100, ""),
        ("2m", SIZE_2M, 20, "at most 1.3 times the bare ioctl"),
    ):
        samples = Samples()
        # Short stretches in turn: what disturbs one side disturbs the other.
        for _ in range(rounds * 10):
            alone = bare.convert(vm.fd, int(_GPA), size, count)
            start = time.perf_counter_ns()
            for _ in range(count // 2):
                vm.memory.set_private(_GPA, size)
                vm.memory.set_shared(_GPA, size)
            taken = time.perf_counter_ns() - start
            samples.add(taken / count / 1e3, alone / count / 1e3)
        yield samples.figure(
            f"convert-{name}",
            "set_private() and set_shared() in turn, beside KVM_SET_MEMORY_ATTRIBUTES in a C loop",
            "us",
            target,
            (lambda figure: figure.ratio <= 1.3) if target else None,
        )


def _renew(vm: GuestVm, private: bool) -> None:
    # Neither kind has memory or mappings now: the next access of a page has everything to do.
    vm.memory.set_private(_GPA, _SIZE, discard=True)
    vm.memory.set_shared(_GPA, _SIZE, discard=True)
    if private:
        vm.memory.set_private(_GPA, _SIZE)


def _first_touch(vm: GuestVm, rounds: int) -> Iterator[Figure]:
    vcpu = vm.vcpus[0]
    samples = Samples()
    vcpu.sync(_TIMEOUT)
    for _ in range(rounds):
        rates = []
        for private in (True, False):
            _renew(vm, private)
            start = time.perf_counter_ns()
            vcpu.sync(_TIMEOUT)
            rates.append(_PAGES / (time.perf_counter_ns() - start) * 1e6)
        samples.add(*rates)
    yield samples.figure(
        "first-touch",
        "first writes of private pages by the guest, beside shared ones",
        "k pages/s",
        beside="shared",
    )


def _pre_fault(vm: GuestVm, bare: Bare, rounds: int) -> Iterator[Figure]:
    vcpu = vm.vcpus[0]
    kinds, ioctls = Samples(), Samples()
    for _ in range(rounds):
        rates = []
        for private in (True, False):
            _renew(vm, private)
            start = time.perf_counter_ns()
            gpa, left = int(_GPA), _SIZE
            while left:
                gpa, left = vcpu.pre_fault_memory(gpa, left)
            rates.append(_PAGES / (time.perf_counter_ns() - start) * 1e6)
        kinds.add(*rates)
        _renew(vm, True)
        ioctls.add(rates[0], _PAGES / bare.pre_fault(vcpu.fd, int(_GPA), _SIZE) * 1e6)
    yield kinds.figure(
        "pre-fault", "private pages mapped in advance, beside shared ones", "k pages/s", beside="shared"
    )
    yield ioctls.figure(
        "pre-fault-ioctl", "private pages mapped in advance, beside KVM_PRE_FAULT_MEMORY in C", "k pages/s"
    )


def measure(kvm: Kvm, rounds: int) -> Iterator[Figure]:
    """Measure the figures in *rounds* rounds, both sides in turn; *kvm* must have sw-protected VMs."""
    bare = Bare()
    with _vm(kvm) as vm:
        yield from _conversions(vm, bare, rounds)
        yield from _first_touch(vm, rounds)
        if vm.check_extension(KVM_CAP_PRE_FAULT_MEMORY):
            yield from _pre_fault(vm, bare, rounds)
