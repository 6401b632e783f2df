# SPDX-License-Identifier: Apache-2.0
"""Requirements that this machine need not fulfil: what they ask, with files made for it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from kvmpy.coco import sev_host
from kvmpy.core.kvm import Kvm
from kvmpy.testing import host, requirements
from kvmpy.testing.requirements import Requirements
from tests.coco.test_sev_host import with_parameters


@pytest.mark.parametrize("source", ["tsc", "kvm-clock", "hyperv_clocksource_tsc_page"])
def test_stable_tsc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    """A kernel that takes its time from the TSC, itself or through its hypervisor, trusts it."""
    monkeypatch.setattr(host, "CLOCK_SOURCE", tmp_path / "current")
    (tmp_path / "current").write_text(f"{source}\n")
    assert Requirements().missing(["stable-tsc"]) == []


def test_unstable_tsc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another clock source is named, and one that cannot be read is not trusted."""
    monkeypatch.setattr(host, "CLOCK_SOURCE", tmp_path / "current")
    assert ["unknown" in missing.what for missing in Requirements().missing(["stable-tsc"])] == [True]
    (tmp_path / "current").write_text("hpet\n")
    (missing,) = Requirements().missing(["stable-tsc"])
    assert "hpet" in missing.what


class PlainKvm:
    """A KVM of default VMs."""

    def vm_types(self) -> set[int]:
        """Return the VM types."""
        return {0}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("KVM_X86_SEV_VM", "kvm_amd.npt (it is N): kvm_amd.npt=1"),
        ("KVM_X86_TDX_VM", "Intel TDX"),
        ("KVM_X86_SW_PROTECTED_VM", "CONFIG_KVM_SW_PROTECTED_VM=y"),
    ],
)
def test_a_vm_type(monkeypatch: pytest.MonkeyPatch, name: str, how: str) -> None:
    """A VM type of SEV lacks what KVM's set-up lacked."""
    monkeypatch.setattr(sev_host, "read", lambda _kvm: with_parameters(kvm_amd__npt="N"))
    missing = requirements._vm_type(cast(Kvm, PlainKvm()), name)
    assert missing is not None
    assert missing.what == f"VM type {name}"
    assert how in missing.how


@pytest.mark.parametrize(
    ("asked", "how"),
    [
        ("kvm.tdp_mmu=Y", None),
        ("kvm.tdp_mmu=1", None),
        ("kvm.tdp_mmu", None),
        ("kvm.tdp_mmu=N", "kvmpy lab run --configuration no-tdp-mmu, or load kvm with tdp_mmu=N, or "),
        ("kvm.force_emulation_prefix=1", "kvmpy lab run --configuration forced-emulation, or load kvm with "),
        ("kvm.tdp_mmu=mine", "kvmpy lab run --configuration mine, or load kvm with tdp_mmu=mine, or "),
        ("kvm.halt_poll_ns=5", "load kvm with halt_poll_ns=5, or "),
        ("kvm.nonesuch=1", "modprobe a kvm that has it"),
        ("kvm.large_gmem=Y", "kvmpy lab run --configuration large-gmem, or modprobe a kvm that has it"),
    ],
)
def test_a_parameter_names_the_configuration_that_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str, how: str | None
) -> None:
    """kvmpy's own, or one of a file that the session was given."""
    there = {"tdp_mmu": "Y", "force_emulation_prefix": "0", "halt_poll_ns": "200000"}
    monkeypatch.setattr(host, "ModuleParameters", lambda module: there if module == "kvm" else {})
    (tmp_path / "mine.toml").write_text('[mine]\nparameters = ["kvm.tdp_mmu=mine"]\n')
    missing = Requirements([tmp_path / "mine.toml"]).missing([f"param:{asked}"])
    assert [entry.how[: len(how or "")] for entry in missing] == ([] if how is None else [how])
    assert all(entry.keys == (f"param:{asked.partition('=')[0]}",) for entry in missing)
