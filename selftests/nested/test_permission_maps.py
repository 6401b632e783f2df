# SPDX-License-Identifier: Apache-2.0
"""The permission maps: single MSRs and ports of L2 exit to L1, the others do not."""

from __future__ import annotations

from functools import partial

import pytest

from kvmpy import L2, Exit, IoExit, Msr, SvmExit
from kvmpy.x86.vmcb import IoInfo
from selftests.nested.conftest import offered

pytestmark = [pytest.mark.protections("none"), pytest.mark.requires("cpuid:svm")]

RDMSR, WRMSR = b"\x0f\x32", b"\x0f\x30"
# One of each range of the map at least, some that KVM gives to guests directly, some that it emulates.
MSRS = [
    Msr.MSR_IA32_TSC, Msr.MSR_IA32_SYSENTER_EIP, Msr.MSR_IA32_CR_PAT, Msr.MSR_EFER, Msr.MSR_STAR,
    Msr.MSR_LSTAR, Msr.MSR_KERNEL_GS_BASE, Msr.MSR_TSC_AUX, Msr.MSR_K7_HWCR,
]  # fmt: skip
PORTS = (0x42, 0x47, 0x48, 0x1234, 0xFFF8)


def test_msrs(l2: L2) -> None:
    """Each MSR has a bit for reads and one for writes, and exits by that bit alone, with its kind.

    AMD APM volume 2, 15.11 MSR Intercepts: EXITINFO1 is 0 for RDMSR and 1 for WRMSR.
    """
    wrong = []
    for msr in MSRS:
        for read, write in ((False, False), (True, False), (False, True), (True, True)):
            l2.reset()
            l2.intercept_msr(msr, read=read, write=write)
            # Its neighbours exit: no bit is taken for another one's.
            for neighbour in (msr - 1, msr + 1):
                if neighbour >> 13 == msr >> 13:
                    l2.intercept_msr(neighbour, read=True, write=True)
            got = l2.run(RDMSR + WRMSR, rcx=msr)
            seen = [(got.code, got.info1, l2.offset)]
            if read:
                l2.intercept_msr(msr, write=write)
                got = l2.resume()
                seen.append((got.code, got.info1, l2.offset))
            expected = [(SvmExit.MSR, 0, 0)] if read else []
            expected.append((SvmExit.MSR, 1, 2) if write else (SvmExit.VMMCALL, 0, 4))
            # EXITINFO1 of VMMCALL is nothing that is defined.
            if [each[::2] for each in seen] != [each[::2] for each in expected] or any(
                mine[0] == SvmExit.MSR and mine[1] != theirs[1]
                for mine, theirs in zip(seen, expected, strict=False)
            ):
                wrong.append(f"{msr!r} read={read} write={write}: {seen}, expected {expected}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "msr", [0x2000, 0x4B56_4D00, 0xBFFF_FFFF, 0xC000_2000, 0xC001_2000, 0xFFFF_FFFF], ids=hex
)
def test_msrs_outside_of_the_map(l2: L2, msr: int) -> None:
    """An MSR that the map does not have exits whenever MSRs are intercepted at all.

    AMD APM volume 2, 15.11: "an attempt to access any MSR not covered by the MSRPM ... automatically causes
    a #VMEXIT".
    """
    l2.reset()
    l2.intercept(SvmExit.MSR)
    for code, info1 in ((RDMSR, 0), (WRMSR, 1)):
        got = l2.run(code, rcx=msr)
        assert (got.code, got.info1, l2.offset) == (SvmExit.MSR, info1, 0), str(got)


def test_map_without_the_intercept(l2: L2) -> None:
    """With MSRs not intercepted the map is not looked at.

    AMD APM volume 2, table B-1, vector at 0Ch, bit 28.
    """
    l2.reset()
    l2.intercept_msr(Msr.MSR_EFER, read=True, write=True)
    l2.intercept(SvmExit.MSR, on=False)
    assert l2.run(RDMSR, rcx=Msr.MSR_EFER).code == SvmExit.VMMCALL
    assert l2.register("rax") | l2.register("rdx") << 32 == l2.vmcb["efer"]


def _access(size: int, out: bool) -> tuple[bytes, int]:
    prefix, opcode = {1: (b"", 0xEC), 2: (b"\x66", 0xED), 4: (b"", 0xED)}[size]
    info = {1: IoInfo.SZ8, 2: IoInfo.SZ16, 4: IoInfo.SZ32}[size] | (0 if out else IoInfo.IN)
    return prefix + bytes((opcode | (2 if out else 0),)), int(info)


