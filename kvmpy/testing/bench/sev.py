# SPDX-License-Identifier: Apache-2.0
"""Launches of SEV and SNP guests beside the bare ioctl loop, and ucalls through a GHCB beside plain ones."""

from __future__ import annotations

import time
from collections.abc import Iterator

from kvmpy.coco.kvm import Kvm
from kvmpy.coco.policy import SevPolicy
from kvmpy.coco.sev_launch import SevInitialised
from kvmpy.coco.sev_platform import large_guest_memfd
from kvmpy.core.address import PAGE_SIZE, Gpa
from kvmpy.guest.program import GuestProgram
from kvmpy.testing.bench import folios
from kvmpy.testing.bench.bare import Bare
from kvmpy.testing.bench.samples import Figure, Samples
from kvmpy.uapi.constants import VmType

SIZE = 2 << 20
_MEMORY = Gpa(0x100_0000)
_CALLS = 100
_TIMEOUT = 120.0

_NOTHING = """
#include <kvmpy/guest.h>
void guest_main(void)
{
}
"""
_SYNC = """
#include <kvmpy/guest.h>
void guest_main(void)
{
	for (;;)
		GUEST_SYNC(1, 2);
}
"""


def _bare_sev(kvm: Kvm, bare: Bare, es: bool) -> float:
    with kvm.create_vm(int(VmType.KVM_X86_SEV_ES_VM if es else VmType.KVM_X86_SEV_VM)) as vm:
        state = SevInitialised.init2(vm, es=es)
        slot = vm.add_slot(_MEMORY, SIZE)
        vm.memory.write(_MEMORY, b"\x5a" * SIZE)
        vm.sev.reg_region(slot.hva, SIZE)
        state.start(SevPolicy(es=es))
        taken = bare.sev_update(vm.fd, vm.sev.device.fd, vm.memory.view(_MEMORY, SIZE))
    return (SIZE >> 20) / taken * 1e9


def _launch(kvm: Kvm, program: GuestProgram, protection: str) -> float:
    with kvm.create_vm(program, protection=protection, memory=SIZE + (16 << 20)) as vm:
        gva = vm.alloc(SIZE)
        vm.memory.write(vm.gva_to_gpa(gva), b"\x5a" * SIZE)
        start = time.perf_counter()
        vm.launch()
        return time.perf_counter() - start


def _rates(kvm: Kvm, bare: Bare, rounds: int, protection: str) -> Iterator[Figure]:
    program, samples = GuestProgram.from_c(_NOTHING), Samples()
    mib = SIZE >> 20
    for _ in range(rounds):
        if protection == "snp":
            alone = folios.bare_launch(kvm, bare, SIZE)
        else:
            alone = _bare_sev(kvm, bare, protection == "sev-es")
        samples.add(mib / _launch(kvm, program, protection), alone)
    yield samples.figure(
        f"launch-rate/{protection}",
        f"vm.launch() of {SIZE // PAGE_SIZE} pages, prediction and all, beside the bare ioctl in C",
        "MiB/s",
    )


def _calls(kvm: Kvm, rounds: int, protection: str) -> Iterator[Figure]:
    program, samples = GuestProgram.from_c(_SYNC), Samples()
    with (
        kvm.create_vm(program, protection=protection) as vm,
        kvm.create_vm(program, protection="none") as plain,
    ):
        vm.launch()
        plain.launch()
        both = [each.vcpus[0].syncs(_TIMEOUT) for each in (vm, plain)]
        for calls in both:
            next(calls)
        for _ in range(rounds * 10):
            taken = []
            for calls in both:
                start = time.perf_counter()
                for _ in range(_CALLS):
                    next(calls)
                taken.append((time.perf_counter() - start) / _CALLS * 1e6)
            samples.add(*taken)
    yield samples.figure(
        f"ucall-ghcb/{protection}",
        "ucall round trip through #VC handler and GHCB, beside one of a plain VM",
        "us",
        beside="plain",
    )


def measure(kvm: Kvm, rounds: int, protections: tuple[str, ...]) -> Iterator[Figure]:
    """Measure launches under each of *protections*, and ucalls under those with a GHCB."""
    bare = Bare()
    for protection in protections:
        yield from _rates(kvm, bare, rounds, protection)
        if protection != "sev":
            yield from _calls(kvm, rounds, protection)
        if protection == "snp" and large_guest_memfd():
            yield from folios.measure(kvm, rounds)
