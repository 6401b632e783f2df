# SPDX-License-Identifier: Apache-2.0
"""The hooks of the software AMD-SP, on small trees and on a real one where the lab's cache has it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvmpy.cli import lab as cli
from kvmpy.lab import kernels, places, softsev, tools
from kvmpy.lab.errors import LabError
from kvmpy.lab.hooks import Copy, Hook, HookError, HookList

SOURCE = """\
#include <linux/first.h>
#include "last.h"
#ifdef CONFIG_X
#include <linux/conditional.h>
#endif

static int other(int a);
static int work(int a);

static int other(int a)
{
	do_it(a);
	return a;
}

static int work(int a)
{
	if (a)
		do_it(a);
	return a;
}
"""


def put(folder: Path, source: str, *hooks: Hook) -> str:
    """Apply *hooks* to a tree with one file, and return what the file then holds."""
    (folder / "a.c").write_text(source)
    HookList([], hooks).apply(folder)
    return (folder / "a.c").read_text()


def hook(**fields: object) -> Hook:
    """A hook with usual fields, some replaced."""
    usual: dict[str, object] = {
        "name": "one",
        "file": "a.c",
        "place": "before",
        "scope": r"^static int work\(",
        "anchor": r"^\treturn a;$",
        "text": "\tNEW();",
    }
    return Hook(**(usual | fields))  # type: ignore[arg-type]


def test_before_a_line_of_the_named_function_only(tmp_path: Path) -> None:
    lines = put(tmp_path, SOURCE, hook()).splitlines()

    index = lines.index("\tNEW();")
    assert lines[index + 2] == "\treturn a;"
    assert lines.count("\tNEW();") == 1
    assert index > lines.index("static int work(int a)")


def test_after_a_line(tmp_path: Path) -> None:
    lines = put(tmp_path, SOURCE, hook(place="after", anchor=r"^\t\tdo_it")).splitlines()

    assert lines[lines.index("\tNEW();") - 2] == "\t\tdo_it(a);"


def test_after_the_includes_that_are_not_conditional(tmp_path: Path) -> None:
    lines = put(tmp_path, SOURCE, hook(place="after-includes", scope="", anchor="")).splitlines()

    assert lines[lines.index("\tNEW();") - 2] == '#include "last.h"'


def test_appended_to_a_makefile_with_its_own_kind_of_comment(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text("obj-y += a.o")  # no newline at the end

    HookList([], [hook(file="Makefile", place="append", text="obj-y += b.o")]).apply(tmp_path)

    lines = (tmp_path / "Makefile").read_text().splitlines()
    assert lines[0] == "obj-y += a.o"
    assert lines[2] == "obj-y += b.o"
    assert lines[1].startswith("# softsev: one ")


def test_twice_is_once(tmp_path: Path) -> None:
    once = put(tmp_path, SOURCE, hook())
    listed = HookList([], [hook()])

    assert listed.apply(tmp_path) == []
    assert (tmp_path / "a.c").read_text() == once


def test_another_version_of_the_same_hook_is_refused(tmp_path: Path) -> None:
    put(tmp_path, SOURCE, hook())

    with pytest.raises(HookError, match="another version"):
        HookList([], [hook(text="\tNEWER();")]).apply(tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"anchor": r"^\treturn b;$"}, r"hook one does not fit a\.c: nothing there is like"),
        ({"scope": "", "anchor": r"^\treturn a;$"}, "2 lines are like"),
        ({"scope": r"^static int gone\("}, "0 places begin like"),
        ({"needs": [r"\bundo_it\("]}, "hook one does not fit"),
        ({"file": "b.c"}, r"this tree has no b\.c"),
    ],
    ids=["no-anchor", "two-anchors", "no-function", "a-need", "no-file"],
)
def test_a_hook_that_does_not_fit_is_refused(tmp_path: Path, fields: dict[str, object], words: str) -> None:
    with pytest.raises(HookError, match=words):
        put(tmp_path, SOURCE, hook(**fields))


def test_prototype_is_no_function(tmp_path: Path) -> None:
    assert "NEW" in put(tmp_path, SOURCE, hook(scope=r"^static int other\("))


def test_a_hook_for_other_versions_leaves_this_one_alone(tmp_path: Path) -> None:
    assert put(tmp_path, SOURCE, hook(when=r"^int newer\(", scope=r"^int newer\(")) == SOURCE


def test_one_hook_that_does_not_fit_leaves_the_whole_tree(tmp_path: Path) -> None:
    with pytest.raises(HookError, match="hook two"):
        put(tmp_path, SOURCE, hook(), hook(name="two", anchor="nowhere"))

    assert (tmp_path / "a.c").read_text() == SOURCE


def test_the_file_behind_a_hard_link_stays(tmp_path: Path) -> None:
    (tmp_path / "theirs.c").write_text(SOURCE)
    (tmp_path / "a.c").hardlink_to(tmp_path / "theirs.c")

    HookList([], [hook()]).apply(tmp_path)

    assert (tmp_path / "theirs.c").read_text() == SOURCE
    assert "NEW" in (tmp_path / "a.c").read_text()


def test_copies_only_what_differs(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "x.c").write_text("1")
    listed = HookList([Copy(tmp_path / "from", "to")], [])
    listed.apply(tmp_path)
    before = (tmp_path / "to" / "x.c").stat().st_mtime_ns

    listed.apply(tmp_path)
    assert (tmp_path / "to" / "x.c").stat().st_mtime_ns == before

    (tmp_path / "from" / "x.c").write_text("2")
    listed.apply(tmp_path)
    assert (tmp_path / "to" / "x.c").read_text() == "2"


def test_what_comes_out_the_same_keeps_its_time(tmp_path: Path) -> None:
    """A second copy of a tree has new times only where its files differ: make compiles those alone."""
    (tmp_path / "from").mkdir()
    for name in ("x.c", "y.c"):
        (tmp_path / "from" / name).write_text(name)
    listed = HookList([Copy(tmp_path / "from", "to")], [hook(), hook(file="b.c")])

    def copied() -> Path:
        tree = tmp_path / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir()
        for name in ("a.c", "b.c"):
            (tree / name).write_text(SOURCE + ("int changed;\n" if changed and name == "b.c" else ""))
        listed.apply(tree)
        return tree

    changed = False
    first = copied()
    files = ("a.c", "b.c", "to/x.c", "to/y.c")
    for name in files:
        os.utime(first / name, ns=(1, 1))
    before = listed.snapshot(first)
    assert listed.snapshot(tmp_path / "nowhere") == {}

    changed = True
    (tmp_path / "from" / "y.c").write_text("another")
    second = copied()
    listed.keep_times(second, before)

    assert [name for name in files if (second / name).stat().st_mtime_ns == 1] == ["a.c", "to/x.c"]


def test_place_must_be_known(tmp_path: Path) -> None:
    (tmp_path / "hooks.toml").write_text('[[hook]]\nname="x"\nfile="a"\nplace="beside"\ntext=""\n')

    with pytest.raises(HookError, match="beside"):
        HookList.load(tmp_path)


def test_the_projects_own_list_is_whole() -> None:
    listed = HookList.load(softsev.FOLDER)

    assert len({one.name for one in listed.hooks}) == len(listed.hooks)
    assert all(copy.source.exists() for copy in listed.copies)


def test_large_folios_are_put_in_whole_or_not_at_all(tmp_path: Path) -> None:
    """guest_memfd of Linux 6.12 has no memory policy: it stays as it is, and nothing of the rest fails."""
    listed = [one for one in HookList.load(softsev.FOLDER).hooks if one.name.startswith("gmem-")]
    older = "#include <linux/fs.h>\n\nstatic struct folio *kvm_gmem_get_folio(struct inode *inode)\n{\n}\n"
    path = tmp_path / "virt/kvm/guest_memfd.c"
    path.parent.mkdir(parents=True)
    path.write_text(older)

    assert len(listed) == 7
    assert {one.file for one in listed} == {"virt/kvm/guest_memfd.c"}
    assert HookList([], listed).apply(tmp_path) == []
    assert path.read_text() == older

    path.write_text(older.replace("{\n", "{\n\tpolicy = mpol_shared_policy_lookup();\n"))
    with pytest.raises(HookError, match="hook gmem-include does not fit"):
        HookList([], listed).apply(tmp_path)


def test_every_kernel_file_is_gpl() -> None:
    files = [file for file in softsev.FOLDER.rglob("*") if file.is_file()]

    assert files
    assert [file.name for file in files if "GPL-2.0-only" not in file.read_text().partition("\n")[0]] == []


def trees() -> list[Path]:
    """The kernel trees of the lab's cache that were not changed."""
    return sorted(
        path.parent
        for path in (places.cache() / "trees").glob("*/Kbuild")
        if not (path.parent / "arch/x86/include/asm/softsev.h").exists()
    )


