# SPDX-License-Identifier: Apache-2.0
"""The HTML page in a real browser: it opens, filters, unfolds, works by keyboard, without a complaint."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmpy.testing.html import render
from kvmpy.testing.verdicts import Verdict
from tests.testing.test_html import EVIL, a_report, a_test

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None or CHROMEDRIVER is None, reason="a browser: apt-get install chromium chromium-driver"
    ),
    pytest.mark.timeout(180),
]

MAP = {
    "type": 0,
    "protection": "cbit",
    "label": "emulated encryption bit",
    "vcpus": 1,
    "launched": True,
    "encryption": "C-bit 47",
    "segments": ["0x0 0x4000000"],
    "private": ["0x100000 0x4000", "0x200000 0x200000"],
    "mappings": [
        "0x400000 0x100000 0x4000 0x1000 private RW",
        "0xc000000 0x104000 0x1000 0x1000 shared RW NX",
        "0xd000000 0x105000 0x1000 0x1000 private RW NX",
        "0xffffffff80000000 0x200000 0x200000 0x200000 private RW NX",
    ],
    "hidden": "",
    "cut": False,
}
IOCTL = {"ms": 1.5, "thread": 0, "fd": "vm0", "ioctl": "KVM_SET_SREGS", "arg": "kvm_sregs(cr0=1)", "count": 2}


def pages() -> str:
    failed = a_test(
        "test_fails[cbit]",
        Verdict.FAIL,
        protection="cbit",
        promise=f"What is promised {EVIL}.",
        reason="it broke",
        details="E   AssertionError",
        postmortem="=== post-mortem of vm0/vcpu0\n--- registers\n  rip 0",
        ioctls=({**IOCTL, "result": "EINVAL", "failed": True},),
        memory_maps=({"vm": "vm0", **MAP},),
        duration=2.0,
    )
    tests = [
        failed,
        a_test("test_fails[none]", protection="none"),
        a_test("test_fails[snp]", Verdict.SKIP, protection="snp", missing=("an AMD CPU",), how=("buy one",)),
        a_test("test_holds", promise="It holds."),
        a_test("test_known", Verdict.XFAIL, reason="errata: known"),
        a_test("test_gone", Verdict.LOST, reason="killed"),
    ]
    return render([a_report(*tests), a_report(tests[1], platform="lab", kernel="7.2.0 x86_64")])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    try:
        driver.set_page_load_timeout(60)
        driver.set_script_timeout(60)
        yield driver
    finally:
        driver.quit()


class Shown:
    """The page as a reader has it."""

    def __init__(self, driver: Any, path: Path, width: int, dark: bool = False) -> None:
        self.driver = driver
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get(path.as_uri())

    def run(self, script: str) -> Any:
        """Evaluate JavaScript in the page."""
        return self.driver.execute_script(f"return {script}")

    def texts(self, selector: str) -> list[str]:
        """The text of every element that can be seen."""
        results: list[str] = self.run(
            f"[...document.querySelectorAll({selector!r})]"
            ".filter((e) => e.offsetParent).map((e) => e.textContent)"
        )
        return results

    def keys(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        from selenium.webdriver import ActionChains

        actions = ActionChains(self.driver)
        for key in keys:
            actions.send_keys(key)
        actions.perform()

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until the page has got there."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 20).until(lambda _: condition())


@pytest.fixture
def page_file(tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text(pages(), encoding="utf-8")
    return path


@pytest.fixture
def shown(browser: Any, page_file: Path) -> Iterator[Shown]:
    page = Shown(browser, page_file, 1280)
    yield page
    complaints = browser.get_log("browser")
    assert complaints == []


NAMES = "#rows .name .id"


def test_opens(shown: Shown) -> None:
    """The page is ready, with a line for each test and a cell for each kernel and protection."""
    assert shown.run("document.documentElement.dataset.ready") == "yes"
    names = ["fails", "holds", "known", "gone"]
    assert shown.texts(NAMES) == [f"test_x.py::test_{name}" for name in names]
    assert shown.run("document.querySelector('.row').querySelectorAll('.cell').length") == 5
    assert shown.texts("#columns .col") == ["no VM", "none", "cbit *", "snp", "none"]
    assert shown.texts("#columns .group") == ["6.18.1", "7.2.0 (lab)"]


def test_no_text_runs(shown: Shown) -> None:
    """Markup in a report's text is shown as text, folded and unfolded."""
    shown.run("document.querySelectorAll('#attention details').forEach((e) => { e.open = true; })")
    shown.until(lambda: shown.run("document.querySelectorAll('.part').length > 0"))
    assert shown.run("document.querySelectorAll('script').length") == 2
    assert shown.run("document.querySelectorAll('img').length") == 0
    assert any(EVIL in text for text in shown.texts(".promise"))


