# SPDX-License-Identifier: Apache-2.0
"""Port I/O of one element: what KVM_EXIT_IO shows and what the guest gets back."""

from __future__ import annotations

import pytest

from kvmpy import (
    AGENT,
    KVM_CAP_DISABLE_QUIRKS2,
    KVM_X86_QUIRK_OUT_7E_INC_RIP,
    Agent,
    IoExit,
    MakeVm,
    Registers,
    Ucall,
)

PORT = 0x600
FILL = 0x1122_3344_5566_7788

GUEST = """
#include <kvmpy/guest.h>

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
    agent = Agent(make_vm(AGENT).vcpus[0])
    agent.begin_out(port | 0xABCD_0000, FILL, size)
    got = agent.vcpu.expect(IoExit)
    assert (got.port, got.direction, got.size, got.count) == (port, "out", size, 1)
    assert got.data == FILL.to_bytes(8, "little")[:size]
    end = agent.end()
    assert isinstance(end, Registers)
    assert (end.rax, end.rdx) == (FILL, port | 0xABCD_0000)


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
    agent = Agent(make_vm(AGENT).vcpus[0])
    agent.begin_in(PORT | 0xABCD_0000, size, rax=FILL)
    got = agent.vcpu.expect(IoExit)
    assert (got.port, got.direction, got.size, got.count) == (PORT, "in", size, 1)
    got.respond(answer)
    end = agent.end()
    assert isinstance(end, Registers)
    assert (end.rax, end.rdx) == (rax, PORT | 0xABCD_0000)


def test_immediate_port(make_vm: MakeVm) -> None:
    """The forms with the port in the instruction exit like those with the port in DX, and leave DX alone.

    Documentation/virt/kvm/api.rst, 5 The kvm_run structure, KVM_EXIT_IO; Intel SDM volume 2, IN and OUT.
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    agent.begin(b"\x66\xe7\xa5\x66\xe5\xa5", rax=FILL, rdx=0x1234)  # out %ax, $0xa5; in $0xa5, %ax
    out = agent.vcpu.expect(IoExit)
    assert (out.port, out.direction, out.size, out.value) == (0xA5, "out", 2, FILL & 0xFFFF)
    answer = agent.vcpu.expect(IoExit)
    assert (answer.port, answer.direction, answer.size) == (0xA5, "in", 2)
    answer.respond(0xBEEF)
    end = agent.end()
    assert isinstance(end, Registers)
    assert (end.rax, end.rdx) == (FILL & ~0xFFFF | 0xBEEF, 0x1234)


def test_flags(make_vm: MakeVm) -> None:
    """Neither IN nor OUT changes RFLAGS, however long user space takes over the exit.

    Intel SDM volume 2, IN and OUT, "Flags Affected: None".
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    code = (
        b"\x68\xd7\x08\0\0\x9d"  # push $0x8d7; popf: carry, zero, sign, parity, adjust, overflow
        b"\x9c\x41\x58"  # pushf; pop %r8
        b"\xee\x9c\x41\x59"  # out %al, %dx; pushf; pop %r9
        b"\xec\x9c\x41\x5a"  # in %dx, %al; pushf; pop %r10
    )
    agent.begin(code, rdx=PORT)
    agent.vcpu.expect(IoExit)
    agent.vcpu.expect(IoExit).respond(0xFF)
    end = agent.end()
    assert isinstance(end, Registers)
    assert end.r8 & 0x8D5 == 0x8D5
    assert (end.r9, end.r10) == (end.r8, end.r8)


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
    assert vcpu.regs.get().rip == vm.program.address_of("out_7e_at")
    vcpu.complete_io()
    assert vcpu.regs.get().rip == vm.program.address_of("out_7e_behind")
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