@pytest.fixture
def plain_trees(tmp_path: Path) -> list[Path]:
    """Copies of what the hooks touch in the trees of the cache."""
    result = trees()
    if not result:
        pytest.skip("no unpacked kernel tree in the lab's cache: `kvmpy lab build` makes one")
    files = {one.file for one in HookList.load(softsev.FOLDER).hooks}
    try:
        with kernels.build_lock(lambda _: None, patience=0):
            for tree in result:
                for name in files:
                    (tmp_path / tree.name / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(tree / name, tmp_path / tree.name / name)
    except LabError as error:
        pytest.skip(f"a build uses the trees of the lab's cache: {error}")
    return [tmp_path / tree.name for tree in result]


def test_fits_the_trees_of_the_cache(plain_trees: list[Path]) -> None:
    for tree in plain_trees:
        assert "kvm-exit" in softsev.apply(tree)
        assert softsev.apply(tree) == []


def test_a_line_that_a_tree_lacks_is_named_by_its_hook(plain_trees: list[Path]) -> None:
    for tree in plain_trees:
        for one in HookList.load(softsev.FOLDER).hooks:
            path = tree / one.file
            source = path.read_text()
            if not one.anchor or (one.when and not re.search(one.when, source, re.MULTILINE)):
                continue
            start, end = one._scope(source)
            match = re.compile(one.anchor, re.MULTILINE).search(source, start, end)
            assert match is not None
            path.write_text(source[: match.start()] + "\t/* gone */" + source[match.end() :])
            before = {file: file.read_bytes() for file in tree.rglob("*") if file.is_file()}

            with pytest.raises(HookError, match=f"hook {one.name} does not fit {re.escape(one.file)}"):
                softsev.apply(tree)

            assert {file: file.read_bytes() for file in tree.rglob("*") if file.is_file()} == before
            path.write_text(source)


def test_a_build_of_a_tree_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tools, "need", lambda *_: None)
    tree = tmp_path / "tree"
    amd = "arch/x86/kernel/cpu/amd.c"
    (tree / amd).parent.mkdir(parents=True)
    (tree / "Kbuild").touch()
    (tree / amd).write_text("#include <linux/a.h>\n\nstatic void early_init_amd(int c)\n{\n\tother(c);\n}\n")
    before = {file: file.read_bytes() for file in tree.rglob("*") if file.is_file()}

    outcome = CliRunner().invoke(cli.lab, ["build", "--soft-sev", "--source", str(tree)])

    assert outcome.exit_code == 3
    assert f"hook cpu-features does not fit {amd}: nothing there is like" in outcome.output
    assert {file: file.read_bytes() for file in tree.rglob("*") if file.is_file()} == before
    copies = list(places.cache().glob(f"trees/*/{amd}"))
    assert [copy.read_text() for copy in copies] == [before[tree / amd].decode()]
    assert kernels.cached() == []
