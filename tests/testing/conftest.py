# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests of the pytest plugin."""

from __future__ import annotations

import pytest

from tests.testing.support import NO_KVM, Suite


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """An empty suite whose runs have no KVM."""
    monkeypatch.setenv("KVMPY_DEV_KVM", NO_KVM)
    monkeypatch.delenv("KVMPY_REQUIRE", raising=False)
    monkeypatch.delenv("KVMPY_PLATFORM", raising=False)
    return Suite(pytester)
