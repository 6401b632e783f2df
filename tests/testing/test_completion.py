# SPDX-License-Identifier: Apache-2.0
"""What the shell offers behind the Tab key."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from kvmpy.cli.main import main
from kvmpy.coco import ladder
from kvmpy.testing import configurations


def offered(*words: str) -> list[str]:
    """Return what is offered for the last of *words*."""
    *before, last = words
    completer = ShellComplete(main, {}, "kvmpy", "_KVMPY_COMPLETE")
    return [item.value for item in completer.get_completions(before, last) if item.type == "plain"]


@pytest.mark.parametrize("command", [("run",), ("lab", "run")])
def test_protections(command: tuple[str, ...]) -> None:
    assert offered(*command, "--protection", "") == ["auto", *ladder.protections()]
    assert offered(*command, "--protection", "cbit,sn") == ["cbit,snp"]
    assert offered(*command, "--protection", "x") == []


def test_configurations() -> None:
    assert offered("lab", "run", "--configuration", "default,n") == [
        f"default,{name}" for name in configurations.load() if name.startswith("n")
    ]


def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the cache; a cache that cannot be read offers none, and no traceback."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert offered("lab", "run", "--kernel", "") == []
    (tmp_path / "kvmpy").write_text("no folder")
    assert offered("lab", "run", "--kernel", "") == []


def test_areas_and_their_files() -> None:
    assert offered("run", "dirt") == ["dirty/"]
    assert "dirty/test_log.py" in offered("run", "dirty/")
    assert offered("lab", "run", "dirty/test_lo") == ["dirty/test_load.py", "dirty/test_log.py"]
    for outside in ("../", "/", "nonesuch/"):
        assert offered("run", outside) == []
