# SPDX-License-Identifier: Apache-2.0
"""The launch digest of a guest that QEMU starts with OVMF, under SEV, SEV-ES and SNP.

The image and the hashes of what it boots, under SNP the sections that its metadata name, then one save area
for each vCPU as it is after a reset (AMD APM volume 2, table 14-1, and what KVM keeps in it: see
vmsa_prediction). No KVM is needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvmpy.coco.ovmf import KernelHashes, Ovmf, OvmfError, Section, SectionKind
from kvmpy.coco.sev_session import LaunchDigest
from kvmpy.coco.snp_digest import PAGE_SIZE, PageType, SnpDigest
from kvmpy.x86.vmsa import VMSA, SevFeature
from kvmpy.x86.vmsa import SegmentAttribute as Attr

# QEMU's models (builtin_x86_defs): family, model, stepping.
CPU_MODELS = {
    "EPYC": (0x17, 0x01, 2),
    "EPYC-Rome": (0x17, 0x31, 0),
    "EPYC-Milan": (0x19, 0x01, 1),
    "EPYC-Genoa": (0x19, 0x11, 0),
    "EPYC-Turin": (0x1A, 0x00, 0),
}
_RESET_VECTOR = 0xFFFF_FFF0
_DATA = Attr.P | Attr.S | Attr.RW | Attr.A
_PAGE_TYPES = {
    SectionKind.SEC_MEM: PageType.ZERO,
    SectionKind.SVSM_CAA: PageType.ZERO,
    SectionKind.KERNEL_HASHES: PageType.ZERO,
    SectionKind.SECRETS: PageType.SECRETS,
    SectionKind.CPUID: PageType.CPUID,
}


def cpu_signature(name: str) -> int:
    """Return EAX of CPUID leaf 1 of a QEMU model, such as ``EPYC-Milan`` or ``EPYC-Milan-v2``.

    ValueError for others. AMD's CPUID specification: family and model beyond four bits are split.
    """
    known = CPU_MODELS.get(re.sub(r"-(v\d+|IBPB)$", "", name))
    if known is None:
        raise ValueError(
            f"no CPU model {name!r}; known: {', '.join(CPU_MODELS)}, each with a version such as -v2"
        )
    family, model, stepping = known
    return (family - 0xF) << 20 | (model >> 4) << 16 | 0xF << 8 | (model & 0xF) << 4 | stepping


def reset_vmsa(eip: int, signature: int, features: int) -> bytes:
    """Return the save area of a vCPU that starts at *eip* after a reset: 4096 bytes.

    *signature* is EAX of CPUID leaf 1, which EDX holds; *features* are SEV_FEATURES.
    """
    fields: dict[str, int | bytes] = {
        "cs.selector": 0xF000,
        "cs.base": eip & 0xFFFF_0000,
        "cs.attrib": _DATA | Attr.CODE,
        "ldtr.attrib": Attr.P | Attr.RW,
        "tr.attrib": Attr.P | Attr.CODE | Attr.RW | Attr.A,
        "efer": 1 << 12,  # SVME
        "cr4": 1 << 6,  # MCE
        "cr0": 1 << 4,  # ET; KVM keeps neither CD nor NW
        "dr6": 0xFFFF_0FF0,
        "dr7": 0x400,
        "rflags": 2,
        "rip": eip & 0xFFFF,
        "rdx": signature,
        "g_pat": 0x0007_0406_0007_0406,
        "xcr0": 1,
        "mxcsr": 0x1F80,
        "x87_fcw": 0x37F,
        "sev_features": features,
    }
    fields |= {f"{name}.attrib": _DATA for name in ("es", "ss", "ds", "fs", "gs")}
    for name in ("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr"):
        fields[f"{name}.limit"] = 0xFFFF
    return VMSA.pack(fields)


@dataclass(frozen=True)
class FirmwareLaunch:
    """What is launched: the image, vCPUs of one model by its *signature*, and what is booted directly."""

    ovmf: Ovmf
    vcpus: int = 0
    signature: int = 0
    kernel: KernelHashes | None = None

    def __post_init__(self) -> None:
        if self.vcpus < 0:
            raise ValueError(f"{self.vcpus} vCPUs")

    def vmsas(self, features: int) -> list[bytes]:
        """Return the save areas in the order of the vCPUs; OvmfError where the image starts but one."""
        if self.vcpus < 2:
            return [reset_vmsa(_RESET_VECTOR, self.signature, features)] * self.vcpus
        eip = self.ovmf.reset_eip
        if eip is None:
            raise OvmfError(
                "the image does not say where vCPUs but the first start: it is not built for SEV-ES"
            )
        others = reset_vmsa(eip, self.signature, features)
        return [reset_vmsa(_RESET_VECTOR, self.signature, features), *[others] * (self.vcpus - 1)]

    def sev(self, *, es: bool = False) -> LaunchDigest:
        """Return the digest of LAUNCH_UPDATE_DATA, and with *es* of LAUNCH_UPDATE_VMSA: SHA-256."""
        digest = LaunchDigest()
        digest.add(self.ovmf.data)
        if self.kernel is not None:
            if self.ovmf.hash_table_gpa is None:
                raise OvmfError("the image has no place for hashes of a kernel")
            digest.add(self.kernel.table())
        for vmsa in self.vmsas(0) if es else ():
            digest.add(vmsa)
        return digest

    def image(self) -> SnpDigest:
        """Return the SNP digest after the image alone, which can stand for its content."""
        digest = SnpDigest()
        digest.add(PageType.NORMAL, self.ovmf.gpa, self.ovmf.data)
        return digest

    def snp(self, features: int = SevFeature.SNP_ACTIVE, start: bytes | None = None) -> SnpDigest:
        """Return the digest of an SNP launch: SHA-384; *start* is that of the image, where it is known."""
        digest = self.image() if start is None else SnpDigest(start)
        sections = self.ovmf.sections()
        if self.kernel is not None and all(one.kind is not SectionKind.KERNEL_HASHES for one in sections):
            raise OvmfError(
                "the image has no section for hashes of a kernel: take one that is built as AmdSev"
            )
        for section in sections:
            self._add(digest, section)
        for vmsa in self.vmsas(features):
            digest.add_vmsa(vmsa)
        return digest

    def _add(self, digest: SnpDigest, section: Section) -> None:
        if section.kind is SectionKind.KERNEL_HASHES and self.kernel is not None:
            pages = self.kernel.pages(section, self.ovmf.hash_table_gpa)
            digest.add(PageType.NORMAL, section.gpa, pages)
        else:
            digest.add(_PAGE_TYPES[section.kind], section.gpa, pages=section.size // PAGE_SIZE)
