# SPDX-License-Identifier: Apache-2.0
"""The complete state of a vCPU as a value, and the order in which it is read and written back."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmpy.core.errors import KvmError
from kvmpy.core.msrs import MsrError
from kvmpy.uapi.constants import KVM_CAP_NESTED_STATE, KVM_CAP_SREGS2
from kvmpy.uapi.structs import (
    Struct,
    kvm_cpuid2,
    kvm_debugregs,
    kvm_fpu,
    kvm_lapic_state,
    kvm_nested_state,
    kvm_regs,
    kvm_sregs,
    kvm_sregs2,
    kvm_vcpu_events,
    kvm_xcrs,
    kvm_xsave,
)

if TYPE_CHECKING:
    from kvmpy.core.vcpu_state import VcpuState

MSR_TSC_DEADLINE = 0x6E0
# These run on between save and comparison: TSC, APERF and MPERF, Hyper-V's run time and reference counter.
_RUNNING_MSRS = frozenset({0x10, 0xE7, 0xE8, 0x40000010, 0x40000020})

# Hyper-V's SynIC and timers: KVM_GET_MSR_INDEX_LIST names SCONTROL and the first timer's configuration for
# them all. A vCPU without a SynIC refuses to be set even to the values that it starts with.
_SCONTROL, _SINT0, _STIMER0 = 0x4000_0080, 0x4000_0090, 0x4000_00B0
_NO_SYNIC = {
    **dict.fromkeys((_SCONTROL + 2, _SCONTROL + 3), 0),
    **dict.fromkeys(range(_SINT0, _SINT0 + 16), 1 << 16),
    **dict.fromkeys(range(_STIMER0, _STIMER0 + 8), 0),
}
_SYNIC = tuple(_NO_SYNIC)


class RestoreError(RuntimeError):
    """A vCPU did not accept a saved state: KVM refused MSRs whose values differ from the saved ones."""


@dataclass(frozen=True)
class VcpuSnapshot:
    """The complete state of a vCPU, in the kernel's layouts: a value to pickle, compare or keep as JSON.

    A part that the saving KVM does not offer is empty (``b""``, None).  *msrs* holds those of
    KVM_GET_MSR_INDEX_LIST that it could read, and those of a SynIC that is in use.  The contents of guest
    memory and the VM's devices are not part of it.
    """

    cpuid: bytes
    sregs: bytes
    sregs2: bytes
    regs: bytes
    fpu: bytes
    xsave: bytes
    xcrs: bytes
    msrs: tuple[tuple[int, int], ...]
    lapic: bytes
    events: bytes
    debugregs: bytes
    nested: bytes
    mp_state: int | None
    tsc_khz: int | None

    def as_dict(self) -> dict[str, Any]:
        """Return it as what JSON can hold: bytes as hexadecimal text."""
        results: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, bytes):
                results[item.name] = value.hex()
            elif isinstance(value, tuple):
                results[item.name] = [list(pair) for pair in value]
            else:
                results[item.name] = value
        return results

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> VcpuSnapshot:
        """Make it from what :meth:`as_dict` returned; ValueError for missing or unknown parts."""
        names = {item.name for item in dataclasses.fields(cls)}
        if set(data) != names:
            raise ValueError(f"not a vCPU snapshot: {sorted(names ^ set(data))} missing or unknown")
        values: dict[str, Any] = {
            name: bytes.fromhex(value) if isinstance(value, str) else value for name, value in data.items()
        }
        values["msrs"] = tuple((int(index), int(value)) for index, value in data["msrs"])
        return cls(**values)

    def general(self) -> kvm_regs:
        """Return the general registers."""
        return kvm_regs.from_bytes(self.regs)

    def system(self) -> kvm_sregs:
        """Return the system registers."""
        return kvm_sregs.from_bytes(self.sregs)

    def differences(self, other: VcpuSnapshot) -> list[str]:
        """Name what differs, one line a part, MSRs by index.

        The time-stamp counter and its like may not agree.
        """
        rows = []
        for item in dataclasses.fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if item.name == "msrs":
                rows += list(_msr_differences(dict(mine), dict(theirs)))
            elif item.name == "xsave" and _without_xstate_bv(mine) == _without_xstate_bv(theirs):
                continue
            elif mine != theirs:
                rows.append(f"{item.name}: {_short(mine)} and {_short(theirs)}")
        return rows


def _without_xstate_bv(area: bytes) -> bytes:
    # A component in its initial state may have its bit set or not; KVM writes its bytes out in both cases.
    return area[:512] + area[520:]


def _hex(value: int | None) -> str:
    return "absent" if value is None else hex(value)


def _short(value: object) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes {value[:16].hex()}..."
    return repr(value)


def _msr_differences(mine: dict[int, int], theirs: dict[int, int]) -> Iterator[str]:
    for index in sorted(mine.keys() | theirs.keys()):
        a, b = mine.get(index), theirs.get(index)
        if a != b and index not in _RUNNING_MSRS:
            yield f"MSR {index:#x}: {_hex(a)} and {_hex(b)}"


def _offered(read: Callable[[], Struct]) -> bytes:
    # EINVAL, ENXIO: this VM has no such part (no in-kernel APIC); ENOTTY: this KVM has not.
    try:
        return read().to_bytes()
    except KvmError as error:
        if error.errno in (errno.EINVAL, errno.ENXIO, errno.ENOTTY):
            return b""
        raise


def save(vcpu: VcpuState) -> VcpuSnapshot:
    """Read the complete state of *vcpu*, which must not be running.

    The instruction of the last exit is completed first (an answer to an ``in`` or MMIO read must be given
    before), since the state in between cannot be read (api.rst, KVM_EXIT_IO).  Events come before the
    multiprocessing state: reading that makes KVM accept pending INIT and SIPI.  Nested state is read last.
    """
    vcpu.complete_io()
    events = vcpu.events.get()
    mp_state = vcpu.get_mp_state()
    regs = vcpu.regs.get()
    fpu = vcpu.fpu.get()
    xsave = _offered(vcpu.fpu.get_xsave2)
    xcrs = _offered(vcpu.fpu.get_xcrs)
    sregs = vcpu.regs.get_sregs()
    sregs2 = vcpu.regs.get_sregs2().to_bytes() if vcpu.vm.check_extension(KVM_CAP_SREGS2) else b""
    msrs = vcpu.msrs.get_offered(vcpu.vm.kvm.get_msr_index_list())
    if _SCONTROL in msrs:
        synic = vcpu.msrs.get_offered(_SYNIC)
        msrs |= synic if synic != _NO_SYNIC else {}
    lapic = _offered(vcpu.lapic.get)
    debugregs = vcpu.debug.get_regs()
    nested = _offered(vcpu.nested.get) if vcpu.vm.check_extension(KVM_CAP_NESTED_STATE) else b""
    try:
        tsc_khz: int | None = vcpu.clock.get_tsc_khz()
    except KvmError:
        tsc_khz = None  # KVM answers EIO where the host's TSC is unstable
    return VcpuSnapshot(
        cpuid=vcpu.cpuid.get().to_bytes(),
        sregs=sregs.to_bytes(),
        sregs2=sregs2,
        regs=regs.to_bytes(),
        fpu=fpu.to_bytes(),
        xsave=xsave,
        xcrs=xcrs,
        msrs=tuple(msrs.items()),
        lapic=lapic,
        events=events.to_bytes(),
        debugregs=debugregs.to_bytes(),
        nested=nested,
        mp_state=mp_state,
        tsc_khz=tsc_khz,
    )


def restore(vcpu: VcpuState, snapshot: VcpuSnapshot) -> None:
    """Bring *vcpu* into the state of *snapshot*; KvmError or RestoreError says what KVM did not take.

    The order matters:

    1. CPUID, since KVM checks everything that follows against it; then the TSC frequency.
    2. System registers: EFER and CR4 open other state, the APIC base decides the mode of the local APIC.
    3. Nested state, which needs EFER.SVME or CR4.VMXE.
    4. XCR0, then the XSAVE area (or the FPU where KVM has no XSAVE).
    5. MSRs, without the TSC deadline.
    6. The local APIC, then the TSC deadline, which counts only in the APIC timer's deadline mode.
    7. General registers, then events: KVM_SET_REGS drops pending exceptions.
    8. Debug registers, and last the multiprocessing state.

    An MSR that KVM refuses is accepted as long as it holds the saved value already (read-only ones do).
    """
    if vcpu.cpuid.get().to_bytes() != snapshot.cpuid:
        vcpu.cpuid.set(kvm_cpuid2.from_bytes(snapshot.cpuid))
    if snapshot.tsc_khz and snapshot.tsc_khz != vcpu.clock.get_tsc_khz():
        vcpu.clock.set_tsc_khz(snapshot.tsc_khz)
    # KVM_SET_SREGS alone carries the pending interrupt, KVM_SET_SREGS2 alone the PDPTRs.
    sregs = kvm_sregs.from_bytes(snapshot.sregs)
    vcpu.regs.set_sregs(sregs)
    if snapshot.sregs2:
        vcpu.regs.set_sregs2(kvm_sregs2.from_bytes(snapshot.sregs2))
    if snapshot.nested:
        vcpu.nested.set(kvm_nested_state.from_bytes(snapshot.nested))
    if snapshot.xcrs:
        vcpu.fpu.set_xcrs(kvm_xcrs.from_bytes(snapshot.xcrs))
    if snapshot.xsave:
        vcpu.fpu.set_xsave(kvm_xsave.from_bytes(snapshot.xsave))
    else:
        vcpu.fpu.set(kvm_fpu.from_bytes(snapshot.fpu))
    msrs = dict(snapshot.msrs)
    deadline = msrs.pop(MSR_TSC_DEADLINE, None)
    _restore_msrs(vcpu, msrs)
    if snapshot.lapic:
        vcpu.lapic.set(kvm_lapic_state.from_bytes(snapshot.lapic))
    else:
        # Without an in-kernel APIC every KVM_RUN loads CR8 from kvm_run.
        vcpu.run_area.cr8 = sregs.cr8
    if deadline is not None:
        _restore_msrs(vcpu, {MSR_TSC_DEADLINE: deadline})
    vcpu.regs.set(kvm_regs.from_bytes(snapshot.regs))
    vcpu.events.set(kvm_vcpu_events.from_bytes(snapshot.events))
    vcpu.debug.set_regs(kvm_debugregs.from_bytes(snapshot.debugregs))
    if snapshot.mp_state is not None:
        vcpu.set_mp_state(snapshot.mp_state)


def _restore_msrs(vcpu: VcpuState, values: dict[int, int]) -> None:
    refused = _write_tolerantly(vcpu, values)
    now = vcpu.msrs.get_offered(refused)
    wrong = [index for index in refused if now.get(index) != values[index]]
    if wrong:
        lines = "".join(
            f"\n  MSR {index:#x}: saved {values[index]:#x}, now {_hex(now.get(index))}" for index in wrong
        )
        raise RestoreError(f"{vcpu.name}: KVM refused {len(wrong)} MSRs{lines}")


def _write_tolerantly(vcpu: VcpuState, values: dict[int, int]) -> list[int]:
    refused: list[int] = []
    pending = dict(values)
    while pending:
        try:
            vcpu.msrs.set_many(pending)
            break
        except MsrError as error:
            refused.append(error.index)
            for index in [*error.done, error.index]:
                del pending[index]
    return refused
