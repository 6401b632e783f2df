# SPDX-License-Identifier: Apache-2.0
"""The save area that KVM makes of a vCPU when a launch encrypts its state, read from the vCPU before.

Linux: sev_es_sync_vmsa(), which copies the save area of the VMCB whole, and what SVM's setters keep there
(EFER.SVME, the host's CR4.MCE, CR0 without CD and NW; svm_set_msr() for MSRs). A segment is what
KVM_SET_SREGS was given: KVM's own reset state lacks the accessed bit that KVM_GET_SREGS shows, so a vCPU
must have had its segments set.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

from kvmpy.core.kernel import cpu_info
from kvmpy.core.vcpu_state import GUEST_SSP_REG_ID
from kvmpy.uapi.constants import KVM_CAP_ONE_REG, KVM_CAP_XCRS
from kvmpy.uapi.structs import kvm_segment
from kvmpy.x86.cpuid import Cpuid
from kvmpy.x86.vmsa import VMSA, SevFeature
from kvmpy.x86.xsave import AVX, PKRU, Layout, XsaveArea

if TYPE_CHECKING:
    from kvmpy.core.vcpu import Vcpu

_EFER_SVME = 1 << 12
_CR4_MCE = 1 << 6
_CR0_CACHE_BITS = 3 << 29
_DR7_INIT = 0x400
_GENERAL = (
    *("rax", "rbx", "rcx", "rdx", "rsp", "rbp", "rsi", "rdi", "rip", "rflags"),
    *(f"r{number}" for number in range(8, 16)),
)
_MSRS = {
    "star": 0xC0000081,
    "lstar": 0xC0000082,
    "cstar": 0xC0000083,
    "sfmask": 0xC0000084,
    "kernel_gs_base": 0xC0000102,
    "sysenter_cs": 0x174,
    "sysenter_esp": 0x175,
    "sysenter_eip": 0x176,
    "g_pat": 0x277,
    "xss": 0xDA0,
    # Branch records, and shadow stacks in kernel mode: those of user mode are no part of this copy.
    "dbgctl": 0x1D9,
    "br_from": 0x1DB,
    "br_to": 0x1DC,
    "last_excp_from": 0x1DD,
    "last_excp_to": 0x1DE,
    "s_cet": 0x6A2,
    "isst_addr": 0x6A8,
}
_SPEC_CTRL = 0x48
_MACHINE_CHECKS = Path("/sys/devices/system/machinecheck")

# Offsets in the XSAVE area's legacy part (AMD APM volume 2, figure 11-10).
_MXCSR, _XSTATE_BV = 24, 512
_YMM = 576  # where every processor has it (CPUID leaf 0xD, subleaf 2)


def host_has_machine_checks() -> bool:
    """Tell whether this host runs with CR4.MCE, which KVM adds to every guest's CR4."""
    return _MACHINE_CHECKS.is_dir()


def host_virtualises_spec_ctrl() -> bool:
    """Tell whether SPEC_CTRL is a part of the save area: else KVM keeps the vCPU's value for itself."""
    return "v_spec_ctrl" in cpu_info().get("flags", "").split()


def predict(
    vcpu: Vcpu,
    vmsa_features: int,
    *,
    snp: bool = False,
    fpu: bool = True,
    machine_checks: bool | None = None,
    spec_ctrl: bool | None = None,
) -> bytes:
    """Return the 4096 bytes of *vcpu*'s save area; before the command that encrypts it.

    *vmsa_features* are those of KVM_SEV_INIT2. *fpu* is False for VMs of KVM_SEV_ES_INIT, whose save areas
    hold no FPU state. *machine_checks* is :func:`host_has_machine_checks` unless given, *spec_ctrl*
    :func:`host_virtualises_spec_ctrl`.
    """
    regs, sregs = vcpu.regs.get(), vcpu.regs.get_sregs()
    mce = host_has_machine_checks() if machine_checks is None else machine_checks
    fields: dict[str, int | bytes] = {name: int(getattr(regs, name)) for name in _GENERAL}
    for name in ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr"):
        fields.update(_segment(name, getattr(sregs, "ldt" if name == "ldtr" else name)))
    for name, table in (("gdtr", sregs.gdt), ("idtr", sregs.idt)):
        fields |= {f"{name}.limit": int(table.limit), f"{name}.base": int(table.base)}
    fields |= {
        "cpl": int(sregs.ss.dpl),
        "efer": int(sregs.efer) | _EFER_SVME,
        "cr0": int(sregs.cr0) & ~_CR0_CACHE_BITS,
        "cr2": int(sregs.cr2),
        "cr3": int(sregs.cr3),
        "cr4": int(sregs.cr4) | (_CR4_MCE if mce else 0),
        "dr6": int(vcpu.debug.get_regs().dr6),
        "dr7": _DR7_INIT,
        "sev_features": vmsa_features | (SevFeature.SNP_ACTIVE if snp else 0),
    }
    fields |= _msrs(vcpu, host_virtualises_spec_ctrl() if spec_ctrl is None else spec_ctrl)
    fields["ssp"] = _shadow_stack(vcpu)
    xsave = vcpu.fpu.get_xsave2().to_bytes()
    fields |= _extended_state(vcpu, xsave)
    if fpu:
        fields |= _fpu(vcpu, xsave)
    return VMSA.pack(fields)


