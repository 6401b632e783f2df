# SPDX-License-Identifier: Apache-2.0
"""Sets of guest frames by the ranges of addresses that change them."""

from __future__ import annotations

from pyroaring import BitMap

from kvmpy.core.address import PAGE_SHIFT

# Frame numbers that a BitMap can hold; it ignores larger ones silently.
GFN_LIMIT = 1 << 32


_MOST_NOTED = 4096


class NotedFrames:
    """A set of frames that changes often and is looked at seldom: changes are noted, and made when it is."""

    def __init__(self) -> None:
        self._frames = BitMap()
        self._noted: list[tuple[int, int, bool]] = []

    def note(self, gpa: int, size: int, there: bool) -> None:
        """Put a range into the set or take it out, as :func:`mark` does."""
        self._noted.append((gpa, size, there))
        if len(self._noted) > _MOST_NOTED:
            self.frames()

    def frames(self) -> BitMap:
        """Return the set; no thread may note meanwhile."""
        for gpa, size, there in self._noted:
            mark(self._frames, gpa, size, there)
        self._noted.clear()
        return self._frames


def mark(frames: BitMap, gpa: int, size: int, there: bool) -> None:
    """Put the whole pages of *size* bytes at *gpa* into *frames*, or take them out; those above
    :data:`GFN_LIMIT` are left out.
    """
    gpa = int(gpa)  # what a Gpa adds is checked, which would be most of the time spent here
    first, end = gpa >> PAGE_SHIFT, min(gpa + size >> PAGE_SHIFT, GFN_LIMIT)
    if first < end:
        if there:
            frames.add_range(first, end)
        else:
            frames.remove_range(first, end)
