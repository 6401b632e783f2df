# SPDX-License-Identifier: Apache-2.0
"""A guest that does as the host orders, an instruction at a time, and tells registers and faults.

``Agent(make_vm(AGENT).vcpus[0])`` gives orders to a VM with the program that ships.  A program of a test's
own does the same where it calls ``guest_agent()`` or, between other work, ``guest_agent_do()``
(kvmpy/agent.h).
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, TypeVar

from kvmpy.core.address import PAGE_SIZE, Gpa, Gva
from kvmpy.guest.errors import GuestError
from kvmpy.guest.ucall import Ucall
from kvmpy.x86.exceptions import Vector

if TYPE_CHECKING:
    from kvmpy.core.exits import Exit
    from kvmpy.guest.vcpu import GuestVcpu
    from kvmpy.guest.vm import GuestVm

AGENT = """
#include <kvmpy/agent.h>

void guest_main(void)
{
	guest_agent();
}
"""

MAX_VCPUS = 64
MAX_CODE = 56
# struct guest_agent_order and guest_agent_reply, which are 256 bytes each in their arrays.
_ORDER = struct.Struct(f"<20Q{MAX_CODE}s")
_REPLY = struct.Struct("<21Q")
_STRIDE = 256
_ROOM_SIZE = PAGE_SIZE // MAX_VCPUS
_RET = b"\xc3"
_UINT64 = (1 << 64) - 1

_Exit = TypeVar("_Exit", bound="Exit")

_LOADS = {1: b"\x8a\x07", 2: b"\x66\x8b\x07", 4: b"\x8b\x07", 8: b"\x48\x8b\x07"}  # mov (%rdi), %rax
_STORES = {1: b"\x88\x1f", 2: b"\x66\x89\x1f", 4: b"\x89\x1f", 8: b"\x48\x89\x1f"}  # mov %rbx, (%rdi)
_INS = {1: b"\xec", 2: b"\x66\xed", 4: b"\xed"}
_OUTS = {1: b"\xee", 2: b"\x66\xef", 4: b"\xef"}
_CR8 = b"\x44"  # REX.R
_ARGUMENTS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")


@dataclass(frozen=True)
class Fault:
    """The exception that ended an order; *address* is CR2 of a page fault, else 0."""

    vector: int
    error_code: int
    address: int = 0
    rip: int = field(default=0, compare=False)

    def __str__(self) -> str:
        known = self.vector in Vector._value2member_map_
        name = Vector(self.vector).name if known else f"vector {self.vector}"
        where = f" at {self.address:#x}" if self.vector == Vector.PF else ""
        return f"#{name}({self.error_code:#x}){where}, RIP {self.rip:#x}"


class AgentFaultError(GuestError):
    """An order that had to succeed ended in an exception: ``.fault``."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        super().__init__(f"the guest's instruction raised {fault}")


@dataclass(frozen=True)
class Registers:
    """The general registers, and RFLAGS, that an order left."""

    rax: int
    rcx: int
    rdx: int
    rbx: int
    rbp: int
    rsi: int
    rdi: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rflags: int

    @property
    def edx_eax(self) -> int:
        """EDX and EAX as one number, as RDMSR and XGETBV return it."""
        return (self.rdx & 0xFFFF_FFFF) << 32 | self.rax & 0xFFFF_FFFF


# Those that an order loads, in the order of struct guest_agent_registers.
_REGISTERS = tuple(each.name for each in fields(Registers) if each.name != "rflags")


class _Rooms:
    """What the agents of a VM share: a page of code for each ring, and which vCPUs wait for orders."""

    def __init__(self, vm: GuestVm) -> None:
        self.pages = {ring: vm.alloc(PAGE_SIZE, user=ring == 3, nx=False) for ring in (0, 3)}
        self.waiting: set[int] = set()


_ROOMS: weakref.WeakKeyDictionary[GuestVm, _Rooms] = weakref.WeakKeyDictionary()


