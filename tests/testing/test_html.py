# SPDX-License-Identifier: Apache-2.0
"""The HTML page as text: what it holds, what it cannot run, and which files it is made of."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvmpy.cli.main import main
from kvmpy.testing import html
from kvmpy.testing.host import HostSummary
from kvmpy.testing.html import ReportError, base_id, page_data, render, reports_in, script_json
from kvmpy.testing.json_report import document
from kvmpy.testing.verdicts import TestVerdict, Verdict
from tests.testing.support import Suite

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028'\"&"


def a_test(name: str, verdict: Verdict = Verdict.PASS, **values: Any) -> TestVerdict:
    identifier = f"memory/test_x.py::{name}"
    return TestVerdict(identifier, identifier, "memory", verdict, "host", **values)


def a_report(
    *tests: TestVerdict,
    platform: str = "host",
    kernel: str = "6.18.1 x86_64",
    configuration: str = "",
    **values: Any,
) -> dict[str, Any]:
    host = HostSummary(
        kernel=kernel,
        cpu="AMD EPYC",
        vendor_modules=("kvm_amd",),
        platform=platform,
        kvm=True,
        vm_types=("KVM_X86_DEFAULT_VM",),
        protections={"snp": "an AMD CPU", "cbit": "", "none": ""},
        labels={"cbit": "emulated encryption bit"},
        accelerator="tcg" if platform != "host" else "",
        configuration=configuration,
    )
    return document(tests, host, seed=7, duration=1.5, exit_status=0, **values)


class Page(HTMLParser):
    """What a browser would find in the page: elements, their attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            self.scripts[-1] += data
        elif self._open[-1:] != ["style"]:
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script shows."""
        results: dict[str, Any] = json.loads(self.scripts[0])
        return results


def test_text_is_never_markup() -> None:
    """Whatever a test's name, reason or guest output says, the page has its own elements and no others."""
    plain = Page(render([a_report(a_test("test_a", Verdict.FAIL, reason="no", details="d"))]))
    words = ("fd", "ioctl", "arg", "result")
    evil = a_test(
        f"test_a[{EVIL}]",
        Verdict.FAIL,
        promise=EVIL,
        reason=EVIL,
        details=EVIL,
        ioctls=({"ms": 0, "thread": 0, "failed": True, "count": 1, **dict.fromkeys(words, EVIL)},),
        memory_maps=({"vm": EVIL, "hidden": EVIL},),
    )
    page = Page(render([a_report(evil)]))
    assert page.tags == plain.tags
    assert len(page.scripts) == 2
    (row,) = page.data["rows"]
    assert row["promise"] == row["cells"][0]["reason"] == EVIL
    assert page.data["maps"] == [{"hidden": EVIL}]
    assert EVIL in page.text  # in the list for readers without a script, as text


def test_host_is_never_markup() -> None:
    """Nor does anything that the host says of itself become markup."""
    report = a_report(a_test("test_a"), not_run=[EVIL])
    plain = Page(render([report])).tags
    for key in ("kernel", "cpu"):
        report["host"][key] = EVIL
    report["host"]["protections"]["snp"]["missing"] = EVIL
    report["host"]["vendor_modules"] = [EVIL]
    assert Page(render([report])).tags == plain


def test_script_json() -> None:
    """The data keeps every character, with none that could end its element or a line."""
    text = script_json({"a": EVIL})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": EVIL}


def test_nothing_is_loaded() -> None:
    """The page names no other file, and its policy lets no script run but its own."""
    text = render([a_report(a_test("test_a"))])
    page = Page(text)
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "action"} & set(attributes), tag
        assert str(attributes.get("href", "#")).startswith(("#", "data:,")), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    assert "@import" not in text
    assert not re.findall(r"url\(", text)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert "innerHTML" not in page.scripts[1]
    assert "insertAdjacentHTML" not in page.scripts[1]


@pytest.mark.parametrize(
    ("identifier", "protection", "expected"),
    [
        ("a.py::test_x[cbit]", "cbit", "a.py::test_x"),
        ("a.py::test_x[cbit-4k]", "cbit", "a.py::test_x[4k]"),
        ("a.py::test_x[4k-cbit]", "cbit", "a.py::test_x[4k]"),
        ("a.py::test_x[4k-sw-protected-huge]", "sw-protected", "a.py::test_x[4k-huge]"),
        ("a.py::test_x[sev-es]", "sev-es", "a.py::test_x"),
        ("a.py::test_x[none-none]", "none", "a.py::test_x[none]"),
        ("a.py::test_x[cbits]", "cbit", "a.py::test_x[cbits]"),
        ("a.py::test_x", "none", "a.py::test_x"),
        ("a.py::test_x[none]", None, "a.py::test_x[none]"),
        ("a.py", None, "a.py"),
    ],
)
def test_base_id(identifier: str, protection: str | None, expected: str) -> None:
    """A test's protections share a row: the parameter that names them goes, the others stay."""
    assert base_id(identifier, protection) == expected


