# SPDX-License-Identifier: Apache-2.0
"""A kernel that warns during a test, by a log in a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmpy.testing.kernelwatch import KernelWatch, splats
from kvmpy.testing.machine import KernelLog
from tests.testing.support import Suite

WARNING = "4,10,5000000,-;WARNING: CPU: 1 PID: 7 at arch/x86/kvm/x86.c:1 kvm_x+0x1/0x2\n"
TRACE = "4,11,5000001,-;Call Trace:\n"
INFO = "6,12,6000000,-;kvm: a VM was made\n"
# Priority and facility: a program's, here.
PROGRAM = "12,13,7000000,-;WARNING: a program's\n"


class Log(KernelLog):
    """A log whose records are the lines of a file, one a read, as /dev/kmsg gives them."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, kernel_only=True)
        self._path = path
        self._done = 0

    def skip(self) -> None:
        self._done = len(self._path.read_text().splitlines())

    def read(self) -> str:
        records = self._path.read_text().splitlines(keepends=True)
        text = ""
        for record in records[self._done :]:
            reader, writer = os.pipe2(os.O_NONBLOCK)
            os.write(writer, record.encode())
            os.close(writer)
            self._fd, kept = reader, self._fd
            text += super().read()
            self._fd = kept
            os.close(reader)
        self._done = len(records)
        return text


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "kmsg"
    path.write_text(WARNING)
    return path


def test_only_what_is_new_counts(log: Path, tmp_path: Path) -> None:
    """Neither what was there before, nor what is no trouble, nor a program's words."""
    tainted = tmp_path / "tainted"
    tainted.write_text("512\n")
    watch = KernelWatch(Log(log), tainted)
    assert watch.trouble() == ""
    with log.open("a") as stream:
        stream.write(INFO + PROGRAM)
    assert watch.trouble() == ""
    with log.open("a") as stream:
        stream.write(INFO + WARNING + TRACE)
    text = watch.trouble()
    assert text.splitlines() == [
        "[    5.000000] WARNING: CPU: 1 PID: 7 at arch/x86/kvm/x86.c:1 kvm_x+0x1/0x2",
        "[    5.000001] Call Trace:",
    ]
    assert watch.trouble() == ""
    watch.pytest_unconfigure()


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        ("0", "512", "newly tainted: warning"),
        ("512", "640", "newly tainted: oops"),
        ("0", "4097", ""),
        ("x", "0", ""),
    ],
)
def test_a_new_taint_is_trouble_without_a_word(
    log: Path, tmp_path: Path, before: str, after: str, text: str
) -> None:
    """A module from outside of the tree, which taints the kernel, is none."""
    tainted = tmp_path / "tainted"
    tainted.write_text(before)
    watch = KernelWatch(Log(log), tainted)
    tainted.write_text(after)
    assert watch.trouble() == text
    watch.pytest_unconfigure()


def test_a_long_splat_is_cut() -> None:
    text = splats("[ 1.0] BUG: x\n" + "[ 1.0] y\n" * 300)
    assert text.splitlines()[-1] == "(181 more lines)"


PLUGIN = """
import pathlib, pytest
from kvmpy.testing.kernelwatch import KernelWatch
from tests.testing.test_kernelwatch import Log

def pytest_configure(config):
    watch = KernelWatch(Log(pathlib.Path({log!r})), pathlib.Path({tainted!r}))
    config.pluginmanager.register(watch, "another-kernel")
"""
TESTS = """
import pathlib
LOG = pathlib.Path({log!r})

def warn():
    with LOG.open("a") as stream:
        stream.write({warning!r})

def test_before(): pass
def test_warns(): warn()
def test_after(): pass
def test_fails_and_warns():
    warn()
    assert False, "its own reason"
"""


def test_the_test_that_made_the_kernel_warn_fails(
    pytester: pytest.Pytester, log: Path, tmp_path: Path
) -> None:
    tainted = tmp_path / "tainted"
    tainted.write_text("0")
    suite = Suite(pytester)
    suite.add("conftest.py", PLUGIN.format(log=str(log), tainted=str(tainted)))
    suite.add("test_k.py", TESTS.format(log=str(log), warning=WARNING))
    outcome = suite.run()
    assert outcome.verdicts() == {
        "test_before": "pass",
        "test_warns": "fail",
        "test_after": "pass",
        "test_fails_and_warns": "fail",
    }
    assert outcome.reason("test_warns").startswith("Failed: the kernel warned during the test")
    assert "kvm_x+0x1/0x2" in outcome.test("test_warns")["details"]
    assert "its own reason" in outcome.reason("test_fails_and_warns")
    assert "Captured the kernel warned teardown" in outcome.text


def test_a_log_that_may_not_be_read_is_told(tmp_path: Path) -> None:
    watch = KernelWatch(KernelLog(tmp_path / "none", kernel_only=True))
    assert watch.missing.startswith(f"{tmp_path / 'none'}: No such file")
    assert watch.trouble() == ""
