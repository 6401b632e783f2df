# SPDX-License-Identifier: Apache-2.0
"""What KVM_RUN came back with: one frozen class for every exit reason, unknown reasons included.

The fields are the kernel's (Documentation/virt/kvm/api.rst, "The kvm_run structure").  Exits that expect an
answer have a ``respond`` method; it writes into kvm_run and must be called before the vCPU runs again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kvmpy.uapi import ffi
from kvmpy.uapi.constants import ExitReason, InternalError, InternalErrorFlag, IoDirection, MemoryFaultFlag
from kvmpy.uapi.constants import HypervExit as HypervType
from kvmpy.uapi.constants import XenExit as XenType

_HAS_INSTRUCTION = InternalErrorFlag.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES

CData = Any  # a cffi pointer to struct kvm_run; cdata has no static type


@dataclass(frozen=True)
class Exit:
    """An exit to user space; ``errno`` is that of KVM_RUN (0 where it succeeded, EFAULT for memory fault)."""

    reason: ClassVar[ExitReason]
    run: CData = field(repr=False, compare=False, kw_only=True, default=None)
    errno: int = field(kw_only=True, default=0)

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        """Make the exit from *run*, a ``struct kvm_run *``."""
        return cls(run=run, errno=errno)


@dataclass(frozen=True)
class UnknownExit(Exit):
    """A reason without a class of its own (of another architecture, or newer than this version of kvmpy).

    *number* is the reason, *payload* the first 32 bytes of what kvm_run holds for it.
    """

    number: int
    payload: bytes

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        raw = bytes(ffi.buffer(ffi.addressof(run, "io"), 32))
        return cls(int(run.exit_reason), raw, run=run, errno=errno)


@dataclass(frozen=True)
class HardwareUnknownExit(Exit):
    """KVM_EXIT_UNKNOWN: the hardware gave a reason that KVM does not know."""

    reason = ExitReason.KVM_EXIT_UNKNOWN
    hardware_exit_reason: int

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        return cls(run.hw.hardware_exit_reason, run=run, errno=errno)


@dataclass(frozen=True)
class FailEntryExit(Exit):
    """KVM_EXIT_FAIL_ENTRY: the vCPU could not enter the guest."""

    reason = ExitReason.KVM_EXIT_FAIL_ENTRY
    hardware_entry_failure_reason: int
    cpu: int

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        entry = run.fail_entry
        return cls(entry.hardware_entry_failure_reason, entry.cpu, run=run, errno=errno)


@dataclass(frozen=True)
class ExceptionExit(Exit):
    """KVM_EXIT_EXCEPTION: an exception that KVM hands to user space."""

    reason = ExitReason.KVM_EXIT_EXCEPTION
    exception: int
    error_code: int

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        return cls(run.ex.exception, run.ex.error_code, run=run, errno=errno)


@dataclass(frozen=True)
class IoExit(Exit):
    """KVM_EXIT_IO: port I/O, *count* elements of *size* bytes (1, 2, 4).

    For ``out`` *data* holds them; for ``in`` answer with :meth:`respond`.  *string* elements arrive in
    bundles, so a REP instruction may take several exits.
    """

    reason = ExitReason.KVM_EXIT_IO
    port: int
    direction: str
    size: int
    count: int
    data: bytes

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        io = run.io
        out = io.direction == IoDirection.KVM_EXIT_IO_OUT
        where = ffi.cast("uint8_t *", run) + io.data_offset
        data = bytes(ffi.buffer(where, io.size * io.count)) if out else b""
        return cls(io.port, "out" if out else "in", io.size, io.count, data, run=run, errno=errno)

    @property
    def value(self) -> int:
        """The first element as an unsigned number."""
        return int.from_bytes(self.data[: self.size], "little")

    def respond(self, data: int | bytes) -> None:
        """Give the ``in`` its data: a number for one element, or exactly size * count bytes."""
        if self.direction != "in":
            raise ValueError("an `out` takes no answer")
        raw = data.to_bytes(self.size, "little") * self.count if isinstance(data, int) else bytes(data)
        if len(raw) != self.size * self.count:
            raise ValueError(f"{len(raw)} bytes given, the guest reads {self.size * self.count}")
        ffi.memmove(ffi.cast("uint8_t *", self.run) + self.run.io.data_offset, raw, len(raw))


@dataclass(frozen=True)
class MmioExit(Exit):
    """KVM_EXIT_MMIO: an access of 1 to 8 bytes at *phys_addr* that no memory slot backs."""

    reason = ExitReason.KVM_EXIT_MMIO
    phys_addr: int
    is_write: bool
    size: int
    data: bytes

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        mmio = run.mmio
        data = bytes(ffi.buffer(mmio.data, mmio.len)) if mmio.is_write else b""
        return cls(mmio.phys_addr, bool(mmio.is_write), mmio.len, data, run=run, errno=errno)

    @property
    def value(self) -> int:
        """The written data as an unsigned number."""
        return int.from_bytes(self.data, "little")

    def respond(self, data: int | bytes) -> None:
        """Give a read its data: a number or exactly *size* bytes."""
        if self.is_write:
            raise ValueError("an MMIO write takes no answer")
        raw = data.to_bytes(self.size, "little") if isinstance(data, int) else bytes(data)
        if len(raw) != self.size:
            raise ValueError(f"{len(raw)} bytes given, the guest reads {self.size}")
        ffi.memmove(self.run.mmio.data, raw, len(raw))


@dataclass(frozen=True)
class DebugExit(Exit):
    """KVM_EXIT_DEBUG: a breakpoint, watchpoint or single step asked for with KVM_SET_GUEST_DEBUG."""

    reason = ExitReason.KVM_EXIT_DEBUG
    exception: int
    pc: int
    dr6: int
    dr7: int

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        arch = run.debug.arch
        return cls(arch.exception, arch.pc, arch.dr6, arch.dr7, run=run, errno=errno)


@dataclass(frozen=True)
class HypercallExit(Exit):
    """KVM_EXIT_HYPERCALL: a hypercall passed to user space by KVM_CAP_EXIT_HYPERCALL; answer with
    :meth:`respond`.
    """

    reason = ExitReason.KVM_EXIT_HYPERCALL
    nr: int
    args: tuple[int, ...]
    flags: int

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        call = run.hypercall
        return cls(call.nr, tuple(call.args), call.flags, run=run, errno=errno)

    def respond(self, result: int) -> None:
        """Set the guest's return value (0 or a negative KVM_E* number)."""
        self.run.hypercall.ret = result & (1 << 64) - 1


