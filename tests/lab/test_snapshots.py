# SPDX-License-Identifier: Apache-2.0
"""Snapshots of machines that wait for a run: what they are made of, and what if one is no good."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvmpy.lab import snapshots
from kvmpy.lab.errors import LabError
from kvmpy.lab.initramfs import Initramfs
from kvmpy.lab.root import Root, is_covered
from tests.lab.test_session import Lab, Plan

pytestmark = pytest.mark.skipif(
    is_covered(Path(sys.prefix)), reason="this environment lies where the lab has a file system in memory"
)

PASSES = [["test", "test_a", "passed"], ["test", "test_b", "passed"], ["test", "test_c", "passed"], ["end"]]


@dataclass
class Entry:
    mode: int
    mtime: int
    data: bytes


def unpacked(archive: Path) -> dict[str, Entry]:
    """The entries of a newc archive in their order, read as the format says."""
    data, place = archive.read_bytes(), 0
    entries: dict[str, Entry] = {}
    inodes = set()
    while True:
        assert data[place : place + 6] == b"070701"
        fields = [int(data[place + 6 + 8 * n : place + 14 + 8 * n], 16) for n in range(13)]
        size, length = fields[6], fields[11]
        name = data[place + 110 : place + 110 + length - 1].decode()
        assert data[place + 110 + length - 1] == 0
        start = (place + 110 + length + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert start + size == len(data)
            return entries
        entries[name] = Entry(fields[1], fields[5], data[start : start + size])
        assert fields[0] not in inodes, "the kernel would take two files for one with two names"
        inodes.add(fields[0])
        place = (start + size + 3) // 4 * 4


def test_an_archive(tmp_path: Path) -> None:
    """Files of odd sizes, an empty one, links, and their folders, each before its content."""
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    for size in range(6):
        (tree / "bin" / f"file{size}").write_bytes(b"x" * size)
    (tree / "bin" / "sh").symlink_to("file5")
    os.utime(tree / "bin" / "file3", (1_700_000_000, 1_700_000_000))
    (tree / "bin" / "file4").chmod(0o755)
    archive = Initramfs()
    archive.tree(tree)
    archive.put(Path("/etc/deep/er/job"), b"words", 0o600)
    archive.put(Path("/bin/file1"), b"another")
    archive.write(tmp_path / "archive")
    entries = unpacked(tmp_path / "archive")
    assert [entries[f"bin/file{size}"].data for size in (0, 2, 3, 4, 5)] == [
        b"x" * n for n in (0, 2, 3, 4, 5)
    ]
    assert entries["bin/file1"].data == b"another"
    assert (stat.S_ISLNK(entries["bin/sh"].mode), entries["bin/sh"].data) == (True, b"file5")
    assert entries["bin/file3"].mtime == 1_700_000_000
    assert entries["bin/file4"].mode == stat.S_IFREG | 0o755
    assert entries["etc/deep/er/job"].mode == stat.S_IFREG | 0o600
    names = list(entries)
    for name in names:
        parent = os.path.dirname(name)
        assert not parent or names.index(parent) < names.index(name)
        assert not parent or stat.S_ISDIR(entries[parent].mode)


def test_a_file_behind_links(tmp_path: Path) -> None:
    """Every link on the way to a file leads to it inside, too, whether it is relative or not."""
    (tmp_path / "real" / "lib").mkdir(parents=True)
    (tmp_path / "real" / "lib" / "libx.so.1.2").write_bytes(b"code")
    (tmp_path / "real" / "lib" / "libx.so.1").symlink_to("libx.so.1.2")
    (tmp_path / "usr").symlink_to("real")
    (tmp_path / "lib").symlink_to(tmp_path / "usr" / "lib")
    archive = Initramfs()
    archive.file(tmp_path / "lib" / "libx.so.1")
    archive.write(tmp_path / "archive")
    entries = {f"/{name}": entry for name, entry in unpacked(tmp_path / "archive").items()}
    here = str(tmp_path)
    assert entries[f"{here}/real/lib/libx.so.1.2"].data == b"code"
    assert entries[f"{here}/real/lib/libx.so.1"].data == b"libx.so.1.2"
    assert entries[f"{here}/usr"].data == b"real"
    assert entries[f"{here}/lib"].data == f"{here}/usr/lib".encode()


def test_what_a_session_needs_is_in_it(tmp_path: Path, cache: Path) -> None:
    """Python, its libraries by the names that the loader asks for, kvmpy's bytecode, and how to begin."""
    (tmp_path / "root" / "etc").mkdir(parents=True)
    (tmp_path / "root" / "etc" / "fstab").write_text("proc /proc proc\n")
    snapshots.write_initramfs(tmp_path / "archive", Root(tmp_path / "root", (Path("/usr"),)), session=True)
    entries = {f"/{name}": entry for name, entry in unpacked(tmp_path / "archive").items()}
    assert os.path.abspath(sys.executable) in entries
    assert any(name.endswith("/libc.so.6") for name in entries)
    assert any(name.endswith("/kvmpy/lab/inside.py") for name in entries)
    assert any("/kvmpy/lab/inside.cpython" in name for name in entries)
    assert entries["/etc/fstab"].data == b"proc /proc proc\n"
    assert entries["/etc/kvmpy-session"].data.endswith(f"{sys.executable} -m kvmpy.lab.frozen\n".encode())


