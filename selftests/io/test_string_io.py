# SPDX-License-Identifier: Apache-2.0
"""INS and OUTS with REP: every element arrives once and in order, in however many exits."""

from __future__ import annotations

import pytest

from kvmpy import PAGE_SIZE, GuestVcpu, GuestVm, Gva, IoExit, MakeVm, Ucall

PORT = 0x600
BUFFER = Gva(0x7000_0000)
BACKWARDS = 1

GUEST = """
#include <kvmpy/guest.h>

#define STRING_IO(name, insn, pointer)						\\
static void name(u64 *address, u64 *count, u64 backwards)			\\
{										\\
	if (backwards)								\\
		asm volatile("std; rep " insn "; cld"				\\
			     : "+" pointer(*address), "+c"(*count) : "d"(0x600) : "memory", "cc"); \\
	else									\\
		asm volatile("rep " insn					\\
			     : "+" pointer(*address), "+c"(*count) : "d"(0x600) : "memory"); \\
}

STRING_IO(rep_outsb, "outsb", "S")
STRING_IO(rep_outsw, "outsw", "S")
STRING_IO(rep_outsl, "outsl", "S")
STRING_IO(rep_insb, "insb", "D")
STRING_IO(rep_insw, "insw", "D")
STRING_IO(rep_insl, "insl", "D")

void rep_outs(u64 address, u64 size, u64 count, u64 backwards)
{
	if (size == 1)
		rep_outsb(&address, &count, backwards);
	else if (size == 2)
		rep_outsw(&address, &count, backwards);
	else
		rep_outsl(&address, &count, backwards);
	GUEST_SYNC(address, count);
}

void rep_ins(u64 address, u64 size, u64 count, u64 backwards)
{
	if (size == 1)
		rep_insb(&address, &count, backwards);
	else if (size == 2)
		rep_insw(&address, &count, backwards);
	else
		rep_insl(&address, &count, backwards);
	GUEST_SYNC(address, count);
}

/* Without REP: one element, RCX is no counter. */
void single(u64 address)
{
	u64 from = address, to = address + 64, rcx = 7;

	asm volatile("outsl" : "+S"(from), "+c"(rcx) : "d"(0x600) : "memory");
	asm volatile("insl" : "+D"(to), "+c"(rcx) : "d"(0x600) : "memory");
	GUEST_SYNC(from - address, to - address - 64, rcx);
}
"""


def pattern(size: int) -> bytes:
    """Return *size* bytes in which every four neighbours differ from all others nearby."""
    return bytes((index * 7 + (index >> 8) * 13 + 1) & 0xFF for index in range(size))


def prepare(make_vm: MakeVm, entry: str, *args: int) -> tuple[GuestVm, GuestVcpu]:
    """Return a VM with two shared pages at BUFFER that are not neighbours in physical memory."""
    vm = make_vm(GUEST)
    vm.alloc(PAGE_SIZE, gva=BUFFER + PAGE_SIZE, private=False)
    vm.alloc(PAGE_SIZE, gva=BUFFER, private=False)
    assert vm.gva_to_gpa(BUFFER + PAGE_SIZE) != vm.gva_to_gpa(BUFFER) + PAGE_SIZE
    vcpu = vm.vcpus[0]
    vcpu.set_entry(entry, *args)
    return vm, vcpu


def collect(vcpu: GuestVcpu, size: int) -> tuple[bytes, Ucall]:
    """Run through the exits of an OUTS; return all of its data and the SYNC behind it."""
    data = b""
    while True:
        got = vcpu.next()
        if isinstance(got, Ucall):
            return data, got
        assert isinstance(got, IoExit)
        assert (got.port, got.direction, got.size) == (PORT, "out", size)
        assert len(got.data) == size * got.count
        data += got.data


def feed(vcpu: GuestVcpu, size: int, source: bytes) -> tuple[int, Ucall]:
    """Answer the exits of an INS from *source*; return how many bytes it took and the SYNC behind it."""
    taken = 0
    while True:
        got = vcpu.next()
        if isinstance(got, Ucall):
            return taken, got
        assert isinstance(got, IoExit)
        assert (got.port, got.direction, got.size) == (PORT, "in", size)
        length = size * got.count
        got.respond(source[taken : taken + length])
        taken += length


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.requires("trait:has_string_io")
def test_outs(make_vm: MakeVm, size: int) -> None:
    """REP OUTS hands all elements to user space once, in ascending order, across a page boundary.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_IO ("a packed array"); Intel SDM
    volume 2, OUTS.
    """
    count = 48
    start = BUFFER + PAGE_SIZE - 10 * size
    vm, vcpu = prepare(make_vm, "rep_outs", start, size, count, 0)
    expected = pattern(size * count)
    vm.write(start, expected)
    vm.launch()
    data, end = collect(vcpu, size)
    assert data == expected
    assert end.args == (start + size * count, 0)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.requires("trait:has_string_io")
