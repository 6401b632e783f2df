# SPDX-License-Identifier: Apache-2.0
"""CR0, CR4, EFER and XCR0 bit by bit, written by the guest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import pytest

from kvmpy import (
    AGENT,
    CR0,
    CR4,
    EFER,
    XCR0,
    Agent,
    Cpuid,
    Fault,
    MakeVm,
    Msr,
    Vector,
    kvm_cpuid2,
)
from selftests.regs.control import CR4_ALWAYS, CR4_FEATURES, EFER_FEATURES, xcr0_holds_together, xcr0_of

GP0 = (Vector.GP, 0)
IGNORED_CR0 = [*range(6, 16), 17, *range(19, 29)]


def outcome(fault: Fault | None) -> tuple[int, int] | None:
    """Return the vector and the error code of a fault."""
    return None if fault is None else (fault.vector, fault.error_code)


def without(features: Iterable[str]) -> Callable[[kvm_cpuid2], kvm_cpuid2]:
    """Return what takes features out of a table."""

    def edit(table: kvm_cpuid2) -> kvm_cpuid2:
        cpuid = Cpuid.from_struct(table)
        for feature in features:
            cpuid.clear_feature(feature)
        return cpuid.to_struct()

    return edit


def walk(
    base: int,
    write: Callable[[int], Fault | None],
    read: Callable[[], int | Fault],
    expected: dict[int, int | None],
) -> list[str]:
    """Write *base* with one bit changed after the other; return a line for each that ends otherwise.

    *expected* has what is then read, by bit; None for #GP(0), after which *base* is read.
    """
    wrong = []
    for bit, value in expected.items():
        ended = outcome(write(base ^ 1 << bit))
        if ended != (GP0 if value is None else None):
            wrong.append(f"bit {bit}: {ended}")
        if (now := read()) != (base if value is None else value):
            wrong.append(f"bit {bit}: reads {now:#x}" if isinstance(now, int) else f"bit {bit}: {now}")
        write(base)
        if read() != base:
            wrong.append(f"bit {bit}: not restored")
            break
    return wrong


def test_cr0(make_vm: MakeVm) -> None:
    """Each bit of CR0 is changed, ignored or #GP(0) as MOV to CR0 in 64-bit mode has it.

    PE and PG cannot be cleared, NW cannot be set alone, ET stays 1, and the upper half is reserved; the other
    reserved bits are ignored.  Intel SDM volume 3, 2.5; AMD APM volume 2, 3.1.1.
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    base = agent.read_cr(0)
    assert isinstance(base, int)
    assert base & (CR0.PE | CR0.ET | CR0.PG | CR0.CD | CR0.NW) == CR0.PE | CR0.ET | CR0.PG
    expected: dict[int, int | None] = {bit: base ^ 1 << bit for bit in (1, 2, 3, 5, 16, 18, 30)}
    expected |= dict.fromkeys([4, *IGNORED_CR0], base)
    expected |= dict.fromkeys([0, 29, 31, *range(32, 64)])
    wrong = walk(base, lambda value: agent.write_cr(0, value), lambda: agent.read_cr(0), expected)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "hidden",
    [
        pytest.param(False, id="offered"),
        # Without these KVM learns of a new value when the CPU has taken it.
        pytest.param(True, id="hidden", marks=pytest.mark.requires("trait:can_read_registers")),
    ],
)
def test_cr4(make_vm: MakeVm, hidden: bool) -> None:
    """Each bit of CR4 can be changed with its CPUID feature, and is #GP(0) without; no reserved bit can.

    In 64-bit mode PAE and LA57 cannot change.  Intel SDM volume 3, 2.5; AMD APM volume 2, 3.1.3.
    """
    agent = Agent(make_vm(AGENT, cpuid=without(CR4_FEATURES.values() if hidden else ())).vcpus[0])
    base = agent.read_cr(4)
    assert isinstance(base, int)
    cpuid = Cpuid.from_struct(agent.vcpu.cpuid.get())
    allowed = int(CR4_ALWAYS)
    allowed |= sum(int(bit) for bit, feature in CR4_FEATURES.items() if cpuid.has(feature))
    fixed = int(CR4.PAE | CR4.LA57)
    # Shadow stacks and IBT, of which KVM's CPUID tells in two ways.
    bits = [bit for bit in range(64) if 1 << bit not in (CR4.VMXE, CR4.CET)]
    expected = {bit: base ^ 1 << bit if allowed & ~fixed & 1 << bit else None for bit in bits}
    wrong = walk(base, lambda value: agent.write_cr(4, value), lambda: agent.read_cr(4), expected)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("hidden", [False, True], ids=["offered", "hidden"])
