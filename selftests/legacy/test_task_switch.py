# SPDX-License-Identifier: Apache-2.0
"""Hardware task switches, which KVM does itself (AMD APM volume 2, 12.3 and 12.4).

KVM's side: task_interception() in arch/x86/kvm/svm/svm.c, emulator_task_switch() in arch/x86/kvm/emulate.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest

from kvmpy import CR0, Ended, Fault, GuestProgram, Gva, Legacy, LegacyMode, Vector
from kvmpy.guest import legacy as places
from kvmpy.x86 import segments
from kvmpy.x86.segments import TSS16_FIELDS, TSS32_FIELDS, TSS_SELECTOR
from selftests.legacy.conftest import ON_THE_CPU, LegacyMaker

pytestmark = [pytest.mark.protections("none"), ON_THE_CPU]

NEW = places.FREE_SELECTOR
NEW_TSS = places.ROOM
NEW_STACK = 0xF800
VECTOR = 0x50
NT, CF = 1 << 14, 1

ASSEMBLY = """
	.section .low, "awx", @progbits
	.code32
jump:		ljmp $0x68, $0
after_jump:	ret
call_task:	lcall $0x68, $0
		ret
interrupt:	int $0x50
		ret
bad_selector:	movl $0xfff8, %eax
bad_load:	movw %ax, %es
		ret
task_return:	pushfl; popl (%esp)
		ret
come_back:	incl %ecx
		iretl
		jmp come_back
jump_back:	ljmp $0x30, $0
drop_error:	popl %edx
		addl $7, 0xb020
		iretl
.code16
come_back16:	incw %cx
		iretw
"""
TASK = {
    "eip": places.END, "eflags": 2 | CF, "eax": 0x11, "ecx": 0x22, "edx": 0x33, "ebx": 0x44, "esp": NEW_STACK,
    "ebp": 0x55, "esi": 0x66, "edi": 0x77, "cs": segments.KERNEL_CS32, "ss": segments.KERNEL_DS,
    "ds": segments.KERNEL_DS, "es": segments.USER_DS, "fs": segments.KERNEL_DS16, "gs": 0,
}  # fmt: skip
GENERAL = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")


@dataclass
class Tasks:
    """A vCPU in 32-bit protected mode whose GDT has a second TSS."""

    cpu: Legacy

    def put(self, *, kind: int = segments.TSS_AVAILABLE, dpl: int = 0, **fields: int) -> None:
        """Write the second task's TSS and its descriptor."""
        cr3 = 0 if self.cpu.tables is None else int(self.cpu.tables.cr3)
        data = segments.tss32(**{"cr3": cr3, **TASK, **fields})
        self.cpu.view(NEW_TSS, len(data))[:] = data
        self.cpu.describe(NEW, places.system(NEW_TSS, segments.TSS_SIZE - 1, kind, dpl))

    def symbol(self, name: str) -> int:
        """Return the address of a label."""
        return int(self.cpu.vm.program.address_of(name))

    def old(self, name: str) -> int:
        """Return a field of the first task's TSS."""
        return int(struct.unpack_from("<I", self.cpu.tss, TSS32_FIELDS[name])[0])

    def new(self, name: str) -> int:
        """Return a field of the second task's TSS."""
        return int(struct.unpack_from("<I", self.cpu.view(NEW_TSS, 104), TSS32_FIELDS[name])[0])

    def busy(self) -> tuple[bool, bool]:
        """Tell which of the two descriptors is busy."""
        first, second = (self.cpu.described(selector).type for selector in (TSS_SELECTOR, NEW))
        return bool(first & 2), bool(second & 2)


@pytest.fixture
def tasks(legacy: LegacyMaker) -> Tasks:
    """A vCPU without paging with two tasks."""
    tasks = Tasks(legacy(LegacyMode.PROTECTED32, GuestProgram.from_asm(ASSEMBLY, name="tasks")))
    tasks.put()
    return tasks


def entered(ended: Ended) -> None:
    """Check that the second task's state is the vCPU's."""
    assert ended.fault is None
    sregs = ended.sregs
    assert {name: ended[name] for name in GENERAL} == {name: TASK[name] for name in GENERAL}
    selectors = {name: getattr(sregs, name).selector for name in ("cs", "ss", "ds", "es", "fs", "gs")}
    assert selectors == {name: TASK[name] for name in selectors}
    assert (sregs.tr.selector, sregs.tr.base, sregs.tr.type) == (NEW, NEW_TSS, segments.TSS_BUSY)
    assert (sregs.es.dpl, sregs.fs.limit) == (3, 0xFFFF)
    assert sregs.cr0 & CR0.TS, "a task switch sets CR0.TS"


