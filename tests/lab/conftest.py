# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests of the lab: a cache of its own, and a QEMU that is none."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

FAKE = Path(__file__).parent / "fake_qemu.py"


@pytest.fixture(scope="session")
def pycache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for bytecode that all tests share: it takes long to make, and does not tell them apart."""
    return tmp_path_factory.mktemp("pycache")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the lab's folder in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvmpy" / "lab"


@pytest.fixture
def warm(cache: Path, pycache: Path) -> Path:
    """The cache, with bytecode in it."""
    cache.mkdir(parents=True)
    (cache / "pycache").symlink_to(pycache)
    return cache


def make_image(path: Path, release: str = "7.2.13-test", tail: bytes = b"") -> Path:
    """Write a file with the boot header of a bzImage."""
    data = bytearray(0x1000)
    data[0x1FE:0x200] = b"\x55\xaa"
    data[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", data, 0x20E, 0x400)
    text = f"{release} (someone@somewhere) #1 SMP\0".encode()
    data[0x600 : 0x600 + len(text)] = text
    path.write_bytes(bytes(data) + tail)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A bzImage, as far as its header goes."""
    return make_image(tmp_path / "bzImage")
