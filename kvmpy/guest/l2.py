# SPDX-License-Identifier: Apache-2.0
"""A nested guest of a vCPU: its VMCB and permission maps, nested page tables, and orders to run it.

A program of a test's own finds it with ``guest_l2()`` (kvmpy/svm.h).  ``L2(make_vm(L1).vcpus[0])`` runs code
of the host's in it, with a program that ships.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from kvmpy.core.address import PAGE_SIZE, Gpa, Gva
from kvmpy.guest.agent import Agent, AgentFaultError, Fault
from kvmpy.guest.errors import LaunchError
from kvmpy.guest.vm import APIC_DEFAULT_GPA
from kvmpy.x86.paging import PageTables
from kvmpy.x86.svm_exits import SvmExit
from kvmpy.x86.vmcb import IOPM_SIZE, MSRPM_SIZE, VMCB_SIZE, Vmcb, exit_name, exit_words, msrpm_bit

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmpy.core.exits import Exit
    from kvmpy.guest.vcpu import GuestVcpu

L1 = """
#include <kvmpy/agent.h>
#include <kvmpy/svm.h>

/* What the host calls. */
void *const l1_calls[] = { l2_reset, l2_run, l2_try };

void guest_main(void)
{
	guest_agent();
}
"""

STACK_SIZE = 4 * PAGE_SIZE
VMMCALL = b"\x0f\x01\xd9"
# struct guest_l2, of which the host writes the first nine words; the general registers follow.
_HEAD = struct.Struct("<9Q")
_REGISTERS = ("rcx", "rdx", "rbx", "rbp", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))
_REGS = struct.Struct("<14Q")
_STACK_TOP = _HEAD.size + _REGS.size
_FUNCTION = struct.Struct("<2Q")
_TRIED = struct.Struct("<2Q3Q2B6x")
_CONTEXT = _STACK_TOP + 8 + _FUNCTION.size + _TRIED.size
_CONTEXT_SIZE = 9 * 8
_UINT64 = (1 << 64) - 1


class VmExit(NamedTuple):
    """An exit of L2 to L1: EXITCODE, EXITINFO1 and EXITINFO2."""

    code: int
    info1: int
    info2: int

    def __str__(self) -> str:
        words = exit_words(*self)
        return exit_name(self.code) + (f" ({words})" if words else "")


class L2:
    """The nested guest of *vcpu*, made before launch: pages for its VMCB, permission maps, stack and code.

    With *npt* it runs on nested page tables, :attr:`npt`, which give it all of L1's memory and the local APIC
    at the same addresses, with and without the encryption bit; else it runs on L1's own tables.  *private*
    says whether VMCB, permission maps and nested tables are private pages: by default where KVM can read
    those and addresses carry an encryption bit.

    The first order launches the VM and lets L1 prepare its VMCB.  :attr:`vmcb` is the page itself.
    """

    def __init__(self, vcpu: GuestVcpu, *, npt: bool = False, private: bool | None = None) -> None:
        vm = vcpu.vm
        if vm.launched:
            raise LaunchError(f"{vcpu.name}: an L2 is made before launch()")
        self.vcpu, self.vm = vcpu, vm
        self.agent = Agent(vcpu)
        hidden = vm.encryption is not None and vm.protection.traits.host_sees_private
        self._private = hidden if private is None else private
        self.vmcb_gva = self._alloc(VMCB_SIZE)
        self.msrpm_gva = self._alloc(MSRPM_SIZE)
        self.iopm_gva = self._alloc(IOPM_SIZE)
        self.code = vm.alloc(PAGE_SIZE, nx=False)
        self._stack = vm.alloc(STACK_SIZE)
        self.npt: PageTables | None = self._tables() if npt else None
        self.gva = vm.alloc(PAGE_SIZE, private=False)
        self._state = vm.view(self.gva, PAGE_SIZE)
        self._state[: _HEAD.size] = _HEAD.pack(
            int(self.vmcb_gva), self.pa(self.vmcb_gva), self.pa(self._alloc(PAGE_SIZE)),
            self.pa(self._alloc(PAGE_SIZE)), int(self.msrpm_gva), int(self.iopm_gva), self.pa(self.msrpm_gva),
            self.pa(self.iopm_gva), 0 if self.npt is None else int(self.npt.cr3),
        )  # fmt: skip
        struct.pack_into("<Q", self._state, _STACK_TOP, int(self._stack) + STACK_SIZE)
        self.vmcb = Vmcb(vm.view(self.vmcb_gva, VMCB_SIZE))
        self._maps = vm.view(self.msrpm_gva, MSRPM_SIZE), vm.view(self.iopm_gva, IOPM_SIZE)
        self._touched: set[tuple[int, int]] = set()
        self._fresh = self._fresh_context = b""
        vcpu.l2_gva = self.gva

    def _alloc(self, size: int) -> Gva:
        # In one piece, as the processor takes the physical address of the first page.
        vm = self.vm
        gpa = vm.allocator.alloc(size // PAGE_SIZE, private=self._private)
        gva = vm.reserve(size)
        vm.map(gva, gpa, size, page_size=PAGE_SIZE, nx=True)
        return gva

    def _tables(self) -> PageTables:
        vm, bit = self.vm, self.vm.encryption
        tables = PageTables(vm.memory, vm.allocator, encryption=bit, private_tables=self._private)
        for segment in vm.memory.segments():
            for private in (False, True) if bit is not None else (None,):
                where = Gva(int(vm.to_raw(segment.gpa, private)))
                tables.map(where, segment.gpa, segment.size, user=True, private=private)
        apic = Gva(int(APIC_DEFAULT_GPA))
        tables.map(apic, APIC_DEFAULT_GPA, PAGE_SIZE, user=True, private=None if bit is None else False)
        return tables

    def pa(self, gva: Gva) -> int:
        """Return the physical address of *gva* as the processor takes it, with the encryption bit."""
        return int(self.vm.to_raw(self.vm.gva_to_gpa(gva)))

    # What L1 lets pass.

    def intercept(self, *exits: int, on: bool = True) -> None:
        """Set or clear intercepts by the codes of their exits."""
        self.vmcb.intercept(*exits, on=on)

    def intercept_msr(self, msr: int, *, read: bool = False, write: bool = False) -> None:
        """Set the two bits of an MSR in the permission map, and let L1 intercept by the map."""
        bit = msrpm_bit(msr)
        self._set(0, bit // 8, 3 << bit % 8, (read | write << 1) << bit % 8)
        self.intercept(SvmExit.MSR)

    def intercept_port(self, port: int, *, on: bool = True) -> None:
        """Set or clear the bit of a port in the permission map, and let L1 intercept by the map."""
        self._set(1, port // 8, 1 << port % 8, on << port % 8)
        self.intercept(SvmExit.IOIO)

    def _set(self, which: int, at: int, clear: int, put: int) -> None:
        self._maps[which][at] = self._maps[which][at] & ~clear | put
        self._touched.add((which, at))

    # Running.

    def reset(self) -> None:
        """Bring VMCB, registers and permission maps back to what L1 prepares first: see ``l2_reset()``."""
        if not self._fresh:
            self._order("l2_reset", int(self.vm.symbol("l2_try").gva))
            self._fresh = bytes(self.vmcb.page)
            self._fresh_context = bytes(self._state[_CONTEXT : _CONTEXT + _CONTEXT_SIZE])
        self.vmcb.page[:] = self._fresh  # type: ignore[index]
        self._state[_CONTEXT : _CONTEXT + _CONTEXT_SIZE] = self._fresh_context
        self.registers()
        for which, at in self._touched:
            self._maps[which][at] = 0
        self._touched.clear()

    def _order(self, function: str, *arguments: int) -> None:
        result = self.agent.call(function, int(self.gva), *arguments)
        if isinstance(result, Fault):
            raise AgentFaultError(result)

    def registers(self, **values: int) -> None:
        """Set L2's general registers, those that are not given to 0; RSP stays."""
        unknown = values.keys() - {"rax", *_REGISTERS}
        if unknown:
            raise TypeError(f"no general register is called {', '.join(sorted(unknown))}")
        self.vmcb["rax"] = values.get("rax", 0) & _UINT64
        words = (values.get(name, 0) & _UINT64 for name in _REGISTERS)
        self._state[_HEAD.size : _STACK_TOP] = _REGS.pack(*words)

    def register(self, name: str) -> int:
        """Return a general register as the last exit left it."""
        if name in ("rax", "rsp"):
            return self.vmcb[name]
        return int(_REGS.unpack(self._state[_HEAD.size : _STACK_TOP])[_REGISTERS.index(name)])

    def load(self, code: bytes, **registers: int) -> None:
        """Let L2 stand before *code*, which VMMCALL follows, with *registers*; nothing else changes.

        ValueError for more than a page.
        """
        if not self._fresh:
            self.reset()
        body = code + VMMCALL
        if len(body) > PAGE_SIZE:
            raise ValueError(f"{len(code)} bytes of code: at most {PAGE_SIZE - len(VMMCALL)}")
        self.vm.write(self.code, body)
        self.vmcb["rip"] = int(self.code)
        self.vmcb["rsp"] = int(self._stack) + STACK_SIZE - 64
        self.registers(**registers)

    def run(self, code: bytes, **registers: int) -> VmExit:
        """Run *code* in L2 to its next exit; VMMCALL follows it."""
        self.load(code, **registers)
        return self.resume()

    def resume(self, on_exit: Callable[[Exit], bool] | None = None) -> VmExit:
        """Run L2 from where it stands to its next exit to L1.

        *on_exit* returns True for exits to the host that may come before.
        """
        self.begin()
        return self.end(on_exit)

    def begin(self) -> None:
        """Order L1 to run L2 at the vCPU's next run: the test takes exits to the host, then :meth:`end`."""
        if not self._fresh:
            self.reset()
        self.agent.begin_call("l2_run", int(self.gva))

    def end(self, on_exit: Callable[[Exit], bool] | None = None) -> VmExit:
        """Run to the exit of L2 to L1 and return it; AgentFaultError where L1 had an exception."""
        self.agent.value(on_exit)
        return self.last_exit

    @property
    def last_exit(self) -> VmExit:
        """What the VMCB says of the last exit."""
        return VmExit(self.vmcb["exit_code"], self.vmcb["exit_info_1"], self.vmcb["exit_info_2"])

    @property
    def offset(self) -> int:
        """How many bytes L2 stands behind the beginning of its code."""
        return self.vmcb["rip"] - int(self.code)

    def attempt(
        self, code: bytes | Gva, arg: int = 0, *, on_exit: Callable[[Exit], bool] | None = None
    ) -> VmExit:
        """Let L2 call *code*, which goes on behind itself, with *arg* in RDI; an exception in it ends it.

        VMMCALL is the exit at its end, and :attr:`fault` the exception then.  *on_exit* as :meth:`resume`.
        """
        if not self._fresh:
            self.reset()
        if isinstance(code, bytes):
            self.vm.write(self.code, code + b"\xc3")
        where = self.code if isinstance(code, bytes) else code
        self._state[_STACK_TOP + 8 : _STACK_TOP + 24] = _FUNCTION.pack(int(where), arg & _UINT64)
        self.vmcb["rip"] = int(self.vm.symbol("l2_try").gva)
        self.vmcb["rsp"] = int(self._stack) + STACK_SIZE - 8
        return self.resume(on_exit)

    @property
    def fault(self) -> Fault | None:
        """The exception that ended the last :meth:`attempt`, None where it returned."""
        returned, _, error_code, rip, cr2, vector, _ = _TRIED.unpack_from(self._state, _STACK_TOP + 24)
        return None if returned & 1 else Fault(vector, error_code, cr2, rip)

    @property
    def value(self) -> int:
        """RAX of the last :meth:`attempt` that returned."""
        return int(_TRIED.unpack_from(self._state, _STACK_TOP + 24)[1])

    def gpa(self, gva: Gva) -> Gpa:
        """Return where L1 has *gva*, which L2 has at the same address."""
        return self.vm.gva_to_gpa(gva)