@dataclass(frozen=True)
class InternalErrorExit(Exit):
    """KVM_EXIT_INTERNAL_ERROR: KVM could not go on; *data* depends on *suberror*."""

    reason = ExitReason.KVM_EXIT_INTERNAL_ERROR
    suberror: int
    data: tuple[int, ...]
    instruction: bytes = b""

    @property
    def name(self) -> str:
        """The kernel's name of *suberror*, such as ``KVM_INTERNAL_ERROR_EMULATION``."""
        known = (error.name for error in InternalError if error == self.suberror)
        return next(known, f"KVM_INTERNAL_ERROR {self.suberror}")

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        internal = run.internal
        data = tuple(internal.data[i] for i in range(min(internal.ndata, 16)))
        instruction = b""
        failure = run.emulation_failure
        emulation = internal.suberror == InternalError.KVM_INTERNAL_ERROR_EMULATION
        if emulation and internal.ndata >= 3 and failure.flags & _HAS_INSTRUCTION:
            instruction = bytes(failure.insn_bytes[0 : min(failure.insn_size, 15)])
        return cls(internal.suberror, data, instruction, run=run, errno=errno)


@dataclass(frozen=True)
class TprAccessExit(Exit):
    """KVM_EXIT_TPR_ACCESS: a guest access to the task priority register."""

    reason = ExitReason.KVM_EXIT_TPR_ACCESS
    rip: int
    is_write: bool

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        return cls(run.tpr_access.rip, bool(run.tpr_access.is_write), run=run, errno=errno)


