# SPDX-License-Identifier: Apache-2.0
"""Accesses to guest-physical addresses that no memory slot backs."""

from __future__ import annotations

import itertools

import pytest

from kvmpy import (
    AGENT,
    KVM_CAP_EXIT_ON_EMULATION_FAILURE,
    KVM_INTERNAL_ERROR_EMULATION,
    PAGE_SIZE,
    Agent,
    Gpa,
    GuestVcpu,
    GuestVm,
    Gva,
    InternalErrorExit,
    MakeVm,
    MmioExit,
)

# Behind the default memory and below the APICs; nothing backs it.
MMIO_GPA = Gpa(0xD000_0000)
# Three pages in a row: MMIO, MMIO elsewhere in physical space, memory.
MMIO = Gva(0x7000_0000)
FAR_GPA = MMIO_GPA + 0x9000
RAM = MMIO + 2 * PAGE_SIZE
VALUE = 0x8877_6655_4433_2211

GUEST = """
#include <kvmpy/guest.h>

void extend(u64 address)
{
	u64 zero, sign, doubled;

	asm volatile("movzbl (%1), %k0" : "=r"(zero) : "r"(address) : "memory");
	asm volatile("movswq 2(%1), %0" : "=r"(sign) : "r"(address) : "memory");
	asm volatile("movslq 4(%1), %0" : "=r"(doubled) : "r"(address) : "memory");
	GUEST_SYNC(zero, sign, doubled);
}

void modify(u64 address)
{
	u64 flags;

	asm volatile("addl $0x01020304, (%1)\\n\\t"
		     "pushfq; popq %0" : "=r"(flags) : "r"(address) : "memory", "cc");
	GUEST_SYNC(flags);
}

void copy_in(u64 address, u64 to, u64 count)
{
	asm volatile("rep movsl" : "+S"(address), "+D"(to), "+c"(count) : : "memory");
	GUEST_SYNC(address, to, count);
}

void fill(u64 address, u64 count)
{
	u64 to = address;

	asm volatile("rep stosw" : "+D"(to), "+c"(count) : "a"(0x1234) : "memory");
	GUEST_SYNC(to - address, count);
}

void write_vector(u64 address, u64 from)
{
	asm volatile("movdqu (%1), %%xmm3\\n\\t"
		     "movdqu %%xmm3, (%0)" : : "r"(address), "r"(from) : "memory");
	GUEST_SYNC(0);
}

void load_x87(u64 address)
{
	asm volatile(".globl load_x87_at\\n"
		     "load_x87_at: flds (%0)" : : "a"(address) : "memory");
	GUEST_SYNC(0);
}
"""


def map_pages(vm: GuestVm) -> GuestVm:
    """Map the three pages."""
    vm.map(MMIO, MMIO_GPA, PAGE_SIZE, private=False)
    vm.map(MMIO + PAGE_SIZE, FAR_GPA, PAGE_SIZE, private=False)
    vm.alloc(PAGE_SIZE, gva=RAM, private=False)
    return vm


def prepare(make_vm: MakeVm, entry: str, *args: int) -> tuple[GuestVm, GuestVcpu]:
    """Return a VM with the three pages mapped, whose guest starts in *entry*."""
    vm = map_pages(make_vm(GUEST))
    vcpu = vm.vcpus[0]
    vcpu.set_entry(entry, *args)
    return vm, vcpu


def make_agent(make_vm: MakeVm) -> Agent:
    """Return an agent with the three pages mapped."""
    return Agent(map_pages(make_vm(AGENT)).vcpus[0])


def write_exit(vcpu: GuestVcpu) -> tuple[int, bytes]:
    """Expect the exit of a write; return its guest-physical address and data."""
    got = vcpu.expect(MmioExit)
    assert got.is_write
    assert got.size == len(got.data)
    return got.phys_addr, got.data


def read_exit(vcpu: GuestVcpu, answer: bytes) -> int:
    """Expect the exit of a read of as many bytes as *answer* has, give them, return the address."""
    got = vcpu.expect(MmioExit)
    assert (got.is_write, got.size) == (False, len(answer))
    got.respond(answer)
    return got.phys_addr