def _segment(name: str, segment: kvm_segment) -> dict[str, int | bytes]:
    attributes = (
        segment.type
        | segment.s << 4
        | segment.dpl << 5
        | (segment.present and not segment.unusable) << 7
        | segment.avl << 8
        | segment.l << 9
        | segment.db << 10
        | segment.g << 11
    )
    return {
        f"{name}.selector": int(segment.selector),
        f"{name}.attrib": int(attributes),
        f"{name}.limit": int(segment.limit),
        f"{name}.base": int(segment.base),
    }


def _msrs(vcpu: Vcpu, spec_ctrl: bool) -> dict[str, int | bytes]:
    """Return what the save area holds of the MSRs; one that the vCPU does not have is zero there."""
    wanted = _MSRS | ({"spec_ctrl": _SPEC_CTRL} if spec_ctrl else {})
    values = vcpu.msrs.get_offered(wanted.values())
    return {name: values.get(index, 0) for name, index in wanted.items()}


def _shadow_stack(vcpu: Vcpu) -> int:
    """Return SSP, a register that has no MSR: 0 where the vCPU has no shadow stacks."""
    if not vcpu.vm.kvm.check_extension(KVM_CAP_ONE_REG) or GUEST_SSP_REG_ID not in vcpu.regs.get_list():
        return 0
    return vcpu.regs.get_one(GUEST_SSP_REG_ID)


def _extended_state(vcpu: Vcpu, xsave: bytes) -> dict[str, int | bytes]:
    fields: dict[str, int | bytes] = {"xcr0": 1}
    if vcpu.vm.kvm.check_extension(KVM_CAP_XCRS):
        xcrs = vcpu.fpu.get_xcrs()
        values = {int(xcr.xcr): int(xcr.value) for xcr in xcrs.xcrs[: xcrs.nr_xcrs]}
        fields["xcr0"] = values.get(0, 1)
    layout = Layout.from_cpuid(Cpuid.from_struct(vcpu.cpuid.get()))
    if PKRU in layout.components:
        fields["pkru"] = XsaveArea(xsave, layout).pkru
    return fields


def _fpu(vcpu: Vcpu, area: bytes) -> dict[str, int | bytes]:
    """Return the x87, SSE and AVX state; x87 registers lie as eight mantissas, then eight exponents.

    KVM_GET_FPU has the registers as they are in KVM's memory, which is what KVM copies. KVM_GET_XSAVE shows
    initial values for components without a bit in XSTATE_BV, which KVM_SET_FPU does not set.
    """
    fpu = vcpu.fpu.get()
    raw = fpu.to_bytes()
    registers = [raw[16 * number : 16 * number + 10] for number in range(8)]
    xmm, size = fpu.fields()["xmm"]
    (components,) = struct.unpack_from("<Q", area, _XSTATE_BV)
    has_ymm = components >> AVX & 1 and len(area) >= _YMM + 256
    return {
        "x87_fcw": int(fpu.fcw),
        "x87_fsw": int(fpu.fsw),
        "x87_ftw": int(fpu.ftwx),
        "x87_fop": int(fpu.last_opcode),
        "x87_rip": int(fpu.last_ip),
        "x87_dp": int(fpu.last_dp),
        "mxcsr": int.from_bytes(area[_MXCSR : _MXCSR + 4], "little"),
        "fpreg_x87": b"".join(part[:8] for part in registers) + b"".join(part[8:] for part in registers),
        "fpreg_xmm": raw[xmm : xmm + size],
        "fpreg_ymm": area[_YMM : _YMM + 256] if has_ymm else bytes(256),
    }
