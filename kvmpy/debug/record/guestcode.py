# SPDX-License-Identifier: Apache-2.0
"""Which bytes of recorded guest memory are code: follows vCPUs from where they begin."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kvmpy.debug.record.format import PAGE_SIZE
from kvmpy.debug.record.script import Node, Ref, Region, Step
from kvmpy.uapi import ioctls
from kvmpy.uapi.structs import kvm_regs, kvm_sregs

_CR0_PE, _CR0_PG = 1, 1 << 31
_CR4_PAE, _CR4_LA57 = 1 << 5, 1 << 12
_EFER_LMA = 1 << 10
_PRESENT, _LARGE = 1, 1 << 7
_FRAME = 0x000F_FFFF_FFFF_F000
_MOST_INSTRUCTIONS = 20000
_TARGET = re.compile(r"(0x[0-9a-f]+|\d+)$")


@dataclass(frozen=True)
class Instruction:
    """One instruction as it lies in host memory."""

    offset: int
    raw: bytes
    gva: int
    text: str
    bits: int = 64


@dataclass
class Slot:
    """A memory slot: guest-physical range and where it lies."""

    gpa: int
    size: int
    region: Region
    offset: int


@dataclass
class GuestView:
    """Guest-physical memory as it was when the VM first ran."""

    slots: list[Slot] = field(default_factory=list)
    content: dict[Region, bytearray] = field(default_factory=dict)

    def find(self, gpa: int) -> tuple[Region, int] | None:
        """Return the region and offset of *gpa*, which may carry an encryption bit."""
        # No memory lies where that bit is, unless it is an emulated one.
        end = max((slot.gpa + slot.size for slot in self.slots), default=0)
        for position in dict.fromkeys((gpa, gpa & (1 << end.bit_length()) - 1)):
            for slot in self.slots:
                if slot.gpa <= position < slot.gpa + slot.size:
                    return slot.region, slot.offset + position - slot.gpa
        return None

    def hold(self, slot: Slot, *, first: bool = False) -> None:
        """Add a slot; with *first* it hides what lies at the same addresses."""
        self.slots.insert(0 if first else len(self.slots), slot)
        region = slot.region
        if region not in self.content:
            end = max((offset + len(data) for offset, data in region.initial), default=0)
            content = bytearray(end)
            for offset, data in region.initial:
                content[offset : offset + len(data)] = data
            self.content[region] = content

    def read(self, gpa: int, size: int) -> bytes:
        """Return what lies at *gpa*, as much as one region has."""
        place = self.find(gpa)
        if place is None:
            return b""
        region, offset = place
        return bytes(self.content.get(region, b"")[offset : offset + size])


@dataclass
class Cpu:
    """The registers that say where a vCPU begins."""

    sregs: kvm_sregs
    regs: kvm_regs

    @property
    def bits(self) -> int:
        """The mode of the code: 16, 32 or 64."""
        if self.sregs.efer & _EFER_LMA and self.sregs.cs.l:
            return 64
        return 32 if self.sregs.cs.db else 16

    @property
    def start(self) -> int:
        """The linear address of the first instruction."""
        return int(self.regs.rip + (0 if self.bits == 64 else self.sregs.cs.base))

    def translate(self, view: GuestView, linear: int) -> int | None:
        """Return the guest-physical address of *linear*, None where it has none that can be found."""
        sregs = self.sregs
        if not sregs.cr0 & _CR0_PG:
            return linear
        if not (sregs.efer & _EFER_LMA):
            return None
        levels = 5 if sregs.cr4 & _CR4_LA57 else 4
        table = int(sregs.cr3) & ~0xFFF
        for level in range(levels, 0, -1):
            shift = 12 + 9 * (level - 1)
            raw = view.read(table + (linear >> shift & 511) * 8, 8)
            entry = int.from_bytes(raw, "little")
            if len(raw) < 8 or not entry & _PRESENT:
                return None
            if level == 1 or (level <= 3 and entry & _LARGE):
                mask = (1 << shift) - 1
                return (entry & _FRAME & ~mask) | (linear & mask)
            table = entry & _FRAME
        return None


def view_of(steps: Iterable[Step]) -> GuestView:
    """Return guest memory as *steps* set it up, with the content that it began with."""
    view = GuestView()
    for step in steps:
        ioctl = step.ioctl
        node = step.argument.node if step.argument is not None else None
        if ioctl is None or node is None or ioctl.result < 0:
            continue
        if step.request in ioctls.SETS_SLOT:
            gpa, size, address = (
                int.from_bytes(node.data[offset : offset + 8], "little") for offset in (8, 16, 24)
            )
            region = next((ref.region for ref in node.refs if ref.region is not None), None)
            if region is not None and size:
                view.hold(Slot(gpa, size, region, address - region.start))
        for gpa, size, source in _launched(node):
            if source.region is not None:
                view.hold(Slot(gpa, size, source.region, source.value - source.region.start), first=True)
    return view


def _launched(node: Node) -> Iterator[tuple[int, int, Ref]]:
    """Yield the pages that an SNP launch copies: guest-physical address, size, and where they come from."""
    for ref in node.refs:
        inner = ref.node
        if inner is None or inner.struct != "kvm_sev_snp_launch_update":
            continue
        gfn, _, size = (int.from_bytes(inner.data[offset : offset + 8], "little") for offset in (0, 8, 16))
        for source in inner.refs:
            yield gfn * PAGE_SIZE, size, source


def cpus_of(steps: Iterable[Step]) -> list[Cpu]:
    """Return the state in which each vCPU first ran."""
    sregs: dict[int, kvm_sregs] = {}
    regs: dict[int, kvm_regs] = {}
    results: dict[int, Cpu] = {}
    for step in steps:
        call = step.ioctl
        if call is None:
            continue
        node = step.argument.node if step.argument is not None else None
        if node is not None and call.result >= 0:
            # kvm_sregs2 begins like kvm_sregs, as far as is looked at here.
            if node.struct in ("kvm_sregs", "kvm_sregs2"):
                data = node.after if node.after is not None else node.data
                sregs[call.object] = kvm_sregs.from_bytes(data[: kvm_sregs.SIZE].ljust(kvm_sregs.SIZE, b"\0"))
            elif step.request == ioctls.KVM_SET_REGS.nr:
                regs[call.object] = kvm_regs.from_bytes(
                    node.data[: kvm_regs.SIZE].ljust(kvm_regs.SIZE, b"\0")
                )
        elif step.request == ioctls.KVM_RUN.nr and call.object not in results and call.object in sregs:
            results[call.object] = Cpu(sregs[call.object], regs.get(call.object, kvm_regs(rflags=2)))
    return list(results.values())


def discover(steps: list[Step]) -> dict[Region, dict[int, Instruction]]:
    """Return the instructions that can be reached from where the vCPUs begin, by region and offset."""
    view = view_of(steps)
    by_name: dict[Region, dict[int, Instruction]] = {}
    for cpu in cpus_of(steps):
        _follow(view, cpu, by_name)
    return by_name


def _follow(view: GuestView, cpu: Cpu, results: dict[Region, dict[int, Instruction]]) -> None:
    decoder = _decoder(cpu.bits)
    work = [cpu.start]
    seen: set[int] = set()
    while work and len(seen) < _MOST_INSTRUCTIONS:
        linear = work.pop()
        while linear not in seen and len(seen) < _MOST_INSTRUCTIONS:
            seen.add(linear)
            place = _fetch(view, cpu, linear)
            if place is None:
                break
            region, offset, raw = place
            decoded = next(iter(decoder.disasm(raw, linear, 1)), None)
            if decoded is None:
                break
            text = f"{decoded.mnemonic} {decoded.op_str}".strip()
            results.setdefault(region, {})[offset] = Instruction(
                offset, raw[: decoded.size], linear, text, cpu.bits
            )
            target = _TARGET.fullmatch(decoded.op_str)
            flow = decoded.mnemonic
            if target is not None and (flow.startswith(("j", "call", "loop"))):
                work.append(int(target[1], 0))
            if flow in ("jmp", "ret", "iretq", "iretd", "iret", "sysretq", "ud2", "retf"):
                break
            linear += decoded.size


def sweep(raw: bytes, offset: int, near: Instruction) -> list[Instruction]:
    """Return the instructions in *raw*, which lies at *offset*; none where they do not fill it."""
    start = near.gva + offset - near.offset
    rows = []
    position = 0
    for each in _decoder(near.bits).disasm(raw, start):
        text = f"{each.mnemonic} {each.op_str}".strip()
        rows.append(
            Instruction(
                offset + position, raw[position : position + each.size], start + position, text, near.bits
            )
        )
        position += each.size
    return rows if position == len(raw) else []


def _fetch(view: GuestView, cpu: Cpu, linear: int) -> tuple[Region, int, bytes] | None:
    gpa = cpu.translate(view, linear)
    place = view.find(gpa) if gpa is not None else None
    if place is None or gpa is None:
        return None
    raw = view.read(gpa, min(15, 4096 - gpa % 4096))
    if len(raw) < 15:
        following = cpu.translate(view, linear + len(raw))
        if following is not None and raw:
            raw += view.read(following, 15 - len(raw))
    return (*place, raw) if raw else None


def _decoder(bits: int) -> Any:
    import capstone

    modes = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
    return capstone.Cs(capstone.CS_ARCH_X86, modes[bits])