@pytest.mark.parametrize(
    ("offset", "size"),
    [*itertools.product((0, 8, 0xFF8), (1, 2, 4, 8)), (1, 2), (3, 4), (0x101, 8)],
)
def test_write(make_vm: MakeVm, offset: int, size: int) -> None:
    """A write, aligned or not, is one exit with the address that the guest used, its length and its data in
    memory order.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_MMIO ("a load or store of the
    appropriate width").
    """
    agent = make_agent(make_vm)
    agent.begin_write(MMIO + offset, VALUE, size)
    assert write_exit(agent.vcpu) == (MMIO_GPA + offset, VALUE.to_bytes(8, "little")[:size])
    agent.value()


@pytest.mark.parametrize(
    ("size", "rax"),
    [
        (1, 0x0102_0304_0506_07A1),
        (2, 0x0102_0304_0506_A2A1),
        (4, 0xA4A3_A2A1),
        (8, 0xA8A7_A6A5_A4A3_A2A1),
    ],
)
def test_read(make_vm: MakeVm, size: int, rax: int) -> None:
    """A read gives the guest the first bytes of kvm_run.mmio.data; only a 4-byte one clears the upper half.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_MMIO; Intel SDM volume 1, 3.4.1.1.
    """
    agent = make_agent(make_vm)
    agent.begin_read(MMIO + 0x10, size, rax=0x0102_0304_0506_0708)
    assert read_exit(agent.vcpu, bytes.fromhex("a1a2a3a4a5a6a7a8")[:size]) == MMIO_GPA + 0x10
    assert agent.value() == rax


def test_read_extended(make_vm: MakeVm) -> None:
    """Loads that extend read only their own width and extend what user space gives.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_MMIO; Intel SDM volume 2, MOVZX and
    MOVSX.
    """
    vm, vcpu = prepare(make_vm, "extend", MMIO)
    vm.launch()
    assert read_exit(vcpu, b"\xf1") == MMIO_GPA
    assert read_exit(vcpu, b"\xf2\xf3") == MMIO_GPA + 2
    assert read_exit(vcpu, b"\xf4\xf5\xf6\xf7") == MMIO_GPA + 4
    assert vcpu.sync().args == (0xF1, 0xFFFF_FFFF_FFFF_F3F2, 0xFFFF_FFFF_F7F6_F5F4)


@pytest.mark.requires("trait:kvm_emulates")
def test_write_across_pages(make_vm: MakeVm) -> None:
    """A write across a page boundary exits once for each page, each part with the address of its own page.

    Commit f78146b0f923 ("KVM: Fix page-crossing MMIO").
    """
    agent = make_agent(make_vm)
    agent.begin_write(MMIO + PAGE_SIZE - 3, VALUE, 8)
    assert write_exit(agent.vcpu) == (MMIO_GPA + PAGE_SIZE - 3, bytes.fromhex("112233"))
    assert write_exit(agent.vcpu) == (FAR_GPA, bytes.fromhex("4455667788"))
    agent.value()


@pytest.mark.requires("trait:kvm_emulates")
def test_read_across_pages(make_vm: MakeVm) -> None:
    """A read across a page boundary joins the answers for both pages.

    Commit f78146b0f923 ("KVM: Fix page-crossing MMIO").
    """
    agent = make_agent(make_vm)
    agent.begin_read(MMIO + PAGE_SIZE - 1, 8)
    assert read_exit(agent.vcpu, b"\x01") == MMIO_GPA + PAGE_SIZE - 1
    assert read_exit(agent.vcpu, bytes.fromhex("02030405060708")) == FAR_GPA
    assert agent.value() == 0x0807_0605_0403_0201


@pytest.mark.requires("trait:kvm_emulates")
def test_write_half_in_memory(make_vm: MakeVm) -> None:
    """Of a write that begins outside of memory slots and ends in one, the exit shows only the part outside.

    Commit f78146b0f923 ("KVM: Fix page-crossing MMIO").
    """
    agent = make_agent(make_vm)
    agent.begin_write(RAM - 2, VALUE, 4)
    assert write_exit(agent.vcpu) == (FAR_GPA + PAGE_SIZE - 2, bytes.fromhex("1122"))
    agent.value()
    assert agent.vm.read(RAM, 4) == bytes.fromhex("33440000")


