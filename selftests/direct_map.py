# SPDX-License-Identifier: Apache-2.0
"""The kernel's own mapping of all memory: its page sizes, and how often it was split."""

from __future__ import annotations

from pathlib import Path

from kvmpy import MissingError


def sizes() -> dict[str, int]:
    """Return KiB of the direct map by page size, from DirectMap4k to DirectMap1G (/proc/meminfo)."""
    words = (line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    found = {entry[0].rstrip(":"): int(entry[1]) for entry in words if entry[0].startswith("DirectMap")}
    if not found:
        raise MissingError("DirectMap lines in /proc/meminfo", "a kernel on x86 with /proc")
    return found


def splits() -> dict[str, int]:
    """Return how often large pages of the direct map were split and collapsed since boot (/proc/vmstat)."""
    words = (line.split() for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines())
    found = {name: int(value) for name, value in words if name.startswith("direct_map_level")}
    if not found:
        raise MissingError(
            "direct_map_level2_splits in /proc/vmstat", "Linux 5.12 on x86, CONFIG_VM_EVENT_COUNTERS"
        )
    return found
