# SPDX-License-Identifier: Apache-2.0
"""Instructions that a #VC handler has to decode and carry out: the same as without one.

They run under every protection, so that what the handler does is compared with what the CPU or KVM does.
"""

from __future__ import annotations

import pytest

from kvmpy import Gpa, Gva, IoExit, MakeVm, MmioExit

MMIO_GVA = Gva(0x70_0000_0000)
MMIO_GPA = Gpa(0xC000_0000)
LOW_GVA = Gva(0x7000_0000)

PORTS = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	u64 rax;

	asm volatile("outb %%al, $0x42" : : "a"(0x1122334455667711));
	asm volatile("outw %%ax, $0x42" : : "a"(0x1122334455667722));
	asm volatile("outl %%eax, $0x42" : : "a"(0x1122334455667733));
	asm volatile("outb %%al, %%dx" : : "a"(0x11), "d"(0xffff1042));
	asm volatile("outw %%ax, %%dx" : : "a"(0x2222), "d"(0x1043));
	asm volatile("outl %%eax, %%dx" : : "a"(0x33333333), "d"(0x1044));
	asm volatile("inb $0x42, %%al" : "=a"(rax) : "a"(0x1122334455667788));
	GUEST_SYNC(rax);
	asm volatile("inw $0x42, %%ax" : "=a"(rax) : "a"(0x1122334455667788));
	GUEST_SYNC(rax);
	asm volatile("inl $0x42, %%eax" : "=a"(rax) : "a"(0x1122334455667788));
	GUEST_SYNC(rax);
	asm volatile("inb %%dx, %%al" : "=a"(rax) : "a"(0x1122334455667788), "d"(0x1042));
	GUEST_SYNC(rax);
	asm volatile("inw %%dx, %%ax" : "=a"(rax) : "a"(0x1122334455667788), "d"(0x1042));
	GUEST_SYNC(rax);
	asm volatile("inl %%dx, %%eax" : "=a"(rax) : "a"(0x1122334455667788), "d"(0x1042));
	GUEST_SYNC(rax);
}
"""


def test_ports(make_vm: MakeVm) -> None:
    """IN and OUT of every size, with the port in DX or in the instruction, keep the rest of RAX."""
    vcpu = make_vm.start(PORTS).vcpus[0]
    for port, size, value in (
        (0x42, 1, 0x11),
        (0x42, 2, 0x7722),
        (0x42, 4, 0x55667733),
        (0x1042, 1, 0x11),
        (0x1043, 2, 0x2222),
        (0x1044, 4, 0x33333333),
    ):
        exit_ = vcpu.expect(IoExit)
        assert (exit_.port, exit_.size, exit_.value) == (port, size, value)
    for port in (0x42, 0x1042):
        for size, rax in ((1, 0x11223344556677A1), (2, 0x112233445566A2A1), (4, 0xA4A3A2A1)):
            exit_ = vcpu.expect(IoExit)
            assert (exit_.port, exit_.size) == (port, size)
            exit_.respond(b"\xa1\xa2\xa3\xa4"[:size])
            assert vcpu.sync().args == (rax,)
    vcpu.run_to_done()


STRINGS = """
#include <kvmpy/guest.h>

u8 out[5000];
u8 in[5000] GUEST_SHARED;

