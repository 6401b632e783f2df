# SPDX-License-Identifier: Apache-2.0
"""The state that an SMI leaves in memory, field by field, and what RSM takes from it."""

from __future__ import annotations

import struct

import pytest

from kvmpy import AGENT, Agent, Gpa, IoExit, MakeVm, Registers, kvm_segment

pytestmark = [
    pytest.mark.protections("none"),
    pytest.mark.requires("KVM_CAP_X86_SMM", "KVM_CAP_MULTI_ADDRESS_SPACE>=2", "cpuid:lm"),
]

SMBASE, SMRAM_SIZE = Gpa(0x30000), 0x10000
ENTRY, IMAGE = SMBASE + 0x8000, SMBASE + 0xFE00
ADDRESS_SPACE = 1
PORT, HANDLER_PORT = 0x20, 0x10
# mov al, 0x5a; out 0x10, al; rsm
HANDLER = bytes.fromhex("b05a e610 0faa")
# out 0x20, al
STOP = b"\xe6\x20"

SEGMENTS = {"es": 0x00, "cs": 0x10, "ss": 0x20, "ds": 0x30, "fs": 0x40, "gs": 0x50, "tr": 0x90}
TABLES = {"gdt": 0x60, "idt": 0x80}
CONTROL = {"efer": 0xD0, "cr4": 0x148, "cr3": 0x150, "cr0": 0x158}
GENERAL = (
    "r15",
    "r14",
    "r13",
    "r12",
    "r11",
    "r10",
    "r9",
    "r8",
    "rdi",
    "rsi",
    "rbp",
    "rsp",
    "rbx",
    "rdx",
    "rcx",
    "rax",
)
FIRST_GENERAL, RFLAGS, RIP = 0x180, 0x170, 0x178
REVISION, BASE = 0xFC, 0x100
# Of a segment's attributes, where a descriptor has bits 16 to 19 of its limit.
LIMIT_BITS = 0xF00
VALUES = {
    name: 0x1111_0000_2222_0000 + 0x0001_0000_0001 * number
    for number, name in enumerate(GENERAL)
    if name != "rsp"
}


class Interrupted:
    """An agent with a register of its own value each, of which an SMI is taken behind an OUT."""

    def __init__(self, make_vm: MakeVm) -> None:
        self.vm = make_vm(AGENT)
        self.vm.memory.write(ENTRY, HANDLER)
        # lifetime: the slot shows guest memory, which the VM keeps.
        self.vm.set_user_memory_region(ADDRESS_SPACE << 16, SMBASE, SMRAM_SIZE, self.vm.memory.hva(SMBASE))
        self.vcpu = self.vm.vcpus[0]
        self.agent = Agent(self.vcpu)
        self.agent.begin(STOP + STOP, ring=None, where=None, **VALUES)
        assert self.vcpu.expect(IoExit).port == PORT
        self.vcpu.complete_io()
        self.regs, self.sregs = self.vcpu.regs.get(), self.vcpu.regs.get_sregs()
        self.vcpu.events.smi()
        assert self.vcpu.expect(IoExit).port == HANDLER_PORT
        self.image = self.vm.memory.shared_view(IMAGE, 0x200)

    def word(self, offset: int) -> int:
        """Return 8 bytes of the image."""
        return int(struct.unpack_from("<Q", self.image, offset)[0])

    def leave(self) -> None:
        """Let the handler end, and the guest come to its second OUT."""
        assert self.vcpu.expect(IoExit).port == PORT

    def end(self) -> Registers:
        """Let the order end."""
        got = self.agent.end()
        assert isinstance(got, Registers)
        return got


def attributes(segment: kvm_segment) -> int:
    """Return what the second word of a descriptor has from bit 8 on, but for the limit."""
    low = segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
    return low | segment.avl << 12 | segment.l << 13 | segment.db << 14 | segment.g << 15


def test_every_field(make_vm: MakeVm) -> None:
    """An SMI stores every register of the interrupted state at its place in the 64-bit image.

    AMD APM volume 2, table 10-1.
    """
    smi = Interrupted(make_vm)
    for number, name in enumerate(GENERAL):
        assert smi.word(FIRST_GENERAL + 8 * number) == getattr(smi.regs, name), name
    assert {name: getattr(smi.regs, name) for name in VALUES} == VALUES
    assert (smi.word(RIP), smi.word(RFLAGS)) == (smi.regs.rip, smi.regs.rflags)
    for name, offset in CONTROL.items():
        assert smi.word(offset) == getattr(smi.sregs, name), name
    for name, offset in SEGMENTS.items():
        segment = getattr(smi.sregs, name)
        selector, bits, limit, base = struct.unpack_from("<HHIQ", smi.image, offset)
        found = (selector, bits & ~LIMIT_BITS, limit, base)
        assert found == (segment.selector, attributes(segment), segment.limit, segment.base), name
    for name, offset in TABLES.items():
        table = getattr(smi.sregs, name)
        assert struct.unpack_from("<IQ", smi.image, offset + 4) == (table.limit, table.base), name
    revision, base = struct.unpack_from("<II", smi.image, REVISION)
    assert (revision, base) == (0x0002_0064, int(SMBASE))
    smi.leave()
    assert smi.end().rbx == VALUES["rbx"]


def test_return_takes_the_image(make_vm: MakeVm) -> None:
    """RSM loads what the handler left in the image, and the rest as it was.

    AMD APM volume 2, 10.3.3.
    """
    smi = Interrupted(make_vm)
    changed = {"rbx": 0x1234_5678_9ABC_DEF0, "r12": 5, "rdi": (1 << 64) - 1}
    for name, value in changed.items():
        struct.pack_into("<Q", smi.image, FIRST_GENERAL + 8 * GENERAL.index(name), value)
    smi.leave()
    end = smi.end()
    assert {name: getattr(end, name) for name in VALUES} == {**VALUES, **changed}


@pytest.mark.parametrize("where", ["handler", "behind"])
def test_state_is_saved_in_the_handler(make_vm: MakeVm, where: str) -> None:
    """A state that was saved in the handler goes on from there, in it or after its RSM.

    Documentation/virt/kvm/api.rst, 4.31 KVM_GET_VCPU_EVENTS (smi.smm).
    """
    smi = Interrupted(make_vm)
    saved = smi.vcpu.save()
    if where == "behind":
        smi.leave()
        smi.vcpu.complete_io()
        assert smi.vcpu.events.get().smi.smm == 0
    smi.vcpu.restore(saved)
    assert smi.vcpu.events.get().smi.smm == 1
    smi.leave()
    end = smi.end()
    assert {name: getattr(end, name) for name in VALUES} == VALUES
    assert smi.vcpu.events.get().smi.smm == 0
