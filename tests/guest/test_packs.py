# SPDX-License-Identifier: Apache-2.0
"""Packs: programs come from them wherever their source lies, and from no other pack than this kvmpy's."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

import kvmpy
from kvmpy.guest import GuestProgram, packs, program, toolchain
from kvmpy.guest.errors import ToolchainError

SOURCE = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	GUEST_SYNC(%d);
}
"""


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> packs.Writer:
    """What collects the programs that are compiled."""
    monkeypatch.delenv(packs.VARIABLE, raising=False)
    monkeypatch.setattr(program, "_known", {})
    collecting = packs.Writer()
    monkeypatch.setattr(program, "collected", collecting.add)
    return collecting


def use(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on as on a host that has the pack, and no compiler."""
    monkeypatch.setattr(program, "collected", None)
    monkeypatch.setattr(program, "_known", {})
    monkeypatch.setenv(packs.VARIABLE, str(path))
    monkeypatch.setenv("PATH", "/nonexistent")
    for name in ("KVMPY_CC", "KVMPY_AR"):
        monkeypatch.delenv(name, raising=False)


def written(writer: packs.Writer, path: Path) -> Path:
    writer.write(path, "a compiler")
    return path


def test_a_program_comes_from_the_pack(
    writer: packs.Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its image, symbols and lines are those of the compiled one; without the pack it cannot be had."""
    compiled = GuestProgram.from_c(SOURCE % 1, cflags=["-DX"])
    entry = compiled.symbol("guest_main").gva
    place = compiled.line(entry)
    use(written(writer, tmp_path / "a.pack"), monkeypatch)
    taken = GuestProgram.from_c(SOURCE % 1, cflags=["-DX"])
    assert taken.elf == compiled.elf
    assert taken.symbol("guest_main") == compiled.symbol("guest_main")
    assert taken.line(entry) == place
    monkeypatch.delenv(packs.VARIABLE)
    program._known.clear()
    with pytest.raises(ToolchainError, match=r"gcc not found.*--pack: kvmpy pack build"):
        GuestProgram.from_c(SOURCE % 1, cflags=["-DX"])


def test_what_the_pack_lacks_is_named(
    writer: packs.Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another text, other options: another program."""
    GuestProgram.from_c(SOURCE % 2)
    use(written(writer, tmp_path / "a.pack"), monkeypatch)
    for text, cflags in ((SOURCE % 3, []), (SOURCE % 2, ["-DX"])):
        with pytest.raises(ToolchainError) as caught:
            GuestProgram.from_c(text, cflags=cflags, name="the-third")
        assert caught.value.missing.startswith(
            "the guest program the-third, which a.pack lacks (gcc not found"
        )
        assert caught.value.how.startswith("kvmpy pack build, with this kvmpy on a machine with gcc")


def test_lines_are_those_of_this_machine(
    writer: packs.Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pack is built in one folder and used in another, where the source stands two lines further down."""
    there, here = tmp_path / "there" / "own.py", tmp_path / "here" / "own.py"
    module = 'import kvmpy.guest\n{}SOURCE = """\n#include "near.h"\nvoid guest_main(void)\n{{\n\tnear();\n'
    module += '}}\n"""\nmade = kvmpy.guest.GuestProgram.from_c(SOURCE)\n'
    for file, text in ((there, module.format("")), (here, module.format("\n\n"))):
        file.parent.mkdir()
        file.write_text(text)
        (file.parent / "near.h").write_text('static inline void near(void) { asm volatile("nop"); }\n')

    def run(file: Path) -> GuestProgram:
        names: dict[str, object] = {"__name__": "own"}
        exec(compile(file.read_text(), str(file), "exec"), names)  # noqa: S102 - a test file as pytest runs one
        made = names["made"]
        assert isinstance(made, GuestProgram)
        return made

    def addresses(made: GuestProgram) -> range:
        main = made.symbol("guest_main")
        return range(main.gva, main.gva + main.size)

    def lines(made: GuestProgram) -> set[tuple[str, int] | None]:
        return {made.line(gva) for gva in addresses(made)}

    built = lines(run(there))
    assert {place[0] for place in built if place} == {str(there), str(there.parent / "near.h")}
    use(written(writer, tmp_path / "a.pack"), monkeypatch)
    taken = run(here)
    assert taken.name == "own.py:4"
    moved = {str(there): (str(here), 2), str(there.parent / "near.h"): (str(here.parent / "near.h"), 0)}
    assert lines(taken) == {place and (moved[place[0]][0], place[1] + moved[place[0]][1]) for place in built}
    calls = {call[:2] for gva in addresses(taken) for call in taken.inlined(gva)}
    assert calls == {("near", str(here))}
    # The header is a part of the program: with another one it is another program.
    (here.parent / "near.h").write_text("static inline void near(void) { }\n")
    program._known.clear()
    with pytest.raises(ToolchainError, match=r"the guest program own\.py:4, which a\.pack lacks"):
        run(here)


def test_files_are_known_by_their_content(
    writer: packs.Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "1" / "own.c", tmp_path / "2" / "own.c"
    for file in (first, second):
        file.parent.mkdir()
        file.write_text("void guest_main(void) { }\n")
    start = GuestProgram.from_file(first).symbol("guest_main").gva
    use(written(writer, tmp_path / "a.pack"), monkeypatch)
    assert GuestProgram.from_file(second).line(start) == (str(second), 1)
    second.write_text('void guest_main(void) { asm("nop"); }\n')
    with pytest.raises(ToolchainError, match=r"the guest program own\.c, which a\.pack lacks"):
        GuestProgram.from_file(second)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kvmpy": "0.0.1"}, f"is of kvmpy 0.0.1, this is {kvmpy.__version__}: kvmpy pack build"),
        ({"runtime": "0"}, "another guest_asm than that of this kvmpy"),
        ({"format": 9}, "has format 9, not 1"),
    ],
)
def test_a_pack_of_another_kvmpy_is_refused(
    writer: packs.Writer, tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    path = written(writer, tmp_path / "a.pack")
    about = {**packs.Pack(path).about, **changed}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pack.json", json.dumps(about))
    with pytest.raises(packs.PackError, match=message) as caught:
        packs.Pack(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_pack_is_refused(writer: packs.Writer, tmp_path: Path) -> None:
    """Cut anywhere, or with a byte changed anywhere, it is one line that names the file."""
    GuestProgram.from_c(SOURCE % 4)
    whole = written(writer, tmp_path / "a.pack").read_bytes()
    path = tmp_path / "b.pack"
    damaged = [b"", b"no zip", *(whole[: len(whole) * part // 5] for part in range(1, 5))]
    damaged += [
        whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :] for at in range(60, len(whole) - 400, 997)
    ]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(packs.PackError, match=r"b\.pack") as caught:
            packs.Pack(path).verify()
        assert "\n" not in str(caught.value)
    with pytest.raises(packs.PackError, match=r"none\.pack: No such file"):
        packs.Pack(tmp_path / "none.pack")


def test_the_default_pack_is_that_of_this_kvmpy(
    writer: packs.Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs no name; one that others may write to is not taken."""
    GuestProgram.from_c(SOURCE % 5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    packs.default().parent.mkdir(parents=True)
    written(writer, packs.default())
    use(tmp_path, monkeypatch)
    monkeypatch.delenv(packs.VARIABLE)
    assert GuestProgram.from_c(SOURCE % 5).name.startswith("test_packs.py")
    packs._opened.cache_clear()
    packs.default().parent.chmod(0o777)
    assert packs.chosen() is None
    assert toolchain.runtime_hash()[:12] in packs.default().name


def test_a_pack_appears_whole_or_not_at_all(writer: packs.Writer, tmp_path: Path) -> None:
    """A failure half-way leaves the old one, and nothing beside it."""
    path = written(writer, tmp_path / "packs")
    before = path.read_bytes()
    writer.programs["bad"] = (b"{}", None)  # type: ignore[assignment]
    with pytest.raises(TypeError):
        writer.write(path, "a compiler")
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir() if "packs" in each.name] == ["packs"]
