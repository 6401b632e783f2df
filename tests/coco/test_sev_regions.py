# SPDX-License-Identifier: Apache-2.0
"""Which pages of an SEV guest are registered, and when."""

from __future__ import annotations

from typing import cast

import pytest

from kvmpy.coco.sev import _Pinned
from kvmpy.core.address import PAGE_SIZE, Gpa
from kvmpy.core.backing import Anonymous
from kvmpy.core.errors import PrivateMemoryError
from kvmpy.core.memory import GuestMemory, Segment
from kvmpy.guest.vm import GuestVm


class FakeVm:
    """Two ranges of memory, side by side; notes what is registered as (page, pages)."""

    def __init__(self) -> None:
        self.sev = self
        self.memory = GuestMemory()
        self.mapping = Anonymous().map(16 * PAGE_SIZE)
        for half in (0, 1):
            offset = half * 8 * PAGE_SIZE
            self.memory.add(Segment(Gpa(offset), 8 * PAGE_SIZE, self.mapping, self.mapping, offset, offset))
        self.registered: list[tuple[int, int]] = []

    def reg_region(self, hva: int, size: int) -> None:
        """Note a region."""
        self.registered.append(((hva - self.mapping.hva) // PAGE_SIZE, size // PAGE_SIZE))


def pinned() -> tuple[FakeVm, _Pinned]:
    """Return a VM with nothing registered."""
    vm = FakeVm()
    return vm, _Pinned(cast(GuestVm, vm))


def test_each_page_once() -> None:
    """Only what is not registered yet is, in as few regions as can be."""
    vm, pins = pinned()
    pins.add(Gpa(PAGE_SIZE), 2 * PAGE_SIZE)
    pins.convert(Gpa(0), 5 * PAGE_SIZE, True, False)
    pins.convert(Gpa(0), 5 * PAGE_SIZE, False, False)
    pins.convert(Gpa(0), 5 * PAGE_SIZE, True, False)
    assert vm.registered == [(1, 2), (0, 1), (3, 2)]


def test_no_region_crosses_memory_slots() -> None:
    """Two slots need not be neighbours in host memory."""
    vm, pins = pinned()
    pins.convert(Gpa(7 * PAGE_SIZE), 2 * PAGE_SIZE, True, True)
    assert vm.registered == [(7, 1), (8, 1)]


def test_nobody_clears_encrypted_pages() -> None:
    """What an allocator would have to clear is refused."""
    _, pins = pinned()
    with pytest.raises(PrivateMemoryError, match="encrypted in place"):
        pins.convert(Gpa(0), PAGE_SIZE, False, True)
