# SPDX-License-Identifier: Apache-2.0
"""What a host's KVM costs, measured: whether ring-0 guest code runs natively, and an exit to user space.

Needs no compiler: a few bytes of machine code in a bare VM in 64-bit mode.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvmpy.core.address import PAGE_SIZE, Gpa, Gva
from kvmpy.core.exits import IoExit
from kvmpy.core.kvm import Kvm
from kvmpy.core.memory import PageAllocator
from kvmpy.core.vcpu import Vcpu
from kvmpy.uapi.structs import kvm_regs
from kvmpy.x86 import segments
from kvmpy.x86.paging import PageTables

# An instruction emulator takes hundreds of nanoseconds, a CPU less than one, QEMU's translation a few.
NATIVE_BELOW_NS = 50.0
_DEADLINE = 10.0
_MEMORY = 2 << 20
_CODE = Gva(0x100000)
_GDT = Gva(0x200000)
# loop: dec %ecx; jnz loop; out %al, $0x80
_LOOP = b"\xff\xc9\x75\xfc\xe6\x80"
# again: out %al, $0x80; jmp again
_EXITS = b"\xe6\x80\xeb\xfc"
_EXITS_AT = 64
_RFLAGS = 2


@dataclass(frozen=True)
class Costs:
    """Nanoseconds for one ring-0 instruction, microseconds for one port exit and its way back (median)."""

    instruction_ns: float
    exit_us: float

    @property
    def ring0_native(self) -> bool:
        """Whether ring-0 code runs on the CPU and not in an instruction emulator."""
        return self.instruction_ns < NATIVE_BELOW_NS


@contextmanager
def _machine(kvm: Kvm) -> Iterator[Vcpu]:
    with Kvm.create_vm(kvm) as vm:
        vm.add_slot(Gpa(0), _MEMORY)
        allocator = PageAllocator(vm.memory)
        pages = PageTables(vm.memory, allocator)
        code, tables = allocator.alloc(1), allocator.alloc(1)
        vm.memory.write(code, _LOOP)
        vm.memory.write(code + _EXITS_AT, _EXITS)
        vm.memory.write(tables, segments.gdt())
        pages.map(_CODE, code, PAGE_SIZE)
        pages.map(_GDT, tables, PAGE_SIZE)
        vcpu = vm.create_vcpu()
        vcpu.cpuid.set(kvm.supported_cpuid)
        sregs = vcpu.regs.get_sregs()
        segments.long_mode_sregs(sregs, cr3=pages.cr3, gdt=_GDT, idt=_GDT, tss=_GDT)
        vcpu.regs.set_sregs(sregs)
        yield vcpu


def _exit(vcpu: Vcpu) -> None:
    got = vcpu.run(_DEADLINE)
    if not isinstance(got, IoExit):
        raise RuntimeError(f"the measuring guest left with {got!r}")


def _loop_seconds(vcpu: Vcpu, count: int) -> float:
    vcpu.regs.set(kvm_regs(rip=int(_CODE), rcx=count, rflags=_RFLAGS))
    start = time.perf_counter()
    _exit(vcpu)
    taken = time.perf_counter() - start
    vcpu.complete_io()
    return taken


def _instruction_ns(vcpu: Vcpu) -> float:
    count = 10_000
    while _loop_seconds(vcpu, count) < 0.005 and count < 10_000_000:
        count *= 10
    short = min(_loop_seconds(vcpu, 1) for _ in range(5))
    long = min(_loop_seconds(vcpu, count) for _ in range(5))
    return max(0.0, long - short) * 1e9 / (2 * (count - 1))


def _exit_us(vcpu: Vcpu, repeat: int = 2000) -> float:
    vcpu.regs.set(kvm_regs(rip=int(_CODE) + _EXITS_AT, rflags=_RFLAGS))
    samples = []
    for _ in range(repeat):
        start = time.perf_counter()
        _exit(vcpu)
        samples.append(time.perf_counter() - start)
    return statistics.median(samples) * 1e6


def measure(kvm: Kvm) -> Costs:
    """Measure on this host, in less than a second; KvmError or RuntimeError when the guest does not run."""
    with _machine(kvm) as vcpu:
        return Costs(_instruction_ns(vcpu), _exit_us(vcpu))
