# SPDX-License-Identifier: Apache-2.0
"""``--soft-sev``: the kernel chosen, its parameter, how verdicts are marked, the AMD-SP's log in reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from kvmpy.cli import lab as cli
from kvmpy.cli import lab_run
from kvmpy.lab import build, kernels, runs, softsev
from kvmpy.lab.errors import LabError
from kvmpy.lab.qemu import Job, Options, Start, command_line, prepare
from kvmpy.lab.root import Root
from kvmpy.lab.softsev import HookError, log
from kvmpy.testing.host import PLATFORM_VARIABLE
from kvmpy.testing.option_table import defaults


def kernel(name: str, soft_sev: bool) -> kernels.Kernel:
    """A kernel as the cache describes it."""
    return kernels.Kernel(name, "7.2.13", "test", "0" * 64, "", Path("nowhere"), soft_sev)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> list[kernels.Kernel]:
    """The kernels of the cache."""
    have = [kernel("plain", False), kernel("other-softsev", True)]
    monkeypatch.setattr(kernels, "cached", lambda: have)
    return have


def machine(soft_sev: bool | None, accel: str = "tcg", kernel: str | None = None) -> Options:
    """The VM of `kvmpy lab shell` with these options."""
    values: dict[str, Any] = {**defaults("lab shell"), "accel": accel, "soft_sev": soft_sev, "kernel": kernel}
    return lab_run.machine(values)


def test_soft_sev_chooses_such_a_kernel_and_its_parameter(
    cache: list[kernels.Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "nested_works", lambda: True)
    vm = machine(True, accel="auto")

    assert vm.kernel.name == "other-softsev"
    assert tuple(vm.parameters) == softsev.PARAMETERS
    assert vm.accel == "tcg"


def test_without_it_the_other_kernel_boots_plainly(cache: list[kernels.Kernel]) -> None:
    vm = machine(None)

    assert vm.kernel.name == "plain"
    assert tuple(vm.parameters) == ()


@pytest.mark.parametrize(
    ("asked", "parameters"), [(None, softsev.PARAMETERS), (True, softsev.PARAMETERS), (False, ())]
)
def test_a_kernel_that_has_it_is_booted_with_it_unless_asked_not_to(
    asked: bool | None, parameters: tuple[str, ...], cache: list[kernels.Kernel]
) -> None:
    assert tuple(machine(asked, kernel="other-softsev").parameters) == parameters


def test_kernels_of_a_matrix_are_asked_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = defaults("lab run")

    assert "--soft-sev" not in lab_run.matrix_arguments((), values)
    assert "--soft-sev" in lab_run.matrix_arguments((), {**values, "soft_sev": True})
    assert "--no-soft-sev" in lab_run.matrix_arguments((), {**values, "soft_sev": False})
    assert "--strict-private" not in lab_run.matrix_arguments((), values)
    assert "--strict-private" in lab_run.matrix_arguments((), {**values, "strict_private": True})


def test_where_the_hooks_do_not_fit_a_kernel_without_them_is_built_unless_they_were_asked_for(
    cache: list[kernels.Kernel], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[bool] = []

    def from_debian(suite: str, say: object, *, soft_sev: bool, coverage: bool) -> kernels.Kernel:
        built.append(soft_sev)
        if soft_sev:
            raise HookError("hook cpu-features does not fit amd.c")
        return kernel("new", soft_sev)

    monkeypatch.setattr(build, "from_debian", from_debian)
    lab_run._build_if_none(None)
    assert built == []  # the cache has kernels

    cache.clear()
    lab_run._build_if_none(None)
    assert built == [True, False]
    assert "cpu-features" in capsys.readouterr().err

    with pytest.raises(HookError):
        lab_run._build_if_none(True)
    assert built == [True, False, True]


def test_without_such_a_kernel_the_command_that_builds_one_is_named(cache: list[kernels.Kernel]) -> None:
    del cache[1]

    with pytest.raises(LabError, match="kvmpy lab build --soft-sev"):
        machine(True)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What was built from Debian's source, with the software AMD-SP or without; each is called "new"."""
    asked: list[bool] = []

    def from_debian(
        suite: str,
        say: object,
        *,
        soft_sev: bool,
        extra: object = (),
        coverage: bool = False,
        bugs: bool = False,
    ) -> kernels.Kernel:
        asked.append(soft_sev)
        return kernel("new", soft_sev)

    monkeypatch.setattr(build, "from_debian", from_debian)
    return asked


def test_missing_builds_only_when_no_kernel_has_it(cache: list[kernels.Kernel], built: list[bool]) -> None:
    there = CliRunner().invoke(cli.lab, ["build", "--missing", "--soft-sev"])
    assert (there.output.strip(), built) == ("other-softsev", [])

    del cache[1]
    outcome = CliRunner().invoke(cli.lab, ["build", "--missing", "--soft-sev"])
    assert (outcome.output.strip(), built) == ("new", [True])


