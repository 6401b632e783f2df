# SPDX-License-Identifier: Apache-2.0
"""The guest copies its own image into private memory, where the host cannot write.

For the length of the copy there are memory slots beside the guest's own: some show the staged image, shared,
one holds a copy loop, its list of jobs and page tables that map everything at its guest-physical address.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from kvmpy.core.address import PAGE_SIZE, SIZE_1G, SIZE_2M, Gpa, Gva
from kvmpy.core.backing import Anonymous, Mapping
from kvmpy.core.errors import KvmError
from kvmpy.core.exits import IoExit
from kvmpy.core.memory import GuestMemory, PageAllocator, Segment
from kvmpy.core.slots import MemorySlot
from kvmpy.guest.errors import LaunchError
from kvmpy.guest.vcpu import GuestVcpu
from kvmpy.guest.vm import GuestVm
from kvmpy.uapi.constants import KVM_CAP_NR_MEMSLOTS, KVM_CAP_PRE_FAULT_MEMORY
from kvmpy.uapi.structs import kvm_regs
from kvmpy.x86 import segments
from kvmpy.x86.paging import PageTables

# Seconds. A guest that copies makes a page fault for each page of the guest_memfd that it touches first.
TIMEOUT = 120.0
# Guest-physical addresses below are taken: memory, APICs, what KVM keeps below 4 GiB.
FIRST_BASE = 4 * SIZE_1G
PLACES = 60  # up to 64 GiB, which every CPU with 64-bit mode can address
RFLAGS_RESERVED = 2
DONE_PORT = 0x80

# RBX walks a list of {source, destination, quadwords}; zero quadwords end it with a port write.
#   0: mov (%rbx),%rsi          9: jz 25 (at 14)
#   3: mov 8(%rbx),%rdi        16: rep movsq
#   7: mov 16(%rbx),%rcx       19: add $24,%rbx
#  11: test %rcx,%rcx          23: jmp 0
#                              25: out %al,$0x80
_CODE = bytes.fromhex("488b33 488b7b08 488b4b10 4885c9 7409 f348a5 4883c318 ebe7 e680")
_JOB = struct.Struct("<QQQ")


def copy_in(vm: GuestVm, vcpu: GuestVcpu, image: Sequence[tuple[Gpa, int]]) -> None:
    """Let *vcpu* copy the staged content of *image*, runs (gpa, bytes) within one memory range each, into
    their private pages.

    The vCPU's general and segment registers are put back afterwards.  LaunchError when the copy stops.
    """
    with ExitStack() as undo:
        staged: dict[int, tuple[int, Segment]] = {}
        for segment in vm.memory.segments():
            if segment.private is None or segment.private is segment.shared:
                continue
            slot = _add_beside(vm, segment.size, segment.private)
            undo.callback(slot.delete)
            base = slot.gpa
            staged[int(segment.gpa)] = (base, segment)
        jobs = []
        for gpa, size in image:
            base, segment = staged[int(vm.memory.find(gpa, size).gpa)]
            if segment.private is None:
                continue
            # What the host never touched is zero, as is a new guest_memfd.
            for offset, part in segment.private.touched(int(gpa) - int(segment.gpa), size):
                jobs.append((base + offset, int(segment.gpa) + offset, part))
        if not jobs:
            return
        work = b"".join(_JOB.pack(source, target, size // 8) for source, target, size in jobs)
        work += _JOB.pack(0, 0, 0)
        area_size = _area_size(len(work), jobs)
        area = Anonymous().map(area_size)
        undo.callback(area.close)
        slot = _add_beside(vm, area_size, area)
        undo.callback(slot.delete)
        _run(vm, vcpu, Gpa(slot.gpa), area, work, jobs)


def _add_beside(vm: GuestVm, size: int, mapping: Mapping) -> MemorySlot:
    # Numbers from the end and addresses by trial: a test may have made slots that nobody else knows of.
    number = vm.check_extension(KVM_CAP_NR_MEMSLOTS) - 1
    while number in vm.slots:
        number -= 1
    for base in range(FIRST_BASE, FIRST_BASE + PLACES * SIZE_1G, SIZE_1G):
        try:
            return vm.add_alias(base, size, mapping, slot=number)
        except KvmError as error:
            if error.errno != errno.EEXIST:
                raise
    raise LaunchError(
        f"{vm.name}: no room for {size:#x} bytes beside guest memory from {FIRST_BASE:#x} on, "
        f"in {PLACES} places 1 GiB apart"
    )


def _area_size(work: int, jobs: Sequence[tuple[int, int, int]]) -> int:
    # Tables for source and target of each job in 4 KiB pages, and for the area itself, at the worst.
    tables = sum(2 * (size // SIZE_2M + 6) for _source, _target, size in jobs)
    size = (tables + 32) * PAGE_SIZE + work
    return -(-size // SIZE_2M) * SIZE_2M


def _run(
    vm: GuestVm,
    vcpu: GuestVcpu,
    base: Gpa,
    area: Mapping,
    work: bytes,
    jobs: Sequence[tuple[int, int, int]],
) -> None:
    memory = GuestMemory()
    memory.add(Segment(base, area.size, area, area))
    allocator = PageAllocator(memory)
    code = allocator.alloc(1)
    list_at = allocator.alloc(-(-len(work) // PAGE_SIZE))
    memory.write(code, _CODE)
    memory.write(list_at, work)
    pages = PageTables(memory, allocator, max_page_size=SIZE_2M)
    pages.map(Gva(int(base)), base, area.size)
    for source, target, size in jobs:
        pages.map(Gva(source), Gpa(source), size, writable=False, nx=True)
        pages.map(Gva(target), Gpa(target), size, nx=True)
    regs, sregs = vcpu.regs.get(), vcpu.regs.get_sregs()
    copying = sregs.copy()
    segments.long_mode_sregs(copying, cr3=pages.cr3, gdt=int(base), idt=int(base), tss=int(base))
    vcpu.regs.set_sregs(copying)
    vcpu.regs.set(kvm_regs(rip=int(code), rbx=int(list_at), rflags=RFLAGS_RESERVED))
    if vm.check_extension(KVM_CAP_PRE_FAULT_MEMORY):
        for source, target, size in jobs:
            _pre_fault(vcpu, source, size)
            _pre_fault(vcpu, target, size)
    got = vcpu.run(TIMEOUT)
    if not isinstance(got, IoExit) or got.port != DONE_PORT:
        where = vcpu.regs.get()
        raise LaunchError(
            f"{vm.name}: the copy into private memory stopped with {got!r} at source {where.rsi:#x}, "
            f"destination {where.rdi:#x}, {where.rcx:#x} quadwords left"
        )
    vcpu.complete_io()
    vcpu.set_deadline(None)
    vcpu.regs.set_sregs(sregs)
    vcpu.regs.set(regs)


def _pre_fault(vcpu: GuestVcpu, start: int, size: int) -> None:
    # One ioctl for what would be an exit for each page. Where it stops, the copy itself goes on or says why.
    with suppress(KvmError):
        while size:
            start, size = vcpu.pre_fault_memory(start, size)
