# SPDX-License-Identifier: Apache-2.0
"""Runs small suites in a child pytest and reads back what all the reports say."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

import kvmpy
from kvmpy.cli.main import LazyGroup, main

SUITE_INI = Path(kvmpy.__file__).parent / "testing" / "suite.ini"
NO_KVM = "/nonexistent/kvm"


@dataclass
class Outcome:
    """What one run printed and wrote."""

    status: int
    text: str
    report: dict[str, Any]
    ktap: str
    junit: ElementTree.Element

    def verdicts(self) -> dict[str, str]:
        """Verdict by test name, from the JSON report."""
        return {test["id"].partition("::")[2]: test["verdict"] for test in self.report["tests"]}

    def test(self, name: str) -> dict[str, Any]:
        """The JSON entry of one test."""
        by_name: dict[str, Any] = next(t for t in self.report["tests"] if t["id"].partition("::")[2] == name)
        return by_name

    def reason(self, name: str) -> str:
        """Why a test did not pass."""
        return str(self.test(name)["reason"])


class Suite:
    """A folder with tests; every run writes JSON, KTAP and JUnit."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.folder = pytester.path

    def add(self, name: str, source: str) -> Path:
        """Write a test file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
        return path

    def arguments(self) -> list[str]:
        """Return the pytest arguments that every run has."""
        return [
            "-c",
            str(SUITE_INI),
            f"--rootdir={self.folder}",
            "-p",
            "no:hypothesispytest",  # takes longer to import than most of these suites run
            "--kvmpy-json=out.json",
            "--ktap=out.ktap",
            "--junitxml=out.xml",
            str(self.folder),
        ]

    def run(self, *args: str) -> Outcome:
        """Run the suite in a child process."""
        result = self.pytester.runpytest_subprocess(*self.arguments(), *args, timeout=100)
        return self.outcome(int(result.ret), "\n".join([*result.outlines, *result.errlines]))

    def outcome(self, status: int, text: str) -> Outcome:
        """Read the reports of the last run."""
        return Outcome(
            status,
            text,
            json.loads((self.folder / "out.json").read_text()),
            (self.folder / "out.ktap").read_text(),
            ElementTree.parse(self.folder / "out.xml").getroot(),
        )


def unknown_options(line: str) -> list[str]:
    """Return what a command line of kvmpy names that does not exist: its command, or options of it."""
    words = re.sub(r"^\W*(?:sudo )?kvmpy ", "", line).split(" -- ")[0].split()
    command = LazyGroup().get_command(click.Context(main), words[0])
    if command is None:
        return words[:1]
    if isinstance(command, click.Group):
        inner = next((word for word in words[1:] if word in command.commands), None)
        command = command.commands[inner] if inner is not None else command
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    given = re.findall(r"(?<=\s)--[a-z-]+", " ".join(words))
    return [option for option in given if option not in known | {"--help"}]


KTAP_RESULT = re.compile(
    r"(?P<indent> *)(?P<ok>ok|not ok) (?P<number>\d+) (?P<name>[^#]*?)"
    r"(?: # (?P<directive>SKIP|XFAIL|TIMEOUT|ERROR)?(?P<data>.*))?"
)


@dataclass
class KtapNode:
    """One level of a KTAP document: its plan and its results with the level inside each."""

    plan: int
    results: list[tuple[bool, str, str, KtapNode | None]]


def parse_ktap(text: str) -> KtapNode:
    """Parse KTAP version 1 by the kernel's rules; AssertionError for a line that breaks one."""
    lines = text.splitlines()

    def level(offset: int, indent: str) -> tuple[KtapNode, int]:
        assert lines[offset] == f"{indent}KTAP version 1"
        offset += 1
        while lines[offset].startswith(f"{indent}#"):
            offset += 1
        plan = re.fullmatch(rf"{indent}1\.\.(\d+)", lines[offset])
        assert plan, lines[offset]
        node = KtapNode(int(plan[1]), [])
        offset += 1
        inner: KtapNode | None = None
        while offset < len(lines) and lines[offset].startswith(indent):
            line = lines[offset]
            if line.startswith(f"{indent}#"):
                offset += 1
            elif line == f"{indent}  KTAP version 1":
                inner, offset = level(offset, indent + "  ")
            else:
                match = KTAP_RESULT.fullmatch(line)
                assert match, line
                if match["indent"] != indent:
                    break
                assert int(match["number"]) == len(node.results) + 1
                node.results.append((match["ok"] == "ok", match["name"], match["directive"] or "", inner))
                inner = None
                offset += 1
        assert node.plan == len(node.results)
        return node, offset

    root, end = level(0, "")
    assert end == len(lines)
    return root
