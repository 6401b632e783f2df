# SPDX-License-Identifier: Apache-2.0
"""mypy tells the kinds of addresses apart, too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SNIPPET = """\
from kvmpy.core.address import EncryptionBit, Gpa, Gva, RawGpa
from kvmpy.guest.vm import GuestVm

def good(vm: GuestVm, bit: EncryptionBit, gpa: Gpa, gva: Gva) -> None:
    raw: RawGpa = bit.to_raw(gpa, True)
    back: Gpa = bit.from_raw(raw)[0]
    vm.gpa_to_hva(back + 0x1000)
    distance: int = gpa - back
    vm.gpa_to_hva(vm.gva_to_gpa(gva + distance))

def bad(vm: GuestVm, bit: EncryptionBit, raw: RawGpa, gva: Gva) -> None:
    vm.gpa_to_hva(raw)
    vm.gpa_to_hva(gva)
    vm.gpa_to_hva(0x1000)
    vm.gva_to_gpa(raw)
    bit.to_raw(raw, True)
    bit.from_raw(gva)
"""


@pytest.mark.timeout(180)
def test_mypy_refuses_each_mix_of_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = pytest.importorskip("mypy.api", reason="needs mypy: pip install 'kvmpy[dev]'")
    root = Path(__file__).resolve().parents[2]
    monkeypatch.chdir(root)
    sample = tmp_path / "sample.py"
    sample.write_text(SNIPPET)
    cache = str(root / ".mypy_cache")
    output, errors, _ = api.run(["--config-file", "pyproject.toml", "--cache-dir", cache, str(sample)])
    assert errors == ""
    lines = [int(number) for number in re.findall(r"sample\.py:(\d+): error: Argument 1", output)]
    first = SNIPPET.splitlines().index("    vm.gpa_to_hva(raw)") + 1
    assert lines == list(range(first, first + 6)), output
