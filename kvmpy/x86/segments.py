# SPDX-License-Identifier: Apache-2.0
"""Descriptor tables and the segment state of every CPU mode (Intel SDM volume 3, 3.4 and 7.2; AMD APM volume
2, 4).

One GDT serves all modes; a vCPU's segment registers are loaded from it as the CPU would, so that what a guest
reloads is what it had. The selectors' order is what SYSCALL and SYSRET want (:data:`STAR`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Union

from kvmpy.x86.bits import CR0, CR4, EFER

if TYPE_CHECKING:
    from kvmpy.uapi.structs import kvm_segment, kvm_sregs, kvm_sregs2

    Sregs = Union[kvm_sregs, kvm_sregs2]

KERNEL_CS = 0x08
KERNEL_DS = 0x10
USER_CS32 = 0x1B
USER_DS = 0x23
USER_CS = 0x2B
TSS_SELECTOR = 0x30
KERNEL_CS32 = 0x40
KERNEL_CS16 = 0x48
KERNEL_DS16 = 0x50

STAR = (USER_CS32 << 16 | KERNEL_CS) << 32
"""The value of MSR_STAR that goes with the GDT."""

CODE, DATA = 0xB, 0x3  # execute/read and read/write, accessed
TSS_AVAILABLE, TSS_BUSY = 0x9, 0xB
TSS16_AVAILABLE, TSS16_BUSY = 0x1, 0x3
INTERRUPT_GATE, TRAP_GATE = 0xE, 0xF
CALL_GATE16, TASK_GATE, INTERRUPT_GATE16 = 0x4, 0x5, 0x6
CALL_GATE32 = 0xC
TSS_SIZE = 104
GDT_LIMIT = 0x57
IDT_SIZE = 4096
IDT32_SIZE = 2048


class Descriptor(NamedTuple):
    """A segment descriptor, field by field; *limit* is in bytes, its last valid offset."""

    base: int
    limit: int
    type: int
    s: int
    dpl: int
    present: int
    avl: int
    l: int  # noqa: E741 - the architecture's name
    db: int
    g: int

    def encode(self) -> int:
        """Return the 8-byte descriptor; ValueError for a limit that page granularity cannot say."""
        limit = self.limit
        if self.g:
            if limit & 0xFFF != 0xFFF:
                raise ValueError(f"limit {limit:#x} does not end with a page (granularity bit set)")
            limit >>= 12
        if not 0 <= limit <= 0xFFFFF or not 0 <= self.base <= 0xFFFF_FFFF:
            raise ValueError(f"base {self.base:#x} or limit {self.limit:#x} does not fit a descriptor")
        access = self.type | self.s << 4 | self.dpl << 5 | self.present << 7
        flags = self.avl | self.l << 1 | self.db << 2 | self.g << 3
        return (
            (limit & 0xFFFF)
            | (self.base & 0xFFFFFF) << 16
            | access << 40
            | (limit >> 16) << 48
            | flags << 52
            | (self.base >> 24) << 56
        )

    @classmethod
    def decode(cls, value: int) -> Descriptor:
        """Split an 8-byte descriptor (the lower half of a 16-byte one)."""
        limit = (value & 0xFFFF) | (value >> 48 & 0xF) << 16
        granular = value >> 55 & 1
        return cls(
            base=(value >> 16 & 0xFFFFFF) | (value >> 56 & 0xFF) << 24,
            limit=limit << 12 | 0xFFF if granular else limit,
            type=value >> 40 & 0xF,
            s=value >> 44 & 1,
            dpl=value >> 45 & 3,
            present=value >> 47 & 1,
            avl=value >> 52 & 1,
            l=value >> 53 & 1,
            db=value >> 54 & 1,
            g=granular,
        )


def _flat(kind: int, dpl: int, *, long: int = 0, db: int = 1) -> int:
    return Descriptor(0, 0xFFFF_FFFF, kind, 1, dpl, 1, 0, long, db, 1).encode()


def _small(kind: int) -> int:
    return Descriptor(0, 0xFFFF, kind, 1, 0, 1, 0, 0, 0, 0).encode()


def gdt(tss: int | None = None) -> bytes:
    """Return the GDT (88 bytes), with a 16-byte descriptor of the 64-bit TSS at *tss* (GVA) where one is
    given.
    """
    low = high = 0
    if tss is not None:
        low = Descriptor(tss & 0xFFFF_FFFF, TSS_SIZE - 1, TSS_AVAILABLE, 0, 0, 1, 0, 0, 0, 0).encode()
        high = tss >> 32
    entries = (
        0,
        _flat(CODE, 0, long=1, db=0),
        _flat(DATA, 0),
        _flat(CODE, 3),
        _flat(DATA, 3),
        _flat(CODE, 3, long=1, db=0),
        low,
        high,
        _flat(CODE, 0),
        _small(CODE),
        _small(DATA),
    )
    return struct.pack(f"<{len(entries)}Q", *entries)


def tss(*, rsp0: int = 0, rsp1: int = 0, rsp2: int = 0, ist: Mapping[int, int] | None = None) -> bytes:
    """Return a 64-bit TSS (104 bytes, no I/O bitmap); *ist* maps 1..7 to stack tops (GVA)."""
    stacks = [0] * 7
    for index, top in (ist or {}).items():
        if not 1 <= index <= 7:
            raise ValueError(f"IST index {index} is outside 1..7")
        stacks[index - 1] = top
    return struct.pack("<I3QQ7QQHH", 0, rsp0, rsp1, rsp2, 0, *stacks, 0, 0, TSS_SIZE)


_TSS32 = (
    "link", "esp0", "ss0", "esp1", "ss1", "esp2", "ss2", "cr3", "eip", "eflags", "eax", "ecx", "edx", "ebx",
    "esp", "ebp", "esi", "edi", "es", "cs", "ss", "ds", "fs", "gs", "ldt", "trap",
)  # fmt: skip
TSS32_FIELDS = {name: 4 * number for number, name in enumerate(_TSS32)}
"""Where the fields of a 32-bit TSS are; *trap* has its T bit, and in the upper half the offset of the I/O
bitmap (AMD APM volume 2, 12.2.5)."""
_TSS16 = (
    "link", "sp0", "ss0", "sp1", "ss1", "sp2", "ss2", "ip", "flags", "ax", "cx", "dx", "bx", "sp", "bp", "si",
    "di", "es", "cs", "ss", "ds", "ldt",
)  # fmt: skip
TSS16_FIELDS = {name: 2 * number for number, name in enumerate(_TSS16)}
"""The same of a 16-bit TSS."""
TSS16_SIZE = 44


def tss32(
    *, esp0: int = 0, ss0: int = KERNEL_DS, cr3: int = 0, trap: int = TSS_SIZE << 16, **fields: int
) -> bytes:
    """Return a 32-bit TSS (104 bytes, no I/O bitmap) with the stack of ring 0, and other :data:`TSS32_FIELDS`
    of a task that is switched to.
    """
    data = bytearray(TSS_SIZE)
    for name, value in {"esp0": esp0, "ss0": ss0, "cr3": cr3, "trap": trap, **fields}.items():
        struct.pack_into("<I", data, TSS32_FIELDS[name], value)
    return bytes(data)


def tss16(**fields: int) -> bytes:
    """Return a 16-bit TSS (44 bytes) with :data:`TSS16_FIELDS`."""
    data = bytearray(TSS16_SIZE)
    for name, value in fields.items():
        struct.pack_into("<H", data, TSS16_FIELDS[name], value)
    return bytes(data)


def gate32(target: int, selector: int, kind: int = INTERRUPT_GATE, dpl: int = 0, count: int = 0) -> int:
    """Return the eight bytes of a legacy gate as a number; *count* of parameters is a call gate's."""
    access = kind | dpl << 5 | 0x80
    return target & 0xFFFF | selector << 16 | count << 32 | access << 40 | (target >> 16) << 48


