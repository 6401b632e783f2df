# SPDX-License-Identifier: Apache-2.0
"""How long vm.launch() takes, by the size of the image that has to be brought into private memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from kvmpy.coco.kvm import Kvm
from kvmpy.core.address import PAGE_SIZE
from kvmpy.core.backing import Anonymous
from kvmpy.guest.program import GuestProgram
from kvmpy.testing.bench.figures import Figure

SIZES = (1 << 20, 16 << 20, 64 << 20)
# The rest of the VM: the program, tables, stacks.
_MARGIN = 16 << 20
_TIMEOUT = 120.0

_LAST = """
#include <kvmpy/guest.h>
void guest_main(u64 first, u64 size)
{
	GUEST_SYNC(*(volatile u64 *)(first + size - 8));
}
"""
_MARK = 0x6D61726B


def _launch(kvm: Kvm, program: GuestProgram, protection: str, size: int, content: bytes) -> float:
    with kvm.create_vm(program, protection=protection, memory=size + _MARGIN) as vm:
        gva = vm.alloc(size)
        vm.memory.write(vm.gva_to_gpa(gva), content)
        vm.variable(gva + size - 8, 8).u64 = _MARK
        vm.vcpus[0].set_entry("guest_main", int(gva), size)
        start = time.perf_counter()
        vm.launch()
        taken = time.perf_counter() - start
        answer = vm.vcpus[0].sync(_TIMEOUT).args[0]
        if answer != _MARK:
            raise RuntimeError(f"launch/{protection}: the guest found {answer:#x} at the end of the image")
    return taken * 1e3


def _copy(content: bytes) -> float:
    mapping = Anonymous().map(len(content))
    start = time.perf_counter()
    view = mapping.view(0, len(content))
    view[:] = content
    taken = time.perf_counter() - start
    view.release()
    mapping.close()
    return taken * 1e3


def measure_launch(kvm: Kvm, rounds: int, protections: tuple[str, ...]) -> Iterator[Figure]:
    """Measure launches under each of *protections*, beside a copy of as many bytes into fresh host memory."""
    program = GuestProgram.from_c(_LAST)
    for protection in protections:
        for size in SIZES:
            content = b"\x5a" * size
            mine, copies = [], []
            for _ in range(rounds):
                mine.append(_launch(kvm, program, protection, size, content))
                copies.append(_copy(content))
            yield Figure(
                f"launch/{protection}/{size >> 20}M",
                f"vm.launch() with {size // PAGE_SIZE} pages of data, beside a copy into fresh memory",
                "ms",
                statistics.median(mine),
                statistics.median(copies),
                statistics.median(one / other for one, other in zip(mine, copies, strict=True)),
            )