@dataclass(frozen=True)
class SystemEventExit(Exit):
    """KVM_EXIT_SYSTEM_EVENT: shutdown, reset, crash, SEV termination and the like."""

    reason = ExitReason.KVM_EXIT_SYSTEM_EVENT
    type: int
    data: tuple[int, ...]

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        event = run.system_event
        return cls(
            event.type, tuple(event.data[i] for i in range(min(event.ndata, 16))), run=run, errno=errno
        )


@dataclass(frozen=True)
class IoapicEoiExit(Exit):
    """KVM_EXIT_IOAPIC_EOI: an EOI for a level-triggered vector of the user-space IOAPIC (split irqchip)."""

    reason = ExitReason.KVM_EXIT_IOAPIC_EOI
    vector: int

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        return cls(run.eoi.vector, run=run, errno=errno)


@dataclass(frozen=True)
class HypervExit(Exit):
    """KVM_EXIT_HYPERV: what a Hyper-V guest did; each type has a class of its own."""

    reason = ExitReason.KVM_EXIT_HYPERV

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        kinds: dict[int, type[HypervExit]] = {
            HypervType.KVM_EXIT_HYPERV_SYNIC: HypervSynicExit,
            HypervType.KVM_EXIT_HYPERV_HCALL: HypervHypercallExit,
            HypervType.KVM_EXIT_HYPERV_SYNDBG: HypervSyndbgExit,
        }
        return kinds.get(run.hyperv.type, HypervUnknownExit).read(run, errno)


@dataclass(frozen=True)
class HypervUnknownExit(HypervExit):
    """A *type* newer than this version of kvmpy; *payload* is what kvm_run holds for it."""

    type: int
    payload: bytes

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        raw = bytes(ffi.buffer(ffi.addressof(run.hyperv, "u")))
        return cls(run.hyperv.type, raw, run=run, errno=errno)


@dataclass(frozen=True)
class HypervSynicExit(HypervExit):
    """KVM_EXIT_HYPERV_SYNIC: the guest wrote the SynIC's *msr*; the others are its registers now."""

    msr: int
    control: int
    evt_page: int
    msg_page: int

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        synic = run.hyperv.u.synic
        return cls(synic.msr, synic.control, synic.evt_page, synic.msg_page, run=run, errno=errno)


@dataclass(frozen=True)
class HypervHypercallExit(HypervExit):
    """KVM_EXIT_HYPERV_HCALL: a Hyper-V hypercall for user space; answer with :meth:`respond`.

    *input* is its control word, *params* are the addresses of input and output, or the values themselves.
    """

    input: int
    params: tuple[int, ...]

    @property
    def code(self) -> int:
        """The call's code, the low 16 bits of *input*."""
        return self.input & 0xFFFF

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        call = run.hyperv.u.hcall
        return cls(call.input, tuple(call.params), run=run, errno=errno)

    def respond(self, result: int) -> None:
        """Set the guest's result: the status, and in bits 43:32 how many repetitions were completed."""
        self.run.hyperv.u.hcall.result = result & (1 << 64) - 1


@dataclass(frozen=True)
class HypervSyndbgExit(HypervExit):
    """KVM_EXIT_HYPERV_SYNDBG: the guest wrote the debugger's *msr*; answer with :meth:`respond`."""

    msr: int
    control: int
    send_page: int
    recv_page: int
    pending_page: int

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        debug = run.hyperv.u.syndbg
        pages = (debug.send_page, debug.recv_page, debug.pending_page)
        return cls(debug.msr, debug.control, *pages, run=run, errno=errno)

    def respond(self, status: int) -> None:
        """Set the debugger's status register; KVM takes it after a write to the control register."""
        self.run.hyperv.u.syndbg.status = status


