# SPDX-License-Identifier: Apache-2.0
"""KTAP version 1, read back by a parser that knows only the kernel's rules."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmpy.testing import ktap
from kvmpy.testing.verdicts import TestVerdict, Verdict
from tests.testing.support import parse_ktap


def entry(
    identifier: str,
    verdict: Verdict,
    reason: str = "",
    *,
    details: str = "",
    platform: str = "host",
    protection: str | None = None,
) -> TestVerdict:
    return TestVerdict(
        identifier,
        identifier,
        "area",
        verdict,
        platform,
        reason=reason,
        details=details,
        protection=protection,
    )


def test_a_document_line_by_line() -> None:
    text = ktap.render(
        [
            entry("m/test_a.py::ok", Verdict.PASS),
            entry("m/test_a.py::no", Verdict.FAIL, "assert 1 == 2", details="E  assert 1 == 2"),
            entry("m/test_b.py::s", Verdict.SKIP, "needs KVM_CAP_X"),
            entry("m/test_c.py::x", Verdict.XFAIL, "errata: known"),
            entry("m/test_c.py::l", Verdict.LOST, "killed by SIGSEGV"),
            entry("m/test_c.py::t", Verdict.FAIL, "Timeout (>3.0s)"),
        ],
        header=["kernel 7.2"],
    )
    assert text.splitlines() == [
        "KTAP version 1",
        "# kernel 7.2",
        "1..3",
        "  KTAP version 1",
        "  # Subtest: m/test_a.py",
        "  1..2",
        "  ok 1 ok",
        "  # no: assert 1 == 2",
        "  # E  assert 1 == 2",
        "  not ok 2 no",
        "not ok 1 m/test_a.py",
        "  KTAP version 1",
        "  # Subtest: m/test_b.py",
        "  1..1",
        "  ok 1 s # SKIP needs KVM_CAP_X",
        "ok 2 m/test_b.py # SKIP all of its tests were skipped",
        "  KTAP version 1",
        "  # Subtest: m/test_c.py",
        "  1..3",
        "  ok 1 x # XFAIL errata: known",
        "  # l: killed by SIGSEGV",
        "  not ok 2 l # ERROR lost: killed by SIGSEGV",
        "  # t: Timeout (>3.0s)",
        "  not ok 3 t # TIMEOUT Timeout (>3.0s)",
        "not ok 3 m/test_c.py",
    ]


def test_an_emulated_platform_is_named_at_every_result() -> None:
    text = ktap.render([entry("a.py::t", Verdict.PASS, platform="lab", protection="snp")])
    assert "  # t (lab, snp)" in text.splitlines()


def test_tests_that_were_not_started_are_counted() -> None:
    """Each has its place in the plan, which was made before anybody knew: it is not ok."""
    selected = ["a.py::one", "a.py::two", "b.py::three", "b.py::four"]
    assert ktap.render([entry("a.py::two", Verdict.PASS)], selected=selected).splitlines() == [
        "KTAP version 1",
        "1..2",
        "  KTAP version 1",
        "  # Subtest: a.py",
        "  1..2",
        "  not ok 1 one # ERROR not started",
        "  ok 2 two",
        "not ok 1 a.py",
        "  KTAP version 1",
        "  # Subtest: b.py",
        "  1..2",
        "  not ok 1 three # ERROR not started",
        "  not ok 2 four # ERROR not started",
        "not ok 2 b.py",
        "# 3 selected tests were not started",
    ]


ENTRIES = st.builds(
    entry,
    st.tuples(st.sampled_from(["a.py", "d/b.py", "c#.py"]), st.text(min_size=1)).map("::".join),
    st.sampled_from(Verdict),
    st.text(),
    details=st.text(),
)


# A test has one verdict.
UNIQUE = st.lists(ENTRIES, max_size=12, unique_by=lambda entry: entry.nodeid)


@given(UNIQUE)
def test_any_text_gives_a_valid_document_with_the_same_verdicts(entries: list[TestVerdict]) -> None:
    document = parse_ktap(ktap.render(entries))
    files: dict[str, list[TestVerdict]] = {}
    for item in entries:
        files.setdefault(item.file, []).append(item)
    assert document.plan == len(files)
    for (good, _, directive, inner), items in zip(document.results, files.values(), strict=True):
        assert inner is not None
        assert [result[0] for result in inner.results] == [not item.verdict.bad for item in items]
        assert [result[2] for result in inner.results] == [_directive(item) for item in items]
        assert good is not any(item.verdict.bad for item in items)
        assert (directive == "SKIP") is all(item.verdict is Verdict.SKIP for item in items)


def _directive(item: TestVerdict) -> str:
    if item.verdict is Verdict.FAIL:
        return "TIMEOUT" if item.reason.startswith("Timeout") else ""
    return {Verdict.PASS: "", Verdict.SKIP: "SKIP", Verdict.XFAIL: "XFAIL", Verdict.LOST: "ERROR"}[
        item.verdict
    ]


@given(UNIQUE, st.data())
def test_a_stream_is_the_document_whatever_comes_first(
    entries: list[TestVerdict], data: st.DataObject
) -> None:
    """In any order of verdicts, and cut off anywhere, it is the beginning of what is written at once."""
    whole = ktap.render(entries, ["seed 1"]).splitlines()
    stream = ktap.Stream([item.nodeid for item in entries], header=["seed 1"])
    written: list[str] = []
    for item in data.draw(st.permutations(entries)):
        written += stream.add(item)
        assert written == whole[: len(written)]
    written += stream.end()
    assert written == whole


def test_a_stream_waits_for_the_test_before() -> None:
    """What can be said is said at once, in the order of collection."""
    stream = ktap.Stream(["a.py::1", "a.py::2", "b.py::1"])
    assert list(stream.add(entry("a.py::2", Verdict.PASS))) == ["KTAP version 1", "1..2"]
    begin = ["  KTAP version 1", "  # Subtest: a.py", "  1..2", "  ok 1 1", "  ok 2 2", "ok 1 a.py"]
    assert list(stream.add(entry("a.py::1", Verdict.PASS))) == begin
    more = list(stream.add(entry("b.py::1", Verdict.LOST, "killed")))
    assert more[-2:] == ["  not ok 1 1 # ERROR lost: killed", "not ok 2 b.py"]


def test_who_was_not_selected_is_told() -> None:
    stream = ktap.Stream(["a.py::1"])
    list(stream.add(entry("a.py::1", Verdict.PASS)))
    list(stream.add(entry("a.py::7", Verdict.FAIL, "odd")))
    assert list(stream.end()) == ["# a.py::7: fail, without having been selected"]
