# SPDX-License-Identifier: Apache-2.0
"""Caches hold code: none is taken from where somebody else may have put it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmpy import caches
from kvmpy.cli import run
from kvmpy.debug.preload.build import TARGET, recorder
from kvmpy.guest import cache as guest_cache
from kvmpy.lab import places
from kvmpy.lab.errors import LabError

OTHER = 12345


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with the cache in it that this user has."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache" / "kvmpy").mkdir(parents=True, mode=0o755)
    return tmp_path


def owned_by_others(path: Path) -> None:
    os.chown(path, OTHER, OTHER)


def open_to_all(path: Path) -> None:
    path.chmod(0o777)


def open_to_a_group(path: Path) -> None:
    os.chown(path, -1, OTHER)
    path.chmod(0o775)


Spoil = Callable[[Path], None]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives files away")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        pytest.param(owned_by_others, f"belongs to user {OTHER}", marks=needs_root),
        (open_to_all, "may be written by everybody"),
        pytest.param(open_to_a_group, f"may be written by group {OTHER}", marks=needs_root),
    ],
)
@pytest.mark.parametrize("place", ["", ".cache", ".cache/kvmpy", ".cache/kvmpy/preload"])
def test_every_folder_above_must_be_ones_own(home: Path, spoil: Spoil, why: str, place: str) -> None:
    folder = caches.own("preload")
    assert folder == home / ".cache" / "kvmpy" / "preload"
    spoil(home / place)
    assert caches.stranger(folder) == f"{home / place} {why}"
    assert caches.own("preload") is None


def test_a_link_is_looked_at_on_both_ends(home: Path, tmp_path: Path) -> None:
    for name, mode in (("open", 0o777), ("safe", 0o755)):
        (tmp_path / name / "real").mkdir(parents=True)
        (tmp_path / name).chmod(mode)
    (tmp_path / "safe" / "link").symlink_to(tmp_path / "open" / "real")
    (tmp_path / "open" / "link").symlink_to(tmp_path / "safe" / "real")
    for link in (tmp_path / "safe" / "link", tmp_path / "open" / "link"):
        assert caches.stranger(link) == f"{tmp_path / 'open'} may be written by everybody"
    assert caches.stranger(tmp_path / "safe" / "real") == ""


def test_in_a_sticky_folder_entries_are_their_owners(home: Path) -> None:
    home.chmod(0o1777)
    assert caches.own("preload") is not None


def test_what_does_not_exist_is_nobodys(home: Path) -> None:
    assert caches.stranger(home / "a" / "b" / "c") == ""


@pytest.mark.usefixtures("home")
def test_a_library_of_somebody_elses_cache_is_not_loaded(home: Path, tmp_path: Path) -> None:
    mine = recorder(tmp_path)
    assert mine.is_relative_to(home / ".cache")
    mine.write_bytes(b"planted")
    assert recorder(tmp_path) == mine
    mine.chmod(0o777)
    own = recorder(tmp_path)
    assert own == tmp_path / TARGET
    assert own.read_bytes() != b"planted"


def test_guest_programs_come_from_a_folder_of_ones_own(home: Path) -> None:
    guest_cache._folder.cache_clear()
    assert guest_cache.folder() == home / ".cache" / "kvmpy" / "guest"
    home.chmod(0o777)
    guest_cache._folder.cache_clear()
    other = guest_cache.folder()
    assert not other.is_relative_to(home)
    assert other.stat().st_mode & 0o777 == 0o700
    guest_cache._folder.cache_clear()


def test_the_lab_refuses_somebody_elses_kernels(home: Path) -> None:
    assert places.cache() == home / ".cache" / "kvmpy" / "lab"
    home.chmod(0o777)
    with pytest.raises(LabError, match=f"is not safe: {home} may be written by everybody"):
        places.cache()


@pytest.mark.parametrize("safe", [True, False])
def test_bytecode_comes_from_a_folder_of_ones_own(
    safe: bool, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    home.chmod(0o755 if safe else 0o777)
    monkeypatch.setattr(run, "_list", lambda _: 0)
    with pytest.raises(SystemExit):
        run.run.main(["--list", "regs"], standalone_mode=False)
    prefix = os.environ.get("PYTHONPYCACHEPREFIX")
    assert prefix == (str(home / ".cache" / "kvmpy" / "pycache") if safe else None)
    assert ("PYTHONDONTWRITEBYTECODE" in os.environ) is not safe
