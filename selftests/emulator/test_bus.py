# SPDX-License-Identifier: Apache-2.0
"""What instructions on MMIO do on the bus: how many accesses, how wide, in which order, with which bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from kvmpy import AGENT, PAGE_SIZE, Agent, Exit, Gpa, Gva, MakeVm, MmioExit, Registers

pytestmark = pytest.mark.protections("none", "cbit")

MMIO_GPA, MMIO = Gpa(0xD000_0000), Gva(0x7000_0000)
RAM = MMIO + 2 * PAGE_SIZE
DEVICE = bytes(range(0x10, 0x50))
VALUE = 0x8877_6655_4433_2211
CONTENT = int.from_bytes(DEVICE[:8], "little")

Access = tuple[str, int, int]


@dataclass(frozen=True)
class Case:
    """An instruction with RDI at the device and RSI at memory, and what it must do."""

    name: str
    code: bytes
    accesses: tuple[Access, ...]
    """R or W, offset, size."""
    wrote: bytes = b""
    """What the device holds at its start in the end, where it was written."""
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)


def little(value: int, size: int) -> bytes:
    """Return the low bytes of a number as they lie in memory."""
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little")


def _exchanges() -> list[Case]:
    cases = []
    for size, code in ((1, b"\x86\x07"), (2, b"\x66\x87\x07"), (4, b"\x87\x07"), (8, b"\x48\x87\x07")):
        low = CONTENT & (1 << 8 * size) - 1
        whole = low if size == 4 else VALUE & ~((1 << 8 * size) - 1) | low
        cases.append(
            Case(
                f"xchg-{size}", code, (("R", 0, size), ("W", 0, size)), little(VALUE, size), {"rax": VALUE},
                {"rax": whole},
            )
        )  # fmt: skip
    return cases


def _byte_swaps() -> list[Case]:
    cases = []
    for size, prefix in ((2, b"\x66"), (4, b""), (8, b"\x48")):
        swapped = int.from_bytes(DEVICE[:size], "big")
        after = VALUE & ~0xFFFF | swapped if size == 2 else swapped
        stored = little(VALUE, size)[::-1]
        cases += [
            Case(
                f"movbe-load-{size}",
                prefix + b"\x0f\x38\xf0\x07",
                (("R", 0, size),),
                b"",
                {"rax": VALUE},
                {"rax": after},
            ),
            Case(
                f"movbe-store-{size}",
                prefix + b"\x0f\x38\xf1\x07",
                (("W", 0, size),),
                stored,
                {"rax": VALUE},
                {"rax": VALUE},
            ),
        ]
    return cases


def _compares() -> list[Case]:
    read_write = (("R", 0, 4), ("W", 0, 4))
    wide = (("R", 0, 8), ("W", 0, 8))
    low, high = CONTENT & 0xFFFF_FFFF, CONTENT >> 32
    equal = {"rax": low, "rdx": high, "rbx": 0x1111_2222, "rcx": 0x3333_4444}
    new = little(0x3333_4444_1111_2222, 8)
    return [
        Case(
            "cmpxchg-equal",
            b"\x0f\xb1\x0f",
            read_write,
            little(VALUE, 4),
            {"rax": low, "rcx": VALUE},
            {"rax": low},
        ),
        Case(
            "cmpxchg-other", b"\x0f\xb1\x0f", read_write, DEVICE[:4], {"rax": 1, "rcx": VALUE}, {"rax": low}
        ),
        Case(
            "lock-cmpxchg-equal",
            b"\xf0\x0f\xb1\x0f",
            read_write,
            little(VALUE, 4),
            {"rax": low, "rcx": VALUE},
        ),
        Case("cmpxchg8b-equal", b"\x0f\xc7\x0f", wide, new, equal, equal),
        Case(
            "cmpxchg8b-other",
            b"\x0f\xc7\x0f",
            wide,
            DEVICE[:8],
            {**equal, "rax": 5},
            {**equal, "rax": low, "rdx": high},
        ),
        Case("lock-cmpxchg8b-equal", b"\xf0\x0f\xc7\x0f", wide, new, equal, equal),
        Case(
            "lock-xadd",
            b"\xf0\x0f\xc1\x07",
            read_write,
            little(CONTENT + VALUE, 4),
            {"rax": VALUE},
            {"rax": low},
        ),
        Case("lock-bts", b"\xf0\x0f\xba\x2f\x07", read_write, little(CONTENT | 0x80, 4)),
        Case("not", b"\xf7\x17", read_write, little(~CONTENT, 4)),
        Case("test", b"\x85\x07", (("R", 0, 4),), b"", {"rax": VALUE}, {"rax": VALUE}),
        Case("setz", b"\x0f\x94\x07", (("W", 0, 1),)),
    ]


def _stack_and_strings() -> list[Case]:
    copy = tuple((kind, offset, 8) for offset in (0, 8) for kind in ("R", "W"))
    moved = tuple((kind, offset + (16 if kind == "W" else 0), size) for kind, offset, size in copy)
    return [
        Case("push-pop", b"\xff\x37\x58", (("R", 0, 8),), b"", {}, {"rax": CONTENT}),
        Case("pop-into", b"\x50\x8f\x07", (("W", 0, 8),), little(VALUE, 8), {"rax": VALUE}),
        Case(
            "movs-within",
            b"\x48\x89\xfe\x48\x83\xc7\x10\xf3\x48\xa5",
            moved,
            b"",
            {"rcx": 2},
            {"rcx": 0},
        ),
        Case(
            "stos-down", b"\xfd\xf3\xaa\xfc", (("W", 0, 1), ("W", -1, 1)), b"\x11", {"rax": VALUE, "rcx": 2}
        ),
    ]


def _vectors() -> list[Case]:
    load = (("R", 0, 8), ("R", 8, 8))
    store = (("W", 0, 8), ("W", 8, 8))
    fill = b"\x0f\x10\x0e"  # movups (%rsi), %xmm1
    show = b"\x0f\x11\x0e"  # movups %xmm1, (%rsi)
    cases = []
    for name, out, back in (
        ("movups", b"\x0f\x11\x0f", b"\x0f\x10\x0f"),
        ("movaps", b"\x0f\x29\x0f", b"\x0f\x28\x0f"),
        ("movdqu", b"\xf3\x0f\x7f\x0f", b"\xf3\x0f\x6f\x0f"),
        ("movdqa", b"\x66\x0f\x7f\x0f", b"\x66\x0f\x6f\x0f"),
    ):
        cases.append(Case(f"{name}-store", fill + out, store, bytes(range(0x80, 0x90))))
        cases.append(Case(f"{name}-load", back + show, load))
    cases.append(Case("movntdq", fill + b"\x66\x0f\xe7\x0f", store, bytes(range(0x80, 0x90))))
    cases.append(Case("movntps", fill + b"\x0f\x2b\x0f", store, bytes(range(0x80, 0x90))))
    return cases


CASES = [*_exchanges(), *_byte_swaps(), *_compares(), *_stack_and_strings(), *_vectors()]


@pytest.mark.requires("trait:kvm_emulates")
@pytest.mark.parametrize("ring", [0, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_accesses(make_vm: MakeVm, case: Case, ring: int) -> None:
    """An instruction on MMIO reads and writes each byte once, lower addresses first, in parts of at most 8.

    What is locked is read and written like the rest.  arch/x86/kvm/x86.c, emulator_read_write() and
    emulator_cmpxchg_emulated(); AMD APM volume 3 for each instruction.
    """
    vm = make_vm(AGENT)
    # What lies behind does too, for what goes down.
    vm.map(
        MMIO - PAGE_SIZE, MMIO_GPA - PAGE_SIZE, 2 * PAGE_SIZE, page_size=PAGE_SIZE, user=True, private=False
    )
    vm.alloc(PAGE_SIZE, gva=RAM, user=True, private=False)
    agent = Agent(vm.vcpus[0], ring=ring)
    vm.write(RAM, bytes(range(0x80, 0x90)))
    device = bytearray(16) + bytearray(DEVICE)
    registers = {"rdi": int(MMIO), "rsi": int(RAM), **case.before}
    agent.begin(case.code, ring=None, where=None, **registers)
    seen: list[Access] = []

    def answer(got: Exit) -> bool:
        if not isinstance(got, MmioExit):
            return False
        offset = int(got.phys_addr) - int(MMIO_GPA)
        seen.append(("W" if got.is_write else "R", offset, got.size))
        place = slice(16 + offset, 16 + offset + got.size)
        if got.is_write:
            device[place] = got.data
        else:
            got.respond(bytes(device[place]))
        return True

    end = agent.end(answer)
    assert isinstance(end, Registers)
    assert tuple(seen) == case.accesses
    assert {name: getattr(end, name) for name in case.after} == case.after
    assert bytes(device[16 : 16 + len(case.wrote)]) == case.wrote
    if case.name.endswith("-load") and "mov" in case.name and not case.after:
        assert vm.read(RAM, 16) == DEVICE[:16]
