# SPDX-License-Identifier: Apache-2.0
"""Encodes a form of an instruction with random operands: registers, ModRM and SIB, prefixes, immediates.

A :class:`Site` says where the instruction lies and what memory it may use; an :class:`Instruction` is the
bytes, and what each register and the memory must hold for the operands to be what was meant.  Registers and
flags that an instruction does not need exactly come from a pool of values when it runs.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvmpy.x86.bits import RFLAGS
from kvmpy.x86.instructions import Form, undefined_flags

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
_UINT64 = (1 << 64) - 1
ARITHMETIC_FLAGS = int(RFLAGS.CF | RFLAGS.PF | RFLAGS.AF | RFLAGS.ZF | RFLAGS.SF | RFLAGS.OF)
FIRST_FLAGS = int(RFLAGS.FIXED | RFLAGS.IF)
WINDOW = 128
"""Bytes of memory that an instruction may use; half of them lie before a border where there is one."""
_SIZES = {"b": 1, "w": 2, "d": 4, "q": 8, "x": 16, "y": 32}
_FS = 0x64
# Bytes that a string instruction may reach.
_STRING = 48


@dataclass(frozen=True)
class Site:
    """Where an instruction is placed: its address, its memory, and the base of FS."""

    rip: int
    window: int
    border: bool = False
    """Whether the memory behind its middle is another page, with other rights."""
    across: bool = True
    """Whether an operand may lie on both sides of the border."""
    fs_base: int = 0
    unmapped: tuple[int, ...] = ()
    """Addresses that nothing is at, or that cannot be."""
    targets: tuple[int, int] = (0, 0)
    """Where a branch may go to: first and last address."""
    seam: bool = False
    """Whether the instruction may lie across two pages of code."""


@dataclass
class Instruction:
    """An encoded instruction, with what its operands need; registers by their numbers in ModRM."""

    form: Form
    bits: int
    size: int
    rip: int
    window: int = 0
    code: bytes = b""
    exact: dict[int, int] = field(default_factory=dict)
    """Registers that hold this value."""
    partly: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Registers that hold this value in the bits that are not in this mask."""
    flags: int = FIRST_FLAGS
    flags_mask: int = ARITHMETIC_FLAGS
    undefined: int = 0
    loose_flags: int = 0
    """Flags that are not compared because of these operands."""
    memory: dict[int, bytes] = field(default_factory=dict)
    """What memory must hold, by its offset in the window; the rest is random."""

    locked: bool = False
    """Whether it has LOCK."""
    in_memory: bool = False
    """Whether its ModRM byte names memory."""

    def registers(self) -> tuple[list[int], list[int]]:
        """Return for each register its value, and the bits that may be any."""
        count = 16 if self.bits == 64 else 8
        base, mask = [0] * 16, [_UINT64] * count + [0] * (16 - count)
        for number, (value, loose) in self.partly.items():
            base[number], mask[number] = value & ~loose & _UINT64, loose
        for number, value in self.exact.items():
            base[number], mask[number] = value & _UINT64, 0
        if self.bits == 32:
            mask = [each & 0xFFFF_FFFF for each in mask]
        return base, mask


class Encoder:
    """Encodes forms at a site, by a seeded generator; *bits* is 64 or 32."""

    def __init__(self, rng: random.Random, *, bits: int = 64, edge: float = 0.05, locks: float = 0) -> None:
        self.rng = rng
        self.bits = bits
        self.edge = edge
        """How often an operand is one that must fault."""
        self.locks = locks
        """How often LOCK is where it must not be."""

    def encode(self, form: Form, site: Site) -> Instruction:
        """Return *form* with random operands.

        ValueError for a form that this mode does not have.
        """
        if self.bits not in form.modes:
            raise ValueError(f"{form.name} {form.code} has no {self.bits}-bit encoding")
        while True:
            made = _Encoding(self, form, site).build()
            if len(made.code) <= 15:
                return made


