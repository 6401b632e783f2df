# SPDX-License-Identifier: Apache-2.0
"""gcovr's HTML pages of the annotated source, with the tests that execute each line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from pyroaring import BitMap

from kvmpy.lab.coverage.maps import Map
from kvmpy.lab.coverage.report import Renderer
from kvmpy.lab.coverage.store import OWN_SUITE
from kvmpy.lab.errors import LabError

INDEX = "index.html"
_CODE = "tests.js"
_NAMES = "tests-names.js"
_TITLE = re.compile(r"<title>(\S+) - ")


def write(renderer: Renderer, trace: Path, known: Map, folder: Path) -> None:
    """Write the pages into *folder*; LabError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        title = f"KVM, {known.kernel}"
        options = ["--html-nested", str(folder / INDEX), "--html-theme", "github.blue", "--html-title", title]
        renderer.render(trace, *options)
        shutil.copy(Path(__file__).with_name(_CODE), folder / _CODE)
        names = [test.id if test.suite == OWN_SUITE else f"{test.suite}: {test.id}" for test in known.tests]
        (folder / _NAMES).write_text(f"const kvmpyTests = {_script(names)};\n", encoding="utf-8")
        for page in folder.glob("index.*.html"):
            _add_tests(page, known)
    except OSError as error:
        raise LabError(f"{error.filename or folder}: {error.strerror}") from error


def _add_tests(page: Path, known: Map) -> None:
    text = page.read_text(encoding="utf-8")
    match = _TITLE.search(text)
    sets: dict[str, int] = {}
    lines = {
        line: sets.setdefault(_ranges(tests), len(sets))
        for (file, line), tests in zip(known.lines, known.line_tests, strict=True)
        if match is not None and file == match[1] and tests
    }
    if not lines:
        return
    scripts = f'<script src="{_NAMES}"></script>\n<script src="{_CODE}"></script>\n'
    data = f"const kvmpyLines = {_script(lines)};\nconst kvmpySets = {_script(list(sets))};"
    head, _, tail = text.rpartition("</body>")
    page.write_text(f"{head}<script>{data}</script>\n{scripts}</body>{tail}", encoding="utf-8")


def _script(value: object) -> str:
    # A name may hold what would end the script.
    return json.dumps(value).replace("</", "<\\/")


def _ranges(numbers: BitMap) -> str:
    """Return numbers as text, such as ``0-3 7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
