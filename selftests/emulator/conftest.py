# SPDX-License-Identifier: Apache-2.0
"""What the emulator's tests share: a guest that runs instructions twice, by the CPU and by KVM's emulator."""

from __future__ import annotations

import enum
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvmpy import (
    KVM_INTERNAL_ERROR_DELIVERY_EV,
    PAGE_SIZE,
    Exit,
    GuestProgram,
    Gva,
    InternalErrorExit,
    MakeVm,
    MmioExit,
    Ucall,
    kvm_xcr,
    kvm_xcrs,
)
from kvmpy.guest.disasm import disassemble
from kvmpy.testing import host
from kvmpy.x86 import pairs, segments
from kvmpy.x86.bits import CR4, RFLAGS
from kvmpy.x86.instructions import ALL, Form, table
from kvmpy.x86.operands import WINDOW, Encoder, Instruction, Site
from kvmpy.x86.pairs import ORDER, Question, State

FOLDER = Path(__file__).parent

CODE, CODE_PAGES = Gva(0x5FF0_0000), 2
ARENA, ARENA_PAGES = Gva(0x6000_0000), 6
ABSENT, READONLY = 2, (3, 5)
# Pages that begin with memory that cannot be written, behind memory that can.
TORN = (2, 5)
# Where the kernel of the guest sees both, writable.
CODE_VIEW, ARENA_VIEW, TABLE_VIEW = Gva(0x5000_0000_0000), Gva(0x5000_1000_0000), Gva(0x5000_2000_0000)
# Nothing is there; its pages take the places of the arena's.
MMIO_GPA = 0xD000_0000
FS_BASE = 0x1230
FORBIDDEN = 1 << 47
PREFIX = b"\x0f\x0bkvm"
HEAD = 8
IMAGE_SIZE = 48
SEAM = int(CODE) + PAGE_SIZE
# HLT in ring 3, INTO in 64-bit mode: whatever jumps there faults there.
FILL_USER, FILL_KERNEL = 0xF4, 0xCE

POOL, CASES, SHOWN = 1024, 512, 8
_CASE = struct.Struct("<16Q16Q5Q48s2Q128s512s4Q")
_DIFFERENCE = 8 + 3 * pairs.STATE_SIZE
SEGMENTS = 3
# With operands in memory, under TCG.
LOSE_FLAGS = ("xchg", "rcl", "rcr")
# The exit tells an event that has been delivered long ago: the pair says nothing.
SKIPPED = 2
RBP, STACK_FAULT = 5, 12
WRITE_ERROR, USER_ERROR = 1 << 1, 1 << 2


class Way(enum.IntEnum):
    """How the second run comes to the emulator."""

    PREFIX = 0
    RING = 1
    MMIO = 2


# Kinds of instructions that reach memory without a ModRM byte.
IMPLICIT = ("absolute", "xlat", "string", "push", "pop", "leave", "call", "return")


def ring_0_is_emulated(_: object) -> str | None:
    """Return None where ring 0 runs in the instruction emulator and ring 3 on the CPU."""
    return (
        None
        if "kvm_pvm" in host.vendor_modules()
        else "kvm_pvm, whose ring 0 runs in the instruction emulator"
    )


def compatibility_mode_is_native(_: object) -> str | None:
    """Return None where 32-bit code of ring 3 runs on the CPU."""
    return (
        "a KVM that runs 32-bit code on the CPU: kvm_pvm emulates it"
        if "kvm_pvm" in host.vendor_modules()
        else None
    )


prefixed = pytest.mark.requires("param:kvm.force_emulation_prefix=1")
native_32_bit = pytest.mark.requires.with_args(compatibility_mode_is_native)
emulated_ring_0 = pytest.mark.requires.with_args(ring_0_is_emulated)
WAYS = [
    pytest.param((Way.PREFIX, 3, 64), marks=prefixed, id="prefix"),
    pytest.param((Way.PREFIX, 0, 64), marks=prefixed, id="prefix-ring0"),
    pytest.param((Way.PREFIX, 3, 32), marks=[prefixed, native_32_bit], id="prefix-32bit"),
    pytest.param((Way.MMIO, 3, 64), id="mmio"),
    pytest.param((Way.MMIO, 3, 32), marks=native_32_bit, id="mmio-32bit"),
    pytest.param((Way.RING, 3, 64), marks=emulated_ring_0, id="ring0"),
]
Ways = tuple[Way, int, int]


