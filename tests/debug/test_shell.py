# SPDX-License-Identifier: Apache-2.0
"""``kvmpy shell`` through a terminal: its names, its VM, completion and decoded ioctls."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvmpy.cli.main import main
from kvmpy.cli.shell import Completer, has_ipython, namespace

NO_KVM = "/nonexistent/kvm"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\][^\x07]*\x07|\x1b[=>]|[\x01\x02\r]")


class Terminal:
    """A command in a pseudo-terminal of its own."""

    def __init__(self, args: list[str], folder: Path, **environment: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvmpy", "shell", *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            cwd=folder,
            env={
                **os.environ,
                "TERM": "xterm",
                "COLUMNS": "120",
                "HOME": str(folder),
                "IPYTHONDIR": str(folder),
                "PYTHONPATH": os.pathsep.join(sys.path),
                **environment,
            },
        )
        os.close(slave)
        self.shown = ""

    def until(self, text: str, seconds: float = 60) -> str:
        """Read until *text* is shown, and return what came since the last call."""
        seen = self.shown
        end = time.monotonic() + seconds
        while text not in seen:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.master], [], [], left)[0]:
                raise AssertionError(f"{text!r} was not shown in {seen!r}")
            try:
                data = os.read(self.master, 65536)
            except OSError:
                raise AssertionError(f"it ended before {text!r} was shown: {seen!r}") from None
            if b"\x1b[6n" in data:
                os.write(self.master, b"\x1b[1;1R")  # where the cursor is, as a terminal would answer
            seen = ESCAPES.sub("", seen + data.decode("utf-8", "replace"))
        before, _, self.shown = seen.partition(text)
        return before + text

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self.master, text.encode())

    def close(self) -> None:
        """End it, however it stands."""
        self.process.kill()
        self.process.wait(30)
        os.close(self.master)


@pytest.fixture
def terminal(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    prompt = Terminal(["--plain"], tmp_path)
    try:
        yield prompt
    finally:
        prompt.close()


@pytest.mark.requires("kvm")
@pytest.mark.timeout(180)
def test_a_vm_in_hand(terminal: Terminal) -> None:
    """The guest runs at a word, ioctls are printed decoded after trace(True), and the end leaves status 0."""
    terminal.until(">>> ")
    terminal.type("vcpu.sync().args[0], vcpu.sync().args[0]\n")
    terminal.until("(1, 2)")
    terminal.type("vm.symbol('counter').u64 + 40\n")
    terminal.until("42")
    terminal.type("trace(True)\n")
    terminal.type("vm.check_extension(KVM_CAP_NR_VCPUS) > 0\n")
    terminal.until("vm0 KVM_CHECK_EXTENSION KVM_CAP_NR_VCPUS = ")
    terminal.until("True")
    terminal.type("vm.ioctl(KVM_CREATE_VCPU, 0)\n")
    terminal.until("EEXIST (File exists)")
    terminal.until(">>> ")
    terminal.type("\x04")
    terminal.until("vm0 close()")
    assert terminal.process.wait(30) == 0


@pytest.mark.requires("kvm")
@pytest.mark.timeout(180)
def test_completion_by_tab(terminal: Terminal) -> None:
    """Tab completes ioctls, structs, their fields, and attributes."""
    terminal.until(">>> ")
    terminal.type("KVM_GET_API\t.nr\n")
    terminal.until("44544")
    terminal.type("kvm_debugr\t")
    terminal.type("\x15")  # away with the line
    terminal.type("kvm_regs(r8=3).r8 * 7\n")
    terminal.until("21")
    terminal.type("hex(kvm_segment(selec\t0x123).selector)\n")
    terminal.until("'0x123'")
    terminal.type("vcpu.vcpu_i\t + 70\n")
    terminal.until("\n70")


@pytest.mark.skipif(not has_ipython(), reason="IPython: pip install ipython")
@pytest.mark.requires("kvm")
@pytest.mark.timeout(180)
def test_ipython(tmp_path: Path) -> None:
    """Where IPython is installed its prompt has the same names."""
    terminal = Terminal([], tmp_path)
    try:
        terminal.until("In [1]:", 90)
        terminal.type("vcpu.sync().args[0] + 1000\r")
        terminal.until("1001")
        terminal.type("kvm_regs(rax=9).rax * 1111\r")
        terminal.until("9999")
        terminal.type("exit\r")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.close()


@pytest.mark.timeout(120)
def test_without_kvm(tmp_path: Path) -> None:
    """Without a KVM the prompt says why there is no VM, and still knows the interface."""
    terminal = Terminal(["--plain"], tmp_path, KVMPY_DEV_KVM=NO_KVM)
    try:
        assert NO_KVM in terminal.until(">>> ")
        terminal.type("print(vm, hex(KVM_RUN.nr))\n")
        terminal.until("None 0xae80")
    finally:
        terminal.close()


def test_completer() -> None:
    """Fields are completed inside the call of a struct, and only there."""
    names = namespace()
    completer = Completer(names, str)
    assert completer.fields("kvm_regs(ra") == ["rax="]
    assert completer.fields("x = kvm_regs(rax=1, rb") == ["rbx=", "rbp="]
    assert completer.fields("kvm_regs(rax=1).r") == []
    assert completer.fields("print(ra") == []
    assert completer.fields("no_struct(ra") == []


def test_names_of_a_word() -> None:
    """Every ioctl and every struct is a word of the prompt."""
    from kvmpy.uapi.ioctls import IOCTLS
    from kvmpy.uapi.structs import kvm_regs

    names = namespace()
    assert {name: names[name] for name in IOCTLS} == IOCTLS
    assert names["kvm_regs"] is kvm_regs
    completer = Completer(names, lambda: "KVM_GET_REG")
    matches = [text for state in range(5) if (text := completer.complete("KVM_GET_REG", state))]
    assert any(text.startswith("KVM_GET_REGS") for text in matches)


@pytest.mark.requires("kvm")
def test_commands_instead_of_a_prompt() -> None:
    """-c runs words and ends; with --trace every ioctl of the VM's making is printed."""
    result = CliRunner().invoke(main, ["shell", "--trace", "-c", "print(vcpu.sync().args[0] + 5)"])
    assert result.exit_code == 0, result.output
    assert result.stdout == "6\n"
    assert "kvm KVM_CREATE_VM " in result.stderr
    from kvmpy.core import observe

    assert observe.active == []


@pytest.mark.requires("kvm")
def test_a_guest_of_ones_own(tmp_path: Path) -> None:
    """--program puts a guest of one's own into the VM; one that cannot be built is a message, not a crash."""
    good = tmp_path / "good.c"
    good.write_text("#include <kvmpy/guest.h>\nvoid guest_main(void)\n{\n\tGUEST_SYNC(77);\n}\n")
    result = CliRunner().invoke(main, ["shell", "--program", str(good), "-c", "print(vcpu.sync().args)"])
    assert "77" in result.stdout
    bad = tmp_path / "bad.c"
    bad.write_text("nonsense")
    result = CliRunner().invoke(main, ["shell", "--program", str(bad), "-c", "print(vm)"])
    assert result.stdout == "None\n"


def test_unknown_protection() -> None:
    """A protection that does not exist leaves a prompt that says so."""
    result = CliRunner().invoke(main, ["shell", "--protection", "none-such", "-c", "print(vm)"])
    assert result.stdout.endswith("None\n")
