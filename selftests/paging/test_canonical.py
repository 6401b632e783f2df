# SPDX-License-Identifier: Apache-2.0
"""Addresses that are not canonical, by every kind of access, with four and five levels of page tables.

AMD APM volume 2, 5.3.1 (canonical address form); Intel SDM volume 1, 3.3.7.1, and volume 3, 4.5.
"""

from __future__ import annotations

import pytest

from kvmpy import AGENT, PAGE_SIZE, Agent, Cpuid, Fault, MakeVm, Registers, Vector

GP, SS = Fault(Vector.GP, 0), Fault(Vector.SS, 0)
# Instructions, the register that holds the address, and what one that is not canonical raises.
ACCESSES = {
    "data": (
        {
            "MOV RAX, (RDI)": "48 8b 07",
            "MOV (RDI), RBX": "48 89 1f",
            "ADD (RDI), RBX": "48 01 1f",
            "STOSQ": "48 ab",
            "JMP RDI": "ff e7",
            "CALL RDI": "ff d7",
        },
        "rdi",
        GP,
    ),
    "string": ({"LODSQ": "48 ad"}, "rsi", GP),
    "stack": ({"MOV RAX, (RBP)": "48 8b 45 00", "MOV (RBP), RBX": "48 89 5d 00"}, "rbp", SS),
}
# No access: nothing faults.
NO_ACCESSES = {"LEA RAX, (RDI)": "48 8d 07", "PREFETCHT0 (RDI)": "0f 18 0f", "INVLPG (RDI)": "0f 01 3f"}


@pytest.fixture(
    params=[4, pytest.param(5, marks=pytest.mark.requires("cpuid:la57"))], ids=["4-levels", "5-levels"]
)
def levels(request: pytest.FixtureRequest) -> int:
    """How many levels the page tables have."""
    return int(request.param)


def edges(width: int) -> dict[int, bool]:
    """Return addresses at the ends of the two halves of *width* bits, and which of them are canonical."""
    half, all_ones = 1 << (width - 1), (1 << 64) - 1
    return {
        half - PAGE_SIZE: True,
        half: False,
        half + 8: False,
        half << 1: False,
        1 << 63: False,
        all_ones - half - 7: False,
        all_ones - half + 1: True,
        half | 1 << 62: False,
    }


@pytest.mark.protections("none", "cbit")
@pytest.mark.parametrize("kind", ACCESSES)
def test_accesses(make_vm: MakeVm, ring: int, levels: int, kind: str) -> None:
    """Accesses through the stack segment raise #SS(0), others #GP(0); canonical ones go to the tables."""
    agent = Agent(make_vm(AGENT, levels=levels).vcpus[0], ring=ring)
    instructions, register, refused = ACCESSES[kind]
    wrong = []
    for address, canonical in edges(57 if levels == 5 else 48).items():
        for text, code in instructions.items():
            result = agent.execute(bytes.fromhex(code), **{register: address})
            if canonical:
                good = isinstance(result, Fault) and (result.vector, result.address) == (Vector.PF, address)
                expected = f"#PF at {address:#x}"
            else:
                good, expected = result == refused, f"#{Vector(refused.vector).name}(0x0)"
            if not good:
                wrong.append(f"{text} of {address:#x}: expected {expected}, found {result}")
    assert wrong == [], "\n".join(wrong)


@pytest.mark.protections("none", "cbit")
def test_no_accesses(make_vm: MakeVm, ring: int, levels: int) -> None:
    """LEA and PREFETCHT0 take any address, and INVLPG in ring 0; registers stay."""
    agent = Agent(make_vm(AGENT, levels=levels).vcpus[0], ring=ring)
    wrong = []
    for address in edges(57 if levels == 5 else 48):
        for text, code in NO_ACCESSES.items():
            if ring == 3 and text == "INVLPG (RDI)":
                continue
            result = agent.execute(bytes.fromhex(code), rdi=address)
            if not isinstance(result, Registers) or result.rdi != address:
                wrong.append(f"{text} of {address:#x}: expected no exception, found {result}")
    assert wrong == [], "\n".join(wrong)


@pytest.mark.protections("none", "cbit")
def test_overrides_that_are_none(make_vm: MakeVm, ring: int) -> None:
    """CS, DS and ES overrides are ignored in 64-bit mode: RBP's segment stays SS.

    AMD APM volume 3, 1.2.4 (segment-override prefixes).
    """
    agent = Agent(make_vm(AGENT).vcpus[0], ring=ring)
    address = 1 << 47
    wrong = []
    for prefix in ("26", "2e", "3e"):
        for code, register, refused in (("48 8b 45 00", "rbp", SS), ("48 8b 07", "rdi", GP)):
            result = agent.execute(bytes.fromhex(prefix + code), **{register: address})
            if result != refused:
                wrong.append(f"{prefix} {code}: expected {refused}, found {result}")
    assert wrong == [], "\n".join(wrong)


@pytest.mark.protections("none", "cbit")
def test_descriptor_table_bases(make_vm: MakeVm, levels: int) -> None:
    """LGDT and LIDT refuse a base that no page table of this CPU could translate, and leave the old one.

    What the CPU could translate counts, not CR4.LA57 (Intel SDM volume 3, 4.5.2).
    """
    vm = make_vm(AGENT, levels=levels)
    agent = Agent(vm.vcpus[0])
    page = vm.alloc(PAGE_SIZE, private=False)
    widest = 57 if Cpuid.from_struct(vm.vcpus[0].cpuid.get()).has("la57") else 48
    base = bytes.fromhex("0f 01 07 48 8b 47 02")  # sgdt (%rdi); mov 2(%rdi), %rax
    before = agent.must(base, rdi=int(page)).rax
    for address in (address for address, canonical in edges(widest).items() if not canonical):
        for code in ("0f 01 17", "0f 01 1f"):
            vm.write(page, (0xFFFF | address << 16).to_bytes(10, "little"))
            assert (hex(address), code, agent.execute(bytes.fromhex(code), rdi=int(page))) == (
                hex(address), code, GP,
            )  # fmt: skip
    assert agent.must(base, rdi=int(page)).rax == before
