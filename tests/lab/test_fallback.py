# SPDX-License-Identifier: Apache-2.0
"""``kvmpy run`` on a machine without a usable KVM: it says so, and runs the selftests in the lab."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvmpy.cli import lab_run
from kvmpy.cli.run import run, why_lab
from kvmpy.lab import kernels
from kvmpy.lab.errors import LabError
from kvmpy.testing import gate, host
from kvmpy.testing.verdicts import Missing

MISSING = Missing("/dev/kvm does not exist", "load a KVM module", ("kvm",))


@pytest.fixture
def no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "kvm_missing", lambda: MISSING)
    for variable in (gate.VARIABLE, host.PLATFORM_VARIABLE, "KVMPY_LAB"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.usefixtures("no_kvm")
def test_why_the_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_lab("auto") == "KVM cannot be used here (/dev/kvm does not exist)"
    assert why_lab("never") == ""
    monkeypatch.setattr(host, "kvm_missing", lambda: None)
    assert why_lab("auto") == ""
    assert why_lab("always") == "as asked for"


@pytest.mark.usefixtures("no_kvm")
def test_the_environment_chooses_as_the_option_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMPY_LAB", "always")
    monkeypatch.setattr(host, "kvm_missing", lambda: None)
    assert len(invoke(monkeypatch)[1]) == 1
    assert not invoke(monkeypatch, "--lab", "never", "--list")[1]


@pytest.mark.parametrize(
    ("variable", "value"),
    [(gate.VARIABLE, "kvm"), (gate.VARIABLE, "snp,all"), (host.PLATFORM_VARIABLE, "lab")],
)
@pytest.mark.usefixtures("no_kvm")
def test_who_insists_on_kvm_hears_that_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert why_lab("auto") == ""


def invoke(monkeypatch: pytest.MonkeyPatch, *args: str) -> tuple[Result, list[Any]]:
    calls: list[Any] = []

    def run_tests(paths: tuple[str, ...], values: dict[str, Any], extra: list[str]) -> int:
        calls.append((paths, values, extra))
        return 1

    monkeypatch.setattr(lab_run, "run_tests", run_tests)
    return CliRunner().invoke(run, list(args)), calls


@pytest.mark.usefixtures("no_kvm")
def test_the_command_goes_on_in_the_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    result, calls = invoke(monkeypatch, "memory", "-k", "dirty", "-n", "3", "--json", "o.json", "--", "-x")
    assert result.exit_code == 1
    assert "KVM cannot be used here (/dev/kvm does not exist): the selftests run in the lab" in result.output
    ((paths, values, extra),) = calls
    assert (paths, extra) == (("memory",), ["-x"])
    wanted = {"expression": "dirty", "machines": 3, "json": "o.json", "may_build": True}
    assert {name: values[name] for name in wanted} == wanted


@pytest.mark.usefixtures("no_kvm")
def test_records_are_asked_for_in_the_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    result, calls = invoke(monkeypatch, "--record", "all", "--record-dir", "there")
    assert result.exit_code == 1
    ((_, values, _),) = calls
    assert (values["record"], values["record_dir"]) == ("all", "there")


@pytest.mark.usefixtures("no_kvm")
def test_without_a_qemu_the_command_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch, cache: Path, image: Path
) -> None:
    kernels.register(image, "file")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    result = CliRunner().invoke(run, ["memory"])
    assert result.exit_code == 3
    assert "the lab needs qemu-system-x86_64" in result.output
    assert "qemu-system-x86" in result.output.rpartition("install with: ")[2]


@pytest.mark.usefixtures("no_kvm")
def test_a_kernel_that_cannot_be_built_is_a_failure(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    from kvmpy.lab import build

    def broken(*_: object, **__: object) -> None:
        raise LabError("the build failed; the first error is:\nx.c:1: error: no")

    monkeypatch.setattr(build, "from_debian", broken)
    result = CliRunner().invoke(run, ["memory"])
    assert result.exit_code == 3
    assert "x.c:1: error: no" in result.output


@pytest.mark.usefixtures("no_kvm")
def test_a_timeline_is_refused_and_not_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result, calls = invoke(monkeypatch, "memory", "--timeline", str(tmp_path / "t.json"))
    assert (result.exit_code, calls) == (2, [])
    assert "--timeline cannot be written in the lab, and KVM cannot be used here" in result.output
