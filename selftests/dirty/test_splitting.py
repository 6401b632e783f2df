# SPDX-License-Identifier: Apache-2.0
"""Dirty logging works page by page, so large pages are split for it, and joined when it is over."""

from __future__ import annotations

import pytest

from kvmpy import KVM_MEM_LOG_DIRTY_PAGES, PAGE_SIZE, SIZE_2M, Anonymous, MissingError

from .conftest import REGION_GPA, MakeWriters, Writers

pytestmark = [
    # Hosts that emulate ring 0 map nothing for it.
    pytest.mark.parametrize("ring", [3], ids=["ring3"], indirect=True)
]

HUGE = SIZE_2M // PAGE_SIZE


@pytest.fixture
def writers(make_writers: MakeWriters) -> Writers:
    """Two pages of 2 MiB, not logged."""
    assert int(REGION_GPA) % SIZE_2M == 0
    new_writers = make_writers(pages=2 * HUGE, flags=0, backing=Anonymous("thp"), page_size=SIZE_2M)
    mapping = new_writers.region.mapping
    for page in (0, HUGE):
        mapping.view(page * PAGE_SIZE, 1)[0] = 1
    return new_writers


def mapped(writers: Writers) -> tuple[int, int]:
    stats = writers.vm.stats.get()
    return stats["pages_4k"].value, stats["pages_2m"].value


@pytest.fixture
def large(writers: Writers) -> tuple[int, int]:
    """Let the guest use both large pages; how many pages of 4 KiB and 2 MiB were mapped before.

    MissingError unless they are mapped as such.
    """
    # Whatever else the guest needs is in use by then.
    writers.write([0])
    small, huge = mapped(writers)
    if not huge:
        raise MissingError(
            "transparent huge pages for guest memory",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, and free memory in pieces of 2 MiB",
        )
    writers.write([HUGE])
    assert mapped(writers) == (small, huge + 1)
    return small, huge - 1


def test_written_pages_are_small(writers: Writers, large: tuple[int, int]) -> None:
    """While a slot is logged its memory is mapped in pages of 4 KiB, and each written one is reported.

    Documentation/virt/kvm/api.rst 4.35, KVM_MEM_LOG_DIRTY_PAGES; vm->stat.pages_2m.
    """
    writers.region.set_flags(KVM_MEM_LOG_DIRTY_PAGES)
    writers.write([3, 300, HUGE + 5, HUGE - 1])
    assert mapped(writers)[1] == large[1]
    assert mapped(writers)[0] >= large[0] + 4
    assert writers.log() == [3, 300, HUGE - 1, HUGE + 5]


def test_every_page_of_it(writers: Writers, large: tuple[int, int]) -> None:
    """Written page by page, 2 MiB are 512 pages of the log and 512 mappings.

    Documentation/virt/kvm/api.rst 4.35, KVM_MEM_LOG_DIRTY_PAGES.
    """
    writers.region.set_flags(KVM_MEM_LOG_DIRTY_PAGES)
    writers.write(range(HUGE))
    # The other large page is not written: it is whole, or was split beforehand (kvm.eager_page_split).
    assert mapped(writers) in ((large[0] + HUGE, large[1] + 1), (large[0] + 2 * HUGE, large[1]))
    assert writers.log() == list(range(HUGE))


def test_they_are_joined_when_logging_ends(writers: Writers, large: tuple[int, int]) -> None:
    """When logging is switched off the guest's next accesses map 2 MiB at once, as before.

    Documentation/virt/kvm/api.rst 4.35; kvm_arch_commit_memory_region(), arch/x86/kvm/x86.c.
    """
    writers.region.set_flags(KVM_MEM_LOG_DIRTY_PAGES)
    writers.write([3, 300, HUGE + 5])
    writers.region.set_flags(0)
    writers.write([4, HUGE + 6])
    assert mapped(writers) == (large[0], large[1] + 2)


def test_content_stays(writers: Writers, large: tuple[int, int]) -> None:
    """Neither splitting nor joining touches what is in the pages.

    Documentation/virt/kvm/api.rst 4.35.
    """
    del large
    view = writers.region.mapping.view(0, 2 * SIZE_2M)
    view[8 : 2 * SIZE_2M : PAGE_SIZE] = bytes(range(256)) * 4
    expected = bytes(view[8 : 2 * SIZE_2M : PAGE_SIZE])
    writers.region.set_flags(KVM_MEM_LOG_DIRTY_PAGES)
    writers.write([1, 511, 513])
    writers.region.set_flags(0)
    writers.write([2, 512])
    assert bytes(view[8 : 2 * SIZE_2M : PAGE_SIZE]) == expected
    view.release()
