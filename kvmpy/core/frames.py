# SPDX-License-Identifier: Apache-2.0
"""Sets of guest frames that change far more often than anybody looks at them."""

from __future__ import annotations

import threading
from collections import deque

from pyroaring import BitMap

from kvmpy.core.address import PAGE_SHIFT

# Frame numbers that a BitMap can hold; it ignores larger ones silently.
GFN_LIMIT = 1 << 32
# Notes that may wait before the bitmap is brought up to date unasked.
_MOST = 1024


class NotedFrames:
    """A bitmap of frames; a change of a range is noted, and carried out when somebody asks for the bitmap.

    A conversion is followed by such a change while KVM has left the caches and TLBs cold, where each page of
    code and data costs: a note touches few, a bitmap many.  Notes take effect in their order, whichever
    threads make them and ask.
    """

    def __init__(self) -> None:
        self._bitmap = BitMap()
        self._notes: deque[tuple[int, int, bool]] = deque()
        self._lock = threading.Lock()

    def note(self, gpa: int, size: int, there: bool) -> None:
        """Put the whole pages of *size* bytes at *gpa* into the set, or take them out; those above
        :data:`GFN_LIMIT` are left out.
        """
        self._notes.append((gpa, size, there))
        if len(self._notes) > _MOST:
            self._fold()

    @property
    def bitmap(self) -> BitMap:
        """The set as it is now: the same object each time, up to date until the next note."""
        if self._notes:
            self._fold()
        return self._bitmap

    def _fold(self) -> None:
        with self._lock:
            while self._notes:
                gpa, size, there = self._notes[0]
                first, last = int(gpa) >> PAGE_SHIFT, min(int(gpa) + size >> PAGE_SHIFT, GFN_LIMIT)
                if first < last and there:
                    self._bitmap.add_range(first, last)
                elif first < last:
                    self._bitmap.remove_range(first, last)
                # Only now: who finds no notes finds them in the bitmap.
                self._notes.popleft()
