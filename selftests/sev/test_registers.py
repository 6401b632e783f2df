# SPDX-License-Identifier: Apache-2.0
"""Registers of launched SEV-ES and SNP guests: refused to the host, and as launched in the guest.

Documentation/virt/kvm/api.rst; sev_es_sync_vmsa() in Linux.
"""

from __future__ import annotations

import errno
import struct

import pytest

from kvmpy import (
    GuestProgram,
    GuestVm,
    IoExit,
    MakeVm,
    Struct,
    ioctls,
    kvm_debugregs,
    kvm_fpu,
    kvm_guest_debug,
    kvm_msr_entry,
    kvm_msrs,
    kvm_regs,
    kvm_sregs,
    kvm_sregs2,
    kvm_xcrs,
    kvm_xsave,
)

hidden = pytest.mark.protections("all", can_read_registers=False)

GUEST = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	GUEST_SYNC();
}
"""

REFUSED: tuple[tuple[ioctls.Ioctl, type[Struct]], ...] = (
    (ioctls.KVM_GET_REGS, kvm_regs),
    (ioctls.KVM_SET_REGS, kvm_regs),
    (ioctls.KVM_GET_SREGS, kvm_sregs),
    (ioctls.KVM_SET_SREGS, kvm_sregs),
    (ioctls.KVM_GET_SREGS2, kvm_sregs2),
    (ioctls.KVM_SET_SREGS2, kvm_sregs2),
    (ioctls.KVM_GET_DEBUGREGS, kvm_debugregs),
    (ioctls.KVM_SET_DEBUGREGS, kvm_debugregs),
    (ioctls.KVM_GET_XCRS, kvm_xcrs),
    (ioctls.KVM_SET_XCRS, kvm_xcrs),
    (ioctls.KVM_SET_GUEST_DEBUG, kvm_guest_debug),
)

# Those that pass through to the guest.
OWN_MSRS = {
    "STAR": 0xC000_0081,
    "LSTAR": 0xC000_0082,
    "CSTAR": 0xC000_0083,
    "SFMASK": 0xC000_0084,
    "KERNEL_GS_BASE": 0xC000_0102,
}


@hidden
@pytest.mark.parametrize(("op", "make"), REFUSED, ids=[op.name for op, _ in REFUSED])
def test_registers_are_refused(make_vm: MakeVm, op: ioctls.Ioctl, make: type[Struct]) -> None:
    """After the launch the ioctls for registers give EINVAL; before it they work."""
    vm = make_vm(GUEST)
    vcpu = vm.vcpus[0]
    assert vcpu.regs.get().rflags == 2
    vm.launch()
    assert vcpu.ioctl_raw(op, make()) == (-1, errno.EINVAL)
    vcpu.sync()


@hidden
def test_msrs_are_refused(make_vm: MakeVm) -> None:
    """Of a guest that has run KVM neither returns nor takes MSRs that it has to itself; before it does both.

    Documentation/virt/kvm/api.rst, 4.18 KVM_GET_MSRS and 4.19 KVM_SET_MSRS; sev_es_prevent_msr_access().
    """
    vm = make_vm(GUEST)
    vcpu = vm.vcpus[0]

    def taken() -> dict[str, tuple[int, int]]:
        return {
            name: (
                vcpu.ioctl_raw(ioctls.KVM_GET_MSRS, kvm_msrs.of([kvm_msr_entry(index=msr)]))[0],
                vcpu.ioctl_raw(ioctls.KVM_SET_MSRS, kvm_msrs.of([kvm_msr_entry(index=msr, data=0x1000)]))[0],
            )
            for name, msr in OWN_MSRS.items()
        }

    assert taken() == dict.fromkeys(OWN_MSRS, (1, 1))
    vm.launch()
    # KVM lets the guest have them to itself at its first run.
    vcpu.sync()
    after = taken()
    assert all(got < 1 and put < 1 for got, put in after.values()), f"(read, written) after a run: {after}"


@pytest.mark.protections("sev-es")
@pytest.mark.parametrize("op", [ioctls.KVM_GET_FPU, ioctls.KVM_SET_FPU], ids=lambda op: op.name)
def test_fpu_state_is_refused(make_vm: MakeVm, op: ioctls.Ioctl) -> None:
    """After the launch of an SEV-ES guest its FPU state is refused with EINVAL."""
    vm = make_vm.start(GUEST)
    assert vm.vcpus[0].ioctl_raw(op, kvm_fpu()) == (-1, errno.EINVAL)


@pytest.mark.protections("sev")
def test_registers_of_plain_sev(make_vm: MakeVm) -> None:
    """SEV without ES leaves registers to the host: RIP is in the guest's program."""
    vm = make_vm.start(GUEST)
    vm.vcpus[0].sync()
    assert vm.program.function(type(vm.program.entry)(vm.vcpus[0].regs.get().rip)) is not None


