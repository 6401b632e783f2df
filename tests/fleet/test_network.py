# SPDX-License-Identifier: Apache-2.0
"""A host whose network is cut: no connection ends, nobody says a word any more."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fleet.conftest import Fleet

TESTS = """
@pytest.mark.requires("tool:far-away")
@pytest.mark.timeout(2)
def test_is_cut_off():
    (Path(os.environ["FLEET_FOLDER"]) / "runs").touch()
    signal.pause()

@pytest.mark.parametrize("n", range(40))
def test_fine(n):
    pass
"""
ADDRESS, FAR_ADDRESS = "192.0.2.1", "192.0.2.2"


class Networks:
    """Two network namespaces with a cable between them; the machine's own is not touched."""

    def __init__(self, stack: ExitStack) -> None:
        self.near, self.far = (self._space(stack) for _ in range(2))
        far = self.far[self.far.index("--target") + 1]
        self.ip(self.near, "link", "add", "near", "type", "veth", "peer", "name", "far", "netns", far)
        for space, name, address in ((self.near, "near", ADDRESS), (self.far, "far", FAR_ADDRESS)):
            self.ip(space, "address", "add", f"{address}/24", "dev", name)
            self.ip(space, "link", "set", name, "up")
            self.ip(space, "link", "set", "lo", "up")

    @staticmethod
    def _space(stack: ExitStack) -> list[str]:
        """Make a namespace, which lives until the stack ends; return the command that works within it."""
        command = ["unshare", "--net", "sh", "-c", "echo ready; exec cat"]
        keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.callback(keeper.communicate, timeout=30)
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == "ready\n"
        return ["nsenter", "--target", str(keeper.pid), "--net"]

    @staticmethod
    def ip(space: list[str], *words: str) -> None:
        subprocess.run([*space, "ip", *words], check=True, capture_output=True, timeout=30)

    def cut(self) -> None:
        """What is sent from now on arrives nowhere."""
        self.ip(self.far, "link", "set", "far", "down")

    def mend(self) -> None:
        self.ip(self.far, "link", "set", "far", "up")


@pytest.fixture
def networks() -> Iterator[Networks]:
    with ExitStack() as stack:
        try:
            made = Networks(stack)
        except (AssertionError, OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespace can be made here: root, unshare, nsenter and ip ({error})")
        yield made


def test_a_host_that_is_cut_off_costs_one_test(fleet: Fleet, networks: Networks) -> None:
    """Its test is lost by the silence alone, the other host runs what it held, and nothing runs twice."""
    fleet.tests(TESTS)
    tools = fleet.folder / "tools"
    tools.mkdir()
    (tools / "far-away").write_text("#!/bin/sh\n")
    (tools / "far-away").chmod(0o755)
    fleet.within = networks.near
    fleet.serve(ADDRESS)
    fleet.join("near")
    fleet.within = networks.far
    far = fleet.start(
        "join",
        Path(fleet.served / "address").read_text().strip(),
        "--name",
        "far",
        environment={"PATH": f"{tools}:{os.environ['PATH']}"},
    )
    fleet.within = networks.near
    fleet.joined(2)
    process = fleet.begin("--margin", "2")
    fleet.wait_for(fleet.folder / "runs")
    networks.cut()
    ended = fleet.end(process)
    assert ended.status == 1, ended.text
    assert Counter(ended.verdicts().values()) == {"pass": 40, "lost": 1}
    lost = ended.test("test_is_cut_off")
    assert lost["host"] == "far"
    assert "no sign of life of far" in lost["reason"]
    assert set(fleet.starts().values()) == {1}
    assert [host["retired"] for host in ended.report["hosts"] if host["name"] == "far"] != [""]
    # It works for nobody any more, and hears so as soon as it hears anything.
    networks.mend()
    assert far.wait(timeout=100) is not None
