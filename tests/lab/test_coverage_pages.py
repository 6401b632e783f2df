# SPDX-License-Identifier: Apache-2.0
"""The annotated source in a real browser: a click on a line's count lists the tests that execute it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvmpy.cli.coverage import coverage as command
from tests.lab.counted_program import CountedProgram
from tests.testing import test_html_browser

pytestmark = test_html_browser.pytestmark
browser = test_html_browser.browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    program = CountedProgram(folder / "program")
    measured = program.coverage(folder / "coverage")
    # A name that would end the script, or be markup.
    program.add(measured, "kvmpy", {"a/test_a.py::test[</script><b>]": (1, 2), "a/test_a.py::test_log": (7,)})
    result = CliRunner().invoke(command, ["html", "--coverage", str(measured), "-o", str(folder / "html")])
    assert result.exit_code == 0, result.output
    (found,) = (folder / "html").glob("index.kvm_main.c.*.html")
    return found


def click(browser: Any, line: int) -> None:
    browser.execute_script(
        f"document.getElementById('L{line}').closest('tr').querySelector('td.linecount').click()"
    )


def panel(browser: Any) -> list[str]:
    text: str = browser.execute_script("return document.getElementById('kvmpy-tests').textContent")
    return text.split("\n")


def test_a_click_lists_the_tests(browser: Any, page: Path) -> None:
    browser.get(page.as_uri())
    click(browser, 3)
    assert panel(browser) == [
        "line 3, tests: 2",
        "a/test_a.py::test[</script><b>]",
        "a/test_a.py::test_log",
    ]
    click(browser, 4)
    assert panel(browser) == ["line 4, tests: 1", "a/test_a.py::test_log"]
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
