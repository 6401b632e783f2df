# SPDX-License-Identifier: Apache-2.0
"""Sets of guest frames by the ranges of addresses that change them."""

from __future__ import annotations

from pyroaring import BitMap

from kvmpy.core.address import PAGE_SHIFT

# Frame numbers that a BitMap can hold; it ignores larger ones silently.
GFN_LIMIT = 1 << 32


def mark(frames: BitMap, gpa: int, size: int, there: bool) -> None:
    """Put the whole pages of *size* bytes at *gpa* into *frames*, or take them out; those above
    :data:`GFN_LIMIT` are left out.
    """
    first, end = gpa >> PAGE_SHIFT, min(gpa + size >> PAGE_SHIFT, GFN_LIMIT)
    if first < end:
        if there:
            frames.add_range(first, end)
        else:
            frames.remove_range(first, end)
