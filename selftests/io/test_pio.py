# SPDX-License-Identifier: Apache-2.0
"""Port I/O of one element: what KVM_EXIT_IO shows and what the guest gets back."""

from __future__ import annotations

import pytest

from kvmpy import KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_OUT_7E_INC_RIP, IoExit, MakeVm, Ucall

PORT = 0x600
FILL = 0x1122_3344_5566_7788

GUEST = """
#include <kvmpy/guest.h>

#define FILL	0x1122334455667788ull

void out_one(u64 port, u64 size)
{
	u64 rax = FILL, rdx = port | 0xabcd0000;

	switch (size) {
	case 1:
		asm volatile("outb %%al, %%dx" : "+a"(rax), "+d"(rdx));
		break;
	case 2:
		asm volatile("outw %%ax, %%dx" : "+a"(rax), "+d"(rdx));
		break;
	case 4:
		asm volatile("outl %%eax, %%dx" : "+a"(rax), "+d"(rdx));
		break;
	}
	GUEST_SYNC(rax, rdx);
}

void in_one(u64 port, u64 size)
{
	u64 rax = FILL, rdx = port | 0xabcd0000;

	switch (size) {
	case 1:
		asm volatile("inb %%dx, %%al" : "+a"(rax), "+d"(rdx));
		break;
	case 2:
		asm volatile("inw %%dx, %%ax" : "+a"(rax), "+d"(rdx));
		break;
	case 4:
		asm volatile("inl %%dx, %%eax" : "+a"(rax), "+d"(rdx));
		break;
	}
	GUEST_SYNC(rax, rdx);
}

void immediate_port(void)
{
	u64 rax = FILL, rdx = 0x1234;

	asm volatile("outw %%ax, $0xa5" : "+a"(rax), "+d"(rdx));
	asm volatile("inw $0xa5, %%ax" : "+a"(rax), "+d"(rdx));
	GUEST_SYNC(rax, rdx);
}

/* Flags that neither IN nor OUT may change: carry, zero, sign, parity, adjust, overflow. */
void flags(void)
{
	u64 before, after_out, after_in;

	asm volatile("pushq $0x8d7; popfq\\n\\t"
		     "pushfq; popq %0\\n\\t"
		     "outb %%al, %%dx\\n\\t"
		     "pushfq; popq %1\\n\\t"
		     "inb %%dx, %%al\\n\\t"
		     "pushfq; popq %2"
		     : "=r"(before), "=r"(after_out), "=r"(after_in)
		     : "d"(0x600) : "rax", "cc", "memory");
	GUEST_SYNC(before, after_out, after_in);
}

__noinline void out_7e(void)
{
	asm volatile(".globl out_7e_at, out_7e_behind\\n"
		     "out_7e_at: outb %%al, $0x7e\\n"
		     "out_7e_behind: nop" : : "a"(0));
	GUEST_DONE();
}
"""


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("port", [0, PORT, 0xFFFF - 3])
def test_out(make_vm: MakeVm, port: int, size: int) -> None:
    """OUT exits with its port, its size, one element, and exactly the bytes that the register part holds.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_IO.
    """
    vcpu = make_vm.start(GUEST, "out_one", port, size).vcpus[0]
    got = vcpu.expect(IoExit)
    assert (got.port, got.direction, got.size, got.count) == (port, "out", size, 1)
    assert got.data == FILL.to_bytes(8, "little")[:size]
    assert vcpu.sync().args == (FILL, port | 0xABCD_0000)


@pytest.mark.parametrize(
    ("size", "answer", "rax"),
    [
        (1, 0xA1, 0x1122_3344_5566_77A1),
        (2, 0xA1B2, 0x1122_3344_5566_A1B2),
        (4, 0xA1B2_C3D4, 0xA1B2_C3D4),
    ],
)
def test_in(make_vm: MakeVm, size: int, answer: int, rax: int) -> None:
    """IN gives the guest what user space left at data_offset, and touches as much of RAX as the CPU would.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_IO; Intel SDM volume 1, 3.4.1.1 for
    the upper half.
    """
    vcpu = make_vm.start(GUEST, "in_one", PORT, size).vcpus[0]
    got = vcpu.expect(IoExit)
    assert (got.port, got.direction, got.size, got.count) == (PORT, "in", size, 1)
    got.respond(answer)
    assert vcpu.sync().args == (rax, PORT | 0xABCD_0000)


