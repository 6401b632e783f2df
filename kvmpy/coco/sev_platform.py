# SPDX-License-Identifier: Apache-2.0
"""Whether this host can run SEV, SEV-ES and SNP guests, each missing piece with the way to get it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from kvmpy.core.errors import KvmError, MissingError
from kvmpy.core.kernel import config_hint, kernel_config, module_parameters
from kvmpy.core.kvm import Kvm
from kvmpy.core.sev_device import SevDevice
from kvmpy.core.sev_errors import SevError
from kvmpy.uapi.constants import (
    KVM_X86_GRP_SEV,
    KVM_X86_SEV_SNP_REQ_CERTS,
    KVM_X86_SEV_VMSA_FEATURES,
    KVM_X86_SNP_POLICY_BITS,
    VmType,
)

SEV_LEAF = 0x8000_001F
SOFTWARE = "software AMD-SP"
_KINDS = {
    VmType.KVM_X86_SEV_VM: ("sev", "sev"),
    VmType.KVM_X86_SEV_ES_VM: ("sev_es", "sev_es"),
    VmType.KVM_X86_SNP_VM: ("sev_snp", "sev_snp"),
}
_LAB = "or `kvmpy lab run --soft-sev`, a kernel with a software AMD-SP"


@functools.cache
def software_platform() -> bool:
    """Tell whether the secure processor of this kernel is the lab's software one: nothing is encrypted."""
    return any(Path("/sys/bus/platform/devices").glob("softsev*"))


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
        return kvm.get_device_attr_int(KVM_X86_GRP_SEV, attribute)
    except KvmError:
        return 0


def cpu_flags() -> set[str]:
    """Return the flags of /proc/cpuinfo, none where it cannot be read."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()


def _missing_vm_type(kind: VmType) -> list[MissingError]:
    """Say why KVM does not offer the VM type: from the CPU up to the module's parameters."""
    flag, parameter = _KINDS[kind]
    found = []
    flags = cpu_flags()
    if "svm" not in flags:
        return [MissingError("an AMD CPU with SVM", f"an EPYC with SEV, {_LAB}")]
    if flag not in flags:
        bios = {
            "sev": "SMEE (secure memory encryption) on in the firmware setup",
            "sev_es": "SMEE and SEV-ES on in the firmware setup",
            "sev_snp": "an EPYC 7003 or newer with SMEE, SEV-SNP and RMP coverage on in the firmware setup",
        }[flag]
        found.append(MissingError(f"CPU flag {flag}", f"{bios}, {_LAB}"))
    if kernel_config("KVM_AMD_SEV") not in ("y", None):
        found.append(MissingError("CONFIG_KVM_AMD_SEV", config_hint("KVM_AMD_SEV")))
    parameters = module_parameters("kvm_amd")
    if not parameters:
        found.append(MissingError("module kvm_amd", "modprobe kvm_amd"))
    elif parameters.get(parameter) not in ("Y", "1"):
        how = f"kvm_amd.{parameter}=1"
        if parameter == "sev_es":
            how += ", and ASIDs for SEV-ES: raise the firmware setup's `SEV-ES ASID space limit` above 1"
        elif parameter == "sev_snp":
            how += ", no `iommu=off`, and an RMP table that the firmware set up (dmesg | grep -i rmp)"
        elif parameters.get("npt") not in ("Y", "1"):
            how += " and kvm_amd.npt=1"
        found.append(MissingError(f"kvm_amd.{parameter} (it is {parameters.get(parameter, 'absent')})", how))
    if not found:
        what = f"VM type {kind.name} (KVM_CAP_VM_TYPES bit {int(kind)})"
        found.append(
            MissingError(what, f"a kernel that offers it (6.11 for SNP, 6.10 for the others), {_LAB}")
        )
    return found


def _missing_asids(kind: VmType, cpuid: SevCpuid) -> list[MissingError]:
    if kind == VmType.KVM_X86_SEV_VM and cpuid.guests and cpuid.first_sev_asid > cpuid.guests:
        return [
            MissingError(
                "an ASID for SEV without ES (all belong to SEV-ES and SNP)",
                f"lower `SEV-ES ASID space limit` (it is {cpuid.first_sev_asid}) in the firmware setup",
            )
        ]
    if kind != VmType.KVM_X86_SEV_VM and cpuid.first_sev_asid == 1:
        return [
            MissingError(
                "an ASID for SEV-ES and SNP (all belong to SEV)",
                "raise `SEV-ES ASID space limit` above 1 in the firmware setup",
            )
        ]
    return []


def missing_pieces(kvm: Kvm, kind: VmType) -> list[MissingError]:
    """Return what this host lacks to launch guests of a VM type; empty when nothing does."""
    if kind not in kvm.vm_types():
        return _missing_vm_type(kind)
    cpuid = sev_cpuid(kvm)
    if cpuid is None or not cpuid.c_bit:
        return [MissingError("CPUID 0x8000001F in KVM_GET_SUPPORTED_CPUID", "a kernel that reports it")]
    found = _missing_asids(kind, cpuid)
    try:
        device = SevDevice()
    except MissingError as error:
        return [*found, error]
    with device:
        try:
            status = device.platform_status()
            if status.state == "uninitialised" and kind == VmType.KVM_X86_SNP_VM:
                device.snp_platform_status()
        except SevError as error:
            found.append(MissingError("a secure processor that answers", str(error).splitlines()[0]))
    return found


def describe(kvm: Kvm) -> str:
    """Return C-bit, firmware and what the platform is, in one line."""
    words = []
    cpuid = sev_cpuid(kvm)
    if cpuid is not None:
        words.append(f"C-bit {cpuid.c_bit}")
        if cpuid.guests:
            words.append(f"{cpuid.guests} ASIDs, SEV-ES and SNP below {cpuid.first_sev_asid}")
    try:
        with SevDevice() as device:
            status = device.platform_status()
            words.append(f"firmware {status.version}, {status.state}, {status.guests} guests")
    except (MissingError, SevError):
        words.append("firmware unknown")
    if software_platform():
        words.append(f"{SOFTWARE}: nothing is encrypted")
    return ", ".join(words)
