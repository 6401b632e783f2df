# SPDX-License-Identifier: Apache-2.0
"""Records of tests (``--record``) on their way out of the lab: compressed, in pieces, over the journal."""

from __future__ import annotations

import base64
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmpy.lab.events import Record

from kvmpy.debug.record.format import private

# Inside, in memory: the root is read-only.
FOLDER = "/tmp/kvmpy-records"  # noqa: S108 - a tmpfs of its own
_PIECE = 1 << 18
MAX_SIZE = 1 << 30
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


def receive(folder: Path, event: Record, lane: int) -> None:
    """Add one piece, from machine *lane*, to the record in *folder*; it has its name once it is whole.

    OSError where it cannot be written, BadEventError for a piece that `send` would not write.
    """
    from kvmpy.lab.events import BadEventError  # the session inside has no use for it

    unpacker = zlib.decompressobj()
    try:
        piece = unpacker.decompress(base64.b64decode(event.data, validate=True), _PIECE + 1)
    except (ValueError, zlib.error) as error:
        raise BadEventError(f"a piece of {event.name}: {error}") from None
    if len(piece) > _PIECE or not unpacker.eof:
        raise BadEventError(f"a piece of {event.name} of more than {_PIECE} bytes")
    part = folder / f".{event.name}.{lane}{_PART}"
    with open(part, "wb" if event.first else "ab", opener=private) as stream:
        if stream.tell() + len(piece) > MAX_SIZE:
            raise BadEventError(f"{event.name} is longer than {MAX_SIZE >> 20} MiB")
        stream.write(piece)
    if event.last:
        part.replace(folder / event.name)


def clean(folder: Path) -> None:
    """Remove what did not become whole."""
    for part in folder.glob(f".*{_PART}"):
        part.unlink()
