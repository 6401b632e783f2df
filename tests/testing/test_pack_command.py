# SPDX-License-Identifier: Apache-2.0
"""``kvmpy pack``: which programs a pack has, and a run on a host that has a pack and no compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from kvmpy.guest import packs
from kvmpy.testing.verdicts import Verdict

# No test of it needs KVM to find its program, and none may get anything from the host that packs.
TESTS = r'''
import os
import subprocess
from pathlib import Path

import pytest
from kvmpy import GuestProgram, Kvm

MAIN = "void guest_main(void) { @ }"
AFTER = """
void guest_main(void) { asm("nop"); }
"""
ASSEMBLY = """
	.globl guest_main
guest_main:
	ret
"""
NEVER = """
void guest_main(void) { this does not compile }
"""
IN_A_TABLE = {"first": ["""
void guest_main(void) { asm("pause"); }
"""]}
HARM = Path(os.environ["HARM"])


def text(number):
    return f"\nvoid guest_main(void) {{ asm volatile(\"mov ${number}, %eax\"); }}\n"


@pytest.mark.requires("protection:snp", "KVM_CAP_NESTED_STATE&0x8000")
def test_skipped_on_most_hosts(make_vm):
    make_vm(text(1))
    HARM.write_text("went on behind its VM")


@pytest.mark.dangerous
@pytest.mark.parametrize("number", [2, 3])
def test_of_a_parameter(number):
    GuestProgram.from_c(text(number), cflags=["-DX"])


@pytest.mark.parametrize("way", [
    lambda: subprocess.run(["touch", str(HARM)]),
    lambda: os.system(f"touch {HARM}"),
    lambda: os.posix_spawn("/usr/bin/touch", ["touch", str(HARM)], {}),
    lambda: os.fork() or (HARM.touch(), os._exit(0)),
    lambda: os.kill(os.getppid(), 9),
    lambda: Path("/proc/self/comm").write_text("harm"),
    lambda: os.open("/dev/mem", os.O_RDONLY),
    lambda: Kvm().create_vm(),
])
def test_of_harm(way):
    try:
        way()
    except Exception:
        pass
    GuestProgram.from_c(text(4))
'''
LATER = r"""
from kvmpy import GuestProgram

SOURCE = '''
void guest_main(void) { asm("nop"); }
'''

def test_packed():
    assert GuestProgram.from_c(SOURCE).symbol("guest_main")

def test_other():
    GuestProgram.from_c(SOURCE + "// changed\n")
"""


def kvmpy_command(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment: Mapping[str, str] = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "HARM": str(folder / "harm"),
        **more,
    }
    return subprocess.run(
        [sys.executable, "-m", "kvmpy", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_all_programs_and_nothing_else(tmp_path: Path) -> None:
    """Those of tests that this host would skip, too; no test gets anything from the host."""
    (tmp_path / "test_own.py").write_text(TESTS)
    done = kvmpy_command(tmp_path, "pack", "build", "./test_own.py", "-o", "own.pack")
    assert done.returncode == 0, done.stderr
    opened = packs.Pack(tmp_path / "own.pack")
    opened.verify()
    own = [name for name in opened.names() if name.startswith("test_own.py")]
    # One of the first test, two of the second, three constants.
    assert len(own) == 6, own
    assert opened.about["programs"] == len(opened.names())
    assert not (tmp_path / "harm").exists()
    shown = kvmpy_command(tmp_path, "pack", "show", "own.pack")
    assert shown.returncode == 0
    assert f"{opened.about['programs']} guest programs for x86_64" in shown.stdout


def test_a_run_without_a_compiler(tmp_path: Path) -> None:
    """What the pack has passes; what it lacks is a skip that names it, and says how to get it."""
    (tmp_path / "test_own.py").write_text(LATER)
    built = kvmpy_command(tmp_path, "pack", "build", "./test_own.py::test_packed", "-o", "own.pack")
    assert built.returncode == 0, built.stderr
    run = ("run", "--lab", "never", "--json", "out.json", "--pack", "own.pack", "./test_own.py")
    done = kvmpy_command(tmp_path, *run, PATH="/nonexistent", KVMPY_CC="", KVMPY_AR="")
    tests = {test["id"]: test for test in json.loads((tmp_path / "out.json").read_text())["tests"]}
    verdicts = {name.partition("::")[2]: test["verdict"] for name, test in tests.items()}
    assert verdicts == {"test_packed": Verdict.PASS, "test_other": Verdict.SKIP}, done.stdout
    (reason,) = [test["reason"] for test in tests.values() if test["verdict"] == "skip"]
    assert "needs the guest program test_own.py:12, which own.pack lacks (gcc not found" in reason
    assert "kvmpy pack build, with this kvmpy on a machine with gcc" in reason


@pytest.mark.parametrize(
    "words", [("run", "--lab", "never"), ("lab", "run"), ("fleet", "run", "--local", "1")]
)
def test_a_pack_that_cannot_be_used_ends_a_run_at_once(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "test_own.py").write_text(LATER)
    (tmp_path / "bad.pack").write_bytes(b"no pack")
    done = kvmpy_command(tmp_path, *words, "--pack", "bad.pack", "./test_own.py")
    assert done.returncode == 3
    assert "bad.pack is no pack of guest programs, or a damaged one" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_a_damaged_pack_in_the_cache_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken without being named: so it is named in the message."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "test_own.py").write_text(LATER)
    packs.default().parent.mkdir(parents=True)
    packs.default().write_bytes(b"no pack")
    done = kvmpy_command(tmp_path, "run", "--lab", "never", "./test_own.py")
    assert done.returncode == 3
    assert f"{packs.default()} is no pack of guest programs" in done.stderr


def test_pytest_takes_a_pack_too(tmp_path: Path) -> None:
    (tmp_path / "bad.pack").write_bytes(b"no pack")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--kvmpy-pack", "bad.pack"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "bad.pack is no pack of guest programs" in done.stderr


def test_what_cannot_be_built_is_told(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text("import no_such_module\n")
    (tmp_path / "old.pack").write_text("an old one")
    for words, message, more in (
        (("./test_own.py", "-o", "old.pack"), "no_such_module", {}),
        (("-o", "no/such/own.pack"), "no/such is no folder that can be written to", {}),
        (("-o", "own.pack"), "gcc not found", {"PATH": "/nonexistent", "KVMPY_CC": ""}),
    ):
        done = kvmpy_command(tmp_path, "pack", "build", *words, **more)
        assert done.returncode == 3
        assert message in done.stderr
    assert not (tmp_path / "own.pack").exists()
    assert (tmp_path / "old.pack").read_text() == "an old one"
    assert [path.name for path in tmp_path.glob("*.pack*")] == ["old.pack"]
    shown = kvmpy_command(tmp_path, "pack", "show", "none.pack")
    assert (shown.returncode, shown.stdout) == (3, "")
    assert "none.pack: No such file" in shown.stderr
