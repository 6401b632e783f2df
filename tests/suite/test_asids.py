# SPDX-License-Identifier: Apache-2.0
"""Sweeps over all ASIDs, on a fake platform that has as many as a Genoa."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvmpy.coco.kvm import Kvm
from kvmpy.coco.sev_platform import SevCpuid
from kvmpy.core.errors import MissingError
from kvmpy.core.sev_errors import SevResult
from kvmpy.uapi.constants import VmType
from selftests.sev import asids as under_test
from selftests.sev.asids import BOUND, Asids, cgroup_root, count_of, descriptors, give_time, limited

GENOA = SevCpuid(0x1A, 51, 6, 1006, 100)
SEV, ES, SNP = VmType.KVM_X86_SEV_VM, VmType.KVM_X86_SEV_ES_VM, VmType.KVM_X86_SNP_VM


class FakeVm:
    """A VM that owns a descriptor as a real one does."""

    def __init__(self, host: FakeHost) -> None:
        self._host = host
        self._fd = os.open(os.devnull, os.O_RDONLY)
        self.guest = False
        self.sev = self

    def __enter__(self) -> FakeVm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the ASID back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._host.free += self.guest

    def command_raw(self, command: str, _arg: object, *, sev_fd: int) -> SevResult:
        """Take an ASID."""
        assert command == "INIT2"
        self._host.devices.add(sev_fd)
        if not self._host.free:
            return SevResult(-1, errno.EBUSY, 0)
        self._host.free -= 1
        self.guest = True
        return SevResult(0, 0, 0)


class FakeHost:
    """A KVM with *free* ASIDs of the kind that is asked for, and the files that commands went through."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.devices: set[int] = set()

    def create_vm(self, _vm_type: int) -> FakeVm:
        """Make a VM."""
        return FakeVm(self)


class FakeDevice:
    """One open /dev/sev."""

    def __enter__(self) -> FakeDevice:
        self.fd = os.open(os.devnull, os.O_RDONLY)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


@pytest.fixture(autouse=True)
def platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "sev_cpuid", lambda _kvm: GENOA)
    monkeypatch.setattr(under_test, "SevDevice", FakeDevice)


@pytest.fixture
def usual_limit() -> Iterator[None]:
    """Have the soft limit of descriptors that a shell gives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_how_many_there_are() -> None:
    assert [count_of(kind, GENOA) for kind in (SEV, ES, SNP)] == [907, 99, 99]
    assert count_of(SEV, SevCpuid(0x1A, 51, 0, 100, 101)) == 0


@pytest.mark.usefixtures("usual_limit")
def test_a_sweep_of_a_genoa(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ASIDs are taken through one /dev/sev, and all of them are back when it is over."""
    monkeypatch.setattr(under_test, "sev_cpuid", lambda _kvm: SevCpuid(0x1A, 51, 6, 2006, 100))
    host = FakeHost(1907)
    asids = Asids(cast(Kvm, host))
    with asids.taken(SEV) as (guests, refused):
        assert len(guests) == 1907
        assert not cast(Any, refused).guest
    assert len(host.devices) == 1
    assert host.free == 1907
    assert asids.left(SEV) == 1907
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 1024


def test_asids_that_do_not_run_out() -> None:
    host = FakeHost(2000)
    with pytest.raises(AssertionError, match="do not run out"):
        Asids(cast(Kvm, host)).left(ES)
    assert host.free == 2000