def test_immediate_port(make_vm: MakeVm) -> None:
    """The forms with the port in the instruction exit like those with the port in DX, and leave DX alone.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_IO; Intel SDM volume 2, IN and OUT.
    """
    vcpu = make_vm.start(GUEST, "immediate_port").vcpus[0]
    out = vcpu.expect(IoExit)
    assert (out.port, out.direction, out.size, out.value) == (0xA5, "out", 2, FILL & 0xFFFF)
    answer = vcpu.expect(IoExit)
    assert (answer.port, answer.direction, answer.size) == (0xA5, "in", 2)
    answer.respond(0xBEEF)
    assert vcpu.sync().args == (FILL & ~0xFFFF | 0xBEEF, 0x1234)


def test_flags(make_vm: MakeVm) -> None:
    """Neither IN nor OUT changes RFLAGS, however long user space takes over the exit.

    Intel SDM volume 2, IN and OUT, "Flags Affected: None".
    """
    vcpu = make_vm.start(GUEST, "flags").vcpus[0]
    vcpu.expect(IoExit)
    vcpu.expect(IoExit).respond(0xFF)
    before, after_out, after_in = vcpu.sync().args
    assert before & 0x8D5 == 0x8D5
    assert (after_out, after_in) == (before, before)


@pytest.mark.usefixtures("open_registers")
@pytest.mark.requires(f"KVM_CAP_DISABLE_QUIRKS2&{int(KVM_X86_QUIRK_OUT_7E_INC_RIP):#x}")
def test_out_rip_at_exit(make_vm: MakeVm) -> None:
    """Without the port 0x7e quirk RIP stays at the OUT until user space has handled the exit.

    Documentation/virt/kvm/api.rst, 7.31 KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_OUT_7E_INC_RIP.
    """
    vm = make_vm(GUEST)
    vm.enable_cap(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_OUT_7E_INC_RIP)
    vcpu = vm.vcpus[0]
    vcpu.set_entry("out_7e")
    vm.launch()
    assert vcpu.expect(IoExit).port == 0x7E
    assert vcpu.get_regs().rip == vm.program.address_of("out_7e_at")
    vcpu.complete_io()
    assert vcpu.get_regs().rip == vm.program.address_of("out_7e_behind")
    vcpu.run_to_done()


def test_exit_fields_of_the_last_run(make_vm: MakeVm) -> None:
    """Each KVM_RUN reports its own exit: nothing of the previous one is left in the data.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, exit_reason and KVM_EXIT_IO.
    """
    vcpu = make_vm.start("""
#include <kvmpy/guest.h>

void guest_main(void)
{
	outl(0x600, 0xdeadbeef);
	outb(0x601, 0x11);
	GUEST_SYNC(inl(0x602));
	GUEST_SYNC(inb(0x603));
}
""").vcpus[0]
    seen: list[tuple[int, str, int, bytes]] = []
    answers = {0x602: 0x0102_0304, 0x603: 0x55}
    replies: list[int] = []
    while len(replies) < 2:
        got = vcpu.next()
        if isinstance(got, Ucall):
            replies.append(got.args[0])
            continue
        assert isinstance(got, IoExit)
        seen.append((got.port, got.direction, got.size, got.data))
        if got.direction == "in":
            got.respond(answers[got.port])
    assert seen == [
        (0x600, "out", 4, bytes.fromhex("efbeadde")),
        (0x601, "out", 1, b"\x11"),
        (0x602, "in", 4, b""),
        (0x603, "in", 1, b""),
    ]
    assert replies == [0x0102_0304, 0x55]
