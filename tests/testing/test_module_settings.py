# SPDX-License-Identifier: Apache-2.0
"""Parameters of KVM's modules for the time of a run, in a tree that stands for sysfs, not this host's own."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from kvmpy.cli.main import main
from kvmpy.testing import guardian
from kvmpy.testing.guardian import Guardian
from kvmpy.testing.module_settings import Modules, SettingError, plan
from tests.testing import fake_modules

ROOT = Path(__file__).resolve().parents[2]
HALT, NPT, TDP = "kvm.halt_poll_ns=0", "kvm_amd.npt=N", "kvm.tdp_mmu=N"


class Host:
    """Modules, and where a guardian keeps its file."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "modules"
        self.run = folder / "run"
        self.users: list[str] = []
        fake_modules.make(self.tree)
        self.before = self.values()

    @property
    def modules(self) -> Modules:
        program = (sys.executable, fake_modules.__file__, str(self.tree))
        return Modules(self.tree, program, lambda: self.users)

    def guardian(self) -> Guardian:
        return Guardian(self.modules, self.run)

    def values(self) -> dict[str, str]:
        return {
            f"{file.parents[1].name}.{file.name}": file.read_text().strip()
            for file in sorted(self.tree.glob("*/parameters/*"))
        }

    def changes(self) -> dict[str, str]:
        now = self.values()
        return {name: now.get(name, "gone") for name, value in self.before.items() if now.get(name) != value}

    def log(self) -> list[str]:
        log = self.tree.with_name("modules.log")
        return log.read_text().splitlines() if log.exists() else []

    def set(self, name: str, value: str) -> None:
        module, _, parameter = name.partition(".")
        file = self.tree / module / "parameters" / parameter
        mode = file.stat().st_mode
        file.chmod(0o644)
        file.write_text(f"{value}\n")
        file.chmod(mode)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_what_can_be_written_is_written_and_put_back(host: Host) -> None:
    with host.guardian().parameters([HALT, "kvm.nx_huge_pages=Y"], reload=False):
        assert host.changes() == {"kvm.halt_poll_ns": "0", "kvm.nx_huge_pages": "Y"}
        assert (host.run / "parameters.json").exists()
    assert host.changes() == {}
    assert not (host.run / "parameters.json").exists()
    assert host.log() == []


def test_what_is_so_already_needs_nobody(host: Host) -> None:
    with host.guardian().parameters(["kvm_amd.npt=1", "kvm.halt_poll_ns=200000"], reload=False):
        assert not (host.run / "parameters.json").exists()
    assert host.log() == []


def test_a_value_that_the_kernel_decides_on_is_written(host: Host) -> None:
    """What sysfs shows tells not whether it was said before."""
    with host.guardian().parameters(["kvm.nx_huge_pages=auto"], reload=False):
        assert host.changes() == {"kvm.nx_huge_pages": "auto"}
    assert host.changes() == {}


@pytest.mark.parametrize(
    ("words", "changes", "log"),
    [
        ([NPT], {"kvm_amd.npt": "N"}, ["-r kvm_amd", "kvm_amd npt=N", "-r kvm_amd", "kvm_amd"]),
        (
            [TDP, NPT, HALT],
            {"kvm.halt_poll_ns": "0", "kvm.tdp_mmu": "N", "kvm_amd.npt": "N"},
            [
                "-r kvm_amd",
                "-r kvm",
                "kvm tdp_mmu=N",
                "kvm_amd npt=N",
                "-r kvm_amd",
                "-r kvm",
                "kvm",
                "kvm_amd",
            ],
        ),
    ],
)
def test_modules_are_loaded_anew_in_their_order(
    host: Host, words: list[str], changes: dict[str, str], log: list[str]
) -> None:
    with host.guardian().parameters(words, reload=True):
        assert host.changes() == changes
    assert host.changes() == {}
    assert host.log() == log


def test_what_was_set_by_hand_at_the_first_load_comes_back(host: Host) -> None:
    """modprobe.d does not say it: the modules are loaded once more, with what differs."""
    host.set("kvm_amd.nested", "0")
    host.set("kvm.halt_poll_ns", "7")
    host.before = host.values()
    with host.guardian().parameters([TDP], reload=True):
        assert host.changes()["kvm.tdp_mmu"] == "N"
    assert host.changes() == {}
    assert host.log()[-2:] == ["kvm", "kvm_amd nested=0"]


