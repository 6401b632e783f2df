# SPDX-License-Identifier: Apache-2.0
"""The bug catalogue: its entries, what a tree gets of it, what runs for a bug, what counts as a notice."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pyroaring import BitMap

from kvmpy.cli import bugs as cli
from kvmpy.lab import build, kernels, places
from kvmpy.lab.bugs import catalogue, measure, others, proving
from kvmpy.lab.bugs.measure import MISSED, NOT_RUN, NOTICED, Journal, Result, Suite
from kvmpy.lab.coverage.maps import Map, Test
from kvmpy.lab.coverage.model import Place
from kvmpy.lab.coverage.store import OWN_SUITE
from kvmpy.lab.errors import LabError
from kvmpy.lab.hooks import BUG, Hook, HookError, HookList, without
from kvmpy.platforms import bugs_platform

SOURCE = """\
static int work(int a)
{
	if (a > 1 &&
		b)
		return check(a);
	return 0;
}
"""


def around(**fields: str) -> Hook:
    """A hook that goes around an expression, some fields replaced."""
    usual = {"name": "7-1", "file": "a.c", "place": "around", "scope": r"^static int work\("}
    usual |= {"anchor": "a > 1", "text": "!kvm_bug(7) && (@@)", "owner": BUG}
    return Hook(**(usual | fields))


# ---- hooks around an expression


def test_an_expression_stays_within_the_hook() -> None:
    changed = around().insert(SOURCE)
    assert "!kvm_bug(7) && (/* bug: around 7-1 */a > 1/* bug: within 7-1 */)" in changed
    assert changed.count("\n") == SOURCE.count("\n")
    assert around().insert(changed) == changed


def test_what_hooks_did_can_be_taken_off() -> None:
    changed = SOURCE
    hooks = [
        around(),
        around(name="8-1", anchor=r"a > 1.*&&\n\t\tb", text="(@@) || kvm_bug(8)"),
        around(name="9-1", place="before", anchor=r"^\t\treturn check", text="\t\tif (!kvm_bug(9))"),
    ]
    for each in hooks:
        changed = each.insert(changed)
    assert changed.count("kvm_bug(") == 3
    assert without(changed) == SOURCE


@pytest.mark.parametrize("text", ["kvm_bug(7)", "@@ @@", "kvm_bug(7) &&\n@@"])
def test_the_kernels_own_code_is_there_once_and_on_one_line(text: str) -> None:
    with pytest.raises(HookError, match="one line is expected"):
        around(text=text).check()


# ---- the catalogue


def test_every_entry_is_whole() -> None:
    known = catalogue.load()
    assert len({bug.name for bug in known.values()}) == len(known)
    for bug in known.values():
        assert all((bug.wrong, bug.visible, bug.fix, bug.hooks, bug.functions)), bug.title
        assert re.match(r"(?i)(kvm|x86/sev)[:,] ", bug.fix), bug.title
        assert not bug.commit or len(bug.commit) == 12, bug.title
        assert float(bug.since), bug.title


def test_every_entry_has_one_proof_in_the_file_of_its_area() -> None:
    proved: list[tuple[str, int]] = []
    for file in sorted(catalogue.PROOFS.glob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = [ast.unparse(mark) for mark in node.decorator_list]
                (number,) = [mark for mark in marks if mark.startswith("pytest.mark.bug(")]
                proved.append((file.stem.removeprefix("test_"), int(number[len("pytest.mark.bug(") : -1])))
    assert sorted(proved) == sorted((bug.area, bug.number) for bug in catalogue.load().values())


def test_bugs_are_named_by_number_range_name_and_area() -> None:
    first = catalogue.load()[1]
    assert catalogue.chosen(["1"]) == catalogue.chosen([first.name]) == [first]
    assert [bug.number for bug in catalogue.chosen(["1-3"])] == [1, 2, 3]
    assert {bug.area for bug in catalogue.chosen(["apic"])} == {"apic"}
    assert catalogue.chosen([]) == list(catalogue.load().values())
    for word in ("0", "nothing", "240-255", "1-"):
        with pytest.raises(LabError, match="has no bug"):
            catalogue.chosen([word] if word != "1-" else ["999-"])


def test_every_kernel_file_is_gpl() -> None:
    files = [file for file in catalogue.FOLDER.rglob("*") if file.is_file()]
    assert len(files) > 4
    assert [file.name for file in files if "GPL-2.0-only" not in file.read_text().partition("\n")[0]] == []


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree that the common hooks fit, and a catalogue of two bugs, of which one does not."""
    for name, text in {
        "arch/x86/kvm/Makefile": "kvm-y += x86.o\n",
        "include/linux/kvm_host.h": "#ifndef A\n#include <linux/types.h>\n#endif\n",
        "a.c": SOURCE,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    fields: dict[str, Any] = dict.fromkeys(
        ("name", "area", "wrong", "fix", "commit", "since", "visible"), "x"
    )
    wrong = (around(name="8-1", text="kvm_bug(8) || @@"), around(name="8-2", anchor="nowhere"))
    known = {
        7: catalogue.Bug(number=7, hooks=(around(),), **fields),
        8: catalogue.Bug(number=8, hooks=wrong, **fields),
    }
    monkeypatch.setattr(catalogue, "load", lambda: known)
    return tmp_path


def test_a_bug_that_does_not_fit_is_told_and_left_out_as_a_whole(tree: Path) -> None:
    told: list[str] = []
    assert catalogue.apply(tree, told.append) == [7]
    assert len(told) == 1
    assert "bug 8 x is left out: hook 8-2 does not fit a.c" in told[0]
    text = (tree / "a.c").read_text()
    assert "kvm_bug(7)" in text
    assert "kvm_bug(8)" not in text
    assert (tree / "arch/x86/kvm/kvm_bugs.c").is_file()
    assert catalogue.apply(tree, told.append) == [7]
    assert (tree / "a.c").read_text() == text


def test_a_tree_without_kvm_is_refused(tree: Path) -> None:
    (tree / "arch/x86/kvm/Makefile").unlink()
    with pytest.raises(HookError, match="this tree has no arch/x86/kvm/Makefile"):
        catalogue.apply(tree, lambda _: None)


def test_what_was_compiled_before_keeps_its_time(tree: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    for name in ("arch", "include"):
        shutil.copytree(tree / name, second / name)
    shutil.copy(tree / "a.c", second)
    catalogue.apply(tree, lambda _: None)
    os.utime(tree / "a.c", ns=(1, 1))
    catalogue.apply(second, lambda _: None, catalogue.snapshot(tree))
    assert (second / "a.c").stat().st_mtime_ns == 1


def real_trees() -> list[Path]:
    """Kernel trees of the lab's cache that have no hooks of the catalogue."""
    found = (path.parent for path in (places.cache() / "trees").glob("*/Kbuild"))
    return [path for path in found if not (path / "include/linux/kvm_bugs.h").exists()]


def test_fits_the_trees_of_the_cache(tmp_path: Path) -> None:
    trees = real_trees()
    if not trees:
        pytest.skip("no unpacked kernel tree in the lab's cache: `kvmpy lab build` makes one")
    files = {hook.file for each in catalogue.lists() for hook in each.hooks}
    try:
        with kernels.build_lock(lambda _: None, patience=0):
            for name in files:
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(trees[0] / name, tmp_path / name)
    except LabError as error:
        pytest.skip(f"a build uses the trees of the lab's cache: {error}")
    before = {name: (tmp_path / name).read_text() for name in files if name.endswith(".c")}
    told: list[str] = []
    assert catalogue.apply(tmp_path, told.append) == list(catalogue.load())
    assert told == []
    assert {name: without((tmp_path / name).read_text()) for name in before} == before


# ---- kernels with it


def test_the_options_of_the_build_differ() -> None:
    with_bugs, plain = build._Plan(True, bugs=True), build._Plan(True)
    assert with_bugs.digest != plain.digest
    assert (with_bugs.suffix, plain.suffix) == ("-softsev-bugs", "-softsev")
    assert build._Plan(False, bugs=True).patches
    assert not build._Plan(False).patches


@pytest.mark.parametrize(
    ("on", "words"),
    [("", ""), ("0", ""), ("17", ", bug 17 on"), ("3,17", ", bug 3,17 on"), ("10", ", bug 10 on")],
)
def test_the_platform_says_it(on: str, words: str) -> None:
    assert bugs_platform(on) == f"kernel with the bug catalogue{words}"


# ---- the measure


def bug(number: int = 1) -> catalogue.Bug:
    """One of the catalogue."""
    return catalogue.load()[number]


def test_tests_of_the_area_come_file_by_file_without_a_map() -> None:
    files = ["apic/test_timer.py", "irq/test_msi.py", "msr/test_values.py"]
    assert [name for name, _ in measure.order(bug(), None, files)] == files[:2]


@pytest.mark.parametrize("many", [True, False])
def test_own_area_first_where_many_enter_the_function(monkeypatch: pytest.MonkeyPatch, many: bool) -> None:
    monkeypatch.setattr(measure, "_FEW", 2 if many else 3)
    file, function = bug().functions[0]
    tests = [
        ("memory/test_a.py::one", 0.1, True), ("apic/test_b.py::slow", 9.0, True),
        ("apic/test_b.py::fast", 1.0, True), ("apic/test_b.py::other", 2.0, False),
        ("irq/test_c.py::one", 0.5, False),
    ]  # fmt: skip
    known = Map(
        "kernel", "id", [Test(OWN_SUITE, name, seconds) for name, seconds, _ in tests], [],
        [Place(file, 1, 2, function)], [], [BitMap(i for i, test in enumerate(tests) if test[2])], BitMap(),
    )  # fmt: skip
    files = ["apic/test_a.py", "apic/test_b.py", "irq/test_c.py", "msr/test_d.py"]
    own = [("apic/test_b.py::fast", 1.0), ("apic/test_b.py::slow", 9.0)]
    rest = [("apic/test_a.py", 1.0), ("apic/test_b.py", 12.0)]
    rest.insert(2 if many else 0, ("memory/test_a.py::one", 0.1))
    assert measure.order(bug(), known, files) == [*own, *rest, ("irq/test_c.py", 0.5)]


def test_a_budget_has_room_for_one_test_at_least() -> None:
    tests = [("a", 50.0), ("b", 5.0), ("c", 100.0)]
    assert measure.within(tests, 1) == ["a"]
    assert measure.within(tests, 60) == ["a", "b"]


class FakeSuite(Suite):
    """Answers with the reports that it is given, and keeps what was asked."""

    def __init__(self, *reports: list[tuple[str, str, str]]) -> None:
        kernel = kernels.Kernel("k", "7.2", "", "", "", Path(), bugs=(1,), build_id="id")
        super().__init__(kernel, lambda _: None)
        self.reports = list(reports)
        self.asked: list[tuple[str, Sequence[str]]] = []

    def _run(
        self, number: str, tests: Sequence[str], seconds: float, parameters: Sequence[str] = ()
    ) -> dict[str, Any]:
        del seconds, parameters
        self.asked.append((number, list(tests)))
        fields = ("id", "verdict", "reason")
        return {"tests": [dict(zip(fields, test, strict=True)) for test in self.reports.pop(0)]}


def test_a_failure_that_passes_without_the_bug_is_a_notice() -> None:
    suite = FakeSuite([("a", "pass", ""), ("b", "fail", "expected 1")], [("b", "pass", "")])
    result = suite.look(bug(), ["a", "b", "c"], 10)
    assert (result.state, result.test, result.why, result.died) == (NOTICED, "b", "expected 1", False)
    assert suite.asked == [("1", ["a", "b", "c"]), ("0", ["b"])]


def test_a_failure_without_the_bug_is_none_and_the_rest_goes_on() -> None:
    suite = FakeSuite([("a", "fail", "")], [("a", "fail", "")], [("b", "pass", "")])
    assert suite.look(bug(), ["a", "b"], 10).state == MISSED
    assert suite.asked[-1] == ("1", ["b"])
    suite.reports = [[("b", "pass", "")]]
    suite.look(bug(2), ["a", "b"], 10)
    assert suite.asked[-1] == ("2", ["b"])


def test_a_dead_kernel_is_a_notice_and_told_as_such() -> None:
    suite = FakeSuite([("a", "lost", "panic")], [("a", "pass", "")])
    assert (suite.look(bug(), ["a"], 10).state, suite.baseline) == (NOTICED, {"a": False})
    suite = FakeSuite([("a", "lost", "panic")], [("a", "pass", "")])
    assert suite.look(bug(), ["a"], 10).died


def test_a_test_that_the_limit_ended_is_no_notice() -> None:
    suite = FakeSuite([("a", "pass", ""), ("b", "lost", "the run took longer than 80 s")])
    assert suite.look(bug(), ["a", "b"], 10).state == MISSED


def test_nothing_that_ran_is_not_a_miss() -> None:
    assert FakeSuite([("a", "skip", "no SEV")]).look(bug(), ["a"], 10).state == NOT_RUN


def test_a_journal_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    kernel = kernels.Kernel("k", "7.2", "", "", "", Path(), build_id="id")
    journal = Journal(path)
    journal.add(Result(1, "kvmpy", NOTICED, "a", kernel="id", budget=10))
    journal.add(Result(2, "kvmpy", MISSED, kernel="id", budget=10))
    journal.add(Result(3, "kvmpy", NOT_RUN, kernel="id", budget=10))
    again = Journal(path)
    assert again.results == journal.results
    has = {
        (number, budget): again.has(bug(number), "kvmpy", kernel, budget)
        for number in (1, 2, 3)
        for budget in (10, 20)
    }
    assert has == {
        (1, 10): True,
        (1, 20): True,
        (2, 10): True,
        (2, 20): False,
        (3, 10): False,
        (3, 20): False,
    }
    assert not again.has(bug(1), "other", kernel, 10)
    path.write_text("no\n")
    with pytest.raises(LabError, match="is no journal"):
        Journal(path)


def test_results_are_kept_as_they_come_under_their_suite(tmp_path: Path) -> None:
    """A slow look keeps no other result back, and a failed one says nothing of another suite."""
    kept = threading.Event()

    class Watched(Journal):
        def add(self, result: Result) -> None:
            super().add(result)
            kept.set()

    journal = Watched(tmp_path / "journal")
    journal.add(Result(2, "kvmpy", NOTICED, "a"))
    kept.clear()

    def look(one: catalogue.Bug) -> Result:
        if one.number == 1:
            assert kept.wait(60), "the other result did not come"
            return Result(1, "cmd", MISSED)
        raise LabError("no boot")

    found = list(measure.look_for([bug(1), bug(2)], "cmd", 2, look, journal, lambda _: None))
    assert [(each.number, each.suite, each.state) for each in found] == [
        (1, "cmd", MISSED),
        (2, "cmd", NOT_RUN),
    ]
    assert Journal(tmp_path / "journal").results[2, "kvmpy"].state == NOTICED


@pytest.mark.parametrize(
    ("statuses", "state"), [((0, 0), MISSED), ((0, 1), NOTICED), ((1, 1), NOT_RUN), ((4, 0), NOT_RUN)]
)
def test_a_command_by_its_exit_status(statuses: tuple[int, int], state: str) -> None:
    assert measure.command_result(1, "cmd", statuses, "last words").state == state


def test_commands_without_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runner = CliRunner()
    listed = runner.invoke(cli.bugs, ["list", "apic"])
    assert listed.exit_code == 0
    assert len(listed.output.splitlines()) == len(catalogue.chosen(["apic"]))
    shown = runner.invoke(cli.bugs, ["show", "1"])
    assert bug().fix in shown.output
    assert runner.invoke(cli.bugs, ["show", "nothing"]).exit_code == 3
    for command in ("prove", "run"):
        refused = runner.invoke(cli.bugs, [command, "1"])
        assert refused.exit_code == 3
        assert "no lab kernel with the bug catalogue" in refused.output
        assert "kvmpy lab build --bugs" in refused.output


def test_a_kernel_with_bugs_is_booted_by_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = places.cache() / "kernels"
    for name, numbers in (("7.2.1-a-bugs", [1, 2]), ("7.2.1-b", [])):
        (folder / name).mkdir(parents=True)
        (folder / name / "bzImage").touch()
        facts = {
            "name": name,
            "release": "7.2.1",
            "origin": "",
            "sha256": "",
            "config_hash": "a",
            "bugs": numbers,
        }
        (folder / name / "kernel.json").write_text(json.dumps(facts))
    assert kernels.find().name == "7.2.1-b"
    assert kernels.find("7.2").name == "7.2.1-b"
    assert kernels.find("7.2.1-a-bugs").name == "7.2.1-a-bugs"
    assert kernels.find(bugs=True).name == "7.2.1-a-bugs"
    with pytest.raises(LabError, match="with the bug catalogue"):
        kernels.find("7.2.1-c", bugs=True)


def test_lists_are_of_the_catalogues_owner() -> None:
    assert {hook.owner for each in catalogue.lists() for hook in each.hooks} == {BUG}
    assert HookList.load(catalogue.FOLDER, BUG).copies


# ---- proofs

PROOFS = """
import pathlib
import pytest

STATE = pathlib.Path({state!r})

@pytest.mark.bug(3)
def test_shows():
    assert STATE.read_text() == "0", "the bug is on"

@pytest.mark.bug(4)
def test_shows_nothing():
    pass

@pytest.mark.bug(5)
def test_fails_anyway():
    assert False

@pytest.mark.bug(6)
def test_of_another():
    assert False
"""


def test_a_proof_passes_with_the_bug_off_and_fails_with_it_on(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = tmp_path / "bugs"
    state.write_text("9")
    monkeypatch.setattr("kvmpy.lab.bugs.PARAMETER", state)
    pytester.makepyfile(PROOFS.format(state=str(state)))
    result = pytester.runpytest("-p", proving.__name__, proving.OPTION, "3,4,5", "-v")
    verdicts = {
        line.split()[0].partition("::")[2]: line.split()[1] for line in result.outlines if "::" in line
    }
    assert {name: verdicts.get(name) for name in verdicts if name.startswith("test_")} == {
        "test_shows[off]": "PASSED",
        "test_shows[on]": "PASSED",
        "test_shows_nothing[off]": "PASSED",
        "test_shows_nothing[on]": "FAILED",
        "test_fails_anyway[off]": "FAILED",
        "test_fails_anyway[on]": "PASSED",
    }
    result.stdout.fnmatch_lines(["*bug 4 is on, and the proof passes: it does not show*"])
    assert state.read_text() == "0"


@pytest.mark.parametrize(
    ("said", "status", "words"),
    [
        ("boot\nno good\n\nkvmpy-suite-status 1\nreboot: down\n", 1, "boot / no good"),
        ("boot\n\nkvmpy-suite-status 0\n", 0, "boot"),
        ("boot\nKernel panic\n", others.DIED, "boot / Kernel panic"),
    ],
)
def test_what_a_command_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, status: int, words: str
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\nprintf '%s' {shlex.quote(said)}\n")
    fake.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(fake))
    kernel = kernels.Kernel("k", "7.2", "", "", "", Path(), bugs=(1,), build_id="id")
    assert others.Program(kernel, "cmd", 5, lambda _: None)._run("1") == (status, words)