def test_jmp(tasks: Tasks) -> None:
    """JMP to a TSS loads the new task, saves the old one, and moves the busy bit; nothing links them."""
    ended = tasks.cpu.run("jump", eax=1, ebx=2, esi=3, edi=4, ebp=5, edx=6, ecx=7)
    entered(ended)
    assert ended.regs.rflags & (NT | CF) == CF
    assert tasks.busy() == (False, True)
    saved = {name: tasks.old(name) for name in GENERAL}
    assert saved == {
        "eax": 1, "ebx": 2, "esi": 3, "edi": 4, "ebp": 5, "edx": 6, "ecx": 7, "esp": places.STACK_TOP - 4
    }  # fmt: skip
    assert tasks.old("eip") == tasks.symbol("after_jump")
    assert (tasks.old("cs"), tasks.old("ss"), tasks.old("eflags")) == (0x40, 0x10, 2)
    assert tasks.new("link") == 0


def test_call(tasks: Tasks) -> None:
    """CALL of a TSS sets NT and the link, and leaves both tasks busy."""
    ended = tasks.cpu.run("call_task")
    entered(ended)
    assert ended.regs.rflags & NT
    assert (tasks.new("link"), tasks.busy()) == (TSS_SELECTOR, (True, True))


def test_call_and_iret(tasks: Tasks) -> None:
    """IRET with NT goes back to the task of the link, which goes on with its registers; NT is clear."""
    tasks.put(eip=tasks.symbol("come_back"))
    ended = tasks.cpu.run("call_task", eax=0x1234, ebx=0x5678, ecx=9)
    assert ended.fault is None
    assert (ended["eax"], ended["ebx"], ended["ecx"]) == (0x1234, 0x5678, 9)
    assert (ended["esp"], ended.cs, ended.sregs.tr.selector) == (places.STACK_TOP, 0x40, TSS_SELECTOR)
    assert not ended.regs.rflags & NT
    assert tasks.busy() == (True, False)
    assert tasks.new("ecx") == TASK["ecx"] + 1
    assert not tasks.new("eflags") & NT, "IRET clears NT in the task that it leaves"
    assert tasks.new("eip") == tasks.symbol("come_back") + 2


def test_interrupt(tasks: Tasks) -> None:
    """An interrupt through a task gate is a call of its task, with the return address behind INT."""
    tasks.cpu.set_gate(VECTOR, segments.gate32(0, NEW, segments.TASK_GATE))
    ended = tasks.cpu.run("interrupt")
    entered(ended)
    assert ended.regs.rflags & NT
    assert (tasks.new("link"), tasks.busy()) == (TSS_SELECTOR, (True, True))
    assert tasks.old("eip") == tasks.symbol("interrupt") + 2


def test_exception(tasks: Tasks) -> None:
    """An exception through a task gate pushes its error code on the new task's stack, and leaves EIP at the
    instruction.
    """
    tasks.cpu.set_gate(Vector.GP, segments.gate32(0, NEW, segments.TASK_GATE))
    ended = tasks.cpu.run("bad_selector")
    assert ended.fault is None
    assert ended["esp"] == NEW_STACK - 4
    assert bytes(tasks.cpu.view(NEW_STACK - 4, 4)) == (0xFFF8).to_bytes(4, "little")
    assert tasks.old("eip") == tasks.symbol("bad_load")


def test_jmp_there_and_back(tasks: Tasks) -> None:
    """Two tasks that JMP to each other find themselves where they left off."""
    tasks.put(eip=tasks.symbol("jump_back"))
    ended = tasks.cpu.run("jump", eax=0x42)
    assert ended.fault is None
    assert (ended["eax"], ended["esp"]) == (0x42, places.STACK_TOP)
    assert tasks.busy() == (True, False)
    assert tasks.new("eip") == tasks.symbol("jump_back") + 7


def test_trap_bit(tasks: Tasks) -> None:
    """The T bit of the new TSS raises #DB with DR6.BT before the task's first instruction."""
    tasks.put(trap=segments.TSS_SIZE << 16 | 1)
    ended = tasks.cpu.run("jump")
    assert ended.fault == Fault(Vector.DB, 0)
    assert ended["eip"] == TASK["eip"]
    assert tasks.cpu.vcpu.debug.get_regs().dr6 & 1 << 15


def test_16_bit_task(tasks: Tasks) -> None:
    """A switch to a 16-bit TSS loads 16-bit registers; IRET goes back to the 32-bit task."""
    cpu = tasks.cpu
    data = segments.tss16(
        ip=tasks.symbol("come_back16"), flags=2, cx=0x7F, sp=NEW_STACK, cs=segments.KERNEL_CS16,
        ss=segments.KERNEL_DS16, ds=segments.KERNEL_DS16, es=segments.KERNEL_DS16,
    )  # fmt: skip
    cpu.view(NEW_TSS, len(data))[:] = data
    cpu.describe(NEW, places.system(NEW_TSS, len(data) - 1, segments.TSS16_AVAILABLE))
    ended = cpu.run("call_task", ecx=0x12345678)
    assert ended.fault is None
    assert ended["ecx"] == 0x12345678
    saved = struct.unpack_from("<H", cpu.view(NEW_TSS, 44), TSS16_FIELDS["cx"])[0]
    assert (saved, tasks.busy()) == (0x80, (True, False))


