# SPDX-License-Identifier: Apache-2.0
"""Inline sources are found in the file that they stand in."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import pytest

from kvmpy.guest import origin
from kvmpy.guest.origin import Origin

PLAIN = """first
second
"""
BACKSLASH = """\
first of two
second
"""
RAW = r"""\
raw
"""
NUMBER = 7
HERE = str(Path(__file__).absolute())


def _line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.startswith(text))


def _find(source: str) -> Origin:
    return origin.find(source, inspect.currentframe())


@pytest.mark.parametrize(
    ("source", "marker", "offset"),
    [(PLAIN, "PLAIN =", 0), (BACKSLASH, "BACKSLASH =", 1), (RAW, "RAW =", 0)],
    ids=["plain", "backslash", "raw"],
)
def test_the_first_line_of_a_literal(source: str, marker: str, offset: int) -> None:
    assert _find(source) == Origin(HERE, _line_of(marker) + offset, exact=True)


def test_a_dedented_literal() -> None:
    source = textwrap.dedent(
        """
        int dedented;
            int more;
        """
    )
    origin_of_source = _find(source)
    assert origin_of_source.exact
    assert Path(__file__).read_text().splitlines()[origin_of_source.line].strip() == "int dedented;"


def test_a_cleaned_literal() -> None:
    source = inspect.cleandoc(
        """

        int cleaned;
        """
    )
    where = _find(source)
    assert where.exact
    assert Path(__file__).read_text().splitlines()[where.line - 1].strip() == "int cleaned;"


def test_an_f_string() -> None:
    source = f"""f-string
    number {NUMBER}
    end {NUMBER + 1}
"""
    origin_of_source = _find(source)
    assert origin_of_source.exact
    assert Path(__file__).read_text().splitlines()[origin_of_source.line - 1].endswith('"""f-string')


def test_a_computed_source_is_named_after_the_call() -> None:
    frame = inspect.currentframe()
    assert frame is not None
    origin_of_source = origin.find("int computed;\n" * NUMBER, frame)
    assert not origin_of_source.exact
    assert origin_of_source.line == 1
    assert origin_of_source.file.startswith(f"{HERE}:")


def test_a_prompt_has_no_file() -> None:
    space: dict[str, object] = {"__name__": "__main__", "find": origin.find, "caller": origin.caller}
    exec(compile("found = find('int x;\\n', caller())", "<stdin>", "exec"), space)  # noqa: S102
    assert space["found"] == Origin("<stdin>", 1, exact=False)
    assert origin.find("x", None).file == "<guest>"


def test_a_file_that_is_no_python_any_more(tmp_path: Path) -> None:
    path = tmp_path / "gone.py"
    space: dict[str, object] = {"__name__": "x", "find": origin.find, "caller": origin.caller}
    exec(compile("found = find('a\\nb\\n', caller())", str(path), "exec"), space)  # noqa: S102
    assert space["found"] == Origin(f"{path}:1", 1, exact=False)


def test_frames_of_kvmpy_are_passed_over_but_not_those_of_its_selftests() -> None:
    def look(module: str) -> str:
        space: dict[str, object] = {"__name__": module, "caller": origin.caller}
        exec(compile("frame = caller()", "<inner>", "exec"), space)  # noqa: S102
        frame = space["frame"]
        return str(frame.f_code.co_filename)  # type: ignore[attr-defined]

    assert Path(look("kvmpy.testing.plugin")).name == Path(__file__).name
    assert Path(look("kvmpy")).name == Path(__file__).name
    assert look("kvmpy.selftests.memory.test_x") == "<inner>"
    assert look("kvmpyextra") == "<inner>"


def test_the_directive_survives_odd_names() -> None:
    assert Origin('/a\\b"c.py', 3, exact=True).directive == '#line 3 "/a\\\\b\\"c.py"\n'