def test_filter(shown: Shown) -> None:
    """Words, verdicts and fields narrow the table down; Escape shows everything again."""
    shown.keys("/", "h", "o", "l", "d", "s")
    shown.until(lambda: shown.texts(NAMES) == ["test_x.py::test_holds"])
    assert shown.texts("#shown") == ["1 of 4 tests"]
    from selenium.webdriver.common.keys import Keys

    shown.keys(Keys.ESCAPE)
    assert len(shown.texts(NAMES)) == 4
    shown.keys("2")  # the second verdict: failed
    assert shown.texts(NAMES) == ["test_x.py::test_fails"]
    assert shown.run("document.querySelector('.chip.v-fail').getAttribute('aria-pressed')") == "true"
    shown.keys("2")
    assert len(shown.texts(NAMES)) == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("p:snp", ["fails"]),
        ("k:7.2", ["fails"]),
        ("v:xfail", ["known"]),
        (">1s", ["fails"]),
        ("-holds -known", ["fails", "gone"]),
        ("area:mem it", ["fails", "holds"]),
        ("amd cpu", ["fails"]),
        ("nothing-like-this", []),
    ],
)
def test_filter_words(shown: Shown, text: str, expected: list[str]) -> None:
    """Each kind of filter finds the tests that it names."""
    shown.run(f"document.getElementById('search').value = {text!r}")
    shown.run("document.getElementById('search').dispatchEvent(new Event('input'))")
    wanted = [f"test_x.py::test_{name}" for name in expected]
    shown.until(lambda: shown.texts(NAMES) == wanted)


def test_unfolds_by_keyboard(shown: Shown) -> None:
    """j goes to the next line, Enter unfolds it: reason, post-mortem, ioctls and memory map are there."""
    from selenium.webdriver.common.keys import Keys

    shown.keys("n", Keys.ENTER)
    panel = " ".join(shown.texts(".panel"))
    parts = ("it broke", "post-mortem of vm0/vcpu0", "KVM_SET_SREGS \u00d72", "EINVAL", "get it: buy one")
    for words in parts:
        assert words in panel
    assert "kvmpy run 'memory/test_x.py::test_fails[cbit]' --seed 7" in panel
    shown.keys(Keys.ENTER)
    assert shown.texts(".panel") == []
    first = shown.run("document.activeElement.textContent")
    shown.keys("j")
    assert shown.run("document.activeElement.textContent") != first
    shown.keys("k")
    assert shown.run("document.activeElement.textContent") == first


def test_focus_is_visible(shown: Shown) -> None:
    """What has the focus by keyboard has an outline."""
    shown.keys("j")
    assert shown.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_help(shown: Shown) -> None:
    """? shows the keys."""
    from selenium.webdriver.common.keys import Keys

    shown.keys("?")
    assert shown.run("document.getElementById('help').open") is True
    shown.keys(Keys.ESCAPE)
    shown.until(lambda: shown.run("document.getElementById('help').open") is False)


def test_memory_map(shown: Shown) -> None:
    """The map draws private and shared pages, the C-bit of entries, large pages, and a bit that disagrees."""
    shown.keys("n")
    shown.run("document.activeElement.click()")
    count = "document.querySelectorAll('.panel .map > svg %s').length"
    assert (
        shown.run(count % "rect.private:not(.faint)") == 4 + 8
    )  # four small pages, eight lines of a large one
    assert shown.run(count % "rect.shared:not(.faint)") == 2
    assert shown.run(count % "rect.odd") == 1  # 0x105000: the entry has the bit, the page is shared
    assert shown.run(count % "rect.big") == 1
    assert shown.run(count % "circle.mark") == 4 + 1 + 1
    titles = shown.run("[...document.querySelectorAll('.panel .map > svg title')].map((e) => e.textContent)")
    assert any("0x105000" in title and "disagrees" in title for title in titles)
    assert any("2 MiB page of gva 0xffffffff80000000" in title for title in titles)
    # Every byte of the VM is drawn once.
    drawn = {title.partition(",")[0] for title in titles}
    assert len(drawn) == len(titles)


def test_lists(shown: Shown) -> None:
    """Failures, missing things and expected failures have lists of their own."""
    assert len(shown.texts("#attention details")) == 2
    assert "an AMD CPU" in shown.texts("#skips summary")[0]
    assert "errata: known" in shown.texts("#expected summary")[0]


def test_order(shown: Shown) -> None:
    """Slowest first."""
    shown.run("document.getElementById('order').value = 'slow'")
    shown.run("document.getElementById('order').dispatchEvent(new Event('change'))")
    assert shown.texts(NAMES)[0] == "test_x.py::test_fails"


# For each line of the table its name and its highest part without text, or text beyond its edge.
BLANKS = """[...document.querySelectorAll('.row')].filter((row) => row.offsetParent).map((row) => {
  const nodes = document.createTreeWalker(row, NodeFilter.SHOW_TEXT), box = row.getBoundingClientRect();
  const spans = [[box.bottom, box.bottom]];
  while (nodes.nextNode()) {
    const range = document.createRange();
    range.selectNodeContents(nodes.currentNode);
    for (const r of range.getClientRects()) if (r.width && r.height) spans.push([r.top, r.bottom]);
  }
  let at = box.top, blank = 0;
  for (const [top, bottom] of spans.sort((a, b) => a[0] - b[0])) {
    blank = Math.max(blank, top - at);
    at = Math.max(at, bottom);
  }
  return [row.querySelector('.id').textContent, Math.max(blank, at - box.bottom)];
})"""
# The paddings of a line and of what is in it.
MOST_BLANK = 16


