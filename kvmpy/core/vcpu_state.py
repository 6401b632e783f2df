# SPDX-License-Identifier: Apache-2.0
"""The state of a vCPU: every ioctl that reads or writes a part of it (api.rst, section 4)."""

from __future__ import annotations

import errno
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmpy.core.address import PAGE_SIZE, Gpa, Gva
from kvmpy.core.caps import CanEnable
from kvmpy.core.device import DeviceAttrs
from kvmpy.core.enlightenments import VcpuXen
from kvmpy.core.msrs import Msrs
from kvmpy.core.stats import BinaryStats
from kvmpy.core.topic import Topic, topic
from kvmpy.core.vcpu_save import VcpuSnapshot, restore, save
from kvmpy.uapi import ffi, ioctls
from kvmpy.uapi.constants import (
    KVM_CAP_NESTED_STATE,
    KVM_CAP_XSAVE2,
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP,
    KVM_REG_GUEST_SSP,
    KVM_REG_SIZE_U64,
    KVM_REG_X86,
    KVM_X86_REG_TYPE_KVM,
    KVM_X86_REG_TYPE_MSR,
)
from kvmpy.uapi.structs import (
    kvm_cpuid2,
    kvm_cpuid_entry2,
    kvm_debugregs,
    kvm_fpu,
    kvm_guest_debug,
    kvm_interrupt,
    kvm_lapic_state,
    kvm_mp_state,
    kvm_nested_state,
    kvm_one_reg,
    kvm_pre_fault_memory,
    kvm_reg_list,
    kvm_regs,
    kvm_signal_mask,
    kvm_sregs,
    kvm_sregs2,
    kvm_sync_regs,
    kvm_tpr_access_ctl,
    kvm_translation,
    kvm_vapic_addr,
    kvm_vcpu_events,
    kvm_x86_mce,
    kvm_xcrs,
    kvm_xsave,
)

if TYPE_CHECKING:
    from kvmpy.core.vm import Vm
    from kvmpy.uapi.structs import kvm_run

_REG_U64 = KVM_REG_X86 | KVM_REG_SIZE_U64


@dataclass(frozen=True)
class DebugPoint:
    """A hardware breakpoint or watchpoint: *kind* is ``x``, ``w`` or ``rw``, *size* 1, 2, 4 or 8 bytes."""

    address: Gva | int
    kind: str = "x"
    size: int = 1

    def dr7_bits(self, number: int) -> int:
        """Return what debug register 7 holds for it in slot *number* (Intel SDM 3B section 19.2.4)."""
        kinds, sizes = {"x": 0, "w": 1, "rw": 3}, {1: 0, 2: 1, 4: 3, 8: 2}
        if self.kind not in kinds or self.size not in sizes or (self.kind == "x" and self.size != 1):
            raise ValueError(f"{self}: kind must be x, w or rw, size 1, 2, 4 or 8, and 1 for x")
        return 2 << 2 * number | (kinds[self.kind] | sizes[self.size] << 2) << 16 + 4 * number


def msr_reg_id(index: int) -> int:
    """Return the id of MSR *index* for :meth:`Regs.get_one` (KVM_X86_REG_MSR)."""
    return _REG_U64 | KVM_X86_REG_TYPE_MSR << 32 | index


# KVM_X86_REG_KVM(KVM_REG_GUEST_SSP): the shadow stack pointer of CET.
GUEST_SSP_REG_ID = _REG_U64 | KVM_X86_REG_TYPE_KVM << 32 | KVM_REG_GUEST_SSP


