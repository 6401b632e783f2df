# SPDX-License-Identifier: Apache-2.0
"""Whether this host can run SEV, SEV-ES and SNP guests, each missing piece with the way to get it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from kvmpy.coco import sev_host
from kvmpy.coco.sev_host import SEV_LEAF, SevHost
from kvmpy.core.errors import KvmError, MissingError
from kvmpy.core.kernel import ModuleParameters
from kvmpy.core.kvm import Kvm
from kvmpy.platforms import LARGE_GMEM, LARGE_GMEM_PLATFORM, SOFTWARE_SP
from kvmpy.uapi.constants import (
    KVM_X86_GRP_SEV,
    KVM_X86_SEV_SNP_REQ_CERTS,
    KVM_X86_SEV_VMSA_FEATURES,
    KVM_X86_SNP_POLICY_BITS,
    VmType,
)

SOFTWARE = SOFTWARE_SP


@functools.cache
def software_platform() -> bool:
    """Tell whether the secure processor of this kernel is the lab's software one: nothing is encrypted."""
    return any(Path("/sys/bus/platform/devices").glob("softsev*"))


def large_guest_memfd() -> bool:
    """Tell whether guest_memfd has folios of 2 MiB by the hook of the lab's kernel."""
    module, _, parameter = LARGE_GMEM.partition(".")
    return ModuleParameters(module).get(parameter) == "Y"


@dataclass(frozen=True)
class SevCpuid:
    """CPUID 0x8000001F as KVM_GET_SUPPORTED_CPUID has it (the instruction may show less)."""

    features: int
    c_bit: int
    reduction: int
    guests: int
    first_sev_asid: int

    @property
    def sev(self) -> bool:
        """Whether SEV is there."""
        return bool(self.features & 1 << 1)

    @property
    def es(self) -> bool:
        """Whether SEV-ES is there."""
        return bool(self.features & 1 << 3)

    @property
    def snp(self) -> bool:
        """Whether SEV-SNP is there."""
        return bool(self.features & 1 << 4)


def sev_cpuid(kvm: Kvm) -> SevCpuid | None:
    """Return the encryption features of *kvm*, None without the leaf."""
    for entry in kvm.supported_cpuid.entries_list():
        if entry.function == SEV_LEAF:
            ebx = int(entry.ebx)
            return SevCpuid(int(entry.eax), ebx & 0x3F, ebx >> 6 & 0x3F, int(entry.ecx), int(entry.edx))
    return None


def vmsa_features(kvm: Kvm) -> int:
    """Return the VMSA features for KVM_SEV_INIT2 (KVM_X86_SEV_VMSA_FEATURES), 0 where KVM cannot say."""
    return _attribute(kvm, KVM_X86_SEV_VMSA_FEATURES)


def snp_policy_bits(kvm: Kvm) -> int:
    """Return the bits that SNP policies may have (KVM_X86_SNP_POLICY_BITS), 0 where KVM cannot say."""
    return _attribute(kvm, KVM_X86_SNP_POLICY_BITS)


def req_certs(kvm: Kvm) -> bool:
    """Tell whether KVM_SEV_SNP_ENABLE_REQ_CERTS is on offer (KVM_X86_SEV_SNP_REQ_CERTS)."""
    return bool(_attribute(kvm, KVM_X86_SEV_SNP_REQ_CERTS))


def _attribute(kvm: Kvm, attribute: int) -> int:
    try:
        return kvm.attrs.get_int(KVM_X86_GRP_SEV, attribute)
    except KvmError:
        return 0


def missing_pieces(kvm: Kvm, kind: VmType, host: SevHost) -> list[MissingError]:
    """Return what *host* lacks to launch guests of a VM type; empty when nothing does."""
    if kind not in kvm.vm_types():
        return sev_host.causes(host, kind)
    cpuid = sev_cpuid(kvm)
    if cpuid is None or not cpuid.c_bit:
        return [MissingError("CPUID 0x8000001F in KVM_GET_SUPPORTED_CPUID", "a kernel that reports it")]
    return sev_host.lacking(host, kind)


def describe(kvm: Kvm, host: SevHost) -> str:
    """Return C-bit, ASIDs, firmware and what the platform is, in one line."""
    words = []
    cpuid = sev_cpuid(kvm)
    if cpuid is not None:
        words.append(f"C-bit {cpuid.c_bit}")
    if cpuid is not None and cpuid.guests:
        last, hidden = cpuid.first_sev_asid - 1, host.hidden
        kinds = f"SNP to {hidden}, SEV-ES to {last}" if hidden else f"SEV-ES and SNP to {last}"
        words.append(f"{cpuid.guests} ASIDs ({kinds})")
    status = host.status
    if status is None:
        words.append("firmware unknown")
    else:
        words.append(f"firmware {status.version}, {status.state}, {status.guests} guests")
        if status.state == "uninitialised" and host.is_off("ccp.psp_init_on_probe"):
            words.append("the first guest initialises it (ccp.psp_init_on_probe=0)")
    if software_platform():
        words.append(f"{SOFTWARE}: nothing is encrypted")
    if large_guest_memfd():
        words.append(LARGE_GMEM_PLATFORM)
    return ", ".join(words)