def gate(
    target: int, *, selector: int = KERNEL_CS, kind: int = INTERRUPT_GATE, dpl: int = 0, ist: int = 0
) -> bytes:
    """Return a 16-byte gate of a 64-bit IDT."""
    if not 0 <= ist <= 7:
        raise ValueError(f"IST index {ist} is outside 0..7")
    access = kind | dpl << 5 | 0x80
    return struct.pack(
        "<HHBBHII",
        target & 0xFFFF,
        selector,
        ist,
        access,
        target >> 16 & 0xFFFF,
        target >> 32 & 0xFFFF_FFFF,
        0,
    )


def idt(
    stub_base: int,
    stride: int = 16,
    ist: Mapping[int, int] | None = None,
    dpl3: Iterable[int] = (3,),
) -> bytes:
    """Return a 64-bit IDT of 256 interrupt gates (4096 bytes).

    Vector *v* goes to ``stub_base + v * stride`` (GVA); *ist* maps vectors to IST stacks; INT n of ring 3 may
    use *dpl3*.
    """
    stacks, open_to_users = ist or {}, frozenset(dpl3)
    return b"".join(
        gate(stub_base + v * stride, dpl=3 if v in open_to_users else 0, ist=stacks.get(v, 0))
        for v in range(256)
    )


def idt32(stub_base: int, stride: int = 16, dpl3: Iterable[int] = (3,)) -> bytes:
    """Return a 32-bit IDT of 256 interrupt gates into :data:`KERNEL_CS32` (2048 bytes)."""
    open_to_users = frozenset(dpl3)
    return b"".join(
        gate32(stub_base + v * stride, KERNEL_CS32, dpl=3 if v in open_to_users else 0).to_bytes(8, "little")
        for v in range(256)
    )


