# SPDX-License-Identifier: Apache-2.0
"""Coverage, from counters to answers, on a program that stands for the kernel; gcov itself is the oracle."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from pyroaring import BitMap

from kvmpy.cli import lab_run
from kvmpy.cli.coverage import coverage as command
from kvmpy.cli.options import NOTHING_SELECTED
from kvmpy.lab.coverage import changes, choice, functions, gcda, kept, maps, notes, queries, store
from kvmpy.lab.coverage.counters import Counters, CountersError
from kvmpy.lab.coverage.model import Model, Place
from kvmpy.lab.coverage.store import Coverage
from kvmpy.lab.errors import LabError
from kvmpy.testing import naming, selection
from tests.lab.counted_program import BUILD_ID, SOURCES, CountedProgram

SEV, X86, MAIN = "arch/x86/kvm/svm/sev.c", "arch/x86/kvm/x86.c", "virt/kvm/kvm_main.c"
LAUNCH, LOG, BAD = (
    "sev/test_a.py::test_launch[snp]",
    "memory/test_b.py::test_log",
    "memory/test_b.py::test_bad",
)
TESTS = {LAUNCH: (101,), LOG: (1, 2), BAD: (-1,)}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> CountedProgram:
    return CountedProgram(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="module")
def measured(program: CountedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = program.coverage(tmp_path_factory.mktemp("measured") / "coverage")
    program.add(folder, "kvmpy", TESTS)
    program.add(folder, "upstream", {"dirty_log_test": (7,)})
    return folder


@pytest.fixture
def known(measured: Path) -> maps.Map:
    return maps.make(Coverage(measured))


def line(path: str, text: str) -> int:
    """The number of the only line of an own source that contains *text*."""
    lines = SOURCES[path].split("\n")
    own = [lines[number - 1] for number in kept.own_lines(SOURCES[path])]
    (number,) = [number for number, content in enumerate(own, 1) if text in content]
    return number


def ask(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(command, words, catch_exceptions=False)
    return result.exit_code, result.output


# ---- counters


def test_the_reader_in_c_finds_every_counter(program: CountedProgram) -> None:
    folder = program.copy(101, 102, 7, -1)
    counters = Counters(folder)
    counted = store.Counted("s", "t", 0.0, counters.take(), counters.names)
    counters.close()
    packed = {name: functions for name, _, functions in counted.counters()}
    expected = {}
    for name in counters.names:
        _, by_function = notes.read_counters((folder / f"{name}.gcda").read_bytes())
        used = {
            ident: [(number, value) for number, value in enumerate(values) if value]
            for ident, values in by_function.items()
            if any(values)
        }
        if used:
            expected[name] = used
    assert packed == expected
    assert len(packed) == 3


def test_taking_the_counters_sets_them_to_zero(program: CountedProgram) -> None:
    folder = program.copy(7)
    counters = Counters(folder)
    counters.take()
    counters.close()
    assert (folder / "reset").read_bytes() == b"1"


def test_a_kernel_that_counts_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(CountersError, match="does not count"):
        Counters(tmp_path)


def test_a_file_that_is_none_of_gcovs_is_an_error(program: CountedProgram) -> None:
    folder = program.copy(7)
    next(folder.rglob("x86.gcda")).write_bytes(b"nonsense, and long enough")
    counters = Counters(folder)
    with pytest.raises(CountersError, match="Invalid argument"):
        counters.take()
    counters.close()


# ---- lines


@pytest.mark.parametrize("numbers", [(), (101,), (102,), (999,), (1, 7), (-1, 101, 102)])
def test_lines_and_functions_are_those_of_gcov(program: CountedProgram, numbers: tuple[int, ...]) -> None:
    counters = Counters(program.copy(*numbers))
    counted = store.Counted(
        "s", "t", 0.0, counters.take(), [_relative(program, each) for each in counters.names]
    )
    counters.close()
    archive = kept.Kept(program.folder / kept.ARCHIVE)
    model = Model(archive)
    lines, functions = model.executed(counted)
    expected_lines, expected_functions = set(), set()
    for data in program.build.rglob("*.gcda"):
        result = subprocess.run(
            ["gcov", "-j", "-t", data.name], cwd=data.parent, capture_output=True, check=True, timeout=60
        )
        for file in json.loads(result.stdout)["files"]:
            for entry in file["lines"]:
                if entry["count"] and (place := archive.place(file["file"], entry["line_number"])):
                    expected_lines.add(place)
            for entry in file["functions"]:
                if entry["execution_count"] and archive.place(file["file"], entry["start_line"]):
                    expected_functions.add(entry["name"])
    assert {model.lines[number] for number in lines} == expected_lines
    assert {model.functions[number].name for number in functions} == expected_functions
    assert expected_lines


def _relative(program: CountedProgram, name: str) -> str:
    return name.removeprefix(f"{str(program.build.resolve()).lstrip('/')}/")


def test_what_the_software_amd_sp_adds_is_nobodys(known: maps.Map) -> None:
    assert not [file for file, _ in known.lines if "softsev" in file]
    assert not [place for place in known.functions if "softsev" in place.name]
    # The lines' numbers are those of the tree without it.
    place = next(place for place in known.functions if place.name == "kvm_sev_ioctl")
    assert place.line == line(SEV, "int kvm_sev_ioctl(")


def test_what_only_the_boot_executes_does_not_count(known: maps.Map) -> None:
    boot = {known.lines[number] for number in known.boot}
    assert (X86, line(X86, "return set_boot_cpu(0);")) in boot
    assert (X86, line(X86, "if (number < 0)")) not in boot


def test_counters_of_another_build_are_refused(program: CountedProgram, tmp_path: Path) -> None:
    other = CountedProgram(
        tmp_path / "other", {**SOURCES, MAIN: SOURCES[MAIN].replace("slot == 7", "slot > 7")}
    )
    folder = program.coverage(tmp_path / "coverage")
    with pytest.raises(LabError, match=f"of another kernel.*build id {BUILD_ID}"):
        gcda.add(Coverage(folder), other.copy(7), "upstream", "dirty_log_test")
    assert not Coverage(folder).files


# ---- the folder


def test_half_an_entry_hides_nothing_before_it(program: CountedProgram, tmp_path: Path) -> None:
    folder = program.coverage(tmp_path / "coverage")
    program.add(folder, "kvmpy", TESTS)
    (file,) = Coverage(folder).files
    file.write_bytes(file.read_bytes()[:-5])
    assert [counted.test for counted in Coverage(folder).entries()] == ["(boot)", LAUNCH, LOG]


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond *size* bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    earlier = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, earlier)


def test_a_full_disk_keeps_what_was_measured(program: CountedProgram, tmp_path: Path) -> None:
    folder = program.coverage(tmp_path / "coverage")
    counters = Counters(program.copy(101))
    data = counters.take()
    counters.close()
    writer = store.Writer(folder, "kvmpy")
    writer.objects(counters.names)
    writer.add("first", 1.0, data)
    before = Coverage(folder).files[0].stat().st_size
    with small_files(600):
        for number in range(9):
            writer.add(f"more-{number}", 1.0, data)
    assert "File too large" in writer.failure
    tests = [counted.test for counted in Coverage(folder).entries()]
    assert tests[0] == "first"
    assert 1 <= len(tests) < 10
    assert before <= Coverage(folder).files[0].stat().st_size <= 600
    # With room again it goes on, behind what is whole.
    writer.add("later", 1.0, data)
    assert [counted.test for counted in Coverage(folder).entries()] == [*tests, "later"]


def test_a_disk_that_is_full_from_the_start_leaves_the_folder_as_it_was(
    program: CountedProgram, tmp_path: Path
) -> None:
    folder = program.coverage(tmp_path / "coverage")
    counters = Counters(program.copy(101))
    data = counters.take()
    counters.close()
    writer = store.Writer(folder, "kvmpy")
    with small_files(0):
        writer.objects(counters.names)
        writer.add("first", 1.0, data)
    assert "File too large" in writer.failure
    assert Coverage(folder).files == []


@pytest.mark.parametrize("suite", ["", "../up", "a b", "x/y"])
def test_a_suite_has_a_name(suite: str, tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no name of a suite"):
        store.Writer(tmp_path, suite)


def test_another_kernel_has_no_place_in_the_folder(program: CountedProgram, tmp_path: Path) -> None:
    folder = program.coverage(tmp_path / "coverage")
    other = program.coverage(tmp_path / "other", "0bad" * 10)
    with pytest.raises(LabError, match=f"build id {BUILD_ID}.*another kernel .build id {'0bad' * 10}"):
        store.merge(folder, Coverage(other))


def test_runs_are_merged(program: CountedProgram, measured: Path, tmp_path: Path) -> None:
    first, second = (program.coverage(tmp_path / name) for name in ("first", "second"))
    program.add(first, "kvmpy", {LAUNCH: (101,), BAD: (-1,)})
    program.add(second, "kvmpy", {LOG: (1, 2), BAD: (-1,)})
    program.add(second, "upstream", {"dirty_log_test": (7,)})
    into = tmp_path / "both"
    assert store.merge(into, Coverage(first)) == 1
    assert store.merge(into, Coverage(second)) == 2
    assert store.merge(into, Coverage(second)) == 0
    both, whole = maps.make(Coverage(into)), maps.make(Coverage(measured))
    assert _executed(both) == _executed(whole)
    # A test of two runs is one, and took as long as both.
    assert {test.id: test.seconds for test in both.tests}[BAD] == 1.0


def _executed(known: maps.Map) -> dict[tuple[str, int], set[str]]:
    return {
        line: {test.id for test in known.named(tests)}
        for line, tests in zip(known.lines, known.line_tests, strict=True)
    }


def test_a_folder_with_other_things_stays_as_it_is(program: CountedProgram, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(LabError, match="other things"):
        program.coverage(tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"\1\2\3", b"\0" * 11, b"\7" + b"\0" * 11, b"\0" * 8 + b"\3\0\0\0" + b"\1\2\3"]
)
def test_a_machine_may_say_anything(data: bytes) -> None:
    import zlib

    if data:
        with pytest.raises(LabError):
            store.check(zlib.compress(data), 3)
    else:
        with pytest.raises(LabError):
            store.check(data, 3)


# ---- the map


def test_a_map_comes_back_as_it_was(known: maps.Map, tmp_path: Path) -> None:
    known.write(tmp_path / "map")
    back = maps.read(tmp_path / "map")
    assert _executed(back) == _executed(known)
    assert back.functions == known.functions
    assert back.function_tests == known.function_tests
    assert (back.boot, back.build_id) == (known.boot, BUILD_ID)


def test_a_map_is_made_anew_when_there_is_more(program: CountedProgram, tmp_path: Path) -> None:
    folder = program.coverage(tmp_path / "coverage")
    program.add(folder, "kvmpy", {LOG: (1,)})
    assert len(maps.of_folder(Coverage(folder)).tests) == 1
    program.add(folder, "kvmpy", {LAUNCH: (101,)})
    assert len(maps.of_folder(Coverage(folder)).tests) == 2


def test_what_is_no_map_is_told(tmp_path: Path) -> None:
    (tmp_path / "map").write_bytes(b"no map")
    with pytest.raises(LabError, match="is no map of coverage"):
        maps.read(tmp_path / "map")


# ---- questions


def test_which_tests_execute_a_line(known: maps.Map) -> None:
    tests = known.of_line(SEV, line(SEV, "return sev_launch(3);"))
    assert tests is not None
    assert [test.id for test in tests] == [LAUNCH]
    assert known.of_line(SEV, line(SEV, "return never_called(number);")) == []
    assert known.of_line(SEV, 2) is None


def test_the_commands_answer(measured: Path) -> None:
    where = ("--coverage", str(measured))
    number = line(MAIN, "return -1;")
    status, text = ask("tests", f"kvm_main.c:{number}", *where)
    assert (status, text) == (0, f"{MAIN}:{number}: 1 of 4\n  upstream: dirty_log_test\n")
    status, text = ask("tests", "never_called", *where)
    assert (status, text.splitlines()) == (
        1,
        [f"{SEV}:{line(SEV, 'never_called(int')} never_called(): 0 of 4"],
    )
    status, text = ask("missing", "--errors", "-n1", *where)
    first = text.splitlines()[0]
    assert f"{SEV}:{line(SEV, 'never_called(int')}-" in first
    assert first.endswith("never_called(), never entered EINVAL ENOTTY")


def test_what_is_not_there_is_told(known: maps.Map) -> None:
    with pytest.raises(LabError, match=r"(?s)no function kvm_sev_ioct,.*there are: kvm_sev_ioctl"):
        queries.who_executes(known, "kvm_sev_ioct")
    with pytest.raises(LabError, match=r"no code in a file vmx\.c"):
        queries.who_executes(known, "vmx.c:7")


def test_blocks_without_a_test_are_sorted_by_size(known: maps.Map, measured: Path) -> None:
    blocks = queries.missing(known, Coverage(measured).kept.source)
    assert [len(block.lines) for block in blocks] == sorted(
        (len(block.lines) for block in blocks), reverse=True
    )
    assert {block.errors for block in blocks} >= {("EINVAL", "ENOTTY"), ("EINVAL",)}
    missed = {(block.file, number) for block in blocks for number in block.lines}
    assert missed == {entry for entry, tests in _executed(known).items() if not tests} - {
        known.lines[number] for number in known.boot
    }


def test_an_executed_line_or_another_function_ends_a_block() -> None:
    test, nobody = BitMap([0]), BitMap()
    known = maps.Map(
        "k",
        "b",
        [maps.Test("kvmpy", "a/test_0.py::test", 1.0)],
        [("f.c", number) for number in (1, 2, 3, 5, 6, 7)],
        [Place("f.c", 1, 5, "first"), Place("f.c", 6, 9, "second")],
        [nobody, test, nobody, nobody, nobody, nobody],
        [test, nobody],
        BitMap([5]),
    )
    blocks = queries.missing(known, lambda _: "a\nb\nc\nreturn -EFAULT;\n" * 3)
    assert [(block.span, block.place.name if block.place else "", block.entered) for block in blocks] == [
        ("3-5", "first", True),
        ("1", "first", True),
        ("6", "second", False),
    ]
    assert blocks[0].errors == ("EFAULT",)


def test_gcovr_agrees_with_the_map(measured: Path, known: maps.Map, tmp_path: Path) -> None:
    status, _ = ask("report", "--coverage", str(measured), "--json", str(tmp_path / "summary.json"))
    assert status == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    lines = _executed(known)
    assert summary["line_total"] == len(lines) - len(known.boot)
    assert summary["line_covered"] == sum(bool(tests) for tests in lines.values())
    # For gcov there is no function that gcc has put into its callers only.
    entered = [
        place.name for place, tests in zip(known.functions, known.function_tests, strict=True) if tests
    ]
    assert summary["function_covered"] == len(entered) - entered.count("doubled")


def test_suites_stand_side_by_side(measured: Path) -> None:
    status, text = ask("report", "kvm_main.c", "--coverage", str(measured))
    assert status == 0
    row = next(text for text in text.splitlines() if MAIN in text).split()
    assert row[1:] == ["4", "75.0", "50.0", "1/1", "75.0", "50.0", "1/1", "25.0", "25.0"]
    status, text = ask("report", "--suite", "nobody", "--coverage", str(measured))
    assert status == 2
    assert "there is no suite nobody, but kvmpy, upstream" in text


def test_lcov_has_the_paths_of_the_tree(measured: Path, tmp_path: Path) -> None:
    assert ask("lcov", "--coverage", str(measured), "-o", str(tmp_path / "all.lcov"))[0] == 0
    text = (tmp_path / "all.lcov").read_text()
    assert f"SF:{SEV}\n" in text
    part = text.partition(f"SF:{SEV}\n")[2]
    assert f"DA:{line(SEV, 'return sev_launch(3);')},1," in part.partition("end_of_record")[0]


def test_pages_have_the_tests_of_each_line(measured: Path, tmp_path: Path) -> None:
    assert ask("html", "--coverage", str(measured), "-o", str(tmp_path / "pages"))[0] == 0
    (page,) = (tmp_path / "pages").glob("index.sev.c.*.html")
    text = page.read_text()
    lines = json.loads(text.partition("const kvmpyLines = ")[2].partition(";\n")[0])
    sets = json.loads(text.partition("const kvmpySets = ")[2].partition(";</script>")[0])
    names = json.loads((tmp_path / "pages" / "tests-names.js").read_text()[len("const kvmpyTests = ") : -2])
    assert names[int(sets[lines[str(line(SEV, "return sev_launch(3);"))]])] == LAUNCH
    assert str(line(SEV, "return never_called(number);")) not in lines


# ---- changes


def edited(text: str) -> str:
    return text.replace("\tcase 102:", "\tcase 101 + 1:").replace(
        "\tint i, sum = 0;\n",
        "\tint i, sum = 0;\n\n\t/* a comment */\n\tif (number > 50)\n\t\treturn -EINVAL;\n",
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with the tree, without the software AMD-SP, and a second commit that changes it."""
    tree = tmp_path / "linux"
    for name, text in SOURCES.items():
        lines = text.split("\n")
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("\n".join(lines[number - 1] for number in kept.own_lines(text)))
    (tree / "arch/x86/kvm/svm/softsev_run.c").unlink()
    _git(tree, "init", "-q")
    _git(tree, "add", ".")
    _git(tree, "commit", "-q", "-m", "before")
    (tree / SEV).write_text(edited((tree / SEV).read_text()))
    (tree / "arch/x86/kvm/xen.c").write_text("int xen(void)\n{\n\treturn 1;\n}\n")
    _git(tree, "add", ".")
    _git(tree, "commit", "-q", "-m", "after")
    return tree


