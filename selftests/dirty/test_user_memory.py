# SPDX-License-Identifier: Apache-2.0
"""The bitmaps of the dirty log in user space: KVM reads and writes what the call names alone."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import pytest

from kvmpy import (
    KVM_MEM_LOG_DIRTY_PAGES,
    PAGE_SIZE,
    Gpa,
    Vm,
    ioctls,
    kvm_clear_dirty_log,
    kvm_dirty_log,
)
from kvmpy.uapi import ffi

GPA = Gpa(0x10_0000)
# Pages of slots: less than a word of the bitmap, words, and more than a page of it.
SIZES = (1, 63, 64, 65, 128, 8 * PAGE_SIZE, 8 * PAGE_SIZE + 65)


class EndOfMemory:
    """Two pages of memory with nothing accessible behind them."""

    def __init__(self) -> None:
        self.area = mmap.mmap(-1, 3 * PAGE_SIZE)
        self._place = ffi.from_buffer(self.area)
        self.end = int(ffi.cast("uintptr_t", self._place)) + 2 * PAGE_SIZE
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(self.end), PAGE_SIZE, 0) == 0

    def close(self) -> None:
        """Give the memory back."""
        ffi.release(self._place)
        self.area.close()


@pytest.fixture
def memory() -> Iterator[EndOfMemory]:
    memory = EndOfMemory()
    yield memory
    memory.close()


def size_of(pages: int) -> int:
    """Return the bytes of a bitmap, which is of whole words."""
    return -(-pages // 64) * 8


@pytest.mark.parametrize("pages", SIZES)
def test_the_log_is_written(vm: Vm, memory: EndOfMemory, pages: int) -> None:
    """KVM_GET_DIRTY_LOG writes the slot's bitmap of whole 64-bit words, and neither before nor behind it.

    Documentation/virt/kvm/api.rst, 4.8 KVM_GET_DIRTY_LOG.
    """
    slot = vm.add_slot(GPA, pages * PAGE_SIZE, flags=KVM_MEM_LOG_DIRTY_PAGES)
    size = size_of(pages)
    memory.area[: 2 * PAGE_SIZE] = b"\xa5" * (2 * PAGE_SIZE)
    arg = kvm_dirty_log(slot=slot.slot, dirty_bitmap=memory.end - size)
    assert vm.ioctl_raw(ioctls.KVM_GET_DIRTY_LOG, arg) == (0, 0)
    assert memory.area[: 2 * PAGE_SIZE] == b"\xa5" * (2 * PAGE_SIZE - size) + bytes(size)


@pytest.mark.requires("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
@pytest.mark.parametrize("pages", SIZES)
def test_the_pages_to_clear_are_read(vm: Vm, memory: EndOfMemory, pages: int) -> None:
    """KVM_CLEAR_DIRTY_LOG reads the bits of its range, wherever in the slot that is, and nothing behind them.

    Documentation/virt/kvm/api.rst, 4.117 KVM_CLEAR_DIRTY_LOG: num_pages, and bit 0 for first_page.
    """
    vm.dirty.enable_manual_log()
    slot = vm.add_slot(GPA, pages * PAGE_SIZE, flags=KVM_MEM_LOG_DIRTY_PAGES)
    wrong = []
    for first in sorted({0, 64, pages // 128 * 64, (pages - 1) // 64 * 64}):
        for count in sorted({64, 128, pages - first}):
            if count <= 0 or first + count > pages or (count % 64 and first + count != pages):
                continue
            arg = kvm_clear_dirty_log(
                slot=slot.slot, num_pages=count, first_page=first, dirty_bitmap=memory.end - size_of(count)
            )
            result = vm.ioctl_raw(ioctls.KVM_CLEAR_DIRTY_LOG, arg)
            if result != (0, 0):
                wrong.append(f"{count} pages from {first}: errno {result[1]}")
    assert not wrong, "\n".join(wrong)
