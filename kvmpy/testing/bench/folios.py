# SPDX-License-Identifier: Apache-2.0
"""Private memory of an SNP guest in RMP entries of 2 MiB beside 4 KiB: first use, conversions, launches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvmpy.coco.kvm import Kvm
from kvmpy.coco.policy import SnpPolicy
from kvmpy.coco.snp_launch import SnpInitialised
from kvmpy.core.address import PAGE_SIZE, SIZE_2M, Gpa, Gva
from kvmpy.core.backing import Anonymous
from kvmpy.guest.program import GuestProgram
from kvmpy.guest.vm import GuestVm
from kvmpy.testing.bench.bare import Bare
from kvmpy.testing.bench.samples import Figure, Samples
from kvmpy.uapi.constants import KVM_MEMORY_ATTRIBUTE_PRIVATE, VmType

_BLOCKS = 8
_SIZE = _BLOCKS * SIZE_2M
_GPA, _GVA = Gpa(0x8000_0000), Gva(0x70_0000_0000)
_TIMEOUT = 120.0
# Between syncs: validates all of a range, in the largest pieces that its entries allow; shares a page of each
# 2 MiB; makes them private again.
_PROGRAM = """
#include <kvmpy/guest.h>

static void accept(u8 *block)
{
	if (!pvalidate(block, true, true).code)
		return;
	for (u64 at = 0; at < 2 << 20; at += 4096)
		GUEST_ASSERT_EQ(pvalidate(block + at, false, true).code, 0);
}

static void convert(u8 *range, u64 size, bool private)
{
	for (u64 at = 0; at < size; at += 2 << 20)
		GUEST_ASSERT_EQ(guest_set_private(range + at + 100 * 4096, 4096, private), 0);
}

void guest_main(u8 *range, u64 size)
{
	GUEST_SYNC();
	for (u64 at = 0; at < size; at += 2 << 20)
		accept(range + at);
	GUEST_SYNC();
	convert(range, size, false);
	GUEST_SYNC();
	convert(range, size, true);
	GUEST_SYNC();
}
"""


def _offset(large: bool) -> int:
    # A file that lies beside the guest's addresses cannot be mapped in 2 MiB.
    return 0 if large else PAGE_SIZE


@contextmanager
def _started(kvm: Kvm, program: GuestProgram, large: bool) -> Iterator[GuestVm]:
    with kvm.create_vm(program, protection="snp") as vm:
        gmem = vm.create_guest_memfd(_SIZE + _offset(large))
        vm.add_slot(_GPA, _SIZE, backing=Anonymous("thp"), gmem=gmem, gmem_offset=_offset(large))
        vm.map(_GVA, _GPA, _SIZE, page_size=PAGE_SIZE, private=True)
        vm.vcpus[0].set_entry("guest_main", int(_GVA), _SIZE)
        vm.launch()
        vm.memory.set_private(_GPA, _SIZE)
        vm.vcpus[0].sync(_TIMEOUT)
        yield vm


def _guests(kvm: Kvm, rounds: int) -> Iterator[Figure]:
    program = GuestProgram.from_c(_PROGRAM)
    accept, split, back = Samples(), Samples(), Samples()
    for _ in range(rounds):
        took: dict[bool, list[float]] = {}
        for large in (True, False):
            with _started(kvm, program, large) as vm:
                took[large] = []
                for _ in range(3):
                    start = time.perf_counter()
                    vm.vcpus[0].sync(_TIMEOUT)
                    took[large].append(time.perf_counter() - start)
        for samples, scale, mine, small in zip(
            (accept, split, back),
            (1e3 / _BLOCKS, 1e6 / _BLOCKS, 1e6 / _BLOCKS),
            took[True],
            took[False],
            strict=True,
        ):
            samples.add(mine * scale, small * scale)
    yield accept.figure(
        "accept-2m/snp",
        "2 MiB assigned, mapped and validated at first use, in one piece",
        "ms",
        beside="4 KiB",
    )
    yield split.figure(
        "share-in-2m/snp",
        "a page shared by the guest in an entry of 2 MiB, PSMASH included, beside one of 4 KiB",
        "us",
        beside="4 KiB",
    )
    yield back.figure(
        "back-in-2m/snp",
        "the page made private again, beside one that was never in 2 MiB",
        "us",
        beside="4 KiB",
    )


def bare_launch(kvm: Kvm, bare: Bare, size: int, *, large: bool = True) -> float:
    """Return how many MiB/s the bare ioctl brings into an SNP guest, in folios of 2 MiB or 4 KiB."""
    with kvm.create_vm(int(VmType.KVM_X86_SNP_VM)) as vm:
        state = SnpInitialised.init2(vm)
        gmem = vm.create_guest_memfd(size + _offset(large))
        vm.add_slot(_GPA, size, gmem=gmem, gmem_offset=_offset(large))
        state.start(SnpPolicy())
        vm.set_memory_attributes(int(_GPA), size, KVM_MEMORY_ATTRIBUTE_PRIVATE)
        source = Anonymous().map(size)
        with source, source.view(0, size) as view:
            view[:] = b"\x5a" * size
            return (size >> 20) / bare.snp_update(vm.fd, vm.sev.device.fd, _GPA.gfn, view) * 1e9


def measure(kvm: Kvm, rounds: int) -> Iterator[Figure]:
    """Measure in a kernel whose guest_memfd has folios of 2 MiB; both sides are on KVM's own code."""
    yield from _guests(kvm, rounds)
    bare, samples = Bare(), Samples()
    for _ in range(rounds):
        samples.add(bare_launch(kvm, bare, _SIZE), bare_launch(kvm, bare, _SIZE, large=False))
    yield samples.figure(
        "launch-in-2m/snp", "SNP_LAUNCH_UPDATE into folios of 2 MiB, page by page", "MiB/s", beside="4 KiB"
    )