class Agent:
    """Orders to one vCPU whose program runs ``guest_agent()``; the first one launches the VM.

    A method runs its order to the end and returns what came of it.  Methods that may fault return a
    :class:`Fault` in place of the value.  Between :meth:`begin` and :meth:`end` a test takes the exits
    that an order causes: ``agent.begin(code, rdi=gva); vcpu.expect(MmioExit).respond(b"..."); agent.end()``.
    The first agent of a VM is made before its launch, for it allocates the pages that code runs in; further
    ones, of other vCPUs or in another ring, share them.
    """

    def __init__(self, vcpu: GuestVcpu, *, ring: int = 0) -> None:
        """Order *vcpu*, by default in *ring* 0 or 3; ValueError for a vCPU beyond the 64th."""
        if vcpu.index >= MAX_VCPUS:
            raise ValueError(f"an agent's vCPU is one of the first {MAX_VCPUS}, not {vcpu.index}")
        self.vcpu = vcpu
        self.vm = vcpu.vm
        self.ring = ring
        rooms = _ROOMS.get(self.vm)
        if rooms is None:
            rooms = _ROOMS[self.vm] = _Rooms(self.vm)
        self._rooms = rooms

    # Any instruction.

    def begin(
        self, code: bytes, *, ring: int | None = None, where: Gva | None = None, **registers: int
    ) -> None:
        """Write an order that the vCPU carries out at its next run: *code*, or what lies at *where*.

        *registers* by name (``rax=1``), the others are 0.  Code goes on behind itself, or returns by RET.
        ValueError for more than 55 bytes.
        """
        self._order(code, ring, where, registers)

    def _order(self, code: bytes, ring: int | None, where: Gva | None, registers: Mapping[str, int]) -> None:
        if len(code) + len(_RET) > MAX_CODE:
            raise ValueError(f"an order has at most {MAX_CODE - len(_RET)} bytes of code, not {len(code)}")
        self.start()
        chosen = self.ring if ring is None else ring
        unknown = registers.keys() - set(_REGISTERS)
        if unknown:
            raise TypeError(f"no general register is called {', '.join(sorted(unknown))}")
        values = [int(registers.get(name, 0)) & _UINT64 for name in _REGISTERS]
        room = int(self._rooms.pages[chosen]) + self.vcpu.index * _ROOM_SIZE
        body = code + _RET
        order = self._share("guest_agent_orders", _ORDER.size)
        _ORDER.pack_into(order, 0, *values, 0, chosen, int(where or 0), room, len(body), body)

    def start(self) -> None:
        """Launch the VM if it is not, and run the vCPU to where it waits for its first order."""
        if not self.vm.launched:
            self.vm.launch()
        if self.vcpu.index not in self._rooms.waiting:
            self.vcpu.sync()
            self._rooms.waiting.add(self.vcpu.index)

    def _share(self, name: str, size: int) -> memoryview:
        return self.vm.view(self.vm.symbol(name).gva + self.vcpu.index * _STRIDE, size)

    def end(self, on_exit: Callable[[Exit], bool] | None = None) -> Registers | Fault:
        """Run the vCPU to the end of its order; *on_exit* returns True for the exits that may come before."""
        got = self.vcpu.next()
        while not isinstance(got, Ucall):
            if on_exit is None or not on_exit(got):
                raise self.vcpu.unexpected(got, "the end of the order")
            got = self.vcpu.next()
        *registers, faulted, vector, error_code, rip, cr2 = _REPLY.unpack(
            self._share("guest_agent_replies", _REPLY.size)
        )
        return Fault(vector, error_code, cr2, rip) if faulted else Registers(*registers)

    def execute(self, code: bytes, *, ring: int | None = None, **registers: int) -> Registers | Fault:
        """Run instructions and return the registers behind them, or the fault that ended them."""
        self._order(code, ring, None, registers)
        return self.end()

    def value(self, on_exit: Callable[[Exit], bool] | None = None) -> int:
        """Run the vCPU as :meth:`end` does, of an order that must not fault, and return RAX."""
        return self._unless_fault(self.end(on_exit)).rax

    @staticmethod
    def _unless_fault(result: Registers | Fault) -> Registers:
        if isinstance(result, Fault):
            raise AgentFaultError(result)
        return result

    def must(self, code: bytes, *, ring: int | None = None, **registers: int) -> Registers:
        """Run instructions that must not fault; AgentFaultError where they do."""
        return self._unless_fault(self.execute(code, ring=ring, **registers))

    def _value(
        self, take: Callable[[Registers], int], code: bytes, *, ring: int | None = None, **registers: int
    ) -> int | Fault:
        result = self.execute(code, ring=ring, **registers)
        return result if isinstance(result, Fault) else take(result)

    def _fault(self, code: bytes, *, ring: int | None = None, **registers: int) -> Fault | None:
        result = self.execute(code, ring=ring, **registers)
        return result if isinstance(result, Fault) else None

    # Memory.

    def read(self, gva: Gva, size: int = 8, *, ring: int | None = None) -> int | Fault:
        """Read 1, 2, 4 or 8 bytes."""
        mask = (1 << 8 * size) - 1
        return self._value(lambda r: r.rax & mask, _LOADS[size], ring=ring, rdi=int(gva))

    def write(self, gva: Gva, value: int, size: int = 8, *, ring: int | None = None) -> Fault | None:
        """Write 1, 2, 4 or 8 bytes; None when it went well."""
        return self._fault(_STORES[size], ring=ring, rdi=int(gva), rbx=value)

    def begin_read(self, gva: Gva, size: int = 8, *, ring: int | None = None, rax: int = 0) -> None:
        """Order a read that causes an exit: of a device, or of memory that is not there.

        It goes into AL, AX, EAX or RAX, which holds *rax* before.
        """
        self.begin(_LOADS[size], ring=ring, rdi=int(gva), rax=rax)

    def begin_write(self, gva: Gva, value: int, size: int = 8, *, ring: int | None = None) -> None:
        """Order a write that causes an exit."""
        self.begin(_STORES[size], ring=ring, rdi=int(gva), rbx=value)

    def call(self, function: Gva | str, *arguments: int, ring: int | None = None) -> int | Fault:
        """Call a function and return its RAX; :meth:`begin_call` says which."""
        self.begin_call(function, *arguments, ring=ring)
        result = self.end()
        return result if isinstance(result, Fault) else result.rax

    def begin_call(self, function: Gva | str, *arguments: int, ring: int | None = None) -> None:
        """Order a call of a function of the program by its name, or of what lies at an address.

        Up to six arguments, where the System V ABI has them; the fetch itself may fault.
        """
        where = self.vm.symbol(function).gva if isinstance(function, str) else function
        self.begin(b"", ring=ring, where=where, **dict(zip(_ARGUMENTS, arguments, strict=False)))

    # Processor state.

    def rdmsr(self, index: int) -> int | Fault:
        """Read an MSR."""
        self.begin_rdmsr(index)
        result = self.end()
        return result if isinstance(result, Fault) else result.edx_eax

    def begin_rdmsr(self, index: int) -> None:
        """Order a read of an MSR that may cause an exit."""
        self.begin(b"\x0f\x32", rcx=index)

    def wrmsr(self, index: int, value: int) -> Fault | None:
        """Write an MSR."""
        self.begin_wrmsr(index, value)
        result = self.end()
        return result if isinstance(result, Fault) else None

    def begin_wrmsr(self, index: int, value: int) -> None:
        """Order a write of an MSR that may cause an exit."""
        self.begin(b"\x0f\x30", rcx=index, rax=value & 0xFFFF_FFFF, rdx=value >> 32)

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        """Execute CPUID and return EAX, EBX, ECX, EDX."""
        r = self.must(b"\x0f\xa2", rax=leaf, rcx=subleaf)
        return r.rax, r.rbx, r.rcx, r.rdx

    def read_cr(self, number: int) -> int | Fault:
        """Read CR0, CR2, CR3, CR4 or CR8."""
        rex, low = (_CR8, 0) if number == 8 else (b"", number)
        return self._value(lambda r: r.rax, rex + bytes((0x0F, 0x20, 0xC0 | low << 3)))

    def write_cr(self, number: int, value: int) -> Fault | None:
        """Write CR0, CR2, CR3, CR4 or CR8."""
        rex, low = (_CR8, 0) if number == 8 else (b"", number)
        return self._fault(rex + bytes((0x0F, 0x22, 0xC0 | low << 3)), rax=value)

    def change_cr(self, number: int, *, clear: int = 0, put: int = 0) -> Fault | None:
        """Clear and set bits of a control register."""
        value = self.read_cr(number)
        return value if isinstance(value, Fault) else self.write_cr(number, value & ~clear | put)

    def read_dr(self, number: int) -> int | Fault:
        """Read a debug register."""
        return self._value(lambda r: r.rax, bytes((0x0F, 0x21, 0xC0 | number << 3)))

    def write_dr(self, number: int, value: int) -> Fault | None:
        """Write a debug register."""
        return self._fault(bytes((0x0F, 0x23, 0xC0 | number << 3)), rax=value)

    def xgetbv(self, index: int = 0, *, ring: int | None = None) -> int | Fault:
        """Read an extended control register; #UD without CR4.OSXSAVE."""
        return self._value(lambda r: r.edx_eax, b"\x0f\x01\xd0", ring=ring, rcx=index)

    def xsetbv(self, value: int, index: int = 0) -> Fault | None:
        """Write an extended control register."""
        return self._fault(b"\x0f\x01\xd1", rcx=index, rax=value & 0xFFFF_FFFF, rdx=value >> 32)

    def invlpg(self, gva: Gva) -> None:
        """Drop the translation of one address."""
        self.must(b"\x0f\x01\x3f", rdi=int(gva))

    def flush_tlb(self) -> None:
        """Write CR3 with what it holds."""
        self.must(b"\x0f\x20\xd8\x0f\x22\xd8")

    # The hypervisor.

    def begin_in(self, port: int, size: int = 1, *, rax: int = 0) -> None:
        """Order a port read of 1, 2 or 4 bytes into RAX, which holds *rax* before; it causes an exit."""
        self.begin(_INS[size], rdx=port, rax=rax)

    def begin_out(self, port: int, value: int, size: int = 1) -> None:
        """Order a port write of 1, 2 or 4 bytes."""
        self.begin(_OUTS[size], rdx=port, rax=value)

    def begin_hypercall(self, number: int, *arguments: int) -> None:
        """Order a hypercall in KVM's convention, with up to four arguments; RAX has the answer."""
        named = dict(zip(("rbx", "rcx", "rdx", "rsi"), arguments, strict=False))
        self._order(self._hypercall_instruction(), None, None, {"rax": number, **named})

    def hypercall(self, number: int, *arguments: int) -> int:
        """Make a hypercall that KVM answers itself, or a handler of the VM; return the answer, signed."""
        self.begin_hypercall(number, *arguments)
        answer = self.value()
        return answer - (1 << 64) if answer >> 63 else answer

    def convert(self, gpa: Gpa, size: int, *, private: bool) -> int:
        """Ask the host to make pages private or shared (KVM_HC_MAP_GPA_RANGE); 0, or a negative error."""
        return self.hypercall(12, int(gpa), size // PAGE_SIZE, private << 4)

    def _hypercall_instruction(self) -> bytes:
        name = self.cpuid(0)[1]
        return b"\x0f\x01\xd9" if name in (0x6874_7541, 0x6F67_7948) else b"\x0f\x01\xc1"