class Regs(Topic):
    """General and system registers, registers by id, and those shared through kvm_run."""

    _owner: VcpuState

    def get(self) -> kvm_regs:
        """Return the general registers, RIP and RFLAGS (KVM_GET_REGS)."""
        arg = kvm_regs()
        self._owner.ioctl(ioctls.KVM_GET_REGS, arg)
        return arg

    def set(self, regs: kvm_regs) -> None:
        """Set the general registers, RIP and RFLAGS; drops a pending exception (KVM_SET_REGS)."""
        self._owner.ioctl(ioctls.KVM_SET_REGS, regs)

    def get_sregs(self) -> kvm_sregs:
        """Return segments, control registers, EFER, APIC base and the pending interrupt (KVM_GET_SREGS)."""
        arg = kvm_sregs()
        self._owner.ioctl(ioctls.KVM_GET_SREGS, arg)
        return arg

    def set_sregs(self, sregs: kvm_sregs) -> None:
        """Set segments, control registers, EFER and APIC base.

        EINVAL for an illegal combination (KVM_SET_SREGS).
        """
        self._owner.ioctl(ioctls.KVM_SET_SREGS, sregs)

    def get_sregs2(self) -> kvm_sregs2:
        """Return the system registers with the PDPTRs instead of the pending interrupt (KVM_GET_SREGS2)."""
        arg = kvm_sregs2()
        self._owner.ioctl(ioctls.KVM_GET_SREGS2, arg)
        return arg

    def set_sregs2(self, sregs: kvm_sregs2) -> None:
        """Set the system registers with the PDPTRs (KVM_SET_SREGS2)."""
        self._owner.ioctl(ioctls.KVM_SET_SREGS2, sregs)

    def get_list(self) -> list[int]:
        """Return the ids that :meth:`get_one` knows (KVM_GET_REG_LIST)."""
        arg = kvm_reg_list.with_entries(0)
        _, number = self._owner.ioctl_raw(ioctls.KVM_GET_REG_LIST, arg)
        if number not in (0, errno.E2BIG):
            raise self._owner.error(ioctls.KVM_GET_REG_LIST, number, arg)
        arg = kvm_reg_list.with_entries(arg.n)
        self._owner.ioctl(ioctls.KVM_GET_REG_LIST, arg)
        return [int(item) for item in arg.entries_list()]

    def get_one(self, reg_id: int) -> int:
        """Return a 64-bit register by id, such as ``msr_reg_id(index)`` (KVM_GET_ONE_REG)."""
        # lifetime: `place` lives until the ioctl is done.
        place = ffi.new("uint64_t *")
        arg = kvm_one_reg(id=reg_id, addr=int(ffi.cast("uintptr_t", place)))
        self._owner.ioctl(ioctls.KVM_GET_ONE_REG, arg)
        return int(place[0])

    def set_one(self, reg_id: int, value: int) -> None:
        """Set a 64-bit register by id (KVM_SET_ONE_REG)."""
        # lifetime: `place` lives until the ioctl is done.
        place = ffi.new("uint64_t *", value)
        arg = kvm_one_reg(id=reg_id, addr=int(ffi.cast("uintptr_t", place)))
        self._owner.ioctl(ioctls.KVM_SET_ONE_REG, arg)
        del place

    def set_sync(self, valid: int) -> None:
        """Let every exit fill the sets of *valid* (KVM_SYNC_X86_*) into :attr:`sync`.

        0 ends it (KVM_CAP_SYNC_REGS).
        """
        self._owner.run_area.kvm_valid_regs = valid

    def mark_sync_dirty(self, dirty: int) -> None:
        """Let the next KVM_RUN load the sets of *dirty* (KVM_SYNC_X86_*) from :attr:`sync`.

        EINVAL for unknown bits.
        """
        self._owner.run_area.kvm_dirty_regs = self._owner.run_area.kvm_dirty_regs | dirty

    @property
    def sync(self) -> kvm_sync_regs:
        """The registers shared through kvm_run: ``.regs``, ``.sregs``, ``.events`` (KVM_CAP_SYNC_REGS)."""
        return self._owner.run_area.s.regs