@pytest.mark.requires("trait:kvm_decodes_mmio")
def test_wide_write(make_vm: MakeVm) -> None:
    """A 16-byte store exits in parts of at most 8 bytes that together are the whole, lowest address first.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_MMIO (data has 8 bytes).
    """
    vm, vcpu = prepare(make_vm, "write_vector", MMIO + 0x20, RAM)
    vm.write(RAM, bytes(range(0x30, 0x40)))
    vm.launch()
    data, address = b"", int(MMIO_GPA) + 0x20
    while len(data) < 16:
        where, part = write_exit(vcpu)
        assert where == address + len(data)
        assert 1 <= len(part) <= 8
        data += part
    assert data == bytes(range(0x30, 0x40))
    vcpu.sync()


@pytest.mark.requires("trait:kvm_decodes_mmio")
def test_read_modify_write(make_vm: MakeVm) -> None:
    """An instruction that modifies memory exits for its read, then for its write, and sets its flags.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_MMIO; Intel SDM volume 2, ADD.
    """
    vm, vcpu = prepare(make_vm, "modify", MMIO + 0x40)
    vm.launch()
    assert read_exit(vcpu, (0xFEFD_FCFC).to_bytes(4, "little")) == MMIO_GPA + 0x40
    assert write_exit(vcpu) == (MMIO_GPA + 0x40, bytes(4))
    carry_and_zero = 0x41
    assert vcpu.sync().args[0] & 0x8C1 == carry_and_zero


@pytest.mark.requires("trait:kvm_emulates")
def test_string_from_mmio(make_vm: MakeVm) -> None:
    """REP MOVS from MMIO reads each element once, in order, and stores it in memory.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_MMIO; Intel SDM volume 2, MOVS.
    """
    count = 5
    vm, vcpu = prepare(make_vm, "copy_in", MMIO + 0x80, RAM, count)
    vm.launch()
    elements = [bytes([16 * number + byte for byte in range(4)]) for number in range(count)]
    for number, element in enumerate(elements):
        assert read_exit(vcpu, element) == MMIO_GPA + 0x80 + 4 * number
    assert vcpu.sync().args == (MMIO + 0x80 + 4 * count, RAM + 4 * count, 0)
    assert vm.read(RAM, 4 * count + 4) == b"".join(elements) + bytes(4)


@pytest.mark.requires("trait:has_string_io")
def test_string_to_mmio(make_vm: MakeVm) -> None:
    """REP STOS to MMIO writes each element once, in order.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_MMIO; Intel SDM volume 2, STOS.
    """
    vm, vcpu = prepare(make_vm, "fill", MMIO, 4)
    vm.launch()
    writes = [write_exit(vcpu) for _ in range(4)]
    assert writes == [(MMIO_GPA + 2 * number, b"\x34\x12") for number in range(4)]
    assert vcpu.sync().args == (8, 0)


@pytest.mark.usefixtures("open_registers")
@pytest.mark.requires("KVM_CAP_EXIT_ON_EMULATION_FAILURE")
def test_emulation_failure(make_vm: MakeVm) -> None:
    """An MMIO instruction that KVM cannot emulate exits as emulation failure, with its bytes.

    Documentation/virt/kvm/api.rst, 7.27 KVM_CAP_EXIT_ON_EMULATION_FAILURE.
    """
    vm, vcpu = prepare(make_vm, "load_x87", MMIO)
    vm.enable_cap(KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)
    vm.launch()
    got = vcpu.expect(InternalErrorExit)
    assert got.suberror == KVM_INTERNAL_ERROR_EMULATION
    assert got.instruction[:2] == b"\xd9\x00"
    regs = vcpu.regs.get()
    assert regs.rip == vm.program.address_of("load_x87_at")
    regs.rip += 2
    vcpu.regs.set(regs)
    assert vcpu.sync().args == (0,)
    vcpu.run_to_done()
