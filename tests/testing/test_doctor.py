# SPDX-License-Identifier: Apache-2.0
"""``kvmpy doctor``: everything the host offers, and each missing piece."""

from __future__ import annotations

import io
import json
import os

import pytest
from click.testing import CliRunner
from rich.console import Console

from kvmpy.cli.doctor import examine, show
from kvmpy.cli.main import main
from kvmpy.coco.kvm import Kvm
from kvmpy.testing import host
from tests.testing.support import NO_KVM


def shown() -> str:
    stream = io.StringIO()
    show(Console(file=stream, highlight=False, markup=False, soft_wrap=True), examine())
    return stream.getvalue()


def test_without_kvm_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMPY_DEV_KVM", NO_KVM)
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0
    document = json.loads(result.output)
    assert document["kvm"]["usable"] is False
    assert document["kvm"]["missing"] == f"{NO_KVM} does not exist"
    assert document["kernel"]["release"] == os.uname().release
    assert "protections" not in document
    assert f"KVM cannot be used: {NO_KVM} does not exist\n  get it: " in shown()


def test_an_emulated_platform_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMPY_DEV_KVM", NO_KVM)
    monkeypatch.setenv("KVMPY_PLATFORM", "lab")
    assert "platform lab (emulated: its results say nothing about hardware)" in shown()


@pytest.mark.requires("kvm")
def test_capabilities_types_and_protections_are_kvms_own(kvm: Kvm) -> None:
    from kvmpy.uapi.constants import KVM_CAP_NR_MEMSLOTS, Cap

    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0
    data = json.loads(result.output)
    assert set(data["capabilities"]) == set(Cap.__members__)
    assert data["capabilities"]["KVM_CAP_NR_MEMSLOTS"] == kvm.check_extension(KVM_CAP_NR_MEMSLOTS)
    assert data["vm_types"] == [host.vm_type_name(number) for number in sorted(kvm.vm_types())]
    offered = kvm.protections()
    assert list(data["protections"]) == list(offered)
    for name, entry in data["protections"].items():
        assert entry["available"] is offered[name].available
        assert entry["available"] or all(piece["what"] for piece in entry["missing"])


@pytest.mark.requires("kvm")
def test_costs_are_measured() -> None:
    measured = examine()["measured"]
    assert 0 < measured["exit_us"] < 100_000
    assert measured["ring0_native"] is (measured["instruction_ns"] < 50)
    # An exit holds at least one instruction.
    assert measured["instruction_ns"] < measured["exit_us"] * 1000


@pytest.mark.requires("kvm")
def test_the_text_names_every_module_parameter_and_capability() -> None:
    text = shown()
    facts = examine()
    for module, parameters in facts["modules"].items():
        assert f"\n  {module}\n" in text
        for name in parameters:
            assert f"\n    {name} = " in text
    for name, value in facts["capabilities"].items():
        assert (f"  {name} = " in text) is bool(value)
    assert "ring 0 runs " in text


def test_the_kernel_config_of_an_unknown_option_is_no() -> None:
    if host.kernel_config("KVM") is None:
        assert host.kernel_config("NO_SUCH_OPTION") is None
    else:
        assert host.kernel_config("CONFIG_NO_SUCH_OPTION") == "n"


def test_an_amd_hosts_missing_fixes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMPY_DEV_KVM", NO_KVM)
    monkeypatch.setattr(host, "vendor_modules", lambda: ("kvm_amd",))
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "host", "6.12.90", "#1", "x86_64")))
    report = examine()["kernel"]["fixes"]
    assert report["sev-dbg-page"] is False
    assert report["snp-finish-twice"] is True
    text = shown()
    assert "not known to have 78ee2d50185a (Linux 7.2, 7.1.3, 6.18.38, 6.12.95): KVM: SVM: Fix page" in text
    assert "9b9f7962e3e8" not in text
    monkeypatch.setattr(host, "vendor_modules", lambda: ("kvm_pvm",))
    assert "not known to have" not in shown()


@pytest.mark.requires("kvm")
def test_require_has_an_exit_status(kvm: Kvm) -> None:
    """0 with all that was asked for, 1 where something is missing: by name alone, or as tests write it."""
    offered = {name for name, state in kvm.protections().items() if state.available}
    result = CliRunner().invoke(main, ["doctor", "--require", "none", "--require", "KVM_CAP_NR_VCPUS"])
    assert (result.exit_code, result.output) == (0, "")
    for name in kvm.protections():
        result = CliRunner().invoke(main, ["doctor", "--require", name, "--require", "kvm"])
        assert result.exit_code == (name not in offered), name
        assert (f"missing: protection {name} (" in result.output) == (name not in offered)
    result = CliRunner().invoke(main, ["doctor", "--json", "--require", "KVM_CAP_NR_VCPUS>=99999"])
    assert result.exit_code == 1
    [entry] = json.loads(result.output)
    assert "KVM_CAP_NR_VCPUS" in entry["what"]


def test_require_without_kvm_or_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMPY_DEV_KVM", NO_KVM)
    result = CliRunner().invoke(main, ["doctor", "--require", "snp", "--require", "none"])
    assert (result.exit_code, result.output.count("missing: ")) == (1, 1)
    assert f"missing: {NO_KVM} does not exist\nget it:  " in result.output
    result = CliRunner().invoke(main, ["doctor", "--require", "snpp"])
    assert result.exit_code == 2
    assert "unknown requirement 'snpp'" in result.output