def test_columns_and_rows() -> None:
    """A test is one row with a cell for each kernel and protection; weaker protections come first."""
    first = a_report(
        a_test("test_a[snp]", Verdict.SKIP, protection="snp", missing=("an AMD CPU",), how=("buy one",)),
        a_test("test_a[cbit]", protection="cbit"),
        a_test("test_a[none]", Verdict.FAIL, protection="none", reason="x"),
        a_test("test_b"),
    )
    second = a_report(a_test("test_a[none]", protection="none"), platform="lab", kernel="7.2.0 x86_64")
    data = page_data([first, second])
    assert [run["name"] for run in data["runs"]] == ["6.18.1", "7.2.0 (lab)"]
    assert [(column["run"], column["name"], column["label"]) for column in data["columns"]] == [
        (0, "no VM", ""),
        (0, "none", ""),
        (0, "cbit", "emulated encryption bit"),
        (0, "snp", ""),
        (1, "none", ""),
    ]
    assert [row["id"] for row in data["rows"]] == ["memory/test_x.py::test_a", "memory/test_x.py::test_b"]
    verdicts = {cell["c"]: cell["v"] for cell in data["rows"][0]["cells"]}
    assert verdicts == {1: "fail", 2: "pass", 3: "skip", 4: "pass"}
    assert data["rows"][0]["cells"][0]["missing"] == [("an AMD CPU", "buy one")]


def test_kernels_of_one_name() -> None:
    """Two runs on one kernel are two names."""
    report = a_report(a_test("test_a"))
    assert [run["name"] for run in page_data([report, report])["runs"]] == ["6.18.1", "6.18.1 #2"]


def test_configurations_of_one_kernel() -> None:
    """A configuration tells runs apart, and is shown with what it sets; the default needs no word."""
    said = ("default", "shadow-paging (kvm_amd.npt=N)", "a,<b>=1")
    reports = [a_report(a_test("test_a"), configuration=text) for text in said]
    data = page_data(reports)
    assert [run["name"] for run in data["runs"]] == ["6.18.1", "6.18.1 shadow-paging", "6.18.1 a,<b>=1"]
    text = Page(render(reports)).text
    assert all(word in text for word in said)
    assert page_data(reports[1:2])["runs"][0]["name"] == "6.18.1"


def test_unknown_protection() -> None:
    """A protection that the host did not list still has its column."""
    data = page_data([a_report(a_test("test_a[tdx]", protection="tdx"))])
    assert [column["name"] for column in data["columns"]] == ["tdx"]


def test_a_map_is_told_once() -> None:
    """Maps that are alike stand once in the JSON report and in the page, whatever their VM and kernel."""
    same = {"segments": ["0x0 0x1000"]}
    other = {"segments": ["0x0 0x2000"]}
    report = a_report(
        a_test("test_a", memory_maps=({"vm": "vm0", **same}, {"vm": "vm1", **other})),
        a_test("test_b", memory_maps=({"vm": "vm2", **same},)),
    )
    assert report["memory_maps"] == [same, other]
    assert report["tests"][1]["memory_maps"] == [{"vm": "vm2", "map": 0}]
    data = page_data([a_report(a_test("test_0", memory_maps=({"vm": "vm0", **other},))), report])
    assert data["maps"] == [other, same]
    cells = {row["id"].rpartition("::")[2]: row["cells"][0] for row in data["rows"]}
    assert cells["test_a"]["maps"] == [["vm0", 1], ["vm1", 0]]
    assert cells["test_b"]["maps"] == [["vm2", 1]]


def test_emulated_platform_is_said() -> None:
    """A page with results of an emulated platform says that they are none of hardware; others do not."""
    words = "say nothing about hardware"
    assert words in Page(render([a_report(a_test("test_a"), platform="lab")])).text
    assert words not in Page(render([a_report(a_test("test_a"))])).text


