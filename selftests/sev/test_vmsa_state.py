# SPDX-License-Identifier: Apache-2.0
"""The VMSA of a launched vCPU, to the last byte: x87, SSE and AVX registers, segments with their attributes.

SEV-ES and SNP: KVM copies what the host set with KVM_SET_XSAVE and KVM_SET_SREGS into the VMSA, and VMRUN
loads it.  AMD APM volume 2, 15.35.8 and table B-4; sev_es_sync_vmsa() in Linux.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from kvmpy import Cpuid, GuestProgram, GuestVcpu, GuestVm, IoExit, MakeVm, XsaveArea, kvm_segment, kvm_sregs
from kvmpy.x86.xsave import Layout

hidden = pytest.mark.protections("all", can_read_registers=False)
PORT, SEEN = 0x80, 0x1234
STACK = 0x1000_FFF0


def launched(make_vm: MakeVm, source: str, change: Callable[[GuestVm, GuestVcpu], None]) -> bytes:
    """Launch with what *change* sets at the last minute; return what the guest left in ``shared``."""
    program = GuestProgram.from_asm(source)
    vm = make_vm(program)
    vcpu = vm.vcpus[0]
    vcpu.set_entry("start_here")
    # After kvmpy has set the registers that its runtime wants, and before the state is encrypted.
    protection = vm.protection
    real = protection.launch

    def launch(which: GuestVm) -> None:
        regs = vcpu.regs.get()
        regs.rip, regs.rsp = int(program.symbol("start_here").gva), STACK
        vcpu.regs.set(regs)
        change(which, vcpu)
        real(which)

    protection.launch = launch  # type: ignore[method-assign, assignment]
    vm.launch()
    exit_ = vcpu.run(10)
    assert isinstance(exit_, IoExit)
    assert (exit_.port, exit_.value) == (PORT, SEEN)
    return vm.read(program.symbol("shared").gva, 0x2000)


SHARED = """
	.section .shared, "aw", @progbits
	.globl	shared
	.balign	4096
shared:	.skip	0x2000

	.section .note.GNU-stack, "", @progbits
"""

# Floating point.

FPU = (
    """
	.text
	.globl	start_here
start_here:
	fxsave64 shared
"""
    + "".join(f"\tvmovdqu\t%ymm{number}, shared + 0x200 + 32 * {number}\n" for number in range(16))
    + """
	xorl	%ecx, %ecx
	xgetbv
	movl	%eax, shared + 0x400
	movl	$0x1234, %eax
	outl	%eax, $0x80
1:	jmp	1b
"""
    + SHARED
)
FCW, FSW, FTW, MXCSR, XCR0 = 0x27F, 0x7841, 0xA5, 0x1F00, 7


def st(number: int) -> bytes:
    """Return ten bytes of their own for each x87 register, the last two included."""
    return bytes(0x81 + 16 * number + byte & 0xFF for byte in range(10))


def ymm(number: int) -> bytes:
    """Return 32 bytes of their own for each register."""
    return bytes(number * 16 + byte * 5 + 1 & 0xFF for byte in range(32))


def set_fpu(vm: GuestVm, vcpu: GuestVcpu) -> None:
    """Give every register of x87, SSE and AVX a value of its own."""
    sregs = vcpu.regs.get_sregs()
    sregs.cr4 |= 1 << 18  # OSXSAVE
    vcpu.regs.set_sregs(sregs)
    xcrs = vcpu.fpu.get_xcrs()
    xcrs.nr_xcrs = 1
    xcrs.xcrs[0].xcr, xcrs.xcrs[0].value = 0, XCR0
    vcpu.fpu.set_xcrs(xcrs)
    area = XsaveArea.from_struct(
        vcpu.fpu.get_xsave(), Layout.from_cpuid(Cpuid.from_struct(vm.kvm.supported_cpuid))
    )
    area.fcw, area.fsw, area.ftw = FCW, FSW, FTW
    for number in range(8):
        area.set_st(number, st(number))
    for number in range(16):
        area.set_ymm(number, ymm(number))
    area.mxcsr = MXCSR
    vcpu.fpu.set_xsave(area.to_struct())


@hidden
@pytest.mark.requires("cpu:avx")
def test_every_byte_of_x87_sse_and_avx(make_vm: MakeVm) -> None:
    """Eight x87 registers with tags and status, sixteen YMM registers, MXCSR and XCR0 reach the guest.

    AMD APM volume 2, table B-4: FPREG_X87 holds the lower eight bytes of all registers, then the upper two.
    """
    raw = launched(make_vm, FPU, set_fpu)
    assert struct.unpack_from("<HHB", raw) == (FCW, FSW, FTW)
    assert struct.unpack_from("<I", raw, 24)[0] == MXCSR
    assert [raw[32 + 16 * n : 42 + 16 * n] for n in range(8)] == [st(n) for n in range(8)]
    assert [raw[160 + 16 * n : 176 + 16 * n] for n in range(16)] == [ymm(n)[:16] for n in range(16)]
    assert [raw[0x200 + 32 * n : 0x220 + 32 * n] for n in range(16)] == [ymm(n) for n in range(16)]
    assert struct.unpack_from("<I", raw, 0x400)[0] == XCR0


# Segments: the guest starts in compatibility mode, where bases and default sizes mean something.

TO_64_BIT = """
	.code64
in_64_bit:
	movq	%rsp, shared + 0x30
	movq	$0x1000fff0, %rsp
	movl	$0x1234, %eax
	outl	%eax, $0x80
1:	jmp	1b
"""

# mov eax, 0x90400001 and dec eax; in 64-bit mode no dec; with 16 bits mov ax, 1; inc ax; nop; dec ax.
PROBE = "\t.byte 0xb8, 0x01, 0x00, 0x40, 0x90, 0x48, 0x90\n"

IN_32_BIT = (
    """
	.text
	.code32
	.globl	start_here
