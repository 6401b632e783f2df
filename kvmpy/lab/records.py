# SPDX-License-Identifier: Apache-2.0
"""Records of tests (``--record``) on their way out of the lab: compressed, in pieces, over the journal."""

from __future__ import annotations

import base64
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvmpy.debug.record.format import private

# Inside, in memory: the root is read-only.
FOLDER = "/tmp/kvmpy-records"  # noqa: S108 - a tmpfs of its own
_PIECE = 1 << 18
_PART = ".part"


def send(write: Callable[[dict[str, Any]], None], path: Path) -> None:
    """Write the record at *path* as events, and remove it; where there is none, nothing is sent."""
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return
    with stream:
        left = os.fstat(stream.fileno()).st_size
        first = True
        while left > 0 and (piece := stream.read(min(_PIECE, left))):
            left -= len(piece)
            data = base64.b64encode(zlib.compress(piece, 1)).decode("ascii")
            write({"event": "record", "name": path.name, "first": first, "last": not left, "data": data})
            first = False
    path.unlink()


def receive(folder: Path, event: dict[str, Any], lane: int) -> None:
    """Add one piece, from machine *lane*, to the record in *folder*; it has its name once it is whole.

    OSError where it cannot be written.
    """
    # A name is of somebody else's making.
    name = Path(str(event["name"])).name
    part = folder / f".{name}.{lane}{_PART}"
    with open(part, "wb" if event["first"] else "ab", opener=private) as stream:
        stream.write(zlib.decompress(base64.b64decode(event["data"])))
    if event["last"]:
        part.replace(folder / name)


def clean(folder: Path) -> None:
    """Remove what did not become whole."""
    for part in folder.glob(f".*{_PART}"):
        part.unlink()