@pytest.mark.parametrize(
    ("verdicts", "headline"),
    [
        ([Verdict.PASS, Verdict.FAIL, Verdict.LOST], "2 did not hold"),
        ([Verdict.PASS, Verdict.SKIP], "everything that ran held"),
        ([Verdict.SKIP], "nothing was shown to hold"),
    ],
)
def test_headline(verdicts: list[Verdict], headline: str) -> None:
    """The headline never says more than the verdicts."""
    text = render([a_report(*(a_test(f"test_{number}", verdict) for number, verdict in enumerate(verdicts)))])
    assert f"<h1>{headline}</h1>" in text


def test_five_thousand_tests_are_a_small_page() -> None:
    """A page of 5,000 verdicts stays below 2 MiB without failures."""
    promise = "A promise of reasonable length that this test checks under every protection there is."
    tests = [
        a_test(f"test_something_{number}[{name}]", protection=name, promise=promise, duration=0.0123)
        for number in range(2500)
        for name in ("cbit", "none")
    ]
    text = render([a_report(*tests)])
    assert len(text) < 2 << 20
    assert len(Page(text).data["rows"]) == 2500


def test_matrix_of_kernels() -> None:
    """The report of several kernels is taken apart; a kernel without a report has no column."""
    matrix = {"schema": "kvmpy-lab-matrix/1", "reports": {"old": a_report(a_test("test_a")), "new": {}}}
    (report,) = reports_in(matrix, "m.json")
    assert page_data([report])["runs"][0]["name"] == "old"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON: Expecting"),
        ("[]", "is not a JSON report of kvmpy"),
        ('{"schema": "kvmpy-report/9"}', "format kvmpy-report/9"),
        ('{"schema": "kvmpy-report/1"}', "cannot be shown: Object missing required"),
        ('{"schema": "kvmpy-lab-matrix/1", "reports": {}}', "there is no report"),
    ],
)
def test_files_that_are_no_reports(tmp_path: Path, text: str, says: str) -> None:
    """`kvmpy html` says of a file that it cannot show what is wrong with it, and writes no page."""
    (tmp_path / "in.json").write_text(text)
    result = CliRunner().invoke(main, ["html", str(tmp_path / "in.json"), "-o", str(tmp_path / "out.html")])
    assert result.exit_code == 1
    assert says in result.output
    assert not (tmp_path / "out.html").exists()


def test_the_command(tmp_path: Path) -> None:
    """`kvmpy html` puts the reports of several files into one page."""
    for number in range(2):
        report = a_report(a_test("test_a"), kernel=f"6.{number} x")
        (tmp_path / f"{number}.json").write_text(json.dumps(report))
    files = [str(tmp_path / f"{number}.json") for number in range(2)]
    result = CliRunner().invoke(main, ["html", *files, "-o", str(tmp_path / "made" / "out.html")])
    assert result.exit_code == 0, result.output
    page = Page((tmp_path / "made" / "out.html").read_text(encoding="utf-8"))
    assert [run["name"] for run in page.data["runs"]] == ["6.0", "6.1"]


def test_missing_file(tmp_path: Path) -> None:
    """A report that is not there is named."""
    result = CliRunner().invoke(main, ["html", str(tmp_path / "no.json"), "-o", str(tmp_path / "out.html")])
    assert result.exit_code == 1
    assert "no.json cannot be read" in result.output


def test_no_report() -> None:
    """A page of nothing is refused."""
    with pytest.raises(ReportError):
        render([])


@pytest.mark.parametrize("workers", [[], ["-n2"]], ids=["alone", "xdist"])
def test_run_writes_the_page(suite: Suite, workers: list[str]) -> None:
    """The page of a run has the verdicts of its other reports."""
    suite.add("memory/test_one.py", "def test_a():\n    'Holds.'\n\ndef test_b():\n    assert 0\n")
    outcome = suite.run("--kvmpy-html=out.html", *workers)
    data = Page((suite.folder / "out.html").read_text(encoding="utf-8")).data
    shown = {row["id"]: row["cells"][0]["v"] for row in data["rows"]}
    assert shown == {test["id"]: test["verdict"] for test in outcome.report["tests"]}
    assert data["rows"][0]["promise"] == "Holds."
    assert data["runs"][0]["seed"] == outcome.report["seed"]


def testassets_say_their_licence() -> None:
    """The page's own files are part of the package."""
    for name in ("page.html.j2", "page.css", "page.js"):
        assert "SPDX-License-Identifier: Apache-2.0" in html.asset(name)