@pytest.mark.parametrize(
    ("words", "reload", "says"),
    [
        (
            ["kvm.halt_pol_ns=0"],
            False,
            "kvm has no parameter kvm.halt_pol_ns; did you mean kvm.halt_poll_ns?",
        ),
        (["kvm_intel.ept=N"], True, "kvm_intel.ept: no module kvm_intel is loaded"),
        (["kvm_amt.npt=N"], True, "no module kvm_amt is loaded; did you mean kvm_amd or kvm?"),
        (["ccp.tio=N"], True, "ccp.tio is no parameter of KVM's modules"),
        (["no5lvl"], True, "no5lvl is no parameter of KVM's modules: only the lab can boot with it"),
        ([HALT, NPT], False, "kvm_amd.npt can be set only when kvm_amd is loaded: --reload does that"),
        ([HALT, "kvm_amd.avic=Y"], True, "kvm_amd.avic is N now, not Y"),
        ([HALT, "kvm_amd.npt=bad"], True, "could not insert: Invalid argument"),
    ],
)
def test_what_cannot_be_set_changes_nothing(host: Host, words: list[str], reload: bool, says: str) -> None:
    with pytest.raises(SettingError) as caught, host.guardian().parameters(words, reload=reload):
        pytest.fail("it was set")
    assert says in str(caught.value)
    assert host.changes() == {}
    assert not (host.run / "parameters.json").exists()