def test_cr3(legacy: LegacyMaker) -> None:
    """A task switch loads CR3 from the new TSS, with paging on."""
    tasks = Tasks(legacy(LegacyMode.PROTECTED32, GuestProgram.from_asm(ASSEMBLY, name="tasks"), levels=2))
    vm, first = tasks.cpu.vm, tasks.cpu.tables
    assert first is not None
    second = type(first)(vm.memory, vm.allocator, levels=2)
    second.map(Gva(0), first.translate(Gva(0)), 1 << 20, page_size=4096, user=True)
    tasks.put(cr3=int(second.cr3))
    ended = tasks.cpu.run("jump")
    entered(ended)
    assert ended.sregs.cr3 == int(second.cr3)


@dataclass(frozen=True)
class Wrong:
    """What is wrong with the second task, and the exception of JMP; *ran* says that the switch was done."""

    vector: Vector
    error_code: int
    ran: bool = False
    kind: int = segments.TSS_AVAILABLE
    present: int = 1
    limit: int = segments.TSS_SIZE - 1
    fields: tuple[tuple[str, int], ...] = ()
    label: str = "jump"


WRONG = {
    "busy": Wrong(Vector.GP, NEW, kind=segments.TSS_BUSY),
    "not a TSS": Wrong(Vector.GP, NEW, kind=0x2),
    "not present": Wrong(Vector.NP, NEW, present=0),
    "short": Wrong(Vector.TS, NEW, limit=0x66),
    "not present CS": Wrong(Vector.TS, 0xFF8, ran=True, fields=(("cs", 0xFF8),)),
    "CS is data": Wrong(Vector.TS, segments.KERNEL_DS, ran=True, fields=(("cs", segments.KERNEL_DS),)),
    "SS is code": Wrong(Vector.TS, segments.KERNEL_CS32, ran=True, fields=(("ss", segments.KERNEL_CS32),)),
    "null SS": Wrong(Vector.TS, 0, ran=True, fields=(("ss", 0),)),
    "SS of ring 3": Wrong(Vector.TS, segments.USER_DS & ~3, ran=True, fields=(("ss", segments.USER_DS),)),
    "DS beyond the GDT": Wrong(Vector.TS, 0xFFF8, ran=True, fields=(("ds", 0xFFF8),)),
    "busy call": Wrong(Vector.GP, NEW, kind=segments.TSS_BUSY, label="call_task"),
    "short call": Wrong(Vector.TS, NEW, limit=0x66, label="call_task"),
}


@pytest.mark.parametrize("name", WRONG)
def test_faults(tasks: Tasks, name: str) -> None:
    """A bad descriptor faults in the old task, bad content of the TSS in the new one."""
    wrong = WRONG[name]
    tasks.put(**dict(wrong.fields))
    system = places.system(NEW_TSS, wrong.limit, wrong.kind)._replace(present=wrong.present)
    tasks.cpu.describe(NEW, system)
    ended = tasks.cpu.run(wrong.label, eax=0x99)
    assert ended.fault == Fault(wrong.vector, wrong.error_code)
    assert ended.sregs.tr.selector == (NEW if wrong.ran else TSS_SELECTOR)
    assert ended["eip"] == (TASK["eip"] if wrong.ran else tasks.symbol(wrong.label))
    assert ended["eax"] == (TASK["eax"] if wrong.ran else 0x99)
    if not wrong.ran:
        assert tasks.cpu.described(NEW) == system, "a refused switch leaves the descriptor alone"


@pytest.mark.parametrize("link", [NEW, 0, 0xFF8, segments.KERNEL_DS], ids=hex)
def test_iret_to_what_is_no_busy_task(tasks: Tasks, link: int) -> None:
    """IRET with NT set and a link to anything but a busy TSS is #TS with the link's selector."""
    struct.pack_into("<I", tasks.cpu.tss, 0, link)
    ended = tasks.cpu.run(b"\xcf", flags=2 | NT)
    assert ended.fault == Fault(Vector.TS, link)
    assert ended["eip"] == places.CODE


@pytest.mark.parametrize("how", ["jump", "gate"])
def test_privilege(legacy: LegacyMaker, how: str) -> None:
    """Ring 3 may switch to a TSS, or use a task gate, of DPL 3 only."""
    tasks = Tasks(legacy(LegacyMode.PROTECTED32, GuestProgram.from_asm(ASSEMBLY, name="tasks"), ring=3))
    label, error = ("jump", NEW) if how == "jump" else ("interrupt", VECTOR * 8 + 2)
    for dpl in (0, 3):
        tasks.cpu.reset()
        tasks.put(dpl=dpl)
        tasks.cpu.set_gate(VECTOR, segments.gate32(0, NEW, segments.TASK_GATE, dpl=dpl))
        ended = tasks.cpu.run(label)
        if dpl:
            entered(ended)
        else:
            assert ended.fault == Fault(Vector.GP, error)
