# SPDX-License-Identifier: Apache-2.0
"""Code in legacy mode: real mode, virtual-8086 mode, and protected mode of 16 and 32 bits.

No guest code takes part but what a test gives: the host puts the vCPU before it, with registers, descriptor
tables and, if asked for, page tables of 32-bit entries or of PAE.  Exceptions and the code's end come back as
writes to a port.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from kvmpy.core.address import PAGE_SIZE, Gpa, Gva
from kvmpy.core.exits import IoExit
from kvmpy.guest.agent import Fault
from kvmpy.guest.errors import LaunchError
from kvmpy.guest.ucall import Ucall
from kvmpy.uapi.structs import kvm_regs, kvm_segment, kvm_sregs
from kvmpy.x86 import segments
from kvmpy.x86.bits import CR4, RFLAGS
from kvmpy.x86.exceptions import EXCEPTIONS, Vector
from kvmpy.x86.paging import PageTables
from kvmpy.x86.segments import Descriptor

if TYPE_CHECKING:
    from kvmpy.core.exits import Exit
    from kvmpy.guest.vcpu import GuestVcpu
    from kvmpy.guest.vm import GuestVm

# Below 64 KiB, so that 16-bit code reaches all of it with segments at 0.  The linker script places the
# program's section .low between the stack of ring 0 and the stack of ring 3.
STACK_TOP = 0x2000
USER_STACK_TOP = 0x8000
END = 0x8000
CODE = 0x8010
CODE_SIZE = 0xFF0
GDT = 0x9000
IDT = 0xA000
TSS = 0xB000
STUBS = 0xE000
STUB_SIZE = 4
ROOM = 0xE800
"""2 KiB of ring 0 that nothing else uses."""
DATA = 0xF000
"""A page that nothing else uses."""
# With page tables ring 3 reaches the first page, where real mode's vectors are, its code and stack, and DATA.
_OPEN = ((0, PAGE_SIZE), (STACK_TOP, GDT - STACK_TOP), (DATA, PAGE_SIZE))
_MAPPED = 1 << 20

PORT = 0xF1
_OUT = bytes((0xE6, PORT))  # out %al, $PORT
_STUB = _OUT + b"\xeb\xfc"  # again: jmp back

USER_CS16 = 0x5B
USER_DS16 = 0x63
FREE_SELECTOR = 0x68
"""The first selector of the GDT that a test may describe."""

IO_BITMAP = segments.TSS_SIZE + 32  # behind the interrupt redirection bitmap
IO_BITMAP_SIZE = 0x2000
_GENERAL = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
_NAMES = {name: "r" + name for name in _GENERAL} | {"ip": "rip", "flags": "rflags"}


class LegacyMode(Enum):
    """A submode of legacy mode (AMD APM volume 2, 1.3.3), protected mode by the size of its code."""

    REAL = "real"
    VM86 = "vm86"
    PROTECTED16 = "protected16"
    PROTECTED32 = "protected32"


@dataclass(frozen=True)
class Ended:
    """How code ended: by *fault*, or at its end (None).

    *regs* and the selectors *cs* and *ss* are those of the code, also where an exception has left it;
    *segments* are ES, DS, FS and GS of virtual-8086 mode, as its exception has pushed them.  *sregs* is the
    vCPU's state now.  ``ended["ax"]`` is a register by its name of 16 or (``eax``) of 32 bits.
    """

    fault: Fault | None
    regs: kvm_regs
    sregs: kvm_sregs
    cs: int
    ss: int
    segments: tuple[int, ...] = ()

    def __getitem__(self, name: str) -> int:
        wide = name.startswith("e")
        value = getattr(self.regs, _NAMES[name[1:] if wide else name])
        return int(value) & (0xFFFF_FFFF if wide else 0xFFFF)


class Legacy:
    """A vCPU of a VM that runs code in *mode*, from a fresh state each time.

    *levels* of page tables: 0 for no paging, 2, or 3 for PAE; the first MiB lies at its own addresses,
    :attr:`tables` maps more.  *ring* is 0 or 3 in protected mode.  *tr_type* is the type that TR begins with:
    QEMU without KVM ends at an exception of ring 3 if that is a busy TSS, as it is on processors.

    The first one launches the VM.  Code is the name of a label in the program's section ``.low``, which
    returns with a near RET, or bytes, which end behind themselves.
    """

    def __init__(
        self,
        vcpu: GuestVcpu,
        mode: LegacyMode = LegacyMode.REAL,
        *,
        levels: int = 0,
        ring: int = 0,
        tr_type: int = segments.TSS_BUSY,
    ) -> None:
        if levels not in (0, 2, 3):
            raise ValueError(f"levels={levels}: 0 (no paging), 2 or 3 (PAE)")
        if mode is LegacyMode.REAL and (levels or ring):
            raise ValueError("real mode has neither paging nor rings")
        if ring not in (0, 3):
            raise ValueError(f"ring={ring}: 0 or 3")
        self.vcpu, self.mode, self._tr_type = vcpu, mode, tr_type
        self.ring = 3 if mode is LegacyMode.VM86 else ring
        self.vm: GuestVm = vcpu.vm
        self.tables: PageTables | None = None
        if levels:
            self.tables = PageTables(self.vm.memory, self.vm.allocator, levels=levels, private_tables=False)
            self.tables.map(Gva(0), Gpa(0), _MAPPED, page_size=PAGE_SIZE)
            for start, size in _OPEN:
                self.tables.protect(Gva(start), size, user=True)
        self._launch()
        self.sregs = vcpu.regs.get_sregs()
        self.reset()

    def _launch(self) -> None:
        vm = self.vm
        self._gdt = self._low(GDT, PAGE_SIZE)
        self._idt = self._low(IDT, segments.IDT32_SIZE)
        self.tss = self._low(TSS, IO_BITMAP + IO_BITMAP_SIZE + 1)
        if not vm.protection.traits.can_read_registers:
            raise LaunchError(f"protection {vm.protection.name} keeps registers from the host")
        if vm.launched:
            return
        if "guest_main" not in vm.program.symbols:
            for vcpu in vm.vcpus:
                vcpu.entry = vcpu.entry or vm.program.entry
        vm.launch()

    def _low(self, address: int, size: int) -> memoryview:
        # Without paging there is no encryption bit: such code sees shared memory.
        return self.vm.memory.shared_view(Gpa(address), size)

    # State.

    def reset(self) -> None:
        """Bring descriptor tables, TSS, vectors and :attr:`sregs`, which code begins with, to their first
        state.
        """
        self._low(STUBS, 256 * STUB_SIZE)[:] = _STUB * 256
        self._low(END, len(_STUB))[:] = _STUB
        self._low(0, 1024)[:] = b"".join(struct.pack("<HH", STUBS + v * STUB_SIZE, 0) for v in range(256))
        table = bytearray(PAGE_SIZE)
        table[: segments.GDT_LIMIT + 1] = segments.gdt()
        self._gdt[:] = table
        self.describe(segments.TSS_SELECTOR, system(TSS, len(self.tss) - 1, segments.TSS_BUSY))
        self.describe(USER_CS16 & ~3, Descriptor(0, 0xFFFF, segments.CODE, 1, 3, 1, 0, 0, 0, 0))
        self.describe(USER_DS16 & ~3, Descriptor(0, 0xFFFF, segments.DATA, 1, 3, 1, 0, 0, 0, 0))
        self._idt[:] = segments.idt32(STUBS, STUB_SIZE, dpl3=(3, 4))
        self.tss[:] = bytes(len(self.tss))
        self.tss[: segments.TSS_SIZE] = segments.tss32(esp0=STACK_TOP, cr3=self._cr3 or 0)
        self.tss[-1] = 0xFF
        self.allow_ports(0, IO_BITMAP_SIZE * 8, on=False)
        self._low(DATA, PAGE_SIZE)[:] = bytes(PAGE_SIZE)
        self._first_sregs()

    @property
    def _cr3(self) -> int | None:
        return None if self.tables is None else int(self.tables.cr3)

    def _first_sregs(self) -> None:
        sregs = self.sregs
        if self.mode is LegacyMode.REAL:
            segments.real_mode_sregs(sregs)
            return
        pae = self.tables is not None and self.tables.levels == 3
        cr4 = int(CR4.PAE if pae else CR4.PSE)
        segments.protected_mode_sregs(sregs, GDT, IDT, TSS, cr3=self._cr3, cr4=cr4)
        sregs.gdt.limit, sregs.tr.limit, sregs.tr.type = PAGE_SIZE - 1, len(self.tss) - 1, self._tr_type
        if self.mode is LegacyMode.VM86:
            for segment in _all_segments(sregs):
                vm86_segment(segment, 0)
            return
        wide = self.mode is LegacyMode.PROTECTED32
        if self.ring:
            code, data = (segments.USER_CS32, segments.USER_DS) if wide else (USER_CS16, USER_DS16)
        else:
            code, data = (
                (segments.KERNEL_CS32, segments.KERNEL_DS)
                if wide
                else (segments.KERNEL_CS16, segments.KERNEL_DS16)
            )
        for segment in _all_segments(sregs):
            self.load(segment, data)
        self.load(sregs.cs, code)

    def describe(self, selector: int, descriptor: Descriptor | int) -> None:
        """Write a descriptor of the GDT; its eight bytes as a number may be a gate."""
        value = descriptor.encode() if isinstance(descriptor, Descriptor) else descriptor
        struct.pack_into("<Q", self._gdt, selector & ~7, value)

    def described(self, selector: int) -> Descriptor:
        """Return the descriptor of *selector* as it is in the GDT now."""
        return Descriptor.decode(struct.unpack_from("<Q", self._gdt, selector & ~7)[0])

    def load(self, segment: kvm_segment, selector: int) -> None:
        """Load a register of :attr:`sregs` from the GDT."""
        segments.load(segment, selector, bytes(self._gdt))

    def set_gate(self, vector: int, gate: int) -> None:
        """Write a gate of the protected-mode IDT."""
        struct.pack_into("<Q", self._idt, vector * 8, gate)

    def allow_ports(self, first: int, count: int = 1, *, on: bool = True) -> None:
        """Open or close ports in the TSS's permission map, and let the TSS have one."""
        struct.pack_into("<H", self.tss, 102, IO_BITMAP)
        if count % 8 == first % 8 == 0:
            start = IO_BITMAP + first // 8
            self.tss[start : start + count // 8] = (b"\0" if on else b"\xff") * (count // 8)
            return
        for port in range(first, first + count):
            at, bit = IO_BITMAP + port // 8, 1 << port % 8
            self.tss[at] = self.tss[at] & ~bit | (0 if on else bit)

    def view(self, address: int, size: int) -> memoryview:
        """Return memory of the first MiB, as the code sees it."""
        return self._low(address, size)

    # Running.

    def run(self, code: bytes | str, **registers: int) -> Ended:
        """Run *code* to its end or to an exception; *registers* by name (``ax=1``), the others are 0."""
        self.begin(code, **registers)
        return self.end()

    def begin(self, code: bytes | str, **registers: int) -> None:
        """Put the vCPU before *code*: the test takes exits, then :meth:`end`.

        ``flags`` are 2 unless they are given.  A given ``sp`` has no return address on it.  ValueError for
        more than 4076 bytes.
        """
        if isinstance(code, bytes):
            if len(code) + len(_STUB) > CODE_SIZE:
                raise ValueError(f"{len(code)} bytes of code: at most {CODE_SIZE - len(_STUB)}")
            self._low(CODE, len(code) + len(_STUB))[:] = code + _STUB
            self._end = CODE + len(code)
            where = CODE
        else:
            where, self._end = int(self.vm.program.address_of(code)), END
        regs = kvm_regs(rip=(where - self.sregs.cs.base) & 0xFFFF_FFFF)
        for name, value in registers.items():
            known = _NAMES.get(name.removeprefix("e"))
            if known is None:
                raise TypeError(f"no register of legacy mode is called {name}")
            setattr(regs, known, value & 0xFFFF_FFFF)
        if not regs.rsp:
            size = 4 if self.sregs.cs.db else 2
            regs.rsp = (USER_STACK_TOP if self.ring else STACK_TOP) - size
            self._low(regs.rsp, size)[:] = END.to_bytes(size, "little")
        regs.rflags |= 2 | (RFLAGS.VM if self.mode is LegacyMode.VM86 else 0)
        self.vcpu.regs.set_sregs(self.sregs)
        self.vcpu.regs.set(regs)

    def end(self, on_exit: Callable[[Exit], bool] | None = None) -> Ended:
        """Run to the end of the code, or to an exception; *on_exit* returns True for exits before that."""
        while True:
            got = self.vcpu.next()
            if isinstance(got, IoExit) and got.port == PORT:
                self.vcpu.complete_io()
                return self.ended()
            if isinstance(got, Ucall) or on_exit is None or not on_exit(got):
                raise self.vcpu.unexpected(got, "the end of the code")

    def moved_to(self, vcpu: GuestVcpu) -> Legacy:
        """Return the same on *vcpu* of another VM, which it launches; the test moves the state."""
        other = copy(self)
        other.vcpu, other.vm = vcpu, vcpu.vm
        other._launch()
        return other

    def ended(self) -> Ended:
        """Return how the code ended whose end or exception the vCPU stands at."""
        regs, sregs = self.vcpu.regs.get(), self.vcpu.regs.get_sregs()
        at = (sregs.cs.base + regs.rip) & 0xFFFF_FFFF
        if not STUBS <= at < STUBS + 256 * STUB_SIZE:
            return Ended(None, regs, sregs, sregs.cs.selector, sregs.ss.selector)
        vector = (at - STUBS) // STUB_SIZE
        result = self._interrupted(vector, regs, sregs)
        # In ring 3 the write to the port is refused.
        if vector == Vector.GP and self._at_end(result):
            return Ended(None, regs, sregs, result.cs, result.ss, result.segments)
        return result

    def _at_end(self, result: Ended) -> bool:
        user = result.cs & 3 or result.regs.rflags & RFLAGS.VM
        refused = result.fault is not None and not result.fault.error_code
        return bool(user and refused) and result["eip"] in (self._end, END)

    def _interrupted(self, vector: int, regs: kvm_regs, sregs: kvm_sregs) -> Ended:
        mask = 0xFFFF_FFFF if sregs.ss.db else 0xFFFF
        stack = (sregs.ss.base + (regs.rsp & mask)) & 0xFFFF_FFFF
        error, ss, rest = 0, sregs.ss.selector, ()
        if not sregs.cr0 & 1:
            rip, cs, flags = struct.unpack("<3H", self.read(stack, 6))
            rsp = regs.rsp + 6 & mask
        else:
            known = EXCEPTIONS.get(vector)
            pushed = 4 if known is not None and known.has_error_code else 0
            if pushed:
                error = int.from_bytes(self.read(stack, 4), "little")
            rip, cs, flags = struct.unpack("<3I", self.read(stack + pushed, 12))
            cs, rsp = cs & 0xFFFF, regs.rsp + pushed + 12 & mask
            if flags & RFLAGS.VM or cs & 3 > sregs.ss.dpl:
                rsp, ss = struct.unpack("<2I", self.read(stack + pushed + 12, 8))
                ss &= 0xFFFF
            if flags & RFLAGS.VM:
                rest = tuple(v & 0xFFFF for v in struct.unpack("<4I", self.read(stack + pushed + 20, 16)))
        regs.rip, regs.rsp, regs.rflags = rip, rsp, flags
        address = int(sregs.cr2) if vector == Vector.PF else 0
        return Ended(Fault(vector, error, address, rip), regs, sregs, cs, ss, rest)

    def read(self, address: int, size: int) -> bytes:
        """Return memory at a linear address, by the page tables where there are some."""
        if self.tables is None:
            return self.vm.memory.read(Gpa(address), size)
        parts = self.tables.extents(Gva(address), size)
        return b"".join(self.vm.memory.read(gpa, part) for gpa, part in parts)


def system(base: int, limit: int, kind: int, dpl: int = 0) -> Descriptor:
    """Return a descriptor of a TSS or an LDT, *limit* in bytes."""
    return Descriptor(base, limit, kind, 0, dpl, 1, 0, 0, 0, 0)


def vm86_segment(segment: kvm_segment, selector: int) -> None:
    """Fill a segment register as virtual-8086 mode has it."""
    for name in ("l", "db", "g", "avl", "unusable"):
        setattr(segment, name, 0)
    segment.base, segment.limit, segment.selector = selector << 4, 0xFFFF, selector
    segment.type, segment.s, segment.dpl, segment.present = segments.DATA, 1, 3, 1


def _all_segments(sregs: kvm_sregs) -> tuple[kvm_segment, ...]:
    return sregs.cs, sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs
