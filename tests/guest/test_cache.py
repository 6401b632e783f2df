# SPDX-License-Identifier: Apache-2.0
"""The cache of built programs: whole entries only, for any number of processes, and never the last word."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvmpy.guest import GuestBuildError, GuestProgram, cache, program, toolchain

SOURCE = """
int cached;
void guest_main(void) { cached = 1; }
"""


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the programs for which the compiler was started."""
    names: list[str] = []
    real = toolchain.compile_objects

    def counted(*args: object, name: str, **more: object) -> object:
        names.append(name)
        return real(*args, name=name, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(toolchain, "compile_objects", counted)
    return names


def _entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("runtime-"))


def test_a_second_process_compiles_nothing(fresh_cache: Path, compiles: list[str]) -> None:
    first = GuestProgram.from_c(SOURCE)
    assert compiles == [first.name, "the guest runtime"][::-1] or compiles == [
        first.name,
        "the guest runtime",
    ]
    program._known.clear()
    second = GuestProgram.from_c(SOURCE)
    assert len(compiles) == 2
    assert second is not first
    assert second.elf == first.elf
    assert dict(second.symbols) == dict(first.symbols)
    assert len(_entries(fresh_cache)) == 1


def _write(folder: Path, text: str) -> None:
    (folder / "who").write_text(text)


@pytest.mark.parametrize("damage", ["image", "image-cut", "index", "index-gone", "image-gone"])
def test_a_damaged_entry_is_built_again(fresh_cache: Path, compiles: list[str], damage: str) -> None:
    good = GuestProgram.from_c(SOURCE)
    (name,) = _entries(fresh_cache)
    image, index = fresh_cache / name / "program.elf", fresh_cache / name / "index.json"
    if damage == "image":
        image.write_bytes(good.elf[:-1] + b"\xff")
    elif damage == "image-cut":
        image.write_bytes(good.elf[:100])
    elif damage == "index":
        index.write_text('{"entry": 5')
    else:
        (index if damage == "index-gone" else image).unlink()
    program._known.clear()
    assert GuestProgram.from_c(SOURCE).elf == good.elf
    assert compiles.count(good.name) == 2
    assert _entries(fresh_cache) == [name]


def test_another_compiler_is_another_program(
    fresh_cache: Path, compiles: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = GuestProgram.from_c(SOURCE).name
    wrapper = tmp_path / "other-gcc"
    wrapper.write_text(f'#!/bin/sh\nexec {toolchain.find().cc} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("KVMPY_CC", str(wrapper))
    program._known.clear()
    GuestProgram.from_c(SOURCE)
    assert compiles.count(name) == 2


def test_a_failed_build_leaves_nothing(fresh_cache: Path) -> None:
    for _ in range(2):
        with pytest.raises(GuestBuildError):
            GuestProgram.from_c("this is no C\n")
    assert _entries(fresh_cache) == []


def test_a_cache_that_cannot_be_written_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(program, "_known", {})
    assert GuestProgram.from_c(SOURCE).symbol("cached").size == 4
    assert not cache.folder().is_relative_to(tmp_path)


def test_old_and_abandoned_entries_go(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.folder()
    for number in range(8):
        (fresh_cache / f"old{number}").mkdir()
        os.utime(fresh_cache / f"old{number}", (1000 + number, 1000 + number))
    (fresh_cache / "tmp-abandoned").mkdir()
    os.utime(fresh_cache / "tmp-abandoned", (1000, 1000))
    (fresh_cache / "tmp-busy").mkdir()
    monkeypatch.setattr(cache, "MAX_ENTRIES", 8)
    cache.create("new", lambda workdir: _write(workdir, "new"))
    assert sorted(os.listdir(fresh_cache)) == ["new", "old4", "old5", "old6", "old7", "tmp-busy"]


def test_the_first_of_two_equal_entries_stays(fresh_cache: Path) -> None:
    def late(workdir: Path) -> None:
        _write(workdir, "late")
        cache.create("same", lambda inner: _write(inner, "early"))

    assert (cache.create("same", late) / "who").read_text() == "early"
    assert os.listdir(fresh_cache) == ["same"]


def test_many_processes_at_once(fresh_cache: Path, tmp_path: Path) -> None:
    script = tmp_path / "build.py"
    script.write_text(
        "from kvmpy.guest import GuestProgram\n"
        'source = "int together; void guest_main(void) { together = 5; }\\n"\n'
        'p = GuestProgram.from_c(source, name="together")\n'
        'print(p.symbol("together").size, len(p.elf))\n'
    )
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script)]
    running = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(4)
    ]
    said = [process.communicate(timeout=100)[0] for process in running]
    assert len(set(said)) == 1, said
    assert said[0].startswith("4 ")
    assert len(_entries(fresh_cache)) == 1


def test_many_threads_at_once(fresh_cache: Path, compiles: list[str]) -> None:
    results: list[GuestProgram] = []
    threads = [
        threading.Thread(target=lambda: results.append(GuestProgram.from_c(SOURCE, name="one")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 4
    assert len({id(one) for one in results}) == 1
    assert compiles.count("one") == 1


@pytest.mark.parametrize("left", ["stale", "gone"])
def test_what_another_process_made_cannot_be_read(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, left: str
) -> None:
    """A link to an entry that is out of date, as a lab's file system may still show it, is built anew."""

    def elsewhere(key: str, recipe: object) -> None:
        stale = tmp_path / key
        if left == "stale":
            stale.mkdir()
            (stale / "index.json").write_text("{}")
        cache.entry(key).symlink_to(stale)

    monkeypatch.setattr(program, "elsewhere", elsewhere)
    assert GuestProgram.from_c(SOURCE).symbols["cached"].size == 4
    assert not any(path.is_symlink() for path in fresh_cache.iterdir())