def load(segment: kvm_segment, selector: int, table: bytes, *, base: int | None = None) -> None:
    """Load a segment register from a GDT image, as the CPU would; *base* replaces the base (FS and GS of
    64-bit mode).

    ValueError when the selector lies outside the table or its descriptor is not present.
    """
    offset = selector & 0xFFF8
    if offset + 8 > len(table) or selector & 4:
        raise ValueError(f"selector {selector:#x} is not in the GDT ({len(table)} bytes)")
    descriptor = Descriptor.decode(int.from_bytes(table[offset : offset + 8], "little"))
    if not descriptor.present:
        raise ValueError(f"the descriptor of selector {selector:#x} is not present")
    segment.base = descriptor.base if base is None else base
    segment.limit = descriptor.limit
    segment.selector = selector
    segment.type = descriptor.type
    segment.present = 1
    segment.dpl = descriptor.dpl
    segment.db = descriptor.db
    segment.s = descriptor.s
    segment.l = descriptor.l
    segment.g = descriptor.g
    segment.avl = descriptor.avl
    segment.unusable = 0


def _system(segment: kvm_segment, selector: int, kind: int, base: int, limit: int) -> None:
    segment.base, segment.limit, segment.selector, segment.type = base, limit, selector, kind
    segment.present, segment.unusable = 1, 0
    segment.dpl = segment.db = segment.s = segment.l = segment.g = segment.avl = 0


def _no_ldt(segment: kvm_segment) -> None:
    _system(segment, 0, 0x2, 0, 0xFFFF)
    segment.present, segment.unusable = 0, 1


def _descriptor_tables(sregs: Sregs, gdt_base: int, idt_base: int, idt_limit: int) -> None:
    sregs.gdt.base, sregs.gdt.limit = gdt_base, GDT_LIMIT
    sregs.idt.base, sregs.idt.limit = idt_base, idt_limit
    _no_ldt(sregs.ldt)


def long_mode_sregs(
    sregs: Sregs,
    cr3: int,
    gdt: int,
    idt: int,
    tss: int,
    *,
    levels: int = 4,
    fs_base: int = 0,
    gs_base: int = 0,
    cr0: int = 0,
    cr4: int = 0,
    efer: int = 0,
) -> None:
    """Fill *sregs* for 64-bit mode in ring 0, paging on.

    *gdt*, *idt*, *tss* are the GVAs of tables as :func:`gdt`, :func:`idt` and :func:`tss` make them; *cr3* is
    raw (with encryption bit); *levels* is 4 or 5; *cr0*, *cr4*, *efer* are bits to set besides the needed
    ones. CR0.WP and EFER.NXE are on. APIC base, CR8 and pending interrupts stay.
    """
    table = _TABLE
    load(sregs.cs, KERNEL_CS, table)
    for segment in (sregs.ds, sregs.es, sregs.ss):
        load(segment, KERNEL_DS, table)
    load(sregs.fs, KERNEL_DS, table, base=fs_base)
    load(sregs.gs, KERNEL_DS, table, base=gs_base)
    _system(sregs.tr, TSS_SELECTOR, TSS_BUSY, tss, TSS_SIZE - 1)
    _descriptor_tables(sregs, gdt, idt, IDT_SIZE - 1)
    sregs.cr0 = int(CR0.PE | CR0.MP | CR0.ET | CR0.NE | CR0.WP | CR0.PG) | cr0
    sregs.cr2 = 0
    sregs.cr3 = int(cr3)
    sregs.cr4 = (
        int(CR4.PAE | CR4.PGE | CR4.OSFXSR | CR4.OSXMMEXCPT | (CR4.LA57 if levels == 5 else CR4(0))) | cr4
    )
    sregs.efer = int(EFER.SCE | EFER.LME | EFER.LMA | EFER.NXE) | efer


