# SPDX-License-Identifier: Apache-2.0
"""Sets of guest frames that change far more often than anybody looks at them."""

from __future__ import annotations

import threading
from typing import Any

from pyroaring import BitMap

from kvmpy.core.address import PAGE_SHIFT
from kvmpy.uapi import ffi, lib

# Frame numbers that a BitMap can hold; it ignores larger ones silently.
GFN_LIMIT = 1 << 32
_MANY = lib.KVMPY_NOTES_MANY
_note = lib.kvmpy_note


class NotedFrames:
    """A bitmap of frames; a change of a range is noted, and carried out when somebody asks for the bitmap.

    A conversion is followed by such a change while KVM has left the caches and TLBs cold, where each page of
    code and data costs: a note touches few, a bitmap many.  Notes take effect in their order, whichever
    threads make them and ask.  They are kept where C can add some: *notes* is a struct kvmpy_notes.
    """

    def __init__(self) -> None:
        self.notes: Any = ffi.new("struct kvmpy_notes *")
        self._bitmap = BitMap()
        self._lock = threading.Lock()

    def note(self, gpa: int, size: int, there: bool) -> None:
        """Put the whole pages of *size* bytes at *gpa* into the set, or take them out; those above
        :data:`GFN_LIMIT` are left out.
        """
        _note(self.notes, gpa, size, there)
        if self.notes.count >= _MANY:
            self._fold()

    @property
    def bitmap(self) -> BitMap:
        """The set as it is now: the same object each time, up to date until the next note."""
        if self.notes.count:
            self._fold()
        return self._bitmap

    def _fold(self) -> None:
        with self._lock:
            count = self.notes.count
            for number in range(count):
                note = self.notes.note[number]
                first, last = note.gpa >> PAGE_SHIFT, min(note.gpa + note.size >> PAGE_SHIFT, GFN_LIMIT)
                if first < last and note.there:
                    self._bitmap.add_range(first, last)
                elif first < last:
                    self._bitmap.remove_range(first, last)
            # Only now: who finds no notes finds them in the bitmap.
            lib.kvmpy_notes_drop(self.notes, count)