def test_outs_backwards(make_vm: MakeVm, size: int) -> None:
    """With the direction flag set REP OUTS goes down in memory, each element itself in memory order.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_IO; Intel SDM volume 2, OUTS.
    """
    count = 12
    first = BUFFER + PAGE_SIZE + 5 * size
    vm, vcpu = prepare(make_vm, "rep_outs", first, size, count, BACKWARDS)
    lowest = first - size * (count - 1)
    memory = pattern(size * count)
    vm.write(lowest, memory)
    vm.launch()
    data, end = collect(vcpu, size)
    elements = [memory[at : at + size] for at in range(0, len(memory), size)]
    assert data == b"".join(reversed(elements))
    assert end.args == (first - size * count, 0)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.requires("trait:has_string_io")
def test_ins(make_vm: MakeVm, size: int) -> None:
    """REP INS stores exactly the elements that user space gives, across a page boundary.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_IO; Intel SDM volume 2, INS.
    """
    count = 48
    start = BUFFER + PAGE_SIZE - 10 * size
    vm, vcpu = prepare(make_vm, "rep_ins", start, size, count, 0)
    vm.write(start - 8, b"\xcc" * (size * count + 16))
    source = pattern(size * count)
    vm.launch()
    taken, end = feed(vcpu, size, source)
    assert taken == size * count
    assert vm.read(start - 8, size * count + 16) == b"\xcc" * 8 + source + b"\xcc" * 8
    assert end.args == (start + size * count, 0)


@pytest.mark.requires("trait:has_string_io")
def test_ins_backwards(make_vm: MakeVm) -> None:
    """With the direction flag set REP INS stores its elements at falling addresses.

    Intel SDM volume 2, INS.
    """
    count, size = 12, 2
    first = BUFFER + PAGE_SIZE + 5 * size
    vm, vcpu = prepare(make_vm, "rep_ins", first, size, count, BACKWARDS)
    lowest = first - size * (count - 1)
    source = pattern(size * count)
    vm.launch()
    taken, end = feed(vcpu, size, source)
    assert taken == size * count
    elements = [source[at : at + size] for at in range(0, len(source), size)]
    assert vm.read(lowest, size * count) == b"".join(reversed(elements))
    assert end.args == (first - size * count, 0)


@pytest.mark.parametrize("entry", ["rep_outs", "rep_ins"])
@pytest.mark.requires("trait:has_string_io")
def test_zero_count(make_vm: MakeVm, entry: str) -> None:
    """A REP string instruction with RCX 0 accesses no port and moves nothing.

    Intel SDM volume 2, REP.
    """
    vm, vcpu = prepare(make_vm, entry, BUFFER, 4, 0, 0)
    vm.launch()
    assert vcpu.sync().args == (BUFFER, 0)


@pytest.mark.requires("trait:has_string_io")
def test_single(make_vm: MakeVm) -> None:
    """Without REP one element is moved, whatever RCX holds.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_IO; Intel SDM volume 2, INS and OUTS.
    """
    vm, vcpu = prepare(make_vm, "single", BUFFER)
    vm.write(BUFFER, pattern(8))
    vm.launch()
    out = vcpu.expect(IoExit)
    assert (out.direction, out.size, out.count, out.data) == ("out", 4, 1, pattern(4))
    answer = vcpu.expect(IoExit)
    assert (answer.direction, answer.size, answer.count) == ("in", 4, 1)
    answer.respond(b"wxyz")
    assert vcpu.sync().args == (4, 4, 7)
    assert vm.read(BUFFER + 64, 8) == b"wxyz\0\0\0\0"


@pytest.mark.requires("trait:has_string_io")
def test_ins_ends_at_its_count(make_vm: MakeVm) -> None:
    """No exit of a REP INS asks for more elements than are left of its count, however they are bundled.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_IO (count).
    """
    count = 1500
    vm, vcpu = prepare(make_vm, "rep_ins", BUFFER, 1, count, 0)
    vm.launch()
    left = count
    while left:
        got = vcpu.expect(IoExit)
        assert 1 <= got.count <= left
        got.respond(bytes([got.count & 0xFF]) * got.count)
        left -= got.count
    assert vcpu.sync().args == (BUFFER + count, 0)
