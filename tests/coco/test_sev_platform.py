# SPDX-License-Identifier: Apache-2.0
"""What a host lacks for SEV, SEV-ES and SNP: each piece by name, on hosts that are made up."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest

from kvmpy.coco import sev_platform
from kvmpy.coco.sev_host import SevHost
from kvmpy.core.kvm import Kvm
from kvmpy.uapi.constants import VmType
from kvmpy.uapi.structs import kvm_cpuid2, kvm_cpuid_entry2
from tests.coco.test_sev_host import GENOA, UNINITIALISED, with_parameters

SEV, ES, SNP = VmType.KVM_X86_SEV_VM, VmType.KVM_X86_SEV_ES_VM, VmType.KVM_X86_SNP_VM


class FakeKvm:
    """A KVM with these VM types and this leaf 0x8000001F."""

    def __init__(
        self, types: set[int], leaf: tuple[int, int, int, int] | None = (0x1A, 51, 500, 100)
    ) -> None:
        self._types = types
        entries = []
        if leaf is not None:
            eax, ebx, ecx, edx = leaf
            entries.append(kvm_cpuid_entry2(function=0x8000001F, eax=eax, ebx=ebx, ecx=ecx, edx=edx))
        self.supported_cpuid = kvm_cpuid2.of(entries)

    def vm_types(self) -> set[int]:
        """Return the VM types."""
        return self._types


@pytest.fixture(autouse=True)
def _hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sev_platform, "software_platform", lambda: False)


def missing(kvm: FakeKvm, kind: VmType, host: SevHost = GENOA) -> list[str]:
    """Return what is missing, without how to get it."""
    return [piece.missing for piece in sev_platform.missing_pieces(cast(Kvm, kvm), kind, host)]


@pytest.mark.parametrize("kind", [SEV, ES, SNP])
def test_nothing_is_missing(kind: VmType) -> None:
    """A host that offers the type, with ASIDs and a firmware that answers, lacks nothing."""
    assert missing(FakeKvm({0, 2, 3, 4}), kind) == []


def test_a_type_that_is_not_offered() -> None:
    """A type that KVM does not offer lacks what its set-up wants; an offered one, ASIDs or the processor."""
    host = replace(GENOA, asids=(1006, 1007))
    assert missing(FakeKvm({0}), SEV, host) == ["an ASID for SEV without ES (all belong to SEV-ES and SNP)"]
    assert missing(FakeKvm({0, 2, 3, 4}), SEV, host) == missing(FakeKvm({0}), SEV, host)
    assert missing(FakeKvm({0, 2, 3, 4}), SNP, host) == []
    assert missing(FakeKvm({0}), SNP, host) == ["VM type KVM_X86_SNP_VM (KVM_CAP_VM_TYPES bit 4)"]


def test_no_leaf() -> None:
    """Without the CPUID leaf nobody knows the C-bit."""
    assert missing(FakeKvm({0, 2}, None), SEV) == ["CPUID 0x8000001F in KVM_GET_SUPPORTED_CPUID"]


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        (GENOA, "500 ASIDs (SEV-ES and SNP to 99), firmware 1.55.40, initialised, 0 guests"),
        (
            with_parameters(kvm_amd__ciphertext_hiding_asids="60"),
            "500 ASIDs (SNP to 60, SEV-ES to 99), firmware 1.55.40, initialised, 0 guests",
        ),
        (replace(GENOA, status=None), "500 ASIDs (SEV-ES and SNP to 99), firmware unknown"),
        (
            with_parameters(UNINITIALISED, ccp__psp_init_on_probe="N"),
            (
                "500 ASIDs (SEV-ES and SNP to 99), firmware 1.55.40, uninitialised, 0 guests, "
                "the first guest initialises it (ccp.psp_init_on_probe=0)"
            ),
        ),
    ],
    ids=["plain", "ciphertext hiding", "no firmware", "late"],
)
def test_in_one_line(monkeypatch: pytest.MonkeyPatch, facts: SevHost, line: str) -> None:
    """The note names C-bit, whose ASIDs are which, firmware and a platform that is software."""
    kvm = cast(Kvm, FakeKvm({0, 2}))
    assert sev_platform.describe(kvm, facts) == f"C-bit 51, {line}"
    monkeypatch.setattr(sev_platform, "software_platform", lambda: True)
    assert sev_platform.describe(kvm, facts).endswith("software AMD-SP: nothing is encrypted")
