# SPDX-License-Identifier: Apache-2.0
"""The root file system of a lab kernel: a cpio archive that it unpacks into memory.

The format is that of Documentation/driver-api/early-userspace/buffer-format.rst ("newc").
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterator
from pathlib import Path

_FOLDER = stat.S_IFDIR | 0o755
_ALIGN = 4


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGN)


def steps(path: Path) -> Iterator[Path]:
    """Yield what leads to *path*, which may be relative, and *path* itself last: folders and links by names
    without a link, and from each link on what leads to its target.
    """
    left = deque(Path(os.path.abspath(path)).parts[1:])
    folder = Path("/")
    while left:
        here = folder / left.popleft()
        yield here
        if here.is_symlink():
            target = Path(os.path.normpath(folder / os.readlink(here)))
            left.extendleft(reversed(target.parts[1:]))
            folder = Path("/")
        else:
            folder = here


class Initramfs:
    """Files, folders and links by their absolute path inside; a folder comes before what is in it."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, int, bytes | Path]] = {}

    def put(self, name: Path, data: bytes, mode: int = 0o644) -> None:
        """Put a file with this content at *name*, in place of what is there."""
        self._folders(name.parent)
        self._entries[str(name)] = stat.S_IFREG | mode, 0, data

    def tree(self, folder: Path) -> None:
        """Make the content of *folder* the root."""
        for path in sorted(folder.rglob("*")):
            self._take(path, Path("/") / path.relative_to(folder))

    def file(self, path: Path) -> None:
        """Put a file of this machine at its own path, through the links that lead to it here."""
        for here in steps(path):
            if str(here) not in self._entries:
                self._take(here, here)

    def _take(self, path: Path, name: Path) -> None:
        status = path.lstat()
        self._folders(name.parent)
        data = os.readlink(path).encode() if path.is_symlink() else path if path.is_file() else b""
        self._entries[str(name)] = status.st_mode, int(status.st_mtime), data

    def _folders(self, folder: Path) -> None:
        for parent in (*reversed(folder.parents[:-1]), folder):
            if str(parent) not in self._entries and parent != Path("/"):
                self._entries[str(parent)] = _FOLDER, 0, b""

    def write(self, target: Path) -> None:
        """Write the archive; OSError where a file has gone, or *target* cannot be written."""
        with target.open("wb") as stream:
            for number, (name, (mode, mtime, data)) in enumerate(
                [*self._entries.items(), ("/TRAILER!!!", (0, 0, b""))], 1
            ):
                content = data.read_bytes() if isinstance(data, Path) else data
                short = name[1:].encode() + b"\0"
                # inode, mode, owner, group, links, time, size, its device, device of a node, name, checksum
                fields = (number, mode, 0, 0, 1, mtime, len(content), 0, 0, 0, 0, len(short), 0)
                header = b"070701" + b"".join(b"%08x" % value for value in fields)
                stream.write(_padded(header + short) + _padded(content))
