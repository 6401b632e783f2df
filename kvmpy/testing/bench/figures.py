# SPDX-License-Identifier: Apache-2.0
"""The figures: what is measured, beside what, and which ratio is asked for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from kvmpy.coco.kvm import Kvm
from kvmpy.core.address import PAGE_SIZE, Gpa, Gva
from kvmpy.core.backing import Anonymous
from kvmpy.core.memory import GuestMemory, PageAllocator, Segment
from kvmpy.guest.program import GuestProgram
from kvmpy.testing.bench.bare import Bare
from kvmpy.testing.bench.samples import Figure, Samples
from kvmpy.x86.paging import PageTables

__all__ = ["Figure", "measure"]

_SYNC = """
#include <kvmpy/guest.h>
void guest_main(void)
{
	for (;;)
		GUEST_SYNC(1, 2);
}
"""

# A port of nobody: the least an exit to user space can be.
_PORT = """
#include <kvmpy/guest.h>
void guest_main(void)
{
	for (;;)
		asm volatile("outl %0, $0xe0" : : "a"(1));
}
"""

_NOTHING = """
#include <kvmpy/guest.h>
void guest_main(void)
{
}
"""

_TIMEOUT = 120.0
_MAP_PAGES = 1 << 22
_TABLE_MEMORY = 64 << 20


def _exits(kvm: Kvm, bare: Bare, rounds: int, protection: str) -> Iterator[Figure]:
    port, sync = GuestProgram.from_c(_PORT), GuestProgram.from_c(_SYNC)
    # Short stretches in turn: what disturbs one side of a figure disturbs the other.
    count = 200
    plain, call, own = Samples(), Samples(), Samples()
    with (
        kvm.create_vm(port, protection=protection) as port_vm,
        kvm.create_vm(sync, protection=protection) as sync_vm,
    ):
        port_vm.launch()
        sync_vm.launch()
        ported, synced = port_vm.vcpus[0], sync_vm.vcpus[0]
        ported.next(_TIMEOUT)
        calls = synced.syncs(_TIMEOUT)
        next(calls)
        for _ in range(rounds * 10):
            exit_bare = bare.run(ported.fd, count) / count / 1e3
            start = time.perf_counter()
            for _ in range(count):
                ported.run()
            plain.add((time.perf_counter() - start) / count * 1e6, exit_bare)
            # The same guest code without a harness: what is left is the harness's own part.
            call_bare = bare.run(synced.fd, count) / count / 1e3
            start = time.perf_counter()
            for _ in range(count):
                next(calls)
            taken = (time.perf_counter() - start) / count * 1e6
            call.add(taken, exit_bare)
            own.add(taken, call_bare)
    yield plain.figure(
        f"exit/{protection}", "Vcpu.run() to a typed PIO exit, beside KVM_RUN in a C loop", "us"
    )
    yield call.figure(
        f"ucall/{protection}",
        "ucall round trip in Python, beside a bare PIO exit",
        "us",
        "at most 3.5 times a bare PIO exit",
        lambda figure: figure.ratio <= 3.5,
    )
    parts = [mine - theirs for mine, theirs in zip(own.kvmpy, own.bare, strict=True)]
    part = statistics.median(parts)
    low, _, high = statistics.quantiles(parts, n=4)
    # A difference of two measurements says nothing on a machine whose noise is larger.
    noisy = part <= 0 or high - low > 2.0
    yield Figure(
        f"ucall-harness/{protection}",
        "the harness's own part of a ucall: the round trip less KVM_RUN on the same guest code in a C loop",
        "us",
        part,
        statistics.median(own.bare),
        part / statistics.median(own.bare),
        "at most 2 us",
        None if noisy else part <= 2.0,
        f"quartiles {low:.2f} and {high:.2f} us: the machine is too busy to tell" if noisy else "",
    )


def _lives(kvm: Kvm, bare: Bare, rounds: int, protection: str) -> Iterator[Figure]:
    program = GuestProgram.from_c(_NOTHING)
    with kvm.create_vm(program, protection="none") as model:
        model.launch()
        life = bare.life(model)
    samples = Samples()
    for _ in range(rounds * 10):
        alone = life.once() / 1e6
        start = time.perf_counter()
        with kvm.create_vm(program, protection=protection) as vm:
            vm.launch()
            vm.vcpus[0].run_to_done(_TIMEOUT)
        samples.add((time.perf_counter() - start) * 1e3, alone)
    yield samples.figure(
        f"vm-life/{protection}",
        "create VM, vCPU, load, run to DONE, close; beside the bare ioctl sequence",
        "ms",
        "at most 3 times the bare ioctl sequence",
        lambda figure: figure.ratio <= 3,
    )


def _mapping(bare: Bare, rounds: int) -> Iterator[Figure]:
    samples = Samples()
    for _ in range(rounds):
        backing = Anonymous().map(_TABLE_MEMORY)
        memory = GuestMemory()
        memory.add(Segment(Gpa(0), _TABLE_MEMORY, backing, backing))
        pages = PageTables(memory, PageAllocator(memory))
        start = time.perf_counter()
        pages.map(Gva(1 << 30), Gpa(1 << 30), _MAP_PAGES * PAGE_SIZE, page_size=PAGE_SIZE)
        taken = time.perf_counter() - start
        samples.add(_MAP_PAGES / taken / 1e6, _MAP_PAGES / bare.fill(_MAP_PAGES) * 1e3)
        backing.close()
    yield samples.figure(
        "map-4k",
        "4 KiB pages mapped, tables included, beside a C loop that writes as many entries into fresh memory",
        "M pages/s",
        "at least 200 M pages/s",
        lambda figure: figure.kvmpy >= 200,
    )


def _views(bare: Bare, rounds: int) -> Iterator[Figure]:
    size, count = 16 << 20, 4
    backing = Anonymous().map(size)
    memory = GuestMemory()
    memory.add(Segment(Gpa(0), size, backing, backing))
    source = memoryview(bytearray(size))
    samples = Samples()
    memory.view(Gpa(0), size)[:] = source
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(count):
            memory.view(Gpa(0), size)[:] = source
        mine = time.perf_counter() - start
        view = memory.view(Gpa(0), size)
        taken = bare.copy(view, source, count)
        view.release()
        samples.add(size * count / mine / 1e9, size * count / taken)
    backing.close()
    yield samples.figure("write-guest-memory", "writes through a view of guest memory, beside memcpy", "GB/s")


def measure(kvm: Kvm, rounds: int, protections: tuple[str, ...]) -> Iterator[Figure]:
    """Measure every figure in *rounds* rounds, both sides in turn; exits and lives under each of
    *protections*.
    """
    bare = Bare()
    for protection in protections:
        yield from _exits(kvm, bare, rounds, protection)
        yield from _lives(kvm, bare, rounds, protection)
    yield from _mapping(bare, rounds)
    yield from _views(bare, rounds)