void guest_main(void)
{
	const void *from = out;
	void *to = in;
	u64 count;

	for (int i = 0; i < 5000; i++)
		out[i] = i * 7;
	count = 5000;
	asm volatile("rep outsb" : "+S"(from), "+c"(count) : "d"(0x42) : "memory");
	GUEST_SYNC((u64)from - (u64)out, count);
	from = out + 4996;
	count = 3;
	asm volatile("std; rep outsl; cld" : "+S"(from), "+c"(count) : "d"(0x42) : "memory");
	GUEST_SYNC((u64)from - (u64)out, count);
	count = 0;
	asm volatile("rep outsw" : "+S"(from), "+c"(count) : "d"(0x42) : "memory");
	count = 2500;
	asm volatile("rep insw" : "+D"(to), "+c"(count) : "d"(0x42) : "memory");
	GUEST_SYNC((u64)to - (u64)in, count);
	to = in;
	asm volatile("insl" : "+D"(to) : "d"(0x42) : "memory");
	GUEST_SYNC((u64)to - (u64)in);
}
"""


def test_strings(make_vm: MakeVm) -> None:
    """String accesses of any length and direction move their bytes in order, and RSI, RDI and RCX along."""
    vm = make_vm(STRINGS)
    traits = vm.protection.traits
    if not traits.emulator_reads_private and not traits.has_ghcb:
        pytest.skip("KVM emulates string I/O, and its emulator does not read private memory")
    vm.launch()
    vcpu = vm.vcpus[0]
    expected = bytes(number * 7 & 0xFF for number in range(5000))

    def sent() -> tuple[bytes, tuple[int, ...]]:
        data = b""
        while True:
            got = vcpu.next()
            if not isinstance(got, IoExit):
                return data, got.args  # type: ignore[union-attr]
            data += bytes(got.data)

    assert sent() == (expected, (5000, 0))
    backwards = b"".join(expected[address : address + 4] for address in (4996, 4992, 4988))
    assert sent() == (backwards, (4984, 0))
    given = bytes(number * 3 & 0xFF for number in range(5000))
    done = 0
    while True:
        got = vcpu.next()
        if not isinstance(got, IoExit):
            break
        size = got.size * got.count
        got.respond(given[done : done + size])
        done += size
    assert got.args == (5000, 0)  # type: ignore[union-attr]
    assert vm.symbol("in").bytes[:5000] == given
    vcpu.expect(IoExit).respond(b"wxyz")
    assert vcpu.sync().args == (4,)
    assert vm.symbol("in").bytes[:4] == b"wxyz"
    vcpu.run_to_done()


STORES = """
#include <kvmpy/guest.h>

void guest_main(u8 *p)
{
	u64 value = 0x1122334455667788;

	asm volatile("movb %%bl, (%0)" : : "r"(p), "b"(value) : "memory");
	asm volatile("movb %%bh, 1(%0)" : : "a"(p), "b"(value) : "memory");
	asm volatile("movw %%bx, 0x200(%0)" : : "r"(p), "b"(value) : "memory");
	asm volatile("movl %%ebx, (%0, %1, 4)" : : "r"(p), "r"(4ul), "b"(value) : "memory");
	asm volatile("movq %1, %%r9; movq %%r9, (%0)" : : "r"(p), "r"(value) : "memory", "r9");
	asm volatile("movb $0x5a, (%0)" : : "r"(p) : "memory");
	asm volatile("movw $0x1234, (%0)" : : "r"(p) : "memory");
	asm volatile("movl $0x12345678, 8(%0)" : : "r"(p) : "memory");
	asm volatile("movq $-2, 8(%0)" : : "r"(p) : "memory");
	asm volatile("movabs %%al, 0x7000000010" : : "a"(0x77ul) : "memory");
	asm volatile("movb %%al, 0x60000000(%k1)" : : "a"(0x66ul), "r"(0xabc10000000ul) : "memory");
}
"""


def test_mmio_stores(make_vm: MakeVm) -> None:
    """Stores of every size and addressing mode to MMIO give their address and bytes to user space."""
    vm = make_vm(STORES)
    vm.map(MMIO_GVA, MMIO_GPA, 4096, page_size=4096, private=False)
    vm.map(LOW_GVA, MMIO_GPA, 4096, page_size=4096, private=False)
    vm.vcpus[0].set_entry("guest_main", int(MMIO_GVA))
    vm.launch()
    base = int(MMIO_GPA)
    for offset, data in (
        (0, b"\x88"),
        (1, b"\x77"),
        (0x200, b"\x88\x77"),
        (16, b"\x88\x77\x66\x55"),
        (0, bytes.fromhex("8877665544332211")),
        (0, b"\x5a"),
        (0, b"\x34\x12"),
        (8, b"\x78\x56\x34\x12"),
        (8, b"\xfe" + b"\xff" * 7),
        (16, b"\x77"),
        (0, b"\x66"),
    ):
        exit_ = vm.vcpus[0].expect(MmioExit)
        assert (exit_.phys_addr, exit_.is_write, exit_.data) == (base + offset, True, data)
    vm.vcpus[0].run_to_done()


LOADS = """
#include <kvmpy/guest.h>