@pytest.mark.requires("param:kvm.ignore_msrs=N", "trait:can_read_registers")
def test_efer(make_vm: MakeVm, hidden: bool) -> None:
    """A bit of EFER can be changed with its CPUID feature, and is #GP(0) without.

    In 64-bit mode LME cannot change, and LMA stays whatever is written.  AMD APM volume 2, 3.1.7;
    arch/x86/kvm/x86.c, set_efer().
    """
    features = {bit: feature for bit, feature in EFER_FEATURES.items() if bit != EFER.NXE}
    agent = Agent(make_vm(AGENT, cpuid=without(features.values() if hidden else ())).vcpus[0])
    base = agent.rdmsr(Msr.MSR_EFER)
    assert isinstance(base, int)
    cpuid = Cpuid.from_struct(agent.vcpu.cpuid.get())
    expected: dict[int, int | None] = {0: base ^ EFER.SCE, 8: None, 10: base}
    expected |= {
        int(bit).bit_length() - 1: base ^ int(bit) if cpuid.has(feature) else None
        for bit, feature in features.items()
    }
    wrong = walk(
        base, lambda value: agent.wrmsr(Msr.MSR_EFER, value), lambda: agent.rdmsr(Msr.MSR_EFER), expected
    )
    assert not wrong, "\n".join(wrong)


@pytest.mark.requires("cpu:xsave")
def test_xcr0(make_vm: MakeVm) -> None:
    """XSETBV takes every set of offered features that has what it needs, and no other; that is #GP(0).

    What leaf 0xD offers holds together itself.  Intel SDM volume 1, 13.3; AMD APM volume 2, 11.5.2.
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    assert agent.change_cr(4, put=CR4.OSXSAVE) is None
    offered = xcr0_of(Cpuid.from_struct(agent.vcpu.cpuid.get()))
    assert xcr0_holds_together(offered)
    bits = [1 << bit for bit in range(64) if offered >> bit & 1]
    values = [sum(chosen) for size in range(len(bits) + 1) for chosen in itertools.combinations(bits, size)]
    values += [offered | 1 << bit for bit in range(64) if not offered >> bit & 1]
    before: int | Fault = int(XCR0.X87)
    wrong = []
    for value in values:
        legal = value & ~offered == 0 and xcr0_holds_together(value)
        ended = outcome(agent.xsetbv(value))
        if ended != (None if legal else GP0):
            wrong.append(f"{value:#x}: {ended}")
        before = value if legal else before
        if (now := agent.xgetbv(ring=3)) != before:
            wrong.append(f"{value:#x}: reads {now}, not {before:#x}")
            break
    assert not wrong, "\n".join(wrong)


@pytest.mark.requires("cpu:xsave")
def test_xsetbv_refused(make_vm: MakeVm) -> None:
    """XGETBV and XSETBV are #UD without CR4.OSXSAVE; XSETBV is #GP(0) in ring 3 and for another register.

    Intel SDM volume 2, XGETBV and XSETBV.
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    without = [agent.xsetbv(1), agent.xgetbv(ring=3)]
    assert [end.vector if isinstance(end, Fault) else end for end in without] == [Vector.UD] * 2
    assert agent.change_cr(4, put=CR4.OSXSAVE) is None
    assert outcome(agent.xsetbv(1, index=1)) == GP0
    in_ring_3 = agent.execute(b"\x0f\x01\xd1", ring=3, rax=1)
    assert isinstance(in_ring_3, Fault)
    assert (in_ring_3.vector, in_ring_3.error_code) == GP0
    assert agent.xgetbv(ring=3) == 1
    assert agent.xsetbv(1) is None