def forms_of(group: str, ways: Ways) -> list[Form]:
    """Return what this way can compare."""
    way, ring, bits = ways
    if group == "privileged" and ring == 0:
        # These do something there.
        return []
    if group.startswith("avx") and "kvm_pvm" in host.vendor_modules():
        # The guest's own kernel would need it, too, in the emulator.
        return []
    return [
        form
        for form in table()
        if form.group == group
        and bits in form.modes
        and not (way is Way.RING and form.same_rings)
        and not (way is Way.MMIO and not reaches_memory(form))
    ]


def reaches_memory(form: Form) -> bool:
    """Whether an instruction may have operands in memory."""
    explicit = "/" in form.code and form.only != "r" and form.access
    return form.group != "privileged" and (explicit or form.kind in IMPLICIT)


class Pairs:
    """A guest that runs pairs one *way*; both runs in *ring*, but for :attr:`Way.RING`."""

    def __init__(
        self,
        make_vm: MakeVm,
        way: Way,
        rng: random.Random,
        *,
        ring: int = 3,
        bits: int = 64,
        avx: bool = False,
    ) -> None:
        self.way, self.rng, self.ring, self.bits = way, rng, ring, bits
        program = GuestProgram.from_file(FOLDER / "pairs.c", FOLDER / "enter.S", name="pairs")
        self.vm = vm = make_vm(program)
        self.vcpu = vm.vcpus[0]
        self.fill = FILL_KERNEL if way is Way.RING or ring == 0 else FILL_USER
        user = ring == 3
        code = vm.allocator.alloc(CODE_PAGES)
        arena = vm.allocator.alloc(8, align=8 * PAGE_SIZE)
        vm.map(CODE, code, CODE_PAGES * PAGE_SIZE, page_size=PAGE_SIZE, user=user, nx=False)
        vm.map(CODE_VIEW, code, CODE_PAGES * PAGE_SIZE, page_size=PAGE_SIZE)
        vm.map(ARENA_VIEW, arena, ARENA_PAGES * PAGE_SIZE, page_size=PAGE_SIZE)
        for page in range(ARENA_PAGES):
            if page != ABSENT:
                offset = page * PAGE_SIZE
                vm.map(
                    ARENA + offset, arena + offset, PAGE_SIZE,
                    page_size=PAGE_SIZE, user=user, writable=page not in READONLY,
                )  # fmt: skip
        vm.memory.write(code, bytes([self.fill]) * (CODE_PAGES * PAGE_SIZE))
        leaf = next(step for step in vm.pages.walk(ARENA).steps if step.level == 1)
        table, private = vm.from_raw(leaf.table)
        vm.map(TABLE_VIEW, table, PAGE_SIZE, page_size=PAGE_SIZE, private=private)
        self.arena = vm.view(ARENA_VIEW, ARENA_PAGES * PAGE_SIZE)
        self.encoder = Encoder(rng, bits=bits)
        self.gave_up = ""
        self.done = 0
        vm.launch()
        self.vcpu.sync()
        if avx:
            # By the host: TCG lets XSETBV of a guest pass KVM by.
            sregs = self.vcpu.regs.get_sregs()
            sregs.cr4 |= int(CR4.OSXSAVE)
            self.vcpu.regs.set_sregs(sregs)
            self.vcpu.fpu.set_xcrs(kvm_xcrs(nr_xcrs=1, xcrs=[kvm_xcr(xcr=0, value=7)]))
        self._cases = vm.view(vm.symbol("pair_cases").gva, CASES * _CASE.size)
        self._set("pair_way", int(way))
        self._set("pair_fs_base", FS_BASE)
        self._set("pair_fill", int.from_bytes(bytes([self.fill]) * 8, "little"))
        self._set("pair_entry_at", int(TABLE_VIEW) + 8 * leaf.index)
        self._set("pair_entries", ARENA_PAGES)
        self._set("pair_mmio", int(arena) ^ MMIO_GPA)
        pool = vm.symbol("pair_pool")
        values = pairs.pool(rng, len(pool.view("Q")))
        vm.write(pool.gva, struct.pack(f"<{len(values)}Q", *values))
        self.ignored_error = USER_ERROR if way is Way.RING else 0
        self.ignored_flags = 0
        self.reads_first = False
        self.unmapped = [int(ARENA) + ABSENT * PAGE_SIZE + 0x800]
        self.undelivered = 0
        self._look_at_the_cpu()
        self._set("pair_ignored_error", self.ignored_error)
        self._set("pair_ignored_flags", self.ignored_flags)

    def _set(self, name: str, value: int) -> None:
        self.vm.symbol(name).u64 = value

    def _look_at_the_cpu(self) -> None:
        """Find what a CPU that QEMU emulates (TCG) does otherwise than processors do, and ignore that."""
        absent = (int(ARENA) + ABSENT * PAGE_SIZE).to_bytes(4, "little")
        modify = b"\x00\x04\x25" if self.bits == 64 else b"\x00\x05"
        plain, _ = self.both(self._question(modify + absent))
        if not plain.rflags & int(RFLAGS.RF):
            # The frame of a fault has no RF.
            self.ignored_flags |= int(RFLAGS.RF)
        if not plain.error_code & WRITE_ERROR:
            # What reads and writes memory raises the fault of a read.
            self.reads_first = True
            self.ignored_error |= WRITE_ERROR
        if self.bits == 64:
            registers = tuple(FORBIDDEN if number == RBP else 0 for number in ORDER)
            plain, _ = self.both(replace(self._question(b"\x8a\x45\x00"), registers=registers))
            if plain.vector == STACK_FAULT:
                # A base of RBP or RSP makes it the stack's fault.
                self.unmapped.append(FORBIDDEN)

    def _question(self, code: bytes) -> Question:
        return Question(code, int(CODE) + 0x800, (0,) * 16, 2, 0, 0, bytes(WINDOW), bits=self.bits)

    def site(self) -> Site:
        """Return a place for an instruction and for its memory: often at a border."""
        rng = self.rng
        # A write of MMIO after its read would not be the page's own fault any more.
        pages = (0, 0, 0, 1, 2) if self.way is Way.MMIO and self.reads_first else (0, 0, 0, 1, 2, 3, 4, 5)
        page = rng.choice(pages)
        border = page > 0 or rng.random() < 0.2
        window = int(ARENA) + page * PAGE_SIZE - WINDOW // 2 if border and page else int(ARENA) + 0x400
        if border and not page and len(pages) > 5:
            window = int(ARENA) + 3 * PAGE_SIZE + 0x400
        seam = rng.random() < 0.1
        rip = SEAM - rng.randrange(1, 15) if seam else int(CODE) + 0x800 + rng.randrange(16)
        return Site(
            rip, window, border=bool(page), across=page not in TORN, fs_base=FS_BASE,
            unmapped=tuple(self.unmapped),
            targets=(int(CODE) + 0x100, int(CODE) + CODE_PAGES * PAGE_SIZE - 0x100),
        )  # fmt: skip

    def _selectors(self) -> tuple[int, int]:
        if self.ring == 0:
            return (segments.KERNEL_CS if self.bits == 64 else segments.KERNEL_CS32), segments.KERNEL_DS
        return (segments.USER_CS if self.bits == 64 else segments.USER_CS32), segments.USER_DS

    def _image(self, code: bytes) -> bytes:
        """Return what lies at the instruction, from :data:`HEAD` bytes before it on."""
        fill = bytes([self.fill])
        head = fill * (HEAD - len(PREFIX)) + PREFIX
        return (head + code).ljust(IMAGE_SIZE, fill)

    def _pack(
        self,
        number: int,
        *,
        base: Sequence[int],
        mask: Sequence[int],
        flags: int,
        flags_mask: int,
        undefined: int,
        rip: int,
        code: bytes,
        window: int,
        memory: bytes | None,
        vectors: int,
        count: int,
    ) -> None:
        view = int(ARENA_VIEW) + window - int(ARENA) if window else 0
        given = (memory or b"").ljust(128 + 512, b"\0")
        _CASE.pack_into(
            self._cases, number * _CASE.size,
            *(base[n] for n in ORDER), *(mask[n] for n in ORDER), flags, flags_mask, undefined, rip,
            int(CODE_VIEW) + rip - HEAD - int(CODE), self._image(code), view, memory is not None,
            given[:128], given[128:], *self._selectors(), vectors, count,
        )  # fmt: skip

    def put(self, number: int, made: Instruction, count: int) -> None:
        """Make an encoded instruction a case of the next run, with as many operands."""
        base, mask = made.registers()
        memory = None
        if made.memory:
            content = bytearray(self.rng.randbytes(WINDOW + 512))
            for offset, part in made.memory.items():
                content[offset : offset + len(part)] = part
            memory = bytes(content)
        vectors = (2 if made.form.vex else 1) if made.form.kind == "vector" else 0
        self._pack(
            number, base=base, mask=mask, flags=made.flags, flags_mask=made.flags_mask,
            undefined=self._undefined(made),
            rip=made.rip, code=made.code, window=made.window, memory=memory, vectors=vectors, count=count,
        )  # fmt: skip

    def loses_flags(self, made: Instruction) -> bool:
        """Whether TCG may lose the flags at a fault or an exit of an instruction."""
        return self.reads_first and (made.locked or (made.in_memory and made.form.name in LOSE_FLAGS))

    def _undefined(self, made: Instruction) -> int:
        return made.undefined | (ALL if self.loses_flags(made) else 0)

    def run(self, count: int) -> int:
        """Run the first *count* cases; return how many pairs differ."""
        self._set("pair_count", count)
        self._set("pair_seed", self.rng.getrandbits(63) | 1)
        self._set("pair_done", 0)
        self._set("pair_different", 0)
        while not isinstance(got := self.vcpu.next(), Ucall):
            self._answer(got)
        self.done += self.vm.symbol("pair_done").u64
        return int(self.vm.symbol("pair_different").u64)

    def _answer(self, got: Exit) -> None:
        if isinstance(got, MmioExit):
            start = int(got.phys_addr) - MMIO_GPA
            if got.is_write:
                self.arena[start : start + got.size] = got.data
            else:
                got.respond(bytes(self.arena[start : start + got.size]))
            return
        if not isinstance(got, InternalErrorExit) or not self._in_run():
            raise self.vcpu.unexpected(got, "the end of the runs")
        over = self.reads_first and got.suberror == KVM_INTERNAL_ERROR_DELIVERY_EV
        self.undelivered += over
        self.gave_up = str(got)
        self._set("pair_given_up", SKIPPED if over else 1)
        sregs = self.vcpu.regs.get_sregs()
        table = segments.gdt()
        segments.load(sregs.cs, segments.KERNEL_CS, table)
        segments.load(sregs.ss, segments.KERNEL_DS, table)
        sregs.gs.base = int(self.vcpu.percpu)
        self.vcpu.regs.set_sregs(sregs)
        regs = self.vcpu.regs.get()
        regs.rip, regs.rflags = int(self.vm.symbol("pairs_leave").gva), 2
        self.vcpu.regs.set(regs)

    def _in_run(self) -> bool:
        return 0 <= self.vcpu.regs.get().rip - int(CODE) < CODE_PAGES * PAGE_SIZE

    def found(self, count: int) -> list[tuple[int, State, State, State]]:
        """Return the first pairs that differ: case, what it began with, the CPU's and the emulator's end."""
        view = self.vm.view(self.vm.symbol("pair_differences").gva, SHOWN * _DIFFERENCE)
        answers = []
        for index in range(min(count, SHOWN)):
            raw = view[index * _DIFFERENCE : (index + 1) * _DIFFERENCE]
            parts = [
                raw[8 + place * pairs.STATE_SIZE : 8 + (place + 1) * pairs.STATE_SIZE] for place in range(3)
            ]
            before, plain, emulated = (State.unpack(part) for part in parts)
            answers.append((int.from_bytes(raw[:8], "little"), before, plain, emulated))
        return answers

    def ask(self, question: Question, vectors: int = 0) -> tuple[State, State] | None:
        """Run one pair exactly as told; return both ends if they differ."""
        base = [question.register(number) for number in range(16)]
        self._pack(
            0, base=base, mask=[0] * 16, flags=question.rflags, flags_mask=0, undefined=question.undefined,
            rip=question.rip, code=question.code, window=question.window,
            memory=question.memory + question.vectors, vectors=vectors, count=1,
        )  # fmt: skip
        different = self.run(1)
        if not different:
            return None
        _, _, plain, emulated = self.found(1)[0]
        return plain, emulated

    def both(self, question: Question, vectors: int = 0) -> tuple[State, State]:
        """Run one pair exactly as told; return both ends, the CPU's first."""
        self._set("pair_show_all", 1)
        ends = self.ask(question, vectors)
        self._set("pair_show_all", 0)
        assert ends is not None
        return ends

    def lines(self, question: Question, plain: State, emulated: State) -> list[str]:
        """Return what differs."""
        undefined = question.undefined | self.ignored_flags
        return pairs.differences(
            plain, emulated, undefined, self.ignored_error, selectors=self.way is not Way.RING
        )

    def check(self, made: Sequence[Instruction], count: int) -> list[str]:
        """Run each instruction with *count* operands; return reports of those that differ, shrunk."""
        for number, each in enumerate(made):
            self.put(number, each, count)
        different = self.run(len(made))
        reports = {}
        for number, before, plain, emulated in self.found(different):
            each = made[number]
            if each.form in reports:
                continue
            vectors = (2 if each.form.vex else 1) if each.form.kind == "vector" else 0
            question = Question(
                each.code, each.rip, before.registers, before.rflags, self._undefined(each), each.window,
                before.memory, before.vectors if vectors else b"", self.bits,
                each.form.prefix,
            )  # fmt: skip
            reports[each.form] = self.report(question, vectors, (plain, emulated))
        return list(reports.values())

    def _kinds(self, question: Question, ends: tuple[State, State]) -> set[str]:
        """Return what differs, without how."""
        return {line.split(":")[0].split(" +")[0] for line in self.lines(question, *ends)}

    def report(self, question: Question, vectors: int, ends: tuple[State, State]) -> str:
        """Return the report of a pair that differs, made as simple as it goes."""
        wanted = self._kinds(question, ends)

        def differs(each: Question) -> bool:
            found = self.ask(each, vectors)
            return found is not None and self._kinds(each, found) == wanted

        if differs(question):
            question = pairs.shrink(question, differs)
            ends = self.ask(question, vectors) or ends
        text = "; ".join(line for _, line in disassemble(question.code, question.rip, bits=self.bits))
        lines = self.lines(question, *ends)
        if ends[1].vector == pairs.GAVE_UP:
            lines.append(self.gave_up)
        return pairs.describe(question, text, lines)


MakePairs = Callable[..., Pairs]


@pytest.fixture
def make_pairs(make_vm: MakeVm, rng: random.Random) -> MakePairs:
    """Makes a guest that runs pairs."""

    def make(way: Way, **options: Any) -> Pairs:
        return Pairs(make_vm, way, rng, **options)

    return make