def compat_mode_sregs(
    sregs: Sregs, cr3: int, gdt: int, idt: int, tss: int, *, levels: int = 4, user: bool = False
) -> None:
    """Fill *sregs* for 32-bit compatibility mode under a 64-bit IDT and TSS, in ring 0 or (*user*) ring 3."""
    long_mode_sregs(sregs, cr3, gdt, idt, tss, levels=levels)
    load(sregs.cs, USER_CS32 if user else KERNEL_CS32, _TABLE)
    if user:
        _user_data(sregs)


def user_mode_sregs(sregs: Sregs) -> None:
    """Turn 64-bit mode in ring 0, as :func:`long_mode_sregs` leaves it, into ring 3; FS and GS bases stay."""
    load(sregs.cs, USER_CS, _TABLE)
    _user_data(sregs)


def _user_data(sregs: Sregs) -> None:
    for segment in (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs):
        load(segment, USER_DS, _TABLE, base=segment.base)


def protected_mode_sregs(
    sregs: Sregs, gdt: int, idt: int, tss: int = 0, *, cr3: int | None = None, cr4: int = 0
) -> None:
    """Fill *sregs* for flat 32-bit protected mode in ring 0, without paging unless *cr3* is given.

    *gdt*, *idt*, *tss* are linear addresses of tables as :func:`gdt`, :func:`idt32` and :func:`tss32` make
    them; with *cr4* 0 the page tables are 2-level ones of 32-bit entries, with PAE set 3-level ones.
    """
    load(sregs.cs, KERNEL_CS32, _TABLE)
    for segment in (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs):
        load(segment, KERNEL_DS, _TABLE)
    _system(sregs.tr, TSS_SELECTOR, TSS_BUSY, tss, TSS_SIZE - 1)
    _descriptor_tables(sregs, gdt, idt, IDT32_SIZE - 1)
    sregs.cr0 = int(CR0.PE | CR0.MP | CR0.ET | CR0.NE | (CR0(0) if cr3 is None else CR0.PG | CR0.WP))
    sregs.cr2 = 0
    sregs.cr3 = 0 if cr3 is None else int(cr3)
    sregs.cr4 = cr4
    sregs.efer = 0


def real_mode_sregs(sregs: Sregs, selector: int = 0) -> None:
    """Fill *sregs* for real mode with all segments at ``selector * 16`` and the interrupt table at 0."""
    if not 0 <= selector <= 0xFFFF:
        raise ValueError(f"selector {selector:#x} is no 16-bit value")
    for segment, kind in (
        (sregs.cs, CODE),
        (sregs.ds, DATA),
        (sregs.es, DATA),
        (sregs.ss, DATA),
        (sregs.fs, DATA),
        (sregs.gs, DATA),
    ):
        _system(segment, selector, kind, selector << 4, 0xFFFF)
        segment.s = 1
    _system(sregs.tr, 0, TSS_BUSY, 0, 0xFFFF)
    sregs.gdt.base, sregs.gdt.limit = 0, 0xFFFF
    sregs.idt.base, sregs.idt.limit = 0, 0x3FF
    _no_ldt(sregs.ldt)
    sregs.cr0 = int(CR0.ET)
    sregs.cr2 = sregs.cr3 = sregs.cr4 = sregs.efer = 0


_TABLE = gdt()