class Fpu(Topic):
    """x87, SSE and what else XSAVE holds."""

    _owner: VcpuState

    def get(self) -> kvm_fpu:
        """Return x87 and SSE registers (KVM_GET_FPU)."""
        arg = kvm_fpu()
        self._owner.ioctl(ioctls.KVM_GET_FPU, arg)
        return arg

    def set(self, fpu: kvm_fpu) -> None:
        """Set x87 and SSE registers, but not MXCSR (KVM_SET_FPU).

        KVM does not mark what it writes in XSTATE_BV (arch/x86/kvm/x86.c): where a component is in
        its initial state the guest does not see them. :meth:`set_xsave` has no such gap.
        """
        self._owner.ioctl(ioctls.KVM_SET_FPU, fpu)

    def get_xsave(self) -> kvm_xsave:
        """Return the first 4096 bytes of the XSAVE area (KVM_GET_XSAVE)."""
        arg = kvm_xsave()
        self._owner.ioctl(ioctls.KVM_GET_XSAVE, arg)
        return arg

    @functools.cached_property
    def xsave_size(self) -> int:
        """Bytes of the XSAVE area: what KVM_CAP_XSAVE2 says, 4096 without it."""
        return max(self._owner.vm.check_extension(KVM_CAP_XSAVE2), PAGE_SIZE)

    def get_xsave2(self) -> kvm_xsave:
        """Return the whole XSAVE area, :attr:`xsave_size` bytes (KVM_GET_XSAVE2)."""
        arg = kvm_xsave.with_entries((self.xsave_size - PAGE_SIZE) // 4)
        self._owner.ioctl(ioctls.KVM_GET_XSAVE2, arg)
        return arg

    def set_xsave(self, xsave: kvm_xsave) -> None:
        """Set the XSAVE area.

        It must have :attr:`xsave_size` bytes, as KVM reads that many (KVM_SET_XSAVE).
        """
        if xsave.size < self.xsave_size:
            raise ValueError(
                f"an XSAVE area of {xsave.size} bytes, KVM reads {self.xsave_size}: use get_xsave2()"
            )
        self._owner.ioctl(ioctls.KVM_SET_XSAVE, xsave)

    def get_xcrs(self) -> kvm_xcrs:
        """Return the extended control registers (KVM_GET_XCRS)."""
        arg = kvm_xcrs()
        self._owner.ioctl(ioctls.KVM_GET_XCRS, arg)
        return arg

    def set_xcrs(self, xcrs: kvm_xcrs) -> None:
        """Set the extended control registers (KVM_SET_XCRS)."""
        self._owner.ioctl(ioctls.KVM_SET_XCRS, xcrs)


class VcpuCpuid(Topic):
    """The CPUID leaves that the guest sees."""

    _owner: VcpuState

    def _cpuid_table(self, op: ioctls.Ioctl) -> kvm_cpuid2:
        # KVM answers E2BIG when there is no room for all leaves.
        room = 256
        while True:
            arg = kvm_cpuid2.with_entries(room)
            _, number = self._owner.ioctl_raw(op, arg)
            if number == 0:
                return kvm_cpuid2.of(arg.entries_list())
            if number != errno.E2BIG or room > 1 << 16:
                raise self._owner.error(op, number, arg)
            room *= 2

    def get(self) -> kvm_cpuid2:
        """Return the CPUID leaves that the guest sees (KVM_GET_CPUID2)."""
        return self._cpuid_table(ioctls.KVM_GET_CPUID2)

    def set(self, cpuid: kvm_cpuid2 | Iterable[kvm_cpuid_entry2]) -> None:
        """Set the CPUID leaves that the guest sees.

        Refused once it ran, except for the same (KVM_SET_CPUID2).
        """
        arg = cpuid if isinstance(cpuid, kvm_cpuid2) else kvm_cpuid2.of(list(cpuid))
        self._owner.ioctl(ioctls.KVM_SET_CPUID2, arg)

    def get_supported_hv(self) -> kvm_cpuid2:
        """Return the Hyper-V leaves that KVM supports for this vCPU (KVM_GET_SUPPORTED_HV_CPUID)."""
        return self._cpuid_table(ioctls.KVM_GET_SUPPORTED_HV_CPUID)


class Events(Topic):
    """Exceptions, interrupts, NMIs, SMIs and machine checks."""

    _owner: VcpuState

    def get(self) -> kvm_vcpu_events:
        """Return pending and injected exceptions, interrupts, NMIs and SMIs (KVM_GET_VCPU_EVENTS)."""
        arg = kvm_vcpu_events()
        self._owner.ioctl(ioctls.KVM_GET_VCPU_EVENTS, arg)
        return arg

    def set(self, events: kvm_vcpu_events) -> None:
        """Set them; ``flags`` says which of the optional fields count (KVM_SET_VCPU_EVENTS)."""
        self._owner.ioctl(ioctls.KVM_SET_VCPU_EVENTS, events)

    def interrupt(self, vector: int) -> None:
        """Queue an external interrupt; ENXIO with an in-kernel PIC (KVM_INTERRUPT)."""
        self._owner.ioctl(ioctls.KVM_INTERRUPT, kvm_interrupt(irq=vector))

    def nmi(self) -> None:
        """Queue a non-maskable interrupt (KVM_NMI)."""
        self._owner.ioctl(ioctls.KVM_NMI)

    def smi(self) -> None:
        """Queue a system management interrupt (KVM_SMI)."""
        self._owner.ioctl(ioctls.KVM_SMI)

    def setup_mce(self, mcg_cap: int) -> None:
        """Set MCG_CAP: the number of machine-check banks and their features (KVM_X86_SETUP_MCE)."""
        # lifetime: `place` lives until the ioctl is done.
        place = ffi.new("uint64_t *", mcg_cap)
        self._owner.ioctl(ioctls.KVM_X86_SETUP_MCE, int(ffi.cast("uintptr_t", place)))
        del place

    def set_mce(self, mce: kvm_x86_mce) -> None:
        """Inject a machine check (KVM_X86_SET_MCE)."""
        self._owner.ioctl(ioctls.KVM_X86_SET_MCE, mce)


class GuestDebug(Topic):
    """Debugging the guest, and its own debug registers."""

    _owner: VcpuState

    def set(self, control: int = 0, debugreg: Mapping[int, int] | None = None) -> None:
        """Debug the guest: KVM_GUESTDBG_* bits and debug registers by number (KVM_SET_GUEST_DEBUG).

        Hits come as KVM_EXIT_DEBUG. Control 0 switches it off.
        """
        arg = kvm_guest_debug(control=control)
        for number, value in (debugreg or {}).items():
            arg.arch.debugreg[number] = value
        self._owner.ioctl(ioctls.KVM_SET_GUEST_DEBUG, arg)

    def set_points(self, points: Iterable[DebugPoint], *, singlestep: bool = False, control: int = 0) -> None:
        """Set up to four hardware breakpoints and watchpoints (KVM_GUESTDBG_USE_HW_BP).

        ValueError for more.
        """
        wanted = list(points)
        if len(wanted) > 4:
            raise ValueError(f"{len(wanted)} debug points, the CPU has 4")
        registers = {number: int(point.address) for number, point in enumerate(wanted)}
        registers[7] = 0x600 | sum(point.dr7_bits(number) for number, point in enumerate(wanted))
        control |= KVM_GUESTDBG_ENABLE | (KVM_GUESTDBG_USE_HW_BP if wanted else 0)
        self.set(control | (KVM_GUESTDBG_SINGLESTEP if singlestep else 0), registers)

    def get_regs(self) -> kvm_debugregs:
        """Return the guest's debug registers (KVM_GET_DEBUGREGS)."""
        arg = kvm_debugregs()
        self._owner.ioctl(ioctls.KVM_GET_DEBUGREGS, arg)
        return arg

    def set_regs(self, debugregs: kvm_debugregs) -> None:
        """Set the guest's debug registers (KVM_SET_DEBUGREGS)."""
        self._owner.ioctl(ioctls.KVM_SET_DEBUGREGS, debugregs)


class Lapic(Topic):
    """The local APIC."""

    _owner: VcpuState

    def get(self) -> kvm_lapic_state:
        """Return the registers of the in-kernel local APIC; EINVAL when there is none (KVM_GET_LAPIC)."""
        arg = kvm_lapic_state()
        self._owner.ioctl(ioctls.KVM_GET_LAPIC, arg)
        return arg

    def set(self, lapic: kvm_lapic_state) -> None:
        """Set the registers of the in-kernel local APIC.

        Its mode comes from the APIC base (KVM_SET_LAPIC).
        """
        self._owner.ioctl(ioctls.KVM_SET_LAPIC, lapic)

    def get_reg(self, offset: int) -> int:
        """Return the 32-bit register at *offset* of the local APIC page, such as 0x20 for the id."""
        if offset % 16 or not 0 <= offset < 0x400:
            raise ValueError(f"APIC register offset {offset:#x}: a multiple of 16 below 0x400 is expected")
        return int.from_bytes(self.get().to_bytes()[offset : offset + 4], "little")

    def set_reg(self, offset: int, value: int) -> None:
        """Set the 32-bit register at *offset* of the local APIC page, leaving the others."""
        if offset % 16 or not 0 <= offset < 0x400:
            raise ValueError(f"APIC register offset {offset:#x}: a multiple of 16 below 0x400 is expected")
        raw = bytearray(self.get().to_bytes())
        raw[offset : offset + 4] = value.to_bytes(4, "little")
        self.set(kvm_lapic_state.from_bytes(bytes(raw)))

    def tpr_access_reporting(self, enabled: bool) -> kvm_tpr_access_ctl:
        """Exit at accesses to the task priority register, or not (KVM_TPR_ACCESS_REPORTING)."""
        arg = kvm_tpr_access_ctl(enabled=int(enabled))
        self._owner.ioctl(ioctls.KVM_TPR_ACCESS_REPORTING, arg)
        return arg

    def set_vapic_addr(self, gpa: Gpa | int) -> None:
        """Say where in guest memory the virtual task priority lives (KVM_SET_VAPIC_ADDR)."""
        self._owner.ioctl(ioctls.KVM_SET_VAPIC_ADDR, kvm_vapic_addr(vapic_addr=int(gpa)))


class NestedState(Topic):
    """The state of nested virtualisation."""

    _owner: VcpuState

    def get(self) -> kvm_nested_state:
        """Return the state of nested virtualisation.

        ENOTTY or EINVAL where KVM has none (KVM_GET_NESTED_STATE).
        """
        size = max(self._owner.vm.check_extension(KVM_CAP_NESTED_STATE), kvm_nested_state.SIZE)
        arg = kvm_nested_state.with_bytes(size)
        arg.size = size
        self._owner.ioctl(ioctls.KVM_GET_NESTED_STATE, arg)
        return arg

    def set(self, state: kvm_nested_state) -> None:
        """Set the state of nested virtualisation (KVM_SET_NESTED_STATE)."""
        self._owner.ioctl(ioctls.KVM_SET_NESTED_STATE, state)


class VcpuClock(Topic):
    """Time as the guest sees it."""

    _owner: VcpuState

    def get_tsc_khz(self) -> int:
        """Return the guest's TSC frequency in kHz (KVM_GET_TSC_KHZ)."""
        return self._owner.ioctl(ioctls.KVM_GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """Set the guest's TSC frequency in kHz, 0 for the host's.

        EINVAL without TSC scaling (KVM_SET_TSC_KHZ).
        """
        self._owner.ioctl(ioctls.KVM_SET_TSC_KHZ, khz)

    def kvmclock_ctrl(self) -> None:
        """Tell the guest that it was paused; EINVAL unless it uses kvmclock (KVM_KVMCLOCK_CTRL)."""
        self._owner.ioctl(ioctls.KVM_KVMCLOCK_CTRL)


class VcpuState(CanEnable):
    """The part of a vCPU that is about its state; what the kernel calls a struct is returned as one."""

    kind = "vcpu"
    regs = topic(Regs)
    fpu = topic(Fpu)
    cpuid = topic(VcpuCpuid)
    msrs = topic(Msrs)
    events = topic(Events)
    debug = topic(GuestDebug)
    lapic = topic(Lapic)
    nested = topic(NestedState)
    clock = topic(VcpuClock)
    attrs = topic(DeviceAttrs)
    stats = topic(BinaryStats)
    xen = topic(VcpuXen)

    if TYPE_CHECKING:
        vm: Vm

        @property
        def run_area(self) -> kvm_run:
            """The shared struct kvm_run."""

        def complete_io(self) -> None:
            """Finish the instruction of the last exit."""

    def get_mp_state(self) -> int:
        """Return the multiprocessing state, a KVM_MP_STATE_* number (KVM_GET_MP_STATE)."""
        arg = kvm_mp_state()
        self.ioctl(ioctls.KVM_GET_MP_STATE, arg)
        return int(arg.mp_state)

    def set_mp_state(self, state: int) -> None:
        """Set the multiprocessing state.

        Without an in-kernel APIC only RUNNABLE is legal (KVM_SET_MP_STATE).
        """
        self.ioctl(ioctls.KVM_SET_MP_STATE, kvm_mp_state(mp_state=int(state)))

    def set_signal_mask(self, blocked: Iterable[int] | None) -> None:
        """Block exactly these signals during KVM_RUN, with None those of the thread (KVM_SET_SIGNAL_MASK)."""
        if blocked is None:
            self.ioctl(ioctls.KVM_SET_SIGNAL_MASK)
            return
        mask = sum({1 << number - 1 for number in blocked})
        arg = kvm_signal_mask.with_entries(8)
        arg.sigset[:] = mask.to_bytes(8, "little")
        self.ioctl(ioctls.KVM_SET_SIGNAL_MASK, arg)

    def translate(self, gva: Gva | int) -> kvm_translation:
        """Translate a guest-virtual address by the vCPU's page tables.

        ``valid`` says whether it did (KVM_TRANSLATE).
        """
        arg = kvm_translation(linear_address=int(gva))
        self.ioctl(ioctls.KVM_TRANSLATE, arg)
        return arg

    def pre_fault_memory(self, gpa: Gpa | int, size: int, *, flags: int = 0) -> tuple[int, int]:
        """Populate second-level page tables; return the ``(gpa, size)`` that is left (KVM_PRE_FAULT_MEMORY).

        One ioctl: it may do a part, so callers go on until the size is 0. ENOENT: the range leaves memory
        slots.
        """
        arg = kvm_pre_fault_memory(gpa=int(gpa), size=size, flags=flags)
        self.ioctl(ioctls.KVM_PRE_FAULT_MEMORY, arg)
        return int(arg.gpa), int(arg.size)

    def save(self) -> VcpuSnapshot:
        """Return the complete state as a value.

        See :func:`kvmpy.core.vcpu_save.save` for order and limits.
        """
        return save(self)

    def restore(self, snapshot: VcpuSnapshot) -> None:
        """Bring this vCPU into the state of *snapshot*; see :func:`kvmpy.core.vcpu_save.restore`."""
        restore(self, snapshot)
