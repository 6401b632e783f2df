# SPDX-License-Identifier: Apache-2.0
"""The journal of a fleet's run: on the disk before a host is answered, and what an earlier run left in it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvmpy.testing import journal
from kvmpy.testing.dealer import Begun


class Book:
    """Writes what happens; *path* is a journal that was created, or that a run is resumed from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = path.open("a", encoding="utf-8")
        # An earlier run may have left half a line.
        self._stream.write("\n")
        self._fresh = True

    def write(self, event: str, **values: object) -> None:
        """Write an event; OSError where the disk is full."""
        self._stream.write(json.dumps({"event": event, **values}) + "\n")
        self._fresh = True

    def sync(self) -> None:
        """Wait until all of it is on the disk."""
        if self._fresh:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._fresh = False

    def close(self) -> None:
        """Close it; what the disk did not take is lost with the error that told so."""
        try:
            self._stream.close()
        except OSError:
            # A second time it closes without what it could not write.
            self._stream.close()

    def begins(self, test: Begun, column: str, host: str) -> None:
        """A test begins on a host."""
        self.write(
            "start",
            nodeid=test.nodeid,
            location=test.location,
            limit=test.limit,
            column=column,
            host=host,
        )

    def lost(self, nodeid: str, reason: str, column: str, about: Mapping[str, Any]) -> None:
        """A test is lost with what ran it."""
        self.write("lost", nodeid=nodeid, reason=reason, column=column, data=dict(about))


def columns(path: Path) -> dict[str, journal.History]:
    """Return what a journal holds of each column; a run that spreads its tests has one without a name."""
    whole = journal.read(path)
    names = [name for name in whole.columns if name]
    return {name: journal.read(path, name) for name in names} if names else {"": whole}