start_here:
"""
    + PROBE
    + """
	movl	%eax, %ds:shared
	movl	%eax, %es:shared + 0x10
	movl	%eax, %fs:shared + 0x20
	pushl	$0x5a5a5a5a
	movw	%cs, %ax
	movw	%ax, %ds:shared + 0x40
	movw	%ss, %ax
	movw	%ax, %ds:shared + 0x42
	movw	%ds, %ax
	movw	%ax, %ds:shared + 0x44
	movw	%es, %ax
	movw	%ax, %ds:shared + 0x46
	movw	%fs, %ax
	movw	%ax, %ds:shared + 0x48
	ljmpl	$0x08, $in_64_bit
"""
    + TO_64_BIT
    + SHARED
)

IN_16_BIT = (
    """
	.text
	.code16
	.globl	start_here
start_here:
	xorl	%eax, %eax
"""
    + PROBE
    + """
	addr32 movl %eax, %ds:shared
	.byte	0x66, 0xea	/* a far jump with an offset of 32 bits */
	.long	in_64_bit
	.short	0x08
"""
    + TO_64_BIT
    + SHARED
)

IN_64_BIT = (
    """
	.text
	.code64
	.globl	start_here
start_here:
"""
    + PROBE
    + """
	movl	%eax, shared
"""
    + TO_64_BIT
    + SHARED
)


def u32(raw: bytes, offset: int) -> int:
    return int(struct.unpack_from("<I", raw, offset)[0])


def change_segments(change: Callable[[kvm_sregs, GuestVm], None]) -> Callable[[GuestVm, GuestVcpu], None]:
    """Return what changes the segments of a vCPU."""

    def apply(vm: GuestVm, vcpu: GuestVcpu) -> None:
        sregs = vcpu.regs.get_sregs()
        change(sregs, vm)
        vcpu.regs.set_sregs(sregs)

    return apply


def code(segment: kvm_segment, *, l: int, db: int) -> None:  # noqa: E741 - the bit's name
    segment.l, segment.db = l, db


@hidden
def test_attributes_of_64_bit_code(make_vm: MakeVm) -> None:
    """With L set and D clear the guest starts in 64-bit mode: 0x48 is a prefix, and bases are 0.

    AMD APM volume 2, 4.8.1 (code segments in long mode).
    """

    def change(sregs: kvm_sregs, vm: GuestVm) -> None:
        code(sregs.cs, l=1, db=0)
        sregs.ds.base = 0x1000

    raw = launched(make_vm, IN_64_BIT, change_segments(change))
    assert u32(raw, 0) == 0x9040_0001
    assert u32(raw, 0x1000) == 0


@hidden
def test_attributes_of_32_bit_code(make_vm: MakeVm) -> None:
    """With L clear and D set it starts in compatibility mode: 0x48 decrements EAX.

    AMD APM volume 2, 4.8.1.
    """
    raw = launched(make_vm, IN_32_BIT, change_segments(lambda sregs, _vm: code(sregs.cs, l=0, db=1)))
    assert u32(raw, 0) == 0x9040_0000


@hidden
def test_attributes_of_16_bit_code(make_vm: MakeVm) -> None:
    """With both clear it starts with operands of 16 bits.

    AMD APM volume 2, 4.8.1 and 4.7.2 (D).
    """
    raw = launched(make_vm, IN_16_BIT, change_segments(lambda sregs, _vm: code(sregs.cs, l=0, db=0)))
    assert u32(raw, 0) == 1


@hidden
def test_bases_and_selectors(make_vm: MakeVm) -> None:
    """Bases of DS, ES and FS are added in compatibility mode, and every selector is the one that was set.

    AMD APM volume 2, 4.5.3 and table B-4; the hidden part of a segment is not read from the GDT again.
    """

    def change(sregs: kvm_sregs, vm: GuestVm) -> None:
        code(sregs.cs, l=0, db=1)
        sregs.ds.base, sregs.ds.selector = 0x1000, 0x40
        sregs.es.base, sregs.es.selector = 0x1100, 0x48
        sregs.fs.base, sregs.fs.selector = 0x1200, 0x50
        sregs.ss.selector = 0x58
        sregs.cs.selector = 0x60

    raw = launched(make_vm, IN_32_BIT, change_segments(change))
    assert (u32(raw, 0), u32(raw, 0x10), u32(raw, 0x20)) == (0, 0, 0)
    assert (u32(raw, 0x1000), u32(raw, 0x1110), u32(raw, 0x1220)) == (0x9040_0000,) * 3
    assert struct.unpack_from("<5H", raw, 0x1040) == (0x60, 0x58, 0x40, 0x48, 0x50)


@hidden
@pytest.mark.parametrize("wide", [0, 1], ids=["16 bits", "32 bits"])
def test_the_size_of_the_stack(make_vm: MakeVm, wide: int) -> None:
    """SS.B says how much of ESP a push uses, and SS.base where the stack begins.

    AMD APM volume 2, 4.7.3 (B).
    """
    esp = 0x0000_0208 if wide else 0xABCD_0208

    def change(sregs: kvm_sregs, vm: GuestVm) -> None:
        code(sregs.cs, l=0, db=1)
        sregs.ss.db = wide
        sregs.ss.base = int(vm.program.symbol("shared").gva)
        regs = vm.vcpus[0].regs.get()
        regs.rsp = esp
        vm.vcpus[0].regs.set(regs)

    raw = launched(make_vm, IN_32_BIT, change_segments(change))
    assert u32(raw, 0x204) == 0x5A5A_5A5A
    assert struct.unpack_from("<Q", raw, 0x30)[0] == esp - 4