void guest_main(u8 *p)
{
	u64 value;

	asm volatile("movb (%1), %%bl" : "=b"(value) : "r"(p), "0"(-1ul) : "memory");
	GUEST_SYNC(value);
	asm volatile("movb 1(%1), %%bh" : "=b"(value) : "a"(p), "0"(-1ul) : "memory");
	GUEST_SYNC(value);
	asm volatile("movw (%1), %%bx" : "=b"(value) : "r"(p), "0"(-1ul) : "memory");
	GUEST_SYNC(value);
	asm volatile("movl (%1), %%ebx" : "=b"(value) : "r"(p), "0"(-1ul) : "memory");
	GUEST_SYNC(value);
	asm volatile("movq (%1), %0" : "=r"(value) : "r"(p) : "memory");
	GUEST_SYNC(value);
	asm volatile("movzbl (%1), %k0" : "=r"(value) : "r"(p) : "memory");
	GUEST_SYNC(value);
	asm volatile("movzwq (%1), %0" : "=r"(value) : "r"(p) : "memory");
	GUEST_SYNC(value);
	asm volatile("movsbq (%1), %0" : "=r"(value) : "r"(p) : "memory");
	GUEST_SYNC(value);
	asm volatile("movswl (%1), %k0" : "=r"(value) : "r"(p) : "memory");
	GUEST_SYNC(value);
	asm volatile("movl (%1), %%r11d; movq %%r11, %0" : "=r"(value) : "r"(p) : "memory", "r11");
	GUEST_SYNC(value);
	asm volatile("movabs 0x7000000010, %%al" : "=a"(value) : "0"(0x100ul) : "memory");
	GUEST_SYNC(value);
}
"""


def test_mmio_loads(make_vm: MakeVm) -> None:
    """Loads of every size from MMIO take user space's answer, extended as the instruction says."""
    vm = make_vm(LOADS)
    vm.map(MMIO_GVA, MMIO_GPA, 4096, page_size=4096, private=False)
    vm.vcpus[0].set_entry("guest_main", int(MMIO_GVA))
    vm.launch()
    for size, expected in (
        (1, 0xFFFFFFFFFFFFFF81),
        (1, 0xFFFFFFFFFFFF81FF),
        (2, 0xFFFFFFFFFFFF8281),
        (4, 0x84838281),
        (8, 0x8887868584838281),
        (1, 0x81),
        (2, 0x8281),
        (1, 0xFFFFFFFFFFFFFF81),
        (2, 0xFFFF8281),
        (4, 0x84838281),
        (1, 0x181),
    ):
        exit_ = vm.vcpus[0].expect(MmioExit)
        assert (exit_.is_write, exit_.size) == (False, size)
        exit_.respond(bytes(range(0x81, 0x81 + size)))
        assert vm.vcpus[0].sync().args == (expected,)
    vm.vcpus[0].run_to_done()


REGISTERS = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	struct cpuid_regs r = cpuid(0x80000000, 0);
	u64 dr7, value;
	struct guest_fault fault;

	GUEST_SYNC(r.eax & 0xffff0000, r.eax > 0x80000000);
	fault = rdmsr_safe(0xdead0000, &value);
	GUEST_SYNC(fault.faulted, fault.vector, fault.error_code);
	fault = wrmsr_safe(0xdead0000, 1);
	GUEST_SYNC(fault.faulted, fault.vector, fault.error_code);
	write_dr7(0x400);
	dr7 = read_dr7();
	GUEST_SYNC(dr7);
	wrmsr(0xc0000102, 0x123456789);
	GUEST_SYNC(rdmsr(0xc0000102));
	asm volatile("wbinvd" : : : "memory");
	GUEST_DONE();
}
"""


def test_registers_and_msrs(make_vm: MakeVm) -> None:
    """CPUID, MSRs with and without #GP, DR7 and WBINVD do what they do without a handler."""
    vm = make_vm.start(REGISTERS)
    syncs = [call.args for call in vm.vcpus[0].syncs()]
    assert syncs == [(0x80000000, 1), (1, 13, 0), (1, 13, 0), (0x400,), (0x123456789,)]


NMI = """
#include <kvmpy/guest.h>

u64 nmis GUEST_SHARED;

static void on_nmi(struct exception_frame *frame)
{
	nmis++;
	GUEST_SYNC(100 + nmis, cpuid(0x80000000, 0).eax >> 31);
}

void guest_main(void)
{
	guest_exception_install(NMI_VECTOR, on_nmi);
	for (int i = 0; i < 4; i++)
		GUEST_SYNC(i);
}
"""


def test_an_nmi_between_ucalls(make_vm: MakeVm) -> None:
    """An NMI's handler makes ucalls and CPUID accesses of its own, and the interrupted code goes on."""
    vcpu = make_vm.start(NMI).vcpus[0]
    assert vcpu.sync().args == (0,)
    vcpu.events.nmi()
    assert vcpu.sync().args == (101, 1)
    assert vcpu.sync().args == (1,)
    vcpu.events.nmi()
    assert vcpu.sync().args == (102, 1)
    assert vcpu.sync().args == (2,)