REGISTERS = """
	.text
	.globl	start_here
start_here:
	movq	%rsp, shared + 8 * 4
	movq	%rax, shared + 8 * 0
	movq	%rcx, shared + 8 * 1
	movq	%rdx, shared + 8 * 2
	movq	%rbx, shared + 8 * 3
	movq	%rbp, shared + 8 * 5
	movq	%rsi, shared + 8 * 6
	movq	%rdi, shared + 8 * 7
	movq	%r8, shared + 8 * 8
	movq	%r9, shared + 8 * 9
	movq	%r10, shared + 8 * 10
	movq	%r11, shared + 8 * 11
	movq	%r12, shared + 8 * 12
	movq	%r13, shared + 8 * 13
	movq	%r14, shared + 8 * 14
	movq	%r15, shared + 8 * 15
	pushfq
	popq	%rax
	movq	%rax, shared + 8 * 16
	movq	%cr0, %rax
	movq	%rax, shared + 8 * 17
	movq	%cr3, %rax
	movq	%rax, shared + 8 * 18
	movq	%cr4, %rax
	movq	%rax, shared + 8 * 19
	sgdt	shared + 8 * 20
	sidt	shared + 8 * 22
	str	%eax
	movq	%rax, shared + 8 * 24
	movw	%cs, %ax
	movw	%ax, shared + 8 * 25
	movw	%ss, %ax
	movw	%ax, shared + 8 * 25 + 2
	movw	%ds, %ax
	movw	%ax, shared + 8 * 25 + 4
	movw	%fs, %ax
	movw	%ax, shared + 8 * 25 + 6
	movl	$0xc0000100, %ecx
	rdmsr
	movl	%eax, shared + 8 * 26
	movl	%edx, shared + 8 * 26 + 4
	movdqu	%xmm0, shared + 8 * 28
	movdqu	%xmm7, shared + 8 * 30
	movdqu	%xmm15, shared + 8 * 32
	stmxcsr	shared + 8 * 34
	fnstcw	shared + 8 * 35
	movl	$0x1234, %eax
	outl	%eax, $0x80
1:	jmp	1b

	.section .shared, "aw", @progbits
	.globl	shared
	.balign	4096
shared:	.skip	8 * 40

	.section .note.GNU-stack, "", @progbits
"""

VALUES = {
    "rax": 0x1111_2222_3333_4444,
    "rcx": 0x0101_0101_0101_0101,
    "rdx": 0x0202_0202_0202_0202,
    "rbx": 0x0303_0303_0303_0303,
    "rsp": 0x1000_FFF0,
    "rbp": 0x0505_0505_0505_0505,
    "rsi": 0x0606_0606_0606_0606,
    "rdi": 0x0707_0707_0707_0707,
    **{f"r{number}": number * 0x1111_1111_1111_1111 & (1 << 64) - 1 for number in range(8, 16)},
}
GPRS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))


def xmm(number: int) -> bytes:
    """Return what the test puts into an XMM register."""
    return bytes(number + 16 * byte & 0xFF for byte in range(16))


def launched(make_vm: MakeVm) -> tuple[GuestVm, tuple[int, ...], bytes]:
    """Launch with known values in every register; return what the guest found in them."""
    program = GuestProgram.from_asm(REGISTERS)
    vm = make_vm(program)
    vcpu = vm.vcpus[0]
    vcpu.set_entry("start_here")

    def last_minute() -> None:
        regs = vcpu.regs.get()
        for name, value in VALUES.items():
            setattr(regs, name, value)
        regs.rip = int(program.symbol("start_here").gva)
        regs.rflags = 0x2 | 0xC5 | 0x400
        vcpu.regs.set(regs)
        sregs = vcpu.regs.get_sregs()
        sregs.fs.base = 0x7766_5544
        vcpu.regs.set_sregs(sregs)
        area = bytearray(vcpu.fpu.get_xsave().to_bytes())
        struct.pack_into("<H", area, 0, 0x27F)
        struct.pack_into("<I", area, 24, 0x1F00)
        for number in (0, 7, 15):
            area[160 + 16 * number : 176 + 16 * number] = xmm(number)
        area[512] |= 3  # x87 and SSE are not in their initial state
        vcpu.fpu.set_xsave(kvm_xsave.from_bytes(bytes(area)))

    # After kvmpy has set the registers that its runtime wants, and before the state is encrypted.
    protection = vm.protection
    real = protection.launch

    def launch(which: GuestVm) -> None:
        last_minute()
        real(which)

    protection.launch = launch  # type: ignore[method-assign, assignment]
    vm.launch()
    assert isinstance(vcpu.run(10), IoExit)
    raw = vm.read(program.symbol("shared").gva, 320)
    return vm, struct.unpack_from("<40Q", raw), raw


@hidden
def test_general_registers_reach_the_guest(make_vm: MakeVm) -> None:
    """What KVM_SET_REGS was given before the launch is what the guest starts with: all sixteen and RFLAGS."""
    _, registers, _ = launched(make_vm)
    assert dict(zip(GPRS, registers[:16], strict=True)) == VALUES
    assert registers[16] == 0x2 | 0xC5 | 0x400


@hidden
def test_system_registers_reach_the_guest(make_vm: MakeVm) -> None:
    """Control registers, descriptor tables, selectors and FS base are those of KVM_SET_SREGS."""
    vm, state, raw = launched(make_vm)
    assert state[18] == int(vm.pages.cr3)
    assert state[17] & 0x8000_0001 == 0x8000_0001
    assert state[19] >> 5 & 1 == 1
    gdt = struct.unpack_from("<HQ", raw, 8 * 20)
    idt = struct.unpack_from("<HQ", raw, 8 * 22)
    assert gdt[1] == 0x07FF_0000
    assert idt == (0xFFF, 0x07FF_1000)
    assert state[24] & 0xFFFF == 0x30
    assert struct.unpack_from("<2H", raw, 8 * 25) == (0x08, 0x10)
    assert state[26] == 0x7766_5544


@hidden
def test_fpu_state_reaches_the_guest(make_vm: MakeVm) -> None:
    """XMM registers, MXCSR and the x87 control word are those of KVM_SET_XSAVE."""
    _, _, raw = launched(make_vm)
    for number, offset in ((0, 28), (7, 30), (15, 32)):
        assert raw[8 * offset : 8 * offset + 16] == xmm(number), f"xmm{number}"
    assert struct.unpack_from("<I", raw, 8 * 34)[0] == 0x1F00
    assert struct.unpack_from("<H", raw, 8 * 35)[0] == 0x27F
