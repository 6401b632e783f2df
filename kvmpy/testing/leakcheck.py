# SPDX-License-Identifier: Apache-2.0
"""The leak check around every test: looks before its first fixture and after its last one."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvmpy.testing import leaks, protections

FAILED = pytest.StashKey[bool]()
RSS = pytest.StashKey[int]()
_BEFORE = pytest.StashKey[leaks.Snapshot]()
_FIXTURES = frozenset({"kvm", "vm", "make_vm", protections.FIXTURE})
_MARKERS = ("requires", protections.MARKER, "dangerous", "deadline")


def uses_kvmpy(item: pytest.Item) -> bool:
    """Whether *item* uses a fixture or marker of this plugin."""
    return bool(_FIXTURES.intersection(getattr(item, "fixturenames", ()))) or any(
        item.get_closest_marker(name) for name in _MARKERS
    )


class LeakCheck:
    """Plugin object of every process that runs tests; *mode* is ``all``, ``kvm`` or ``off``."""

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._allowed = leaks.Allowed()
        self._collected = 0
        # What the last test left, if it was checked and left nothing behind.
        self._after: leaks.Snapshot | None = None

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within the block test files are imported: what the process grows by is no growth of the tests."""
        before = leaks.resident()
        try:
            yield
        finally:
            self._collected += max(0, leaks.resident() - before)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        """Take the first look; the mappings are known from the end of the test before."""
        after, self._after = self._after, None
        if self._mode == "all" or (self._mode == "kvm" and uses_kvmpy(item)):
            item.stash[_BEFORE] = leaks.renewed(after) if after else leaks.snapshot()
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
        """What a fixture of wider scope opens is no leak of the test that happens to set it up."""
        if fixturedef.scope == "function" or self._mode == "off":
            return (yield)
        before = leaks.snapshot()
        result = yield
        self._allowed.add(before, leaks.snapshot())
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """Fail a test that leaves something behind; one that has failed already only says so."""
        result = yield
        before = item.stash.get(_BEFORE, None)
        if before is None:
            return result
        del item.stash[_BEFORE]
        failed = item.stash.get(FAILED, False)
        # The frames of a failed test's traceback hold its VMs, and these KVM's threads: they do not go.
        leaks_found, now = leaks.leaks_since(before, self._allowed, 0.1 if failed else leaks.GRACE)
        item.stash[RSS] = now.rss - self._collected
        if not leaks_found:
            self._after = now
        if leaks_found:
            text = "left behind by the test:\n" + "\n".join(f"  {entry}" for entry in leaks_found)
            if not failed:
                pytest.fail(text, pytrace=False)
            item.add_report_section("teardown", "left behind", text)
        return result
