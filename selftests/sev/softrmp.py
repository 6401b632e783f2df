# SPDX-License-Identifier: Apache-2.0
"""The RMP of the lab's software AMD-SP, as debugfs shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpy.coco.rmp import Entry

FOLDER = Path("/sys/kernel/debug/softsev")

needs_softsev = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="no software AMD-SP in debugfs: `kvmpy lab run --soft-sev`"
)


def rmp() -> dict[int, Entry]:
    """Return the entry of every assigned page, by page frame number; permissions are not shown."""
    entries = {}
    for line in (FOLDER / "rmp").read_text(encoding="ascii").splitlines():
        pfn, gpa, asid, size, *flags = line.split()
        entries[int(pfn, 16)] = Entry(
            True,
            int(gpa, 16),
            int(asid),
            large=size == "2M",
            immutable="immutable" in flags,
            validated="validated" in flags,
            vmsa="vmsa" in flags,
        )
    return entries


def host_writes(pfn: int) -> bool:
    """Whether the kernel can write to a page by its direct map."""
    try:
        (FOLDER / "host_write").write_text(f"{pfn:#x}\n", encoding="ascii")
    except OSError:
        return False
    return True