def _git(tree: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    result = subprocess.run(
        ["git", *who, *words], cwd=tree, check=True, capture_output=True, text=True, timeout=60
    )
    return result.stdout


@pytest.fixture
def changed(program: CountedProgram, tmp_path: Path) -> Path:
    """Coverage of the kernel with the change."""
    after = CountedProgram(
        tmp_path / "after",
        {**SOURCES, SEV: edited(SOURCES[SEV]), "arch/x86/kvm/xen.c": "int xen(void)\n{\n\treturn 1;\n}\n"},
    )
    folder = after.coverage(tmp_path / "changed", "feed" * 10)
    after.add(folder, "kvmpy", TESTS)
    return folder


def test_added_lines_are_told_with_their_tests(changed: Path, repository: Path) -> None:
    status, text = ask("diff", "HEAD~1..HEAD", "--source", str(repository), "--coverage", str(changed))
    states = {row.split(":")[2].split()[0]: row for row in text.splitlines() if row.startswith(f"{SEV}:")}
    assert status == 1
    assert set(states) >= {"executed", "not"}
    assert f"if (number > 50)  [{LAUNCH}]" in states["executed"]
    assert (
        "Coverage of HEAD~1..HEAD: 1 of 5 added lines with code are executed (20 %), by 1 of 3 tests." in text
    )
    assert "arch/x86/kvm/xen.c: xen(): 0 of 2" in text
    assert "Not executed:\n" in text
    assert f"build id {'feed' * 10}." in text


def test_a_patch_file_does_as_well(changed: Path, repository: Path, tmp_path: Path) -> None:
    patch = tmp_path / "0001.patch"
    patch.write_text(_git(repository, "format-patch", "-1", "--stdout"))
    status, text = ask("diff", str(patch), "--summary", "--coverage", str(changed))
    assert status == 1
    assert text.startswith(f"Coverage of {patch}: 1 of 5 added lines with code are executed")


def test_a_patch_for_another_tree_is_refused(
    changed: Path, measured: Path, repository: Path, tmp_path: Path
) -> None:
    patch = tmp_path / "0001.patch"
    text = _git(repository, "format-patch", "-1", "--stdout")
    known = maps.of_folder(Coverage(changed))

    def judge(folder: Path, patch_text: str) -> None:
        patch.write_text(patch_text)
        archive = Coverage(folder).kept
        changes.judge(
            maps.of_folder(Coverage(folder)),
            changes.change(str(patch), None),
            lambda path: archive.source(path) if path in archive.sources else None,
        )

    assert known.build_id == "feed" * 10
    with pytest.raises(LabError, match=f"does not apply to the tree that was measured.*{'feed' * 10}"):
        judge(changed, text.replace("sum = 0", "total = 0"))
    with pytest.raises(LabError, match=f"is not applied to the tree that was measured.*{BUILD_ID}"):
        judge(measured, text)
    with pytest.raises(LabError, match="changes nothing in arch/x86/kvm and virt/kvm"):
        judge(changed, text.replace("arch/x86/kvm", "arch/arm64/kvm"))
    with pytest.raises(LabError, match="is no patch"):
        judge(changed, "not a patch\n")


def test_the_coverage_of_another_kernel_than_the_tree_is_refused(measured: Path, repository: Path) -> None:
    result = CliRunner().invoke(
        command, ["diff", "HEAD~1..HEAD", "--source", str(repository), "--coverage", str(measured)]
    )
    assert result.exit_code == 3
    assert f"build id {BUILD_ID}" in result.output


def test_a_tree_that_differs_elsewhere_is_another_one(
    changed: Path, repository: Path, tmp_path: Path
) -> None:
    patch = tmp_path / "0001.patch"
    patch.write_text(_git(repository, "format-patch", "-1", "--stdout"))
    words = ["diff", str(patch), "--source", str(repository), "--coverage", str(changed)]
    assert CliRunner().invoke(command, words).exit_code == 1
    source = repository / SEV
    source.write_text(f"{source.read_text()}/* the end */\n")
    result = CliRunner().invoke(command, words)
    assert result.exit_code == 3
    assert f"{SEV} is not the one that was measured (6.6.6-test, build id {'feed' * 10})" in result.output


def test_functions_that_change_are_found_by_name(repository: Path) -> None:
    found = changes.touched(changes.change("HEAD~1..HEAD", repository))
    assert found.functions == {(SEV, "sev_launch"), (SEV, "kvm_sev_ioctl"), ("arch/x86/kvm/xen.c", "xen")}
    assert not found.outside


def test_functions_in_the_kernels_style() -> None:
    text = """\
#define XCR0(a) \\
	(a | 1)
static u64 first(void)
{
	if (x) {
		y(1);
	}
}
struct some {
	int (*call)(int a);
};
static inline bool second(int a,
				int b) {
	return a;
}
static int FNAME(fetch)(struct kvm_vcpu *vcpu,
			int level)
{
}
int __attribute__((weak)) third(int a)
{
}
__printf(1, 2) void fourth(int a)
{
}
static const struct other table[] = {
	[1] = { .f = first(2) },
};
"""
    found = functions.functions_of(text.replace("\\\\", "\\"))
    assert found == [
        (3, 8, "first"),
        (12, 15, "second"),
        (16, 19, "*_fetch"),
        (20, 22, "third"),
        (23, 25, "fourth"),
    ]


def test_changes_outside_of_functions_are_told(repository: Path) -> None:
    header = repository / "arch/x86/kvm/svm/sev.h"
    header.write_text(header.read_text().replace("EINVAL 22", "EINVAL 23"))
    _git(repository, "commit", "-q", "-a", "-m", "third")
    found = changes.touched(changes.change("HEAD~1..HEAD", repository))
    assert not found.functions
    assert [text.partition(":")[2] for text in found.outside] == [
        "1: #define EINVAL 22",
        "1: #define EINVAL 23",
    ]


def test_the_tests_that_reach_a_change(known: maps.Map, repository: Path) -> None:
    found = choice.touching(known, changes.touched(changes.change("HEAD~1..HEAD", repository)))
    assert [test.id for test in found.tests] == [LAUNCH]
    assert found.of == 3
    assert found.unknown == ["arch/x86/kvm/xen.c xen()"]
    assert found.lines()[0] == "1 of 3 tests reach what changes, in sev (1)"


def test_a_changed_function_that_no_test_reaches_is_told(known: maps.Map) -> None:
    touched = changes.Touched(frozenset({(SEV, "never_called")}), ())
    found = choice.touching(known, touched)
    assert (list(found.tests), found.unreached) == ([], [f"{SEV} never_called()"])


def test_a_changed_function_that_gcc_has_inlined_is_reached_by_its_lines(known: maps.Map) -> None:
    found = choice.touching(known, changes.Touched(frozenset({(SEV, "doubled")}), ()))
    assert ([test.id for test in found.tests], found.unknown) == ([LAUNCH], [])
    (answer,) = queries.who_executes(known, "doubled")
    assert [test.id for test in answer.tests or ()] == [LAUNCH]


def test_a_changed_function_of_the_boot_is_not_said_to_be_dead(known: maps.Map) -> None:
    found = choice.touching(known, changes.Touched(frozenset({(X86, "kvm_arch_init")}), ()))
    assert (list(found.tests), found.booted, found.unreached) == ([], [f"{X86} kvm_arch_init()"], [])


@pytest.mark.parametrize("what", ["HEAD~1..nothing", "no-such-file"])
def test_what_is_no_change_is_told(what: str, repository: Path) -> None:
    with pytest.raises(LabError, match=r"nothing|neither a file"):
        changes.change(what, repository)


class Handed:
    """What a command would have run in the lab."""

    def __init__(self) -> None:
        self.paths: tuple[str, ...] = ()
        self.ids: list[str] = []

    def __call__(self, paths: tuple[str, ...], values: dict[str, Any], _extra: list[str]) -> int:
        self.paths, self.ids = paths, selection.read(values["select"])
        return 0


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> Handed:
    handed = Handed()
    monkeypatch.setattr(lab_run, "_run_selected", handed)
    return handed


def test_only_the_tests_that_reach_a_change_run(
    known: maps.Map,
    repository: Path,
    tmp_path: Path,
    handed: Handed,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known.write(tmp_path / "kvm.map")
    monkeypatch.chdir(repository)
    wanted = {"touching": "HEAD~1..HEAD", "coverage_map": tmp_path / "kvm.map"}
    assert lab_run.run_tests((), wanted, []) == 0
    assert (handed.paths, handed.ids) == (("sev/test_a.py",), [LAUNCH])
    assert "1 of 3 tests reach what changes, in sev (1)" in capsys.readouterr().err
    # One that nothing reaches boots nothing.
    main = repository / MAIN
    main.write_text(f"{main.read_text()}\nint nobody(void)\n{{\n\treturn 0;\n}}\n")
    _git(repository, "commit", "-q", "-a", "-m", "third")
    assert lab_run.run_tests((), wanted, []) == NOTHING_SELECTED
    assert f"not in the map (new, or not compiled): {MAIN} nobody()" in capsys.readouterr().err


def test_the_quick_run_is_the_suites_own_choice(
    tmp_path: Path, handed: Handed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(naming, "suite_folder", lambda: tmp_path)
    with pytest.raises(
        click.ClickException, match=r"no quick\.txt in the suite; kvmpy coverage quick writes"
    ):
        lab_run.run_tests((), {"quick": True}, [])
    selection.write(tmp_path / selection.QUICK, [LOG, LAUNCH, BAD], "three tests")
    assert lab_run.run_tests((), {"quick": True}, []) == 0
    assert handed.paths == ("memory/test_b.py", "sev/test_a.py")
    assert handed.ids == [LOG, LAUNCH, BAD]
    with pytest.raises(click.UsageError, match="exclude each other"):
        lab_run.run_tests((), {"quick": True, "touching": "a..b"}, [])
    with pytest.raises(click.UsageError, match="needs --coverage-map"):
        lab_run.run_tests((), {"touching": "a..b"}, [])


# ---- choosing few


def a_map(*tests: tuple[float, str]) -> maps.Map:
    """A map of tests: seconds, and a letter for each line that it executes."""
    letters = sorted({letter for _, lines in tests for letter in lines})
    return maps.Map(
        "k",
        "b",
        [
            maps.Test("kvmpy", f"a/test_{number}.py::test", seconds)
            for number, (seconds, _) in enumerate(tests)
        ],
        [("f.c", number) for number, _ in enumerate(letters)],
        [Place("f.c", 0, 99, "f")],
        [BitMap(number for number, (_, lines) in enumerate(tests) if letter in lines) for letter in letters],
        [BitMap(range(len(tests)))],
        BitMap(),
    )


def numbers(chosen: choice.Quick) -> list[int]:
    return [int(test.id[len("a/test_")]) for test in chosen.tests]


def test_few_tests_make_up_for_all() -> None:
    known = a_map((1, "abc"), (1, "def"), (1, "ad"), (1, "be"), (50, "abcdef"))
    chosen = choice.quick(known, 1.0)
    assert numbers(chosen) == [0, 1]
    assert (chosen.covered, chosen.lines) == (6, 6)


def test_a_slow_test_is_worth_it_where_nothing_else_does() -> None:
    assert numbers(choice.quick(a_map((1, "ab"), (90, "abcdefgh")), 0.9)) == [1]
    assert numbers(choice.quick(a_map((1, "abcdefghi"), (90, "j")), 0.9)) == [0]


def test_other_suites_are_not_chosen_from(measured: Path) -> None:
    chosen = choice.quick(maps.make(Coverage(measured)), 1.0)
    assert {test.suite for test in chosen.tests} == {"kvmpy"}
    assert {test.id for test in chosen.tests} == {LAUNCH, LOG, BAD}


# ---- import


@pytest.mark.parametrize("packed", [False, True])
def test_counters_of_other_programs_are_imported(
    program: CountedProgram, tmp_path: Path, packed: bool
) -> None:
    folder = program.coverage(tmp_path / "coverage")
    source = tmp_path / "gcov"
    shutil.copytree(program.copy(7), source)
    if packed:
        with tarfile.open(tmp_path / "gcov.tar.gz", "w:gz") as archive:
            archive.add(source, "sys/kernel/debug/gcov")
        source = tmp_path / "gcov.tar.gz"
    status, text = ask("import", str(source), "--suite", "upstream", "--coverage", str(folder))
    assert status == 0
    assert text == "gcov of upstream: 7 lines, 2 functions\n"
    tests = maps.of_folder(Coverage(folder)).of_line(MAIN, line(MAIN, "return -1;"))
    assert tests is not None
    assert [(test.suite, test.id) for test in tests] == [("upstream", "gcov")]


def test_what_has_no_counters_is_told(program: CountedProgram, tmp_path: Path) -> None:
    folder = program.coverage(tmp_path / "coverage")
    with pytest.raises(LabError, match=r"has no \.gcda files"):
        gcda.add(Coverage(folder), tmp_path / "coverage", "upstream", "x")
    (tmp_path / "text").write_text("text")
    with pytest.raises(LabError, match="neither a folder nor a tar archive"):
        gcda.add(Coverage(folder), tmp_path / "text", "upstream", "x")


def test_a_folder_without_coverage_is_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["missing", "--coverage", str(tmp_path)])
    assert result.exit_code == 3
    assert "has no coverage in it\n  measure some: kvmpy lab run" in result.output
