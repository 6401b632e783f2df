# SPDX-License-Identifier: Apache-2.0
"""Sets of guest frames by the ranges of addresses that change them."""

from __future__ import annotations

from pyroaring import BitMap

from kvmpy.core.address import PAGE_SHIFT

# Frame numbers that a BitMap can hold; it ignores larger ones silently.
GFN_LIMIT = 1 << 32


def mark(frames: BitMap, gpa: int, size: int, there: bool) -> None:
    """Put the whole pages of *size* bytes at *gpa*, where a page begins, into *frames*, or take them out.

    Those above :data:`GFN_LIMIT` are left out.
    """
    # Every conversion comes by here, twice. A shift makes a plain int of a Gpa, whose sums are checked.
    first = gpa >> PAGE_SHIFT
    end = first + (size >> PAGE_SHIFT)
    if end > GFN_LIMIT:
        end = GFN_LIMIT
    if first < end:
        if there:
            frames.add_range(first, end)
        else:
            frames.remove_range(first, end)