@dataclass(frozen=True)
class MsrExit(Exit):
    """A RDMSR or WRMSR passed to user space by KVM_CAP_X86_USER_SPACE_MSR; answer with :meth:`respond`."""

    index: int
    data: int
    msr_reason: int

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        msr = run.msr
        return cls(msr.index, msr.data, msr.reason, run=run, errno=errno)

    def respond(self, data: int = 0, *, fault: bool = False) -> None:
        """Complete the access: *data* is what RDMSR returns; *fault* injects #GP instead."""
        self.run.msr.data = data
        self.run.msr.error = 1 if fault else 0


@dataclass(frozen=True)
class RdmsrExit(MsrExit):
    """KVM_EXIT_X86_RDMSR."""

    reason = ExitReason.KVM_EXIT_X86_RDMSR


@dataclass(frozen=True)
class WrmsrExit(MsrExit):
    """KVM_EXIT_X86_WRMSR."""

    reason = ExitReason.KVM_EXIT_X86_WRMSR


@dataclass(frozen=True)
class XenExit(Exit):
    """KVM_EXIT_XEN: what a Xen guest did; each type has a class of its own."""

    reason = ExitReason.KVM_EXIT_XEN

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        hypercall = run.xen.type == XenType.KVM_EXIT_XEN_HCALL
        return (XenHypercallExit if hypercall else XenUnknownExit).read(run, errno)


@dataclass(frozen=True)
class XenUnknownExit(XenExit):
    """A *type* newer than this version of kvmpy; *payload* is what kvm_run holds for it."""

    type: int
    payload: bytes

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        return cls(run.xen.type, bytes(ffi.buffer(ffi.addressof(run.xen, "u"))), run=run, errno=errno)


@dataclass(frozen=True)
class XenHypercallExit(XenExit):
    """KVM_EXIT_XEN_HCALL: hypercall *input* of a Xen guest with six *params*; answer with :meth:`respond`.

    *longmode* tells the 64-bit convention from the 32-bit one, *cpl* is the caller's ring.
    """

    longmode: bool
    cpl: int
    input: int
    params: tuple[int, ...]

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        call = run.xen.u.hcall
        return cls(bool(call.longmode), call.cpl, call.input, tuple(call.params), run=run, errno=errno)

    def respond(self, result: int) -> None:
        """Set the guest's return value (0 or a negative error number of Xen)."""
        self.run.xen.u.hcall.result = result & (1 << 64) - 1


@dataclass(frozen=True)
class NotifyExit(Exit):
    """KVM_EXIT_NOTIFY: no event window opened in the guest for the configured time."""

    reason = ExitReason.KVM_EXIT_NOTIFY
    flags: int

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        return cls(run.notify.flags, run=run, errno=errno)


@dataclass(frozen=True)
class MemoryFaultExit(Exit):
    """KVM_EXIT_MEMORY_FAULT: an access that KVM cannot resolve; KVM_RUN failed with EFAULT or EHWPOISON."""

    reason = ExitReason.KVM_EXIT_MEMORY_FAULT
    flags: int
    gpa: int
    size: int

    @property
    def private(self) -> bool:
        """Whether the guest meant the private page (KVM_MEMORY_EXIT_FLAG_PRIVATE)."""
        return bool(self.flags & MemoryFaultFlag.KVM_MEMORY_EXIT_FLAG_PRIVATE)

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        fault = run.memory_fault
        return cls(fault.flags, fault.gpa, fault.size, run=run, errno=errno)


