# SPDX-License-Identifier: Apache-2.0
"""What a lab kernel sees of this machine: a small root of its own, and the folders that a session needs.

The root is a folder that is made for a run, with what the first process needs before it has mounted the rest;
a kernel gets it as an initramfs.  Each shared folder is an export of its own and is mounted where it is here;
nothing else is exported, so that no mount and no kernel inside reaches more.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmpy.lab import places
from kvmpy.lab.errors import LabError
from kvmpy.lab.initramfs import steps

# What comes into the job's folder during the run has to be seen: no cache there.
JOB_FLAGS = "trans=virtio,version=9p2000.L,msize=500000"
MOUNT_FLAGS = f"{JOB_FLAGS},cache=loose"
# Programs and libraries; links among them, as /bin is one today, stay links.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_EMPTY = ("dev", "proc", "sys", "run", "tmp", "var", "etc", "root")
# What libraries, Python and the distribution's alternatives look for in /etc.
_SETTINGS = (
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "alternatives",
    "localtime",
    "nsswitch.conf",
    "hosts",
)
_ACCOUNTS = ("passwd", "group")
# These are the inside's own.
_OWN = ("/dev", "/etc", "/proc", "/sys")
# These are covered by file systems in memory.
_COVERED = ("/run", "/tmp")  # noqa: S108
# These hold more than a session's own.
_NEVER = ("/", "/home", "/root", "/var", *_OWN, *_COVERED)
_KEYS = (".ssh", ".gnupg", ".aws", ".netrc")
_FIRST = ("sh", "mount", "mkdir", "ln")
_LIBRARY = re.compile(r"(/\S+) \(0x")


def is_private(folder: Path) -> bool:
    """Whether *folder* is not to be shared as a whole: it is or holds a home, or keeps keys."""
    home = Path(os.path.expanduser("~")).resolve()
    return (
        str(folder) in _NEVER
        or home.is_relative_to(folder)
        or any(os.path.lexists(folder / name) for name in _KEYS)
    )


# The folder with the job of a run, and how it is mounted.
JOB_TAG = "kvmpyjob"
JOB_MOUNT = f"{JOB_TAG} {places.INSIDE} 9p {JOB_FLAGS},ro,X-mount.mkdir\n"


@dataclass(frozen=True)
class Root:
    """The folder that becomes the root, and the folders that are mounted into it."""

    folder: Path
    shares: tuple[Path, ...]

    @property
    def mounts(self) -> str:
        """Lines of an fstab that mount the shared folders."""
        return _mounts(self.shares)

    def shows(self, path: Path) -> bool:
        """Whether the file at *path*, its links followed, is to be seen inside."""
        return _below(path.resolve(), self.shares)


def _below(path: Path, folders: Iterable[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


class _Layout:
    """A root that is being made in *folder*."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shares: list[Path] = []

    def inside(self, path: Path) -> Path:
        """Return where *path*, which is absolute, lies in the new root."""
        return self.folder / path.relative_to("/")

    def place(self, path: Path) -> None:
        """Make *path* lead inside to what it leads to here, through the same links; share a folder, copy a
        file.
        """
        here = Path("/")
        for here in steps(path):
            if _below(here, self.shares):
                return
            if here.is_symlink() and not os.path.lexists(self.inside(here)):
                self.inside(here).parent.mkdir(parents=True, exist_ok=True)
                self.inside(here).symlink_to(os.readlink(here))
        if here.is_dir():
            self.shares = [here, *(share for share in self.shares if not share.is_relative_to(here))]
        elif here.is_file():
            self.copy(here, here)

    def copy(self, source: Path, name: Path) -> None:
        """Put the content of *source* at *name*, whose folder may be a link inside."""
        target = self.inside(name.parent.resolve() / name.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def libraries(programs: Sequence[str]) -> list[str]:
    """Return the paths, as the loader finds them, of what *programs* and shared objects are linked with."""
    result = subprocess.run(["ldd", *programs], check=False, capture_output=True, text=True, timeout=60)
    return _LIBRARY.findall(result.stdout)


def _settings(layout: _Layout) -> None:
    etc = layout.folder / "etc"
    names = [*_SETTINGS, *(path.name for path in Path("/etc").glob("python3*"))]
    for name in names:
        source = Path("/etc") / name
        if source.is_dir():
            shutil.copytree(source, etc / name, symlinks=True, ignore_dangling_symlinks=True)
        elif source.is_file():
            shutil.copy2(source, etc / name)
    for name in _ACCOUNTS:
        lines = [line.split(":") for line in (Path("/etc") / name).read_text(encoding="utf-8").splitlines()]
        text = "".join(":".join([line[0], "x", *line[2:]]) + "\n" for line in lines if len(line) > 2)
        (etc / name).write_text(text, encoding="utf-8")


def _mounts(shares: Iterable[Path]) -> str:
    lines = []
    for number, share in enumerate(shares):
        place = str(share).replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011")
        lines.append(f"{tag(number)} {place} 9p {MOUNT_FLAGS},ro,X-mount.mkdir\n")
    return "".join(lines)


def _place_wanted(layout: _Layout, path: Path) -> None:
    real = path.resolve()
    own = real if real.is_dir() else real.parent
    if _below(real, map(Path, _OWN)):
        return
    if not is_private(own):
        layout.place(path if real.is_dir() else path.parent)
        layout.place(path)
    elif str(own) in _COVERED and not real.is_dir():
        raise LabError(
            f"{path} cannot be shown to the lab: {own} is another one inside",
            "put it into a folder of its own",
        )
    elif not real.is_dir():
        layout.place(path)


def is_covered(path: Path) -> bool:
    """Tell whether a machine has a file system in memory over *path*."""
    return _below(path, map(Path, _COVERED))


def tag(number: int) -> str:
    """Return the name under which QEMU exports the share *number*."""
    return f"kvmpy{number}"


def build(folder: Path, needed: Iterable[Path], wanted: Iterable[Path]) -> Root:
    """Make a root in *folder*, which must not exist, and return it.

    *needed* are files and folders of kvmpy and of Python; *wanted* are those that the user named or works in:
    of a folder that is not to be shared, files are copied, unless a file system of the inside covers it:
    LabError.
    """
    layout = _Layout(folder)
    for name in _EMPTY:
        (folder / name).mkdir(parents=True)
    for name in _SYSTEM:
        if os.path.exists(name):
            layout.place(Path(name))
    for path in sorted({*needed}, key=lambda path: (not path.is_dir(), path)):
        if path.exists() and not (path.is_dir() and is_private(path.resolve())):
            layout.place(path)
    for path in wanted:
        _place_wanted(layout, path)
    first = {name: program for name in _FIRST if (program := shutil.which(name)) is not None}
    for file in [*first.values(), *libraries([*first.values()])]:
        layout.copy(Path(file), Path(file))
    if "sh" in first:
        layout.copy(Path(first["sh"]), Path("/bin/sh"))
    _settings(layout)
    shares = tuple(sorted(layout.shares))
    for share in shares:
        if not _below(share, map(Path, _COVERED)):
            layout.inside(share).mkdir(parents=True, exist_ok=True)
    shutil.copy(places.files() / "init.sh", folder / "init")
    (folder / "init").chmod(0o755)
    shutil.copy(places.files() / "fstab", folder / "etc" / "fstab")
    return Root(folder, shares)
