# SPDX-License-Identifier: Apache-2.0
"""Proofs of the bugs of dirty logging."""

from __future__ import annotations

import ctypes
import mmap

import pytest

from kvmpy import (
    KVM_MEM_LOG_DIRTY_PAGES,
    PAGE_SIZE,
    DirtyBitmap,
    Gpa,
    MemorySlot,
    Vm,
    ioctls,
    kvm_clear_dirty_log,
)
from kvmpy.uapi import ffi


def logged(vm: Vm, pages: int) -> MemorySlot:
    vm.dirty.enable_manual_log()
    return vm.add_slot(Gpa(0x10_0000), pages * PAGE_SIZE, flags=KVM_MEM_LOG_DIRTY_PAGES)


@pytest.mark.bug(140)
def test_last_pages(vm: Vm) -> None:
    slot = logged(vm, 70)
    vm.dirty.clear_log(slot.slot, DirtyBitmap.of(6, [5]), first_page=64)


@pytest.mark.bug(141)
def test_end_of_memory(vm: Vm) -> None:
    slot = logged(vm, 128 * 64)
    area = mmap.mmap(-1, 2 * PAGE_SIZE)
    place = ffi.from_buffer(area)
    address = int(ffi.cast("uintptr_t", place))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + PAGE_SIZE), PAGE_SIZE, 0) == 0
    arg = kvm_clear_dirty_log(slot=slot.slot, num_pages=64, dirty_bitmap=address + PAGE_SIZE - 8)
    try:
        assert vm.ioctl_raw(ioctls.KVM_CLEAR_DIRTY_LOG, arg) == (0, 0)
    finally:
        ffi.release(place)
        area.close()