def test_a_hard_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    with (
        pytest.raises(MissingError, match="the hard limit RLIMIT_NOFILE is 1024") as caught,
        descriptors(1000),
    ):
        pass
    assert "LimitNOFILE" in caught.value.how


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cgroup file system whose files keep the last text, and whose folders can be removed as real ones."""
    for name, text in {
        "cgroup.controllers": "cpuset cpu memory misc\n",
        "cgroup.subtree_control": "cpu memory\n",
        "misc.capacity": "sev 907\nsev_es 99\n",
        "home/cgroup.procs": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "membership").write_text("1:name=systemd:/x\n0::/home\n")
    monkeypatch.setattr(Path, "rmdir", lambda folder: shutil.rmtree(folder))
    return tmp_path


def test_a_cgroup_bounds_the_process(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is in a group with a limit of each kind, and back in its own afterwards."""
    limits: list[str] = []
    write = Path.write_text

    def note(file: Path, text: str) -> int:
        if file.name == "misc.max":
            limits.append(text)
        return write(file, text)

    monkeypatch.setattr(Path, "write_text", note)
    folder = cgroup / f"kvmpy-{os.getpid()}"
    with limited(cgroup, cgroup / "membership") as bound:
        assert bound
        assert limits == [f"sev {BOUND}", f"sev_es {BOUND}"]
        assert (folder / "cgroup.procs").read_text() == str(os.getpid())
        assert (cgroup / "cgroup.subtree_control").read_text() == "+misc"
        assert not (cgroup / "home/cgroup.procs").read_text()
    assert not folder.exists()
    assert (cgroup / "home/cgroup.procs").read_text() == str(os.getpid())
    assert (cgroup / "cgroup.subtree_control").read_text() == "-misc"


@pytest.mark.parametrize(
    ("file", "text"),
    [("cgroup.controllers", "cpu memory\n"), ("misc.capacity", "\n"), ("misc.capacity", "tdx 5\n")],
)
def test_without_the_controller(cgroup: Path, file: str, text: str) -> None:
    (cgroup / file).write_text(text)
    with limited(cgroup, cgroup / "membership") as bound:
        assert not bound
    assert not (cgroup / f"kvmpy-{os.getpid()}").exists()


def test_a_cgroup_that_may_not_be_entered(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done before the refusal is undone."""
    write = Path.write_text

    def refuse(file: Path, text: str) -> int:
        if file.name == "cgroup.procs":
            raise PermissionError(errno.EPERM, "no")
        return write(file, text)

    monkeypatch.setattr(Path, "write_text", refuse)
    with limited(cgroup, cgroup / "membership") as bound:
        assert not bound
    assert not (cgroup / f"kvmpy-{os.getpid()}").exists()
    assert (cgroup / "cgroup.subtree_control").read_text() == "-misc"


def test_where_cgroups_are(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 0:20 / /sys rw - sysfs sysfs rw\n"
        "30 22 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n"
    )
    assert cgroup_root(mounts) == Path("/sys/fs/cgroup")
    mounts.write_text("22 1 0:20 / /sys rw - sysfs sysfs rw\n")
    assert cgroup_root(mounts) is None
    with limited(None) as bound:
        assert not bound


def test_a_bound_sweep() -> None:
    """Where the cgroup refuses, no more than its limit is asked for."""
    assert Asids(cast(Kvm, FakeHost(BOUND)), bound=True).left(ES) == BOUND
    with pytest.raises(AssertionError, match="do not run out"):
        Asids(cast(Kvm, FakeHost(99)), bound=True).left(ES)


def test_time_by_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps have time for as many guests as there are ASIDs, other tests what they had."""
    monkeypatch.setattr(under_test, "Kvm", ExitStack)
    given: dict[str, float] = {}

    def item(name: str, *fixtures: str) -> Any:
        return SimpleNamespace(
            fixturenames=fixtures,
            config=SimpleNamespace(getini=lambda _: "120"),
            add_marker=lambda mark: given.update({name: mark.args[0]}),
        )

    give_time([item("sweep", "kvm", "asids"), item("all", "all_asids"), item("other", "kvm")])
    assert set(given) == {"sweep", "all"}
    assert 300 < given["sweep"] <= 400
    given.clear()
    monkeypatch.setattr(under_test, "sev_cpuid", lambda _kvm: SevCpuid(0x1A, 39, 0, 64, 33))
    give_time([item("sweep", "asids")])
    assert not given
