# SPDX-License-Identifier: Apache-2.0
"""What a host lacks for SEV, SEV-ES and SNP: each piece by name, on hosts that are made up."""

from __future__ import annotations

from typing import Any, cast

import pytest

from kvmpy.coco import sev_platform
from kvmpy.core.errors import MissingError
from kvmpy.core.kvm import Kvm
from kvmpy.core.sev_device import PlatformStatus
from kvmpy.uapi.constants import VmType
from kvmpy.uapi.structs import kvm_cpuid2, kvm_cpuid_entry2

SEV, ES, SNP = VmType.KVM_X86_SEV_VM, VmType.KVM_X86_SEV_ES_VM, VmType.KVM_X86_SNP_VM
ALL_ON = {"sev": "Y", "sev_es": "Y", "sev_snp": "Y", "npt": "Y"}


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


class FakeDevice:
    """A secure processor that answers."""

    def __enter__(self) -> FakeDevice:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def platform_status(self) -> PlatformStatus:
        """Return a status."""
        return PlatformStatus(1, 55, 40, "initialised", 3, True)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A host that has everything; tests take pieces away."""
    facts: dict[str, Any] = {"flags": {"svm", "sev", "sev_es", "sev_snp"}, "config": "y", "module": ALL_ON}
    monkeypatch.setattr(sev_platform, "_cpu_flags", lambda: facts["flags"])
    monkeypatch.setattr(sev_platform, "kernel_config", lambda _option: facts["config"])
    monkeypatch.setattr(sev_platform, "module_parameters", lambda _module: facts["module"])
    monkeypatch.setattr(sev_platform, "SevDevice", FakeDevice)
    monkeypatch.setattr(sev_platform, "software_platform", lambda: False)
    return facts


def missing(kvm: FakeKvm, kind: VmType) -> list[str]:
    """Return what is missing, without how to get it."""
    return [piece.missing for piece in sev_platform.missing_pieces(cast(Kvm, kvm), kind)]


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("kind", [SEV, ES, SNP])
def test_nothing_is_missing(kind: VmType) -> None:
    """A host that offers the type, with ASIDs and a firmware that answers, lacks nothing."""
    assert missing(FakeKvm({0, 2, 3, 4}), kind) == []


def test_another_cpu(host: dict[str, Any]) -> None:
    """Without SVM there is nothing else to say."""
    host["flags"] = set()
    assert missing(FakeKvm({0}), SNP) == ["an AMD CPU with SVM"]


@pytest.mark.parametrize(("kind", "flag"), [(SEV, "sev"), (ES, "sev_es"), (SNP, "sev_snp")])
def test_the_firmware_setup(host: dict[str, Any], kind: VmType, flag: str) -> None:
    """A CPU flag that is absent is the firmware setup's: SMEE and its friends."""
    host["flags"] = {"svm"}
    pieces = sev_platform.missing_pieces(cast(Kvm, FakeKvm({0})), kind)
    assert pieces[0].missing == f"CPU flag {flag}"
    assert "SMEE" in pieces[0].how


def test_the_kernel(host: dict[str, Any]) -> None:
    """CONFIG_KVM_AMD_SEV, the module and its parameters are named."""
    host["config"] = "n"
    assert "CONFIG_KVM_AMD_SEV" in missing(FakeKvm({0}), SEV)
    host["module"] = {}
    assert "module kvm_amd" in missing(FakeKvm({0}), SEV)


@pytest.mark.parametrize(
    ("kind", "parameter", "words"),
    [(SEV, "sev", "kvm_amd.sev=1"), (ES, "sev_es", "SEV-ES ASID space limit"), (SNP, "sev_snp", "RMP")],
)
def test_a_parameter(host: dict[str, Any], kind: VmType, parameter: str, words: str) -> None:
    """A parameter that is off is named with its value, and what may have switched it off."""
    host["module"] = {**ALL_ON, parameter: "N"}
    pieces = sev_platform.missing_pieces(cast(Kvm, FakeKvm({0})), kind)
    assert [piece.missing for piece in pieces] == [f"kvm_amd.{parameter} (it is N)"]
    assert words in pieces[0].how


@pytest.mark.usefixtures("host")
def test_an_old_kernel() -> None:
    """Where nothing else explains it, the kernel does not offer the VM type."""
    assert missing(FakeKvm({0}), SNP) == ["VM type KVM_X86_SNP_VM (KVM_CAP_VM_TYPES bit 4)"]


@pytest.mark.usefixtures("host")
def test_asids() -> None:
    """ASIDs that all belong to the other kind are missing to this one."""
    for_es = FakeKvm({0, 2, 3, 4}, (0x1A, 51, 500, 501))
    assert missing(for_es, SEV)[0].startswith("an ASID for SEV without ES")
    assert missing(for_es, SNP) == []
    for_sev = FakeKvm({0, 2, 3, 4}, (0x1A, 51, 500, 1))
    assert missing(for_sev, SNP)[0].startswith("an ASID for SEV-ES and SNP")
    assert missing(for_sev, SEV) == []


@pytest.mark.usefixtures("host")
def test_no_leaf() -> None:
    """Without the CPUID leaf nobody knows the C-bit."""
    assert missing(FakeKvm({0, 2}, None), SEV) == ["CPUID 0x8000001F in KVM_GET_SUPPORTED_CPUID"]


@pytest.mark.usefixtures("host")
def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A /dev/sev that cannot be opened is told in its own words."""

    def refuse() -> FakeDevice:
        raise MissingError("no permission to open /dev/sev for reading and writing", "udev")

    monkeypatch.setattr(sev_platform, "SevDevice", refuse)
    assert missing(FakeKvm({0, 2}), SEV) == ["no permission to open /dev/sev for reading and writing"]


@pytest.mark.usefixtures("host")
def test_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The note names C-bit, ASIDs, firmware and a platform that is software."""
    kvm = cast(Kvm, FakeKvm({0, 2}))
    line = "C-bit 51, 500 ASIDs, SEV-ES and SNP below 100, firmware 1.55.40, initialised, 3 guests"
    assert sev_platform.describe(kvm) == line
    monkeypatch.setattr(sev_platform, "software_platform", lambda: True)
    assert sev_platform.describe(kvm) == f"{line}, software AMD-SP: nothing is encrypted"