@pytest.mark.parametrize("width", [360, 768, 1280, 2560])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_widths(browser: Any, page_file: Path, width: int, dark: bool) -> None:
    """No width needs sideways scrolling or has blank lines, in neither theme, with everything unfolded."""
    page = Shown(browser, page_file, width, dark)
    assert [name for name, blank in page.run(BLANKS) if blank > MOST_BLANK] == []
    assert page.run("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    page.run("document.querySelectorAll('.name').forEach((e) => e.click())")
    page.run("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    page.until(lambda: page.run("document.querySelectorAll('#attention .part').length") == 2)
    assert page.run("document.documentElement.scrollWidth") <= width
    assert [name for name, blank in page.run(BLANKS) if blank > MOST_BLANK] == []
    assert len(page.texts(NAMES)) == 4
    assert browser.get_log("browser") == []


def test_lines_below_the_window_are_not_blank(browser: Any, tmp_path: Path) -> None:
    """Where lines differ in height each takes its own before it is near."""
    path = tmp_path / "long.html"
    tests = [a_test(f"test_{number}", promise="It holds. " * (number % 9)) for number in range(80)]
    path.write_text(render([a_report(*tests)]), encoding="utf-8")
    page = Shown(browser, path, 360)
    page.keys("e")  # unfold all
    blanks = page.run(BLANKS)
    assert len(blanks) == 80
    assert [name for name, blank in blanks if blank > MOST_BLANK] == []


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize(
    "rule", [".row { min-height: 20rem }", ".row { padding-bottom: 2rem }", ".row .name { margin-top: 2rem }"]
)
def test_a_blank_line_would_be_seen(browser: Any, page_file: Path, width: int, rule: str) -> None:
    """What test_widths measures tells a line that is higher than its texts."""
    page = Shown(browser, page_file, width)
    page.run(f"document.head.appendChild(document.createElement('style')).textContent = {rule!r}")
    assert [name for name, blank in page.run(BLANKS) if blank > MOST_BLANK] == page.texts(NAMES)


# The ratio of the luminances of text and ground, by the definition of WCAG 2.
CONTRAST = """(() => {
  const parse = (text) => {
    const c = document.createElement('canvas').getContext('2d');
    c.fillStyle = text;
    c.fillRect(0, 0, 1, 1);
    return c.getImageData(0, 0, 1, 1).data;
  };
  const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const part = (c, i, weight) => weight * linear(c[i] / 255);
  const light = (c) => part(c, 0, 0.2126) + part(c, 1, 0.7152) + part(c, 2, 0.0722);
  const ground = (e) => {
    while (getComputedStyle(e).backgroundColor === 'rgba(0, 0, 0, 0)') e = e.parentElement;
    return parse(getComputedStyle(e).backgroundColor);
  };
  const low = [];
  for (const e of document.querySelectorAll('body *')) {
    const text = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!text || !e.offsetParent || e.closest('[aria-hidden=true], :disabled')) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) low.push([e.className || e.tagName, e.textContent.slice(0, 30), ratio]);
  }
  return low;
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_contrast(browser: Any, page_file: Path, dark: bool) -> None:
    """Text stands out from its ground by 4.5 to 1 or more (WCAG 2, AA) in both themes."""
    page = Shown(browser, page_file, 1280, dark)
    page.run("document.querySelectorAll('.name').forEach((e) => e.click())")
    assert page.run(CONTRAST) == []


@pytest.mark.parametrize("kernels", [1, 3])
def test_five_thousand_tests(browser: Any, tmp_path: Path, kernels: int) -> None:
    """A page of 5,000 verdicts a kernel is there within seconds, and filters at once."""
    tests = [
        a_test(f"test_{number}[{name}]", protection=name, promise="Something is promised.", duration=0.01)
        for number in range(2500)
        for name in ("cbit", "none")
    ]
    path = tmp_path / "big.html"
    path.write_text(render([a_report(*tests, kernel=f"6.{n} x") for n in range(kernels)]), encoding="utf-8")
    start = time.monotonic()
    page = Shown(browser, path, 1280)
    assert time.monotonic() - start < 10
    assert page.texts("#shown") == ["2,500 tests"]
    page.keys("e")  # unfold all
    assert 0 < len(page.texts(NAMES)) <= 250
    cost = page.run(
        "(() => {"
        " document.getElementById('search').value = 'test_2499';"
        " const t = performance.now();"
        " document.getElementById('order').dispatchEvent(new Event('change'));"
        " document.body.offsetHeight;"
        " return performance.now() - t;"
        "})()"
    )
    assert page.texts(NAMES) == ["test_x.py::test_2499"]
    assert cost < 1500
