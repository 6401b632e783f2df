# SPDX-License-Identifier: Apache-2.0
"""A toolchain that is missing, incomplete or for another machine is named, with the way to get it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpy.core.errors import MissingError
from kvmpy.guest import GuestBuildError, GuestProgram, ToolchainError, toolchain

SOURCE = "void guest_main(void) { }\n"


def _script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_no_gcc(fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match="gcc not found") as caught:
        GuestProgram.from_c(SOURCE)
    assert isinstance(caught.value, MissingError)
    assert "apt install gcc" in caught.value.how


def test_no_ar(fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gcc").symlink_to(toolchain.find().cc)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match="ar not found") as caught:
        GuestProgram.from_c(SOURCE)
    assert "apt install binutils" in caught.value.how


def test_a_compiler_for_another_machine(
    fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMPY_CC", str(_script(tmp_path / "cc", "echo aarch64-linux-gnu")))
    with pytest.raises(ToolchainError, match="makes code for aarch64-linux-gnu") as caught:
        GuestProgram.from_c(SOURCE)
    assert "gcc-x86-64-linux-gnu" in caught.value.how


@pytest.mark.parametrize(
    "words",
    [
        "gcc: fatal error: cannot execute 'cc1': execvp: No such file or directory",
        "gcc: error trying to exec 'as': execvp: cannot execute: No such file or directory",
        "collect2: fatal error: cannot find 'ld'",
    ],
)
def test_an_incomplete_compiler(
    fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    body = f'case "$1" in -dumpmachine) echo x86_64-linux-gnu;; *) echo "{words}" >&2; exit 1;; esac'
    monkeypatch.setenv("KVMPY_CC", str(_script(tmp_path / "cc", body)))
    with pytest.raises(ToolchainError, match="compiler is incomplete") as caught:
        GuestProgram.from_c(SOURCE)
    assert "apt install gcc binutils" in caught.value.how


def test_a_file_that_is_no_program(
    fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cc"
    path.write_bytes(b"\x7fELF not really")
    path.chmod(0o755)
    monkeypatch.setenv("KVMPY_CC", str(path))
    with pytest.raises(ToolchainError, match="cannot be run"):
        GuestProgram.from_c(SOURCE)


def test_a_compiler_that_hangs(fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = 'case "$1" in -dumpmachine) echo x86_64-linux-gnu;; *) exec sleep 60;; esac'
    monkeypatch.setenv("KVMPY_CC", str(_script(tmp_path / "cc", body)))
    monkeypatch.setattr(toolchain, "TIMEOUT", 0.3)
    with pytest.raises(GuestBuildError, match="did not finish in 0"):
        GuestProgram.from_c(SOURCE)


def test_dependencies_with_odd_names() -> None:
    text = "out.o: a.c \\\n /x/with\\ space.h b$$c.h\n"
    assert toolchain._dependencies(text) == ["a.c", "/x/with space.h", "b$c.h"]
