# SPDX-License-Identifier: Apache-2.0
"""What ring, control bits and CPUID make of an instruction: an exception, or none and its result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from kvmpy import AGENT, CR4, PAGE_SIZE, Agent, Cpuid, Fault, MakeVm, Msr, Vector
from kvmpy.guest.agent import Registers

KERNEL, USER = (0,), (3,)
BOTH = (*KERNEL, *USER)
NO_BITS = CR4(0)
AUX = 0x5A17
# Vector and error code.
UD, GP, DB, BP, DE = ((vector, 0) for vector in (Vector.UD, Vector.GP, Vector.DB, Vector.BP, Vector.DE))


@dataclass(frozen=True)
class Rule:
    """How an instruction ends in some rings: ``ends`` is its exception, None for none.

    ``put`` and ``clear`` are bits of CR4; ``gives`` are registers afterwards, in their lower 32 bits.
    """

    text: str
    code: str
    rings: tuple[int, ...]
    ends: tuple[int, int] | None = None
    put: CR4 = NO_BITS
    clear: CR4 = NO_BITS
    given: dict[str, int] = field(default_factory=dict)
    gives: dict[str, int] = field(default_factory=dict)


def _umip() -> Iterator[Rule]:
    for text, code in (
        ("SGDT m", "0f 01 07"),
        ("SIDT m", "0f 01 0f"),
        ("SLDT m", "0f 00 07"),
        ("STR m", "0f 00 0f"),
        ("SMSW m", "0f 01 27"),
        ("SLDT EAX", "0f 00 c0"),
        ("STR EAX", "0f 00 c8"),
        ("SMSW EAX", "0f 01 e0"),
    ):
        yield Rule(text, code, BOTH, clear=CR4.UMIP)
        yield Rule(text, code, KERNEL, put=CR4.UMIP)
        yield Rule(text, code, USER, GP, put=CR4.UMIP)


def _privileged() -> Iterator[Rule]:
    for text, code in (
        ("HLT", "f4"),
        ("CLI", "fa"),
        ("STI", "fb"),
        ("LGDT m", "0f 01 17"),
        ("LIDT m", "0f 01 1f"),
        ("LLDT AX", "0f 00 d0"),
        ("LTR AX", "0f 00 d8"),
        ("LMSW AX", "0f 01 f0"),
        ("CLTS", "0f 06"),
        ("INVLPG m", "0f 01 3f"),
        ("INVD", "0f 08"),
        ("WBINVD", "0f 09"),
        ("MOV RAX, CR0", "0f 20 c0"),
        ("MOV RAX, CR2", "0f 20 d0"),
        ("MOV RAX, CR3", "0f 20 d8"),
        ("MOV RAX, CR4", "0f 20 e0"),
        ("MOV RAX, CR8", "44 0f 20 c0"),
        ("MOV CR3, RAX", "0f 22 d8"),
        ("MOV CR8, RAX", "44 0f 22 c0"),
        ("MOV RAX, DR0", "0f 21 c0"),
        ("MOV DR7, RAX", "0f 23 f8"),
        ("RDMSR", "0f 32"),
        ("WRMSR", "0f 30"),
        ("SWAPGS", "0f 01 f8"),
        ("SYSRETQ", "48 0f 07"),
        ("IN AL, DX", "ec"),
        ("OUT DX, AL", "ee"),
        ("INSB", "6c"),
        ("OUTSB", "6e"),
    ):
        yield Rule(text, code, USER, GP)


def _undefined() -> Iterator[Rule]:
    for text, code in (
        ("UD2", "0f 0b"),
        ("UD1 EAX, EAX", "0f b9 c0"),
        ("PUSH ES", "06"),
        ("DAA", "27"),
        ("INTO", "ce"),
        ("CALL far", "9a 00 00 00 00 08 00"),
        ("JMP far", "ea 00 00 00 00 08 00"),
        ("LEA EAX, EAX", "8d c0"),
        ("LOCK NOP", "f0 90"),
        ("LOCK ADD EAX, EAX", "f0 01 c0"),
        ("LOCK CMP m, EAX", "f0 39 07"),
    ):
        yield Rule(text, code, BOTH, UD)
    for text, code in (("STAC", "0f 01 cb"), ("CLAC", "0f 01 ca")):
        yield Rule(text, code, USER, UD)
    yield Rule("MOV CR1, RAX", "0f 22 c8", KERNEL, UD)
    yield Rule("NOP of 15 bytes", "66 " * 14 + "90", BOTH)
    yield Rule("NOP of 16 bytes", "66 " * 15 + "90", BOTH, GP)


def _monitor() -> Iterator[Rule]:
    for text, code in (("MONITOR", "0f 01 c8"), ("MWAIT", "0f 01 c9")):
        yield Rule(text, code, USER, UD)


def _int_n() -> Iterator[Rule]:
    yield Rule("INT 0x40", "cd 40", USER, (Vector.GP, 0x40 << 3 | 2))


def _lock_mov() -> Iterator[Rule]:
    yield Rule("LOCK MOV m, EAX", "f0 89 07", BOTH, UD)


def _int1() -> Iterator[Rule]:
    yield Rule("INT1", "f1", BOTH, DB)


def _traps() -> Iterator[Rule]:
    yield Rule("INT3", "cc", BOTH, BP)
    yield Rule("INT 3", "cd 03", BOTH, BP)
    yield Rule("DIV ECX", "f7 f1", BOTH, DE)
    yield Rule("IDIV ECX, -2^31 by -1", "f7 f9", BOTH, DE, given={"rax": 1 << 31, "rdx": ~0, "rcx": ~0})


def _time() -> Iterator[Rule]:
    for text, code in (("RDTSC", "0f 31"), ("RDTSCP", "0f 01 f9")):
        yield Rule(text, code, BOTH, clear=CR4.TSD)
        yield Rule(text, code, KERNEL, put=CR4.TSD)
        yield Rule(text, code, USER, GP, put=CR4.TSD)
    yield Rule("RDTSCP", "0f 01 f9", BOTH, clear=CR4.TSD, gives={"rcx": AUX})


def _rdpid() -> Iterator[Rule]:
    yield Rule("RDPID RAX", "f3 0f c7 f8", BOTH, gives={"rax": AUX})


def _xsave() -> Iterator[Rule]:
    xgetbv, xsetbv = "0f 01 d0", "0f 01 d1"
    one = {"rax": 1}
    yield Rule("XGETBV", xgetbv, BOTH, UD, clear=CR4.OSXSAVE)
    yield Rule("XGETBV", xgetbv, BOTH, put=CR4.OSXSAVE, gives={"rax": 1, "rdx": 0})
    yield Rule("XGETBV 2", xgetbv, BOTH, GP, put=CR4.OSXSAVE, given={"rcx": 2})
    yield Rule("XSETBV", xsetbv, KERNEL, UD, clear=CR4.OSXSAVE, given=one)
    yield Rule("XSETBV", xsetbv, KERNEL, put=CR4.OSXSAVE, given=one)
    yield Rule("XSETBV", xsetbv, USER, GP, put=CR4.OSXSAVE, given=one)
    yield Rule("XSETBV 1", xsetbv, KERNEL, GP, put=CR4.OSXSAVE, given={"rax": 1, "rcx": 1})
    yield Rule("XSETBV without x87", xsetbv, KERNEL, GP, put=CR4.OSXSAVE)
    yield Rule("XSETBV of bit 63", xsetbv, KERNEL, GP, put=CR4.OSXSAVE, given={"rax": 1, "rdx": 1 << 31})


def _xsetbv_off() -> Iterator[Rule]:
    yield Rule("XSETBV", "0f 01 d1", USER, UD, clear=CR4.OSXSAVE, given={"rax": 1})


def _pkru() -> Iterator[Rule]:
    rdpkru, wrpkru = "0f 01 ee", "0f 01 ef"
    yield Rule("RDPKRU", rdpkru, BOTH, UD, clear=CR4.PKE)
    yield Rule("WRPKRU", wrpkru, BOTH, UD, clear=CR4.PKE)
    yield Rule(
        "WRPKRU, RDPKRU", f"{wrpkru} {rdpkru}", BOTH, put=CR4.PKE, given={"rax": 0xC}, gives={"rax": 0xC}
    )
    yield Rule("RDPKRU 1", rdpkru, BOTH, GP, put=CR4.PKE, given={"rcx": 1})
    yield Rule("WRPKRU 1", wrpkru, BOTH, GP, put=CR4.PKE, given={"rcx": 1})
    yield Rule("WRPKRU with EDX", wrpkru, BOTH, GP, put=CR4.PKE, given={"rdx": 1})
    yield Rule("WRPKRU of 0", f"{wrpkru} {rdpkru}", BOTH, put=CR4.PKE, gives={"rax": 0, "rdx": 0})


def _fsgsbase() -> Iterator[Rule]:
    for text, code in (("RDFSBASE RAX", "f3 48 0f ae c0"), ("RDGSBASE RAX", "f3 48 0f ae c8")):
        yield Rule(text, code, BOTH, UD, clear=CR4.FSGSBASE)
        yield Rule(text, code, BOTH, put=CR4.FSGSBASE)
    write_read = "f3 48 0f ae d3 f3 48 0f ae c0"
    yield Rule("WRFSBASE RBX", "f3 48 0f ae d3", BOTH, UD, clear=CR4.FSGSBASE)
    yield Rule(
        "WRFSBASE RBX",
        write_read,
        BOTH,
        put=CR4.FSGSBASE,
        given={"rbx": 0x7654_3000},
        gives={"rax": 0x7654_3000},
    )
    yield Rule("WRFSBASE of 0", write_read, BOTH, put=CR4.FSGSBASE, gives={"rax": 0})


def _fsbase_hole() -> Iterator[Rule]:
    yield Rule("WRFSBASE of a hole", "f3 48 0f ae d3", BOTH, GP, put=CR4.FSGSBASE, given={"rbx": 1 << 60})


def _smap() -> Iterator[Rule]:
    load = "48 8b 07"
    yield Rule("MOV RAX, user m", load, KERNEL, (Vector.PF, 1), put=CR4.SMAP)
    yield Rule("MOV RAX, user m", load, BOTH, clear=CR4.SMAP)
    yield Rule("STAC, MOV RAX, user m, CLAC", f"0f 01 cb {load} 0f 01 ca", KERNEL, put=CR4.SMAP)
    yield Rule(
        "STAC, CLAC, MOV RAX, user m", f"0f 01 cb 0f 01 ca {load}", KERNEL, (Vector.PF, 1), put=CR4.SMAP
    )


def _caches() -> Iterator[Rule]:
    for text, code in (
        ("MFENCE", "0f ae f0"),
        ("LFENCE", "0f ae e8"),
        ("SFENCE", "0f ae f8"),
        ("PREFETCHT0 m", "0f 18 0f"),
    ):
        yield Rule(text, code, BOTH)
    yield Rule("PREFETCHT0 of a hole", "0f 18 0f", BOTH, given={"rdi": 0x7000_0000_0000})


def _clflush() -> Iterator[Rule]:
    yield Rule("CLFLUSH m", "0f ae 3f", BOTH)


def _clflush_hole() -> Iterator[Rule]:
    yield Rule("CLFLUSH of no page", "0f ae 3f", USER, (Vector.PF, 4), given={"rdi": 0x7000_0000_0000})


def _rdpru() -> Iterator[Rule]:
    yield Rule("RDPRU", "0f 01 fd", BOTH, UD)


# By the CPUID feature that they need; of ``no-`` the vCPU must not have it.
GROUPS = {
    "privileged": ("", _privileged),
    "undefined": ("", _undefined),
    "traps": ("", _traps),
    "int-n": ("", _int_n),
    "int1": ("", _int1),
    "lock-mov": ("", _lock_mov),
    "monitor": ("", _monitor),
    "caches": ("", _caches),
    "umip": ("umip", _umip),
    "time": ("rdtscp", _time),
    "rdpid": ("rdpid", _rdpid),
    "xsave": ("xsave", _xsave),
    "xsetbv-off": ("xsave", _xsetbv_off),
    "pkru": ("pku", _pkru),
    "fsgsbase": ("fsgsbase", _fsgsbase),
    "fsbase-hole": ("fsgsbase", _fsbase_hole),
    "smap": ("smap", _smap),
    "clflush": ("clflush", _clflush),
    "clflush-hole": ("clflush", _clflush_hole),
    "rdpru": ("no-rdpru", _rdpru),
}


def ending(result: Registers | Fault) -> tuple[int, int] | None:
    """Return vector and error code of a fault."""
    return (result.vector, result.error_code) if isinstance(result, Fault) else None


def told(ends: tuple[int, int] | None) -> str:
    """Return an ending in words."""
    return "no exception" if ends is None else str(Fault(*ends)).partition(",")[0]


@pytest.mark.protections("none")
@pytest.mark.parametrize("group", GROUPS)
def test_rules(make_vm: MakeVm, ring: int, group: str) -> None:
    """Each instruction ends as the manual has it, in each ring, and with the bits of CR4 set and clear.

    AMD APM volume 3, the pages of the instructions; volume 2, 3.1.3 (CR4).
    """
    feature, rules = GROUPS[group]
    offered = Cpuid.from_struct(make_vm.kvm.supported_cpuid)
    if feature and not feature.startswith("no-") and not offered.has(feature):
        pytest.skip(f"KVM offers no {feature}")
    vm = make_vm(AGENT)
    agent = Agent(vm.vcpus[0])
    page = vm.alloc(PAGE_SIZE, user=True, private=False)
    if feature.startswith("no-"):
        assert not Cpuid.from_struct(vm.vcpus[0].cpuid.get()).has(feature[3:])
    if offered.has("rdtscp") or offered.has("rdpid"):
        assert agent.wrmsr(Msr.MSR_TSC_AUX, AUX) is None
    wrong = []
    for rule in rules():
        if ring not in rule.rings:
            continue
        assert agent.change_cr(4, clear=rule.clear, put=rule.put) is None
        result = agent.execute(
            bytes.fromhex(rule.code), ring=ring, **{"rdi": int(page), "rsi": int(page), **rule.given}
        )
        bits = (
            f"{f' with {rule.put!r}' if rule.put else ''}{f' without {rule.clear!r}' if rule.clear else ''}"
        )
        if ending(result) != rule.ends:
            wrong.append(f"{rule.text}{bits}: expected {told(rule.ends)}, found {told(ending(result))}")
        elif isinstance(result, Registers):
            wrong += [
                f"{rule.text}{bits}: expected {name} {value:#x}, found {getattr(result, name):#x}"
                for name, value in rule.gives.items()
                if getattr(result, name) & 0xFFFF_FFFF != value
            ]
        agent.change_cr(4, clear=rule.put & CR4.SMAP)
    assert wrong == [], "\n".join(wrong)
