# SPDX-License-Identifier: Apache-2.0
"""What the host does for the sessions inside: it compiles their guest programs and their modules."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvmpy.guest import GuestProgram, cache, packs, program
from kvmpy.guest.errors import GuestBuildError
from kvmpy.guest.symbols import LineTable
from kvmpy.lab import bytecode, kernels, places, programs, runs
from kvmpy.lab.qemu import Options, prepare

SOURCE = """
#include <kvmpy/guest.h>
void guest_main(void)
{
	GUEST_SYNC(%d);
}
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Two caches, of a host and of a session inside, and requests that the host answers at once."""
    host, inside, answers = tmp_path / "host", tmp_path / "inside", tmp_path / "answers"
    monkeypatch.setenv(programs.CACHE_VARIABLE, str(host / "kvmpy" / "guest"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(inside))
    monkeypatch.setattr(program, "_known", {})
    events: list[dict[str, Any]] = []

    def write(event: dict[str, Any]) -> None:
        events.append(event)
        with monkeypatch.context() as there:
            there.setenv("XDG_CACHE_HOME", str(host))
            there.setattr(program, "elsewhere", None)
            programs.answer(answers, event["key"], event["recipe"])

    monkeypatch.setattr(program, "elsewhere", lambda key, recipe: programs.ask(write, answers, key, recipe))
    return events


def test_the_host_compiles_and_the_session_inside_finds_it(elsewhere: list[dict[str, Any]]) -> None:
    results = []
    for _ in range(2):
        results.append(GuestProgram.from_c(SOURCE % 5, cflags=["-DX=1"]))
        program._known.clear()
    (event,) = elsewhere  # the second time it is in the cache
    assert cache.entry(event["key"]).is_symlink()
    assert results[0].symbol("guest_main").gva
    assert results[0].elf == results[1].elf


def test_what_does_not_compile_is_explained_inside(elsewhere: list[dict[str, Any]]) -> None:
    with pytest.raises(GuestBuildError, match="expected"):
        GuestProgram.from_c("#include <kvmpy/guest.h>\nvoid guest_main(void) { broken here }\n")
    assert len(elsewhere) == 1


def test_missed_modules_are_compiled_for_the_next_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "own_module.py"
    file.write_text("raise RuntimeError('only compiled')\n")
    bytecode.compile_files([str(file), "/does/not/exist.py", str(tmp_path)])
    monkeypatch.setattr(sys, "pycache_prefix", str(bytecode.folder()))
    assert Path(importlib.util.cache_from_source(str(file))).is_file()


def test_uncompiled_modules_are_told(tmp_path: Path) -> None:
    (tmp_path / "own_module.py").write_text("")
    code = "import own_module\nfrom kvmpy.lab.bytecode import uncompiled\nprint([*uncompiled()])"
    for dont, wanted in (("1", True), ("", False)):
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": f"{tmp_path}:{Path.cwd()}", "PYTHONDONTWRITEBYTECODE": dont},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert (str(tmp_path / "own_module.py") in result.stdout) is wanted


def test_the_host_decodes_the_line_table(elsewhere: list[dict[str, Any]]) -> None:
    """Emulated, decoding takes many seconds for each program that fails."""
    guest_program = GuestProgram.from_c(SOURCE % 6)
    address = guest_program.symbol("guest_main").gva
    place = guest_program.line(address)
    assert place is not None
    assert [event["recipe"] for event in elsewhere][1:] == [{"lines": guest_program._key}]
    (file,) = cache.entry(guest_program._key).glob("lines.json")
    assert (
        LineTable.load(file.read_text()).find(address)
        == place
        == LineTable.of(guest_program.elf).find(address)
    )


def test_a_damaged_line_table_is_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = GuestProgram.from_c(SOURCE % 7)
    start = program.symbol("guest_main").gva
    for text in ("", "[", "[[], [[1, 5, 2]]]", '{"a": 1}'):
        (cache.entry(program._key) / "lines.json").write_text(text)
        vars(program).pop("_lines", None)
        assert program.line(start) == LineTable.of(program.elf).find(start)
    assert LineTable.load((cache.entry(program._key) / "lines.json").read_text()).find(start) is not None


def test_a_post_mortem_imports_nothing_else(tmp_path: Path) -> None:
    """What the session inside has loaded before is all that a failure needs."""
    (tmp_path / "test_own.py").write_text(POSTMORTEM)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-s", str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    if "skipped" in result.stdout:
        pytest.skip("needs KVM")
    assert "IMPORTED []" in result.stdout, result.stdout


POSTMORTEM = """
import importlib, sys
import pytest
from kvmpy.guest import postmortem

def test_fails(make_vm):
    vm = make_vm("#include <kvmpy/guest.h>\\nvoid guest_main(void) { GUEST_ASSERT(0); }")
    vm.launch()
    for name in postmortem.IMPORTED_LATER:
        importlib.import_module(name)
    before = set(sys.modules)
    with pytest.raises(Exception) as caught:
        list(vm.vcpus[0].syncs())
    assert "guest_main" in str(caught.value)
    print("IMPORTED", sorted(set(sys.modules) - before))
"""


def test_a_pack_goes_into_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the session inside looks for it; without one nothing is named there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = Options(kernels.Kernel("k", "7.2.13", "test", "0" * 64, "", Path("nowhere"), False))
    pack = tmp_path / "own.pack"
    packs.Writer().write(pack, "a compiler")
    for number, named in enumerate((str(pack), "")):
        monkeypatch.setenv(packs.VARIABLE, named)
        folder = tmp_path / str(number)
        job = runs.job_of(options, ["true"], folder, [])
        prepare(folder, job)
        inside = folder / "job" / places.PACK
        assert inside.exists() is bool(named)
        assert job.environment.get(packs.VARIABLE) == (f"{places.INSIDE}/{places.PACK}" if named else None)
    assert (tmp_path / "0" / "job" / places.PACK).read_bytes() == pack.read_bytes()