@dataclass(frozen=True)
class SnpReqCertsExit(Exit):
    """KVM_EXIT_SNP_REQ_CERTS: an extended guest request wants the certificate blob at *gpa*."""

    reason = ExitReason.KVM_EXIT_SNP_REQ_CERTS
    gpa: int
    npages: int

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        return cls(run.snp_req_certs.gpa, run.snp_req_certs.npages, run=run, errno=errno)

    def respond(self, result: int, npages: int | None = None) -> None:
        """Set the result (0, ENOSPC with the pages needed, EAGAIN, EIO)."""
        self.run.snp_req_certs.ret = result
        if npages is not None:
            self.run.snp_req_certs.npages = npages


@dataclass(frozen=True)
class TdxExit(Exit):
    """KVM_EXIT_TDX: a TDVMCALL of an Intel TDX guest; *data* is its payload without the return value."""

    reason = ExitReason.KVM_EXIT_TDX
    flags: int
    nr: int
    data: tuple[int, ...]

    @classmethod
    def read(cls, run: CData, errno: int) -> Exit:
        return cls(run.tdx.flags, run.tdx.nr, tuple(run.tdx.unknown.data), run=run, errno=errno)

    def respond(self, result: int) -> None:
        """Set the status that the guest finds in R10 (0 for success)."""
        self.run.tdx.unknown.ret = result


@dataclass(frozen=True)
class HltExit(Exit):
    """KVM_EXIT_HLT: the guest halted, and no in-kernel APIC could wake it."""

    reason = ExitReason.KVM_EXIT_HLT


@dataclass(frozen=True)
class ShutdownExit(Exit):
    """KVM_EXIT_SHUTDOWN: triple fault."""

    reason = ExitReason.KVM_EXIT_SHUTDOWN


@dataclass(frozen=True)
class IntrExit(Exit):
    """KVM_EXIT_INTR: a signal was pending."""

    reason = ExitReason.KVM_EXIT_INTR


@dataclass(frozen=True)
class IrqWindowOpenExit(Exit):
    """KVM_EXIT_IRQ_WINDOW_OPEN: the guest can take an interrupt now (request_interrupt_window)."""

    reason = ExitReason.KVM_EXIT_IRQ_WINDOW_OPEN


@dataclass(frozen=True)
class SetTprExit(Exit):
    """KVM_EXIT_SET_TPR: the guest lowered its task priority (user-space APIC)."""

    reason = ExitReason.KVM_EXIT_SET_TPR


@dataclass(frozen=True)
class NmiExit(Exit):
    """KVM_EXIT_NMI: a host NMI ended guest mode."""

    reason = ExitReason.KVM_EXIT_NMI


@dataclass(frozen=True)
class DirtyRingFullExit(Exit):
    """KVM_EXIT_DIRTY_RING_FULL: harvest and reset the dirty rings before running on."""

    reason = ExitReason.KVM_EXIT_DIRTY_RING_FULL


@dataclass(frozen=True)
class ApResetHoldExit(Exit):
    """KVM_EXIT_AP_RESET_HOLD: an SEV-ES AP waits for its start."""

    reason = ExitReason.KVM_EXIT_AP_RESET_HOLD


@dataclass(frozen=True)
class BusLockExit(Exit):
    """KVM_EXIT_X86_BUS_LOCK: the guest took a bus lock (KVM_CAP_X86_BUS_LOCK_EXIT)."""

    reason = ExitReason.KVM_EXIT_X86_BUS_LOCK


def _all_subclasses(cls: type[Exit]) -> list[type[Exit]]:
    results = []
    for sub in cls.__subclasses__():
        results += [sub, *_all_subclasses(sub)]
    return results


BY_REASON: dict[int, Callable[[CData, int], Exit]] = {
    int(cls.reason): cls.read for cls in _all_subclasses(Exit) if "reason" in vars(cls)
}


def read_exit(run: CData, errno: int) -> Exit:
    """Make the typed exit from *run*, a ``struct kvm_run *``; *errno* is that of KVM_RUN."""
    return BY_REASON.get(run.exit_reason, UnknownExit.read)(run, errno)
