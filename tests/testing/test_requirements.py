# SPDX-License-Identifier: Apache-2.0
"""Requirements that this machine need not fulfil: what they ask, with files made for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpy.testing import host
from kvmpy.testing.requirements import Requirements


@pytest.mark.parametrize("source", ["tsc", "kvm-clock", "hyperv_clocksource_tsc_page"])
def test_stable_tsc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    """A kernel that takes its time from the TSC, itself or through its hypervisor, trusts it."""
    monkeypatch.setattr(host, "CLOCK_SOURCE", tmp_path / "current")
    (tmp_path / "current").write_text(f"{source}\n")
    assert Requirements().missing(["stable-tsc"]) == []


def test_unstable_tsc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another clock source is named, and one that cannot be read is not trusted."""
    monkeypatch.setattr(host, "CLOCK_SOURCE", tmp_path / "current")
    assert ["unknown" in missing.what for missing in Requirements().missing(["stable-tsc"])] == [True]
    (tmp_path / "current").write_text("hpet\n")
    (missing,) = Requirements().missing(["stable-tsc"])
    assert "hpet" in missing.what
