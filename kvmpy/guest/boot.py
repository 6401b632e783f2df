# SPDX-License-Identifier: Apache-2.0
"""The state a vCPU of a guest program starts in: tables, CPUID, segment and general registers."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING

from kvmpy.core.address import Gva
from kvmpy.guest import layout
from kvmpy.uapi import ioctls
from kvmpy.uapi.constants import KVM_MP_STATE_RUNNABLE
from kvmpy.uapi.structs import kvm_cpuid2, kvm_mp_state, kvm_regs
from kvmpy.x86 import segments
from kvmpy.x86.bits import CR4, EFER

if TYPE_CHECKING:
    from kvmpy.core.kvm import Kvm
    from kvmpy.guest.program import GuestProgram
    from kvmpy.guest.vcpu import GuestVcpu
    from kvmpy.x86.paging import PageTables

# Interrupt stack table: a double fault and an NMI must not trust the stack they interrupt.
DOUBLE_FAULT_VECTOR = 8
NMI_VECTOR = 2
IST_DOUBLE_FAULT = 1
IST_NMI = 2
RFLAGS_RESERVED = 0x2
_LONG_MODE_LEVELS = 4


@functools.lru_cache(maxsize=64)
def _tables(stubs: int, nested_nmis: bool, bits: int) -> tuple[bytes, bytes]:
    if bits == 32:
        return segments.gdt(), segments.idt32(stubs, stride=layout.VECTOR_STRIDE)
    ist = {DOUBLE_FAULT_VECTOR: IST_DOUBLE_FAULT}
    if not nested_nmis:
        ist[NMI_VECTOR] = IST_NMI
    return segments.gdt(), segments.idt(stubs, stride=layout.VECTOR_STRIDE, ist=ist)


def system_tables(program: GuestProgram, *, nested_nmis: bool = False) -> tuple[bytes, bytes]:
    """Return the GDT and the IDT of *program*, whose vector stubs lie at ``layout.VECTORS_SYMBOL``.

    With *nested_nmis* an NMI has no stack of its own: the next may come before it has returned.
    """
    return _tables(int(program.symbol(layout.VECTORS_SYMBOL).gva), nested_nmis, program.bits)


@functools.lru_cache(maxsize=1024)
def tss_page(percpu: Gva) -> bytes:
    """Return the TSS of the vCPU whose per-CPU area is at *percpu*, with its two interrupt stacks."""
    base = int(percpu)
    return segments.tss(
        rsp0=0, ist={IST_DOUBLE_FAULT: base + layout.PERCPU_IST1_TOP, IST_NMI: base + layout.PERCPU_IST2_TOP}
    )


_ENTRY_SIZE = 40
_HEADER_SIZE = 8
_lock = threading.Lock()


@functools.lru_cache(maxsize=8)
def _cpuid_template(kvm: Kvm) -> tuple[bytes, tuple[tuple[int, int], ...]]:
    table = kvm.supported_cpuid
    places = []
    for number, entry in enumerate(table.entries_list()):
        offset = _HEADER_SIZE + number * _ENTRY_SIZE
        if entry.function == 1:
            places.append((offset + 16 + 3, 1))  # EBX[31:24], initial APIC id
        elif entry.function in (0xB, 0x1F, 0x80000026):
            places.append((offset + 24, 4))  # EDX, x2APIC id
        elif entry.function == 0x8000001E:
            places.append((offset + 12, 4))  # EAX, extended APIC id
    return table.to_bytes(), tuple(places)


def guest_cpuid(kvm: Kvm, apic_id: int) -> kvm_cpuid2:
    """Return what KVM supports, with *apic_id* where the topology leaves carry it."""
    template, places = _cpuid_template(kvm)
    raw = bytearray(template)
    for start, size in places:
        raw[start : start + size] = (apic_id & (1 << size * 8) - 1).to_bytes(size, "little")
    return kvm_cpuid2.from_bytes(bytes(raw))


def initial_sregs(vcpu: GuestVcpu, pages: PageTables) -> None:
    """Put *vcpu* into 64-bit mode, or 32-bit mode where the page tables are legacy mode's, with the tables,
    TSS and GS base of the guest program.
    """
    sregs = vcpu.regs.get_sregs()
    if pages.levels < _LONG_MODE_LEVELS:
        paging = pages.levels > 0
        segments.protected_mode_sregs(
            sregs,
            gdt=layout.GDT_GVA,
            idt=layout.IDT_GVA,
            tss=int(vcpu.percpu) + layout.PERCPU_TSS,
            cr3=int(pages.cr3) if paging else None,
            cr4=int(CR4.PAE if pages.levels == 3 else CR4.PSE if paging else CR4(0)),
        )
        sregs.efer = int(EFER.NXE) if pages.levels == 3 else 0
        sregs.gs.base = int(vcpu.percpu)
        vcpu.regs.set_sregs(sregs)
        return
    segments.long_mode_sregs(
        sregs,
        cr3=pages.cr3,
        levels=pages.levels,
        gdt=layout.GDT_GVA,
        idt=layout.IDT_GVA,
        tss=int(vcpu.percpu) + layout.PERCPU_TSS,
        gs_base=int(vcpu.percpu),
    )
    vcpu.regs.set_sregs(sregs)


def initial_regs(vcpu: GuestVcpu, program: GuestProgram) -> None:
    """Point *vcpu* at the program's entry, with its stack and, in RDI, its per-CPU area; application
    processors become runnable.
    """
    regs = kvm_regs(
        rip=int(program.entry), rsp=int(vcpu.stack_top), rdi=int(vcpu.percpu), rflags=RFLAGS_RESERVED
    )
    vcpu.regs.set(regs)
    # Which vCPU boots is a matter of ids (KVM_SET_BOOT_CPU_ID); all others would wait for INIT and SIPI.
    vcpu.ioctl_raw(ioctls.KVM_SET_MP_STATE, kvm_mp_state(mp_state=KVM_MP_STATE_RUNNABLE))