def _noted(exits: list[Exit], exit_: Exit) -> bool:
    exits.append(exit_)
    return True


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ports(l2: L2, size: int) -> None:
    """An access exits if the bit of any of its ports is set, with port, size, direction and the next RIP.

    AMD APM volume 2, 15.10 I/O Instruction Intercepts: the bits of all bytes of the access count.
    """
    wrong = []
    for port in PORTS:
        for out in (False, True):
            code, info = _access(size, out)
            for hit in range(-1, size + 1):
                l2.reset()
                l2.intercept_port(port + hit)
                l2.load(code, rdx=port, rax=0x12345678)
                exits: list[Exit] = []
                got = l2.resume(partial(_noted, exits))
                if 0 <= hit < size:
                    right = got.code == SvmExit.IOIO and l2.offset == 0 and not exits
                    right = right and got.info1 & ~0x1F80 == port << 16 | info
                    right = right and got.info2 == int(l2.code) + len(code)
                else:
                    right = got.code == SvmExit.VMMCALL and len(exits) == 1
                    right = right and isinstance(exits[0], IoExit) and exits[0].port == port
                if not right:
                    way = "out" if out else "in"
                    wrong.append(f"{way} {size} at {port:#x}, bit of {port + hit:#x}: {got}, {exits}")
    assert not wrong, "\n".join(wrong)


def test_string_ports(l2: L2) -> None:
    """INS and OUTS exit with their own bits in EXITINFO1, and before the first element.

    AMD APM volume 2, 15.10.2.
    """
    l2.reset()
    buffer = l2.vm.alloc(4096)
    wrong = []
    for rep, prefix in ((0, b""), (int(IoInfo.REP), b"\xf3")):
        for out, opcode in ((False, 0x6C), (True, 0x6E)):
            for size, (more, wide, bits) in {
                1: (b"", 0, IoInfo.SZ8), 2: (b"\x66", 1, IoInfo.SZ16), 4: (b"", 1, IoInfo.SZ32)
            }.items():  # fmt: skip
                l2.reset()
                l2.intercept_port(0x4321)
                code = prefix + more + bytes((opcode | wide,))
                got = l2.run(code, rdx=0x4321, rsi=int(buffer), rdi=int(buffer), rcx=3)
                expected = 0x4321 << 16 | int(bits) | rep | int(IoInfo.STR) | (0 if out else int(IoInfo.IN))
                # The segment is only told with decode assists.
                if (got.code, got.info1 & ~0x1F80, l2.offset) != (SvmExit.IOIO, expected, 0):
                    wrong.append(f"size {size} out={out} rep={bool(rep)}: {got} {got.info1:#x}")
                elif got.info2 != int(l2.code) + len(code):
                    wrong.append(f"size {size} out={out} rep={bool(rep)}: next RIP {got.info2:#x}")
                elif l2.register("rcx") != 3:
                    wrong.append(f"size {size} out={out} rep={bool(rep)}: RCX {l2.register('rcx')}")
    assert not wrong, "\n".join(wrong)


def test_string_address_size(l2: L2) -> None:
    """INS and OUTS tell the width of their addresses in EXITINFO1.

    AMD APM volume 2, 15.10.2.
    """
    l2.reset()
    l2.intercept_port(0x4321)
    for prefix, bit in ((b"", IoInfo.A64), (b"\x67", IoInfo.A32)):
        for opcode in (b"\x6c", b"\x6e"):
            got = l2.run(prefix + opcode, rdx=0x4321)
            assert got.info1 & (IoInfo.A16 | IoInfo.A32 | IoInfo.A64) == bit, str(got)


def test_next_rip_of_msrs(l2: L2) -> None:
    """Where next RIPs are saved, an intercepted RDMSR has one.

    AMD APM volume 2, 15.7.1 State Saved on Exit.
    """
    l2.reset()
    if not offered(l2, "nrips"):
        pytest.skip("L1's CPUID lacks nrips")
    l2.intercept_msr(Msr.MSR_EFER, read=True)
    l2.run(RDMSR, rcx=Msr.MSR_EFER)
    assert l2.vmcb["next_rip"] == int(l2.code) + 2