def test_the_name_changes_with_what_it_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Root(tmp_path / "root", ())
    (root.folder / "etc").mkdir(parents=True)
    (root.folder / "etc" / "hosts").write_text("a")
    name = snapshots.key("kernel", ["qemu", "-append", "x"], root)
    assert snapshots.key("kernel", ["qemu", "-append", "x"], Root(root.folder, (Path("/other"),))) == name
    others = [
        snapshots.key("another", ["qemu", "-append", "x"], root),
        snapshots.key("kernel", ["qemu", "-append", "x kvm.tdp_mmu=0"], root),
    ]
    (root.folder / "etc" / "hosts").write_text("b")
    others.append(snapshots.key("kernel", ["qemu", "-append", "x"], root))
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    others.append(snapshots.key("kernel", ["qemu", "-append", "x"], root))
    assert len({name, *others}) == 5


def test_the_least_recently_used_go(cache: Path) -> None:
    for number in range(snapshots.MOST + 2):
        fresh = snapshots.begin()
        kept = snapshots.keep(fresh, f"snapshot{number}")
        os.utime(kept, (number, number))
    assert snapshots.find("snapshot0") is None
    assert snapshots.find("snapshot1") is None
    assert snapshots.find("snapshot2") is not None  # and is the latest now
    snapshots.keep(snapshots.begin(), "another")
    assert snapshots.find("snapshot2") is not None
    assert snapshots.find("snapshot3") is None
    assert len(list((cache / "snapshots").iterdir())) == snapshots.MOST


def test_a_killed_run_leaves_none_behind(cache: Path) -> None:
    """What a process that was killed had begun goes when the next snapshot is."""
    code = "import os, signal; from kvmpy.lab import snapshots; print(snapshots.begin().path, flush=True); "
    killed = subprocess.run(
        [sys.executable, "-c", f"{code}os.kill(os.getpid(), signal.SIGKILL)"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert killed.returncode == -signal.SIGKILL
    assert Path(killed.stdout.strip()).is_dir()
    fresh = snapshots.begin()
    assert list((cache / "snapshots").iterdir()) == [fresh.path]
    fresh.close()


def test_two_runs_that_make_the_same_one(cache: Path) -> None:
    first, second = snapshots.begin(), snapshots.begin()
    (first.path / "state").write_text("first")
    (second.path / "state").write_text("second")
    snapshots.keep(first, "same")
    assert (snapshots.keep(second, "same") / "state").read_text() == "first"
    assert not second.path.exists()


def test_no_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmpy.lab.places.MIB", 1 << 50)
    with pytest.raises(LabError, match="a snapshot of the lab needs"):
        snapshots.begin()


# ---- runs


@pytest.fixture
def lab(tmp_path: Path, warm: Path, image: Path) -> Lab:
    return Lab(tmp_path, image)


def commands(lab: Lab) -> list[list[str]]:
    return [json.loads(path.read_text())[1] for path in sorted(lab.folder.glob("boot-*"))]


def run(lab: Lab, plan: Plan) -> str:
    ended = lab.run(plan, "--snapshots")
    assert ended.status == 0, ended.text
    assert set(ended.verdicts().values()) == {"pass"}
    assert len(ended.verdicts()) == 3
    return ended.text


def test_a_run_takes_a_snapshot_and_the_next_resumes_it(lab: Lab, warm: Path) -> None:
    unused = [["end"]]
    run(lab, [unused, PASSES])
    first, second = commands(lab)
    assert "-incoming" not in first
    assert second[-6:-4] == ["-incoming", "defer"]
    run(lab, [unused, PASSES, PASSES])
    (third,) = commands(lab)[2:]
    assert "-incoming" in third
    assert "share=off" in " ".join(third)
    assert len(list((warm / "snapshots").iterdir())) == 1


def test_an_environment_that_the_lab_covers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone below /tmp has no snapshots: inside, the files of its session would be covered."""
    monkeypatch.setattr(snapshots, "_session_files", lambda: [sys.executable, "/tmp/clone/python"])
    with pytest.raises(LabError, match=r"^/tmp/clone/python lies where"):
        snapshots.write_initramfs(tmp_path / "archive", Root(tmp_path, ()), session=True)


def test_a_machine_that_cannot_be_saved(lab: Lab, warm: Path) -> None:
    text = run(lab, [[["refuse"]], PASSES])
    assert "no snapshot could be kept: QEMU's state cannot be moved: failed" in text
    assert "-mon" not in commands(lab)[1]
    assert not list((warm / "snapshots").iterdir())


def test_a_snapshot_that_cannot_be_resumed(lab: Lab, warm: Path) -> None:
    """The run boots another machine, and the next run does not meet that snapshot again."""
    run(lab, [[["end"]], PASSES])
    text = run(lab, [[["end"]], PASSES, [["refuse"]], PASSES])
    assert "without a snapshot: QEMU's state cannot be moved: failed" in text
    assert not list((warm / "snapshots").iterdir())


@pytest.mark.parametrize("ending", ["dies", "is silent"])
def test_a_snapshot_that_does_not_run(lab: Lab, warm: Path, ending: str) -> None:
    """QEMU that dies at once boots the tests' machine; one that resumes and says nothing is not kept."""
    run(lab, [[["end"]], PASSES])
    if ending == "dies":
        text = run(lab, [[["end"]], PASSES, [["die", 3]], PASSES])
    else:
        text = run(lab, [[["end"]], PASSES, [["silent"], ["die", 3]], [["end"]], PASSES])
    if ending == "dies":
        assert "without a snapshot: QEMU's monitor: " in text
        assert not list((warm / "snapshots").iterdir())
    else:
        assert "a snapshot that is resumed does not run: it is removed" in text
        assert len(list((warm / "snapshots").iterdir())) == 1