class _Encoding:
    """One instruction in the making."""

    def __init__(self, encoder: Encoder, form: Form, site: Site) -> None:
        self.encoder, self.form, self.site = encoder, form, site
        self.rng, self.bits = encoder.rng, encoder.bits
        stack = form.kind in ("push", "pop", "leave")
        sizes = [s for s in form.sizes if self.bits == 64 or s != "q"]
        if stack and self.bits == 64:
            sizes = [s for s in sizes if s != "d"] or ["q"]
        self.letter = self.rng.choice(sizes)
        self.size = _SIZES[self.letter]
        self.made = Instruction(form, self.bits, self.size, site.rip)
        self.prefixes: list[int] = []
        self.rex = 0
        self.relative_at = -1
        self.relative_target = 0
        # Registers with a meaning of their own, which no address is made of.
        self.reserved: set[int] = {RSP}
        if not stack and self.bits == 64 and self.size == 8 and form.group != "branches":
            self.rex |= 8
        if self.size == 2:
            self.prefixes.append(0x66)

    # Parts.

    def build(self) -> Instruction:
        form, made = self.form, self.made
        opcode, *rest = form.code.split()
        body = bytearray(bytes.fromhex(opcode))
        if "b" in form.sizes and len(form.sizes) > 1 and self.size > 1:
            body[-1] |= 1
        count = self._special()
        modrm = b""
        for part in rest:
            if part == "+r":
                number = self._register()
                body[-1] |= number & 7
                self.rex |= number >> 3
            elif part.startswith("/"):
                modrm = self._modrm(part[1:])
        immediate = b""
        for part in rest:
            immediate += self._immediate(part)
        if form.count == "ib":
            count = immediate[-1]
        made.undefined = undefined_flags(form, self.size, count) | made.loose_flags
        self._more_prefixes(bool(modrm) and modrm[0] >> 6 != 3)
        self._assemble(bytes(body), modrm, immediate)
        if RSP not in made.partly:
            made.exact.setdefault(RSP, self.site.window + WINDOW // 2)
        return made

    def _assemble(self, opcode: bytes, modrm: bytes, immediate: bytes) -> None:
        form, made = self.form, self.made
        self.rng.shuffle(self.prefixes)
        if form.vex:
            head = self._vex(opcode)
        else:
            head = bytes(self.prefixes)
            if form.prefix:
                head += bytes([form.prefix])
            # Without REX the byte registers 4 to 7 are AH, CH, DH, BH; with it SPL, BPL, SIL, DIL.
            if self.bits == 64 and (self.rex or self.rng.random() < (0.5 if self.size == 1 else 0.1)):
                head += bytes([0x40 | self.rex])
            head += opcode
        code = bytearray(head + modrm + immediate)
        if self.relative_at >= 0:
            where = len(head) + self.relative_at
            displacement = self.relative_target - (self.site.rip + len(code))
            code[where : where + 4] = (displacement & 0xFFFF_FFFF).to_bytes(4, "little")
        if form.code.endswith(("jb", "jz")):
            width = 1 if form.code.endswith("jb") else 4
            code[-width:] = self._displacement(len(code), width)
        made.code = bytes(code)

    def _displacement(self, length: int, width: int) -> bytes:
        first, last = self.site.targets
        after = self.site.rip + length
        low, high = (max(first, after - 128), min(last, after + 127)) if width == 1 else (first, last)
        target = self.rng.randint(low, high)
        if self.site.rip - 8 <= target < after:
            target = after
        if width == 4 and self.rng.random() < self.encoder.edge:
            target = after + self.rng.choice((0x100_0000, -0x100_0000))
        return (target - after & (1 << 8 * width) - 1).to_bytes(width, "little")

    def _vex(self, opcode: bytes) -> bytes:
        place = {b"\x0f": 1, b"\x0f\x38": 2}[opcode[:-1]]
        pp = {0: 0, 0x66: 1, 0xF3: 2, 0xF2: 3}[self.form.prefix]
        last = (self.size == 32) << 2 | pp | 0x78
        lead = bytes(each for each in self.prefixes if each != 0x66)
        if place == 1 and not self.rex & 3 and self.rng.random() < 0.5:
            return lead + bytes([0xC5, last | (~self.rex & 4) << 5, opcode[-1]])
        second = (~self.rex & 4) << 5 | (~self.rex & 2) << 5 | (~self.rex & 1) << 5 | place
        return lead + bytes([0xC4, second, last, opcode[-1]])

    def _register(self) -> int:
        return self.rng.randrange(16 if self.bits == 64 else 8)

    def _modrm(self, digit: str) -> bytes:
        form = self.form
        if digit == "r":
            reg = self._register()
            self.rex |= (reg >> 3) << 2
        else:
            reg = int(digit)
        memory = form.only == "m" or (form.only != "r" and self.rng.random() < 0.6)
        if not memory:
            rm = self._register()
            if form.kind in ("target", "call"):
                self.made.exact[rm] = self._branch_target()
            if form.kind == "compare" and self.rng.random() < 0.4:
                self.made.exact[rm] = self.made.exact[RAX] = self.rng.choice(
                    (0, 1, _UINT64, self.rng.getrandbits(64))
                )
            self.rex |= rm >> 3
            return bytes([0xC0 | (reg & 7) << 3 | rm & 7])
        if form.kind == "bit":
            # It counts bits from the memory operand on: keep it near.
            value, loose = self.rng.randrange(-128, 128), _UINT64 ^ (1 << 8 * self.size) - 1
            self.made.partly[reg] = (value, loose)
        return self._memory_operand(reg, form.access)

    def _target(self, width: int) -> int:
        """Return the address of a memory operand."""
        site, form = self.site, self.form
        if self.rng.random() < self.encoder.edge and site.unmapped and form.access:
            return self.rng.choice(site.unmapped)
        self.made.window = site.window
        span = WINDOW - width
        if form.kind == "bit":
            offset = self.rng.randrange(48, 80 - width)
            if site.border and not site.across:
                # Its register operand moves it on by multiples of the width.
                offset -= offset % width
        elif site.border:
            offset = self.rng.randrange(WINDOW // 2 - width - 2, WINDOW // 2 + 2)
        else:
            offset = self.rng.randrange(span)
        if (form.aligned or self.rng.random() < 0.5) and self.rng.random() < 0.8:
            offset -= offset % width
        if site.border and not site.across and offset < WINDOW // 2 < offset + width:
            offset = WINDOW // 2 - self.rng.choice((0, width))
        if form.kind in ("target", "call"):
            self.made.memory[offset] = self._branch_target().to_bytes(8, "little")[: self.bits // 8]
        return site.window + offset

    def _memory_operand(self, reg: int, access: bool) -> bytes:
        width = {"compare8": 8, "target": 8, "call": 8}.get(self.form.kind, self.size)
        target = self._target(width) if access else self.rng.getrandbits(self.bits) & ~0xFFF
        if not access and self.bits == 64 and self.rng.random() < 0.8:
            target &= 0x7FFF_FFFF
        self._compare_memory(target)
        if self.site.fs_base and access and self.rng.random() < 0.1 and target < 1 << 47:
            self.prefixes.append(_FS)
            target -= self.site.fs_base
        address_bits = self.bits
        if self.bits == 64 and 0 <= target < 1 << 32 and self.rng.random() < 0.15:
            self.prefixes.append(0x67)
            address_bits = 32
        return self._address(reg, target, address_bits)

    def _compare_memory(self, target: int) -> None:
        offset = target - self.site.window
        if not self.made.window or self.rng.random() > 0.4:
            return
        if self.form.kind == "compare":
            value = self.rng.getrandbits(64)
            self.made.exact[RAX] = value
            self.made.memory[offset] = (value & (1 << 8 * self.size) - 1).to_bytes(self.size, "little")
        elif self.form.kind == "compare8":
            value = self.rng.getrandbits(64)
            self.made.exact[RAX] = value & 0xFFFF_FFFF
            self.made.exact[RDX] = value >> 32
            self.made.memory[offset] = value.to_bytes(8, "little")

    def _base(self) -> int:
        taken = self.reserved | self.made.exact.keys() | self.made.partly.keys()
        free = [n for n in range(16 if self.bits == 64 else 8) if n not in taken]
        return self.rng.choice(free)

    def _hold(self, number: int, value: int, address_bits: int) -> None:
        if address_bits < self.bits and self.rng.random() < 0.5:
            # What lies above the address does not count.
            self.made.partly[number] = (value & 0xFFFF_FFFF, _UINT64 ^ 0xFFFF_FFFF)
        else:
            self.made.exact[number] = value & (1 << address_bits) - 1

    def _address(self, reg: int, target: int, address_bits: int) -> bytes:
        mask = (1 << address_bits) - 1
        top = (reg & 7) << 3
        far = target - self.site.rip
        near = -(1 << 31) + 16 <= far < (1 << 31) - 16
        shape = self.rng.choice(("base", "base", "index", "absolute", "relative", "no-base"))
        low = target & mask
        reaches = low < 1 << 31 or low >= (1 << address_bits) - (1 << 31) or address_bits == 32
        if shape == "relative" and self.bits == 64 and near and not self.prefixes.count(_FS):
            self.relative_at, self.relative_target = 1, target
            return bytes([top | 5]) + bytes(4)
        if shape == "absolute" and reaches:
            where = (low & 0xFFFF_FFFF).to_bytes(4, "little")
            return bytes([top | 4, 0x25]) + where if self.bits == 64 else bytes([top | 5]) + where
        mod = self.rng.randrange(3)
        displacement = (
            0
            if mod == 0
            else self.rng.randrange(-128, 128)
            if mod == 1
            else self.rng.randrange(-(1 << 31), 1 << 31)
        )
        scale, index, spread = 0, 4, 0
        if shape in ("index", "no-base"):
            index = self._base()
            scale = self.rng.randrange(4)
            spread = self.rng.choice((0, 1, -1, self.rng.randrange(-64, 64), self.rng.getrandbits(20)))
        if shape == "no-base" and not reaches:
            shape = "index"
        if shape == "no-base":
            spread = self.rng.randrange(-0x1000, 0x1000)
            displacement = low - (spread << scale)
            if address_bits == 64 and not -(1 << 31) <= displacement < 1 << 31:
                displacement, spread = low if low < 1 << 31 else low - (1 << 64), 0
            self._hold(index, spread, address_bits)
            self.rex |= (index >> 3) << 1
            sib = scale << 6 | (index & 7) << 3 | 5
            return bytes([top | 4, sib]) + (displacement & 0xFFFF_FFFF).to_bytes(4, "little")
        if index != 4:
            self._hold(index, spread, address_bits)
            self.rex |= (index >> 3) << 1
        base = self._base()
        if base & 7 == RBP and mod == 0:
            mod, displacement = 1, 0
        self._hold(base, low - displacement - (spread << scale), address_bits)
        self.rex |= base >> 3
        tail = b"" if mod == 0 else (displacement & 0xFFFF_FFFF).to_bytes(4, "little")[: 1 if mod == 1 else 4]
        if index != 4 or base & 7 == RSP or self.rng.random() < 0.1:
            return bytes([mod << 6 | top | 4, scale << 6 | (index & 7) << 3 | base & 7]) + tail
        return bytes([mod << 6 | top | base & 7]) + tail

    def _immediate(self, part: str) -> bytes:
        if part in ("ib", "jb"):
            width = 1
        elif part == "iw":
            width = 2
        elif part == "iz":
            width = min(self.size, 4)
        elif part == "jz":
            width = 4
        elif part == "iv":
            width = self.size
        elif part == "00":
            return b"\0"
        elif part == "mo":
            return self._absolute()
        else:
            return b""
        value = self.rng.choice(
            (0, 1, (1 << 8 * width) - 1, 1 << 8 * width - 1, self.rng.getrandbits(8 * width))
        )
        if self.form.count == "ib" and self.rng.random() < 0.8:
            value = self.rng.randrange(0, 8 * self.size + 2)
        if self.form.name in ("shld", "shrd"):
            value = self.rng.randrange(0, 8 * self.size)
        if self.form.name in ("enter", "ret"):
            value = self.rng.randrange(0, 0x40)
        if self.form.name == "enter" and self.site.border:
            # Processors also look at memory at the new RSP.
            value = 0
        return value.to_bytes(width, "little")

    def _absolute(self) -> bytes:
        target = self._target(self.size)
        if self.bits == 64 and target < 1 << 32 and self.rng.random() < 0.2:
            self.prefixes.append(0x67)
            return target.to_bytes(4, "little")
        return (target & (1 << self.bits) - 1).to_bytes(self.bits // 8, "little")

    def _branch_target(self) -> int:
        first, last = self.site.targets
        if self.rng.random() < self.encoder.edge and self.site.unmapped:
            return self.rng.choice(self.site.unmapped)
        target = self.rng.randint(first, last)
        return target if not self.site.rip - 8 <= target < self.site.rip + 15 else last - 1

    def _special(self) -> int:
        """Set up what this kind of form needs, and return the count of a shift by CL or by 1."""
        form, made, rng = self.form, self.made, self.rng
        if form.count == "1":
            return 1
        if form.count == "cl":
            limit = 8 * self.size if form.name in ("shld", "shrd") else 8 * self.size + 2
            count = (
                rng.randrange(limit)
                if rng.random() < 0.8 or form.name in ("shld", "shrd")
                else rng.randrange(256)
            )
            made.exact[RCX] = count | rng.getrandbits(56) << 8
            return count
        handler = {
            "divide": self._divide, "string": self._string, "xlat": self._xlat,
            "loop": self._loop, "compare": self._compare, "compare8": self._compare8,
        }.get(form.kind)  # fmt: skip
        if handler is not None:
            handler()
        elif form.kind in ("push", "pop", "leave", "call", "return"):
            self._stack()
        return 0

    def _divide(self) -> None:
        if self.rng.random() < 0.6:
            if self.size == 1:
                self.made.partly[RAX] = (0, _UINT64 ^ 0xFF80)
            else:
                self.made.exact[RDX] = self.rng.choice((0, 0, 1, _UINT64))
        self.reserved |= {RAX, RDX}

    def _compare(self) -> None:
        self.reserved.add(RAX)

    def _compare8(self) -> None:
        self.reserved |= {RAX, RDX, RCX, RBX}

    def _loop(self) -> None:
        self.made.exact[RCX] = self.rng.choice((0, 1, 2, 1 << 32))
        if self.rng.random() < 0.3:
            self.prefixes.append(0x67)

    def _xlat(self) -> None:
        target = self._target(1)
        low = self.rng.randrange(256)
        self.made.partly[RAX] = (low, _UINT64 ^ 0xFF)
        self.made.exact[RBX] = target - low

    def _stack(self) -> None:
        made, rng, site = self.made, self.rng, self.site
        made.window = site.window
        offset = WINDOW // 2 + (rng.randrange(-10, 11) if site.border else 8 * rng.randrange(-2, 3))
        if rng.random() < 0.2:
            offset += rng.randrange(8)
        if site.border and not site.across:
            offset -= offset % 8
        where = site.window + offset
        if rng.random() < self.encoder.edge and site.unmapped:
            where = rng.choice(site.unmapped)
        made.exact[RSP] = where
        if self.form.kind == "leave":
            made.exact[RSP] = rng.getrandbits(self.bits)
            made.exact[RBP] = where
        if self.form.kind == "return":
            made.memory[offset] = self._branch_target().to_bytes(8, "little")[: self.bits // 8]

    def _string(self) -> None:
        made, rng, site = self.made, self.rng, self.site
        made.window = site.window
        address_bits = self.bits
        if self.bits == 64 and rng.random() < 0.2:
            self.prefixes.append(0x67)
            address_bits = 32
        repeat, count = rng.choice((0, 0xF3, 0xF3, 0xF2)), 1
        if repeat:
            self.prefixes.append(repeat)
            # All elements lie in the window.
            count = min(rng.choice((0, 1, 2, 3, rng.randrange(16), rng.randrange(16))), _STRING // self.size)
            self._hold(RCX, count, address_bits)
        down = rng.random() < 0.3
        if down:
            made.flags |= int(RFLAGS.DF)
        span = self.size * max(count, 1)
        for number in (RSI, RDI):
            if site.border:
                back = rng.randrange(-2 * self.size + 1, min(span, 32) + self.size)
                offset = WINDOW // 2 + (back - self.size if down else -back)
                if not site.across:
                    offset -= offset % self.size
            else:
                offset = rng.randrange(WINDOW - span + 1) + (span - self.size if down else 0)
            self._hold(number, site.window + offset, address_bits)
        if self.form.name == "cmps" and site.border:
            # Which of two operands faults first is nobody's promise.
            for registers in (made.exact, made.partly):
                registers.pop(RDI, None)
            self._hold(RDI, made.exact.get(RSI, made.partly.get(RSI, (0, 0))[0]), address_bits)
        if self.form.name in ("cmps", "scas") and repeat and site.border:
            # A fault leaves the flags of the last element (AMD) or those before the first (Intel).
            made.loose_flags = ARITHMETIC_FLAGS
        if self.form.name in ("cmps", "scas") and rng.random() < 0.7:
            # Long runs of equal elements, so that a repetition goes on.
            byte = bytes([rng.randrange(256)])
            made.memory[0] = byte * WINDOW
            made.exact[RAX] = int.from_bytes(byte * 8, "little")
            if rng.random() < 0.5:
                made.memory[rng.randrange(WINDOW)] = bytes([rng.randrange(256)])

    def _more_prefixes(self, memory: bool) -> None:
        form, rng = self.form, self.rng
        locked = memory and form.lock and rng.random() < 0.25
        self.made.locked, self.made.in_memory = locked, memory
        if locked or rng.random() < self.encoder.locks:
            self.prefixes.append(0xF0)
        if rng.random() < 0.1 and not form.vex:
            self.prefixes.append(rng.choice((0x26, 0x2E, 0x36, 0x3E)) if self.bits == 64 else 0x3E)
            if _FS in self.prefixes:
                self.prefixes.pop()


def choose(rng: random.Random, forms: Iterable[Form], count: int) -> list[Form]:
    """Return *count* of the forms, each as often as the others."""
    forms = list(forms)
    return [form for _ in range(count // len(forms) + 1) for form in rng.sample(forms, len(forms))][:count]