@pytest.mark.parametrize("soft_sev", [False, True])
def test_a_kernel_of_other_options_is_built_again(
    cache: list[kernels.Kernel], built: list[bool], capsys: pytest.CaptureFixture[str], soft_sev: bool
) -> None:
    """One that this kvmpy would build alike is not, nor one of somebody's own tree, whatever is in it."""
    current = build._Plan(soft_sev).digest
    assert current != build._Plan(not soft_sev).digest
    for origin, again in (
        (f"linux-source-7.2 7.2.13-1, options {current}", []),
        ("linux-source-7.2 7.2.13-1, options 0badf00d", [soft_sev]),
        ("tree /src/linux", []),
    ):
        built.clear()
        cache[:] = [replace(kernel("k", soft_sev), origin=origin)]
        lab_run._build_if_none(soft_sev)
        assert built == again
        assert ("outdated" in capsys.readouterr().err) == bool(again)
        arguments = ["build", "--missing", *(["--soft-sev"] if soft_sev else [])]
        assert CliRunner().invoke(cli.lab, arguments).output.strip() == ("new" if again else "k")


def test_a_kernel_with_further_options_takes_nobodys_place(
    cache: list[kernels.Kernel], built: list[bool], capsys: pytest.CaptureFixture[str]
) -> None:
    cache[:] = [replace(kernel("k", True), origin="tree /src/linux", extra="debug.config")]
    lab_run._build_if_none(True)
    assert built == [True]
    assert "outdated" not in capsys.readouterr().err


def test_the_parameter_reaches_the_kernels_command_line(tmp_path: Path) -> None:
    options = Options(kernel("k-softsev", True), parameters=("softsev",))
    root = Root(tmp_path, ())
    prepare(tmp_path, Job(["true"], {}, tmp_path, root))

    command = command_line(options, tmp_path, root, Start(tmp_path / "initramfs"))

    assert command[command.index("-append") + 1].endswith(" softsev")


LARGE = "large guest_memfd folios by kvmpy's hook"


@pytest.mark.parametrize(
    ("parameters", "platform"),
    [
        ("", "lab"),
        ("softsev", "lab, software AMD-SP"),
        ("softsev kvm.large_gmem=Y", f"lab, software AMD-SP, {LARGE}"),
        ("kvm.large_gmem=on", f"lab, {LARGE}"),
        ("kvm.large_gmem", f"lab, {LARGE}"),
        ("softsev kvm.large_gmem=0", "lab, software AMD-SP"),
        ("softsev kvm.large_gmem=Y kvm.large_gmem=N", "lab, software AMD-SP"),
    ],
)
def test_the_platform_names_it(tmp_path: Path, parameters: str, platform: str) -> None:
    options = Options(kernel("k", True), parameters=tuple(parameters.split()))

    assert runs.platform(options) == platform
    assert runs.job_of(options, ["true"], tmp_path, []).environment[PLATFORM_VARIABLE] == platform


def test_log_has_only_what_is_new_and_the_software_s(tmp_path: Path) -> None:
    path = tmp_path / "kmsg"
    path.write_text("6,1,10,-;softsev: before\n")
    reader = log.KernelLog(path)
    try:
        with path.open("a") as stream:
            stream.write("6,2,11,-;kvm_amd: other\n6,3,12,-;softsev: guest 1: launched\n SUBSYSTEM=x\n")

        assert reader.lines() == ["softsev: guest 1: launched"]
        assert reader.lines() == []
    finally:
        reader.close()


def test_log_becomes_a_section_of_the_report(tmp_path: Path) -> None:
    path = tmp_path / "kmsg"
    path.touch()
    reader = log.KernelLog(path)
    report = SimpleNamespace(when="call", sections=[])
    try:
        step: Any = reader.pytest_runtest_makereport()
        next(step)
        path.write_text("6,1,10,-;softsev: SNP_LAUNCH_FINISH: error 0xb\n")
        with pytest.raises(StopIteration) as done:
            step.send(report)
    finally:
        reader.close()

    assert done.value.value is report
    assert report.sections == [("software AMD-SP, call", "softsev: SNP_LAUNCH_FINISH: error 0xb")]


def test_log_is_for_kernels_with_the_software_only(tmp_path: Path) -> None:
    log_file = tmp_path / "kmsg"
    log_file.touch()
    assert log.plugin(tmp_path / "devices", log_file) is None

    (tmp_path / "softsev").mkdir()
    assert log.plugin(tmp_path, tmp_path / "gone") is None

    plugin = log.plugin(tmp_path, log_file)
    assert isinstance(plugin, log.KernelLog)
    plugin.close()
