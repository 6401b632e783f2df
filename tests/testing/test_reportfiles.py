# SPDX-License-Identifier: Apache-2.0
"""Every report is written on its own, whole or not at all, whatever stands in it and wherever it goes."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kvmpy.owned import write_atomically
from kvmpy.testing import ktap
from kvmpy.testing.reportfiles import KtapFile, ReportFiles, SteadyStream
from kvmpy.testing.verdicts import TestVerdict, Verdict, printable
from tests.testing.support import Suite, parse_ktap

# Test names, reasons, output and docstrings that a terminal, KTAP, XML, JSON or HTML could take for its own.
HOSTILE = r'''
import pytest

def test_fails():
    """</script><b>promise</b> ]]> \x1b[2J"""
    print("\x1b]0;title\x07 printed \udc80")
    raise RuntimeError("</script><script>alert(3)</script>\nok 99 - forged\n# x\x1b[31m\u202e\udcff")

@pytest.mark.parametrize(
    "x", ["<b>", "ok 5 # SKIP", "a\nb", "\x1b[31m", "]]>", "\u00e9\u2028", "</title>", "\udc80"]
)
def test_name(x): pass

def test_nul(): assert "\0\x01\ufffe" == "\udc80"

def test_markup(): raise RuntimeError("[bold red]x[/bold red] [link=http://evil]y[/link] [/nope]")

@pytest.mark.skip(reason="<script>alert(5)</script> [bold]x[/] \x1b[2J # \nok 3 forged")
def test_skip(): pass

@pytest.mark.xfail(reason="\nnot ok 4 forged \udc80", strict=True)
def test_xfail(): assert 0
'''


@pytest.mark.timeout(400)
@pytest.mark.parametrize("workers", [[], ["-n1"]], ids=["one process", "xdist"])
def test_hostile_text_is_text_in_every_report(
    suite: Suite, workers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite.add("test_a.py", HOSTILE)
    monkeypatch.setenv("CI", "true")  # pytest's summary has whole messages there
    outcome = suite.run("--kvmpy-html=out.html", "-rA", *workers)
    assert outcome.status == 1
    verdicts = list(outcome.verdicts().values())
    assert {name: verdicts.count(name) for name in set(verdicts)} == {
        "pass": 8,
        "fail": 3,
        "skip": 1,
        "xfail": 1,
    }
    (level,) = [inner for _, _, _, inner in parse_ktap(outcome.ktap).results]
    assert level is not None
    assert len(level.results) == 13
    assert len(outcome.junit.findall(".//testcase")) == 13
    page = (suite.folder / "out.html").read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert data
    assert len(json.loads(data[1])["rows"]) == 13
    for text in (outcome.text, outcome.ktap, page):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", text)
    assert "</script><script>alert(3)" not in page
    assert r"\x1b[31m\u202e\udcff" in outcome.test("test_fails")["details"]
    assert not re.search(r"^(ok|not ok) \d+", outcome.text, re.MULTILINE)


def test_what_is_printable_stays() -> None:
    assert printable("a\tb\nä 漢 \U0001f600") == "a\tb\nä 漢 \U0001f600"
    assert printable("\x1b[2J\r\x9b\udc80\u2028") == r"\x1b[2J\r\x9b\udc80\u2028"


@pytest.mark.timeout(300)
def test_a_report_that_cannot_be_written_costs_no_other(suite: Suite) -> None:
    suite.add("test_a.py", "def test_a(): pass\n")
    result = suite.pytester.runpytest_subprocess(
        *suite.arguments(),
        *("--ktap=/dev/full", "--kvmpy-html=test_a.py/x.html", "--junitxml=/dev/full"),
        timeout=200,
    )
    # Nothing of the tests failed, yet the run is not good.
    assert result.ret == 3
    assert json.loads((suite.folder / "out.json").read_text())["summary"]["pass"] == 1
    text = result.stderr.str()
    assert "kvmpy: ktap: /dev/full is not complete: No space left on device" in text
    assert "kvmpy: junit: /dev/full is not written: No space left on device" in text
    assert re.search(r"kvmpy: html: \S*/test_a.py/x.html is not written: (Not a directory|File exists)", text)


@pytest.mark.timeout(300)
def test_a_record_that_cannot_be_written_costs_no_test(suite: Suite) -> None:
    suite.add(
        "test_a.py",
        "import pytest\n"
        "@pytest.mark.deadline(1)\ndef test_a(): pass\n"
        "@pytest.mark.deadline(1)\ndef test_b(): assert 0\n",
    )
    (suite.folder / "records").mkdir()
    for name in ("a", "b"):
        (suite.folder / "records" / f"test_a-test_{name}.rec").symlink_to("/dev/full")
    outcome = suite.run("--record=failures", "--record-dir=records")
    assert outcome.verdicts() == {"test_a": "pass", "test_b": "fail"}
    told = re.findall(r"^kvmpy: record: (\S+) is not complete: (.*)$", outcome.text, re.MULTILINE)
    assert [(Path(name).name, reason) for name, reason in told] == [
        ("test_a-test_b.rec", "No space left on device")
    ]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("option", ["--kvmpy-json", "--ktap", "--kvmpy-html", "--kvmpy-timeline"])
def test_a_folder_is_told_before_any_test(suite: Suite, option: str) -> None:
    suite.add("test_a.py", "def test_a(): open('ran', 'w').close()\n")
    (suite.folder / "made").mkdir()
    result = suite.pytester.runpytest_subprocess(*suite.arguments(), f"{option}=made", timeout=200)
    assert result.ret == 4
    result.stderr.fnmatch_lines([f"*{option}: */made is a folder; a file is expected"])
    assert not (suite.folder / "ran").exists()


@pytest.mark.timeout(400)
def test_a_reader_that_leaves_loses_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMPY_DEV_KVM", "/nonexistent")
    (tmp_path / "test_a.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(50))\ndef test_it(n): pass\n"
    )
    command = [sys.executable, "-m", "kvmpy", "run", "--lab", "never", "test_a.py", "--json", "o.json"]
    with subprocess.Popen(
        [*command, "--ktap", "o.ktap", "--junit", "o.xml", "--", "-v"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert b"test session starts" in process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(300) == 0
    assert json.loads((tmp_path / "o.json").read_text())["summary"]["pass"] == 50
    assert len(parse_ktap((tmp_path / "o.ktap").read_text()).results) == 1
    assert (tmp_path / "o.xml").exists()


def test_a_steady_stream_survives_its_reader() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        steady = SteadyStream(stream)
        os.close(reader)
        for _ in range(3):
            assert steady.write("x\udc80" * 10) in (20, 70)
            steady.flush()
        steady.finish()
        assert isinstance(steady.failure, BrokenPipeError)
        assert steady.lost == ""
    with open("/dev/full", "w") as stream:
        steady = SteadyStream(stream)
        steady.write("x")
        steady.flush()
        steady.finish()
        assert steady.lost == "standard output is not complete: No space left on device"


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "made" / "file"
    write_atomically(target, "old \udc80")
    assert target.read_bytes() == b"old \\udc80"
    target.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(target)
    write_atomically(link, b"new")
    assert (link.is_symlink(), target.read_bytes(), target.stat().st_mode & 0o777) == (True, b"new", 0o640)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(target, "other")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert target.read_bytes() == b"new"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_a_ktap_report_that_cannot_begin_costs_no_run(tmp_path: Path) -> None:
    """What goes wrong with its header is told; at the end it is tried once more."""
    files = ReportFiles()
    report = KtapFile(files, tmp_path / "out.ktap")
    entry = TestVerdict("a.py::t", "a.py::t", "a", Verdict.PASS, "host")

    def broken() -> ktap.Stream:
        raise RuntimeError("no header")

    report.add(entry, broken)
    report.add(entry, broken)
    assert files.failures == [f"ktap: {tmp_path / 'out.ktap'} is not complete: RuntimeError: no header"]
    report.end([entry], lambda: ktap.render([entry]))
    assert (tmp_path / "out.ktap").read_text() == ktap.render([entry])