def test_a_value_that_the_kernel_refuses(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameter written before it is as it was, too."""

    def write(self: Modules, module: str, name: str, value: str) -> None:
        if value == "abc":
            raise SettingError(f"{module}.{name}={value} is refused: Invalid argument")
        host.set(f"{module}.{name}", value)

    monkeypatch.setattr(Modules, "write", write)
    words = ["kvm.nx_huge_pages=Y", "kvm.halt_poll_ns=abc"]
    with (
        pytest.raises(SettingError, match="halt_poll_ns=abc is refused: Invalid argument"),
        host.guardian().parameters(words, reload=False),
    ):
        pytest.fail("it was set")
    assert host.changes() == {}


def test_a_module_that_is_built_in(host: Host) -> None:
    (host.tree / "kvm_amd" / "initstate").unlink()
    for words, says in (
        ([NPT], "kvm_amd.npt can be set on the kernel's command line only: kvm_amd is built in"),
        ([TDP], "kvm cannot be loaded anew: kvm_amd is built in"),
    ):
        with pytest.raises(SettingError, match=says):
            plan(host.modules, words, reload=True)


@pytest.mark.parametrize("users", [["process 7 (qemu -accel kvm)"], []])
def test_nothing_is_loaded_anew_under_a_user(host: Host, users: list[str]) -> None:
    """The message has the names that `kvmpy ps` has, or says that somebody else is there."""
    (host.tree / "kvm_amd" / "refcnt").write_text("2\n")
    host.users = users
    with pytest.raises(SettingError) as caught:
        plan(host.modules, [NPT], reload=True)
    says = users[0] if users else "somebody whom `kvmpy ps` does not show: kvm_amd (2 references)"
    assert says in str(caught.value)
    assert host.log() == []
    plan(host.modules, [HALT], reload=True)  # that needs nobody's absence


def test_what_somebody_else_has_changed_meanwhile_stays(host: Host) -> None:
    with (
        pytest.raises(SettingError, match="was 200000; somebody else has made it 5, which stays"),
        host.guardian().parameters([HALT], reload=False),
    ):
        host.set("kvm.halt_poll_ns", "5")
    assert host.changes() == {"kvm.halt_poll_ns": "5"}


def test_two_runs_do_not_set_parameters_at_once(host: Host) -> None:
    said: list[str] = []
    with host.guardian().parameters([HALT], reload=False):
        with (
            pytest.raises(SettingError, match="another kvmpy run has set parameters"),
            host.guardian().parameters(["kvm.nx_huge_pages=Y"], reload=False),
        ):
            pytest.fail("it was set")
        host.guardian().recover(said.append)
        assert host.changes() == {"kvm.halt_poll_ns": "0"}
    assert len(said) == 1
    assert host.changes() == {}


HOLDER = """
import os, sys
from pathlib import Path
from kvmpy.testing.guardian import Guardian
from kvmpy.testing.module_settings import Modules

tree, program = Path(sys.argv[1]), sys.argv[3]
with Guardian(Modules(tree, (sys.executable, program, str(tree)), lambda: []), Path(sys.argv[2])).parameters(
    sys.argv[4:], reload=True
):
    print("set", flush=True)
    sys.stdin.read()
"""


def start(host: Host, *words: str) -> subprocess.Popen[str]:
    """Start a process that holds *words* until its input ends; they are set when this returns."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, host.tree, host.run, fake_modules.__file__, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "set\n"
    return child


def wait_for(host: Host, changes: dict[str, str]) -> None:
    """Wait for the guardian's end, when its lock is free."""
    with (host.run / "parameters.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert host.changes() == changes


def guardian_of(host: Host) -> psutil.Process:
    """Return the guardian: it holds the lock, and is nobody's child that we know."""
    lock = host.run / "parameters.lock"
    for process in psutil.process_iter():
        try:
            files = [os.readlink(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()]
        except OSError:
            continue
        if str(lock) in files and process.pid == os.getsid(process.pid):
            return process
    raise AssertionError("no guardian")


def kill_guardian(host: Host) -> None:
    process = guardian_of(host)
    process.kill()
    psutil.wait_procs([process], timeout=30)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("words", [[HALT], [TDP, HALT]])
def test_however_it_ends_everything_is_put_back(host: Host, number: signal.Signals, words: list[str]) -> None:
    with start(host, *words) as child:
        assert host.changes()["kvm.halt_poll_ns"] == "0"
        child.send_signal(number)
        child.wait(30)
    wait_for(host, {})


def test_signals_do_not_end_the_guardian(host: Host) -> None:
    with start(host, HALT) as child:
        process = guardian_of(host)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            process.send_signal(number)
        child.kill()
    wait_for(host, {})


@pytest.mark.parametrize("words", [[HALT], [TDP, NPT, HALT]])
def test_the_next_start_puts_back_what_a_killed_guardian_did_not(host: Host, words: list[str]) -> None:
    with start(host, *words) as child:
        kill_guardian(host)
        child.kill()
    assert host.changes()["kvm.halt_poll_ns"] == "0"
    said: list[str] = []
    host.guardian().recover(said.append)
    assert host.changes() == {}
    assert len(said) == 1
    assert "kvm.halt_poll_ns=200000" in said[0]
    host.guardian().recover(said.append)
    assert len(said) == 1


def test_a_killed_guardian_is_no_success(host: Host) -> None:
    with (
        pytest.raises(SettingError, match="that was to put parameters back is gone"),
        host.guardian().parameters([HALT], reload=False),
    ):
        kill_guardian(host)


def test_while_somebody_uses_kvm_the_next_start_tries_again(host: Host) -> None:
    with start(host, NPT) as child:
        (host.tree / "kvm_amd" / "refcnt").write_text("1\n")
        child.kill()
    wait_for(host, {"kvm_amd.npt": "N"})
    host.users = ["process 9 (vmm)"]
    with pytest.raises(SettingError, match=r"process 9 \(vmm\).*the next kvmpy run tries again"):
        host.guardian().recover(lambda _: None)
    (host.tree / "kvm_amd" / "refcnt").write_text("0\n")
    host.guardian().recover(lambda _: None)
    assert host.changes() == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"before": 5}'])
def test_a_file_that_says_nothing(host: Host, text: str) -> None:
    host.run.mkdir()
    (host.run / "parameters.json").write_text(text)
    with pytest.raises(SettingError, match=r"parameters\.json does not say what a killed run has changed"):
        host.guardian().recover(lambda _: None)


def test_the_command_names_what_it_cannot_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line, exit status 3, and no test runs."""
    host = Host(tmp_path)
    monkeypatch.setattr(guardian, "Modules", lambda: host.modules)
    monkeypatch.setattr(guardian, "FOLDER", host.run)
    monkeypatch.setenv("KVMPY_LAB", "never")
    ended = CliRunner().invoke(main, ["run", "host", "--param", "kvm.halt_pol_ns=0"])
    assert ended.exit_code == 3
    assert ended.output == "kvmpy run: kvm has no parameter kvm.halt_pol_ns; did you mean kvm.halt_poll_ns?\n"
