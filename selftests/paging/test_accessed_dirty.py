# SPDX-License-Identifier: Apache-2.0
"""The accessed and dirty flags that a translation leaves in the page tables."""

from __future__ import annotations

import pytest

from kvmpy import PAGE_SIZE, SIZE_2M, Gva, PfErr
from kvmpy.x86.entry import ACCESSED, DIRTY
from selftests.paging.conftest import MakeProber, PageFault, Prober

pytestmark = pytest.mark.usefixtures("open_tables")

GVA = Gva(0x6000_0000_0000)
MARK = 0x4D41_524B
CODE = b"\xb8" + MARK.to_bytes(4, "little") + b"\xc3"  # mov eax, MARK; ret
LEVELS = (4, 3, 2, 1)
BOTH = ACCESSED | DIRTY


def flags(prober: Prober, gva: Gva = GVA, levels: tuple[int, ...] = LEVELS) -> list[int]:
    return [prober.entry(gva, level).value & BOTH for level in levels]


def use_and_clear(
    prober: Prober, gva: Gva = GVA, levels: tuple[int, ...] = LEVELS, *, write: bool = True
) -> None:
    """Let the flags be set by an access, then clear them in every entry of the translation and flush it."""
    content = prober.read(gva)
    assert isinstance(content, int)
    if write:
        assert prober.write(gva, content) is None
    assert all(flags(prober, gva, levels))
    for level in levels:
        prober.change_entry(gva, level, clear=BOTH)
    prober.kernel.invlpg(gva)
    assert not any(flags(prober, gva, levels))


def test_nothing_touched_nothing_set(prober: Prober) -> None:
    """Without an access there are no flags: neighbours of a page that is used stay clean.

    Intel SDM volume 3, 4.8 (accessed and dirty flags).
    """
    prober.page(GVA, MARK)
    prober.page(GVA + PAGE_SIZE, MARK)
    use_and_clear(prober, GVA + PAGE_SIZE)
    assert flags(prober, levels=(1,)) == [0]
    assert prober.read(GVA) == MARK
    assert flags(prober) == [ACCESSED] * 4
    assert flags(prober, GVA + PAGE_SIZE, (1,)) == [0]


@pytest.mark.parametrize("access", ["read", "fetch"])
def test_an_access_marks_every_entry_as_accessed(prober: Prober, access: str) -> None:
    """A read and a fetch set the accessed flag in every entry of the translation, and no dirty flag.

    Intel SDM volume 3, 4.8.
    """
    prober.page(GVA, CODE if access == "fetch" else MARK)
    use_and_clear(prober)
    assert (prober.fetch(GVA) if access == "fetch" else prober.read(GVA)) == MARK
    assert flags(prober) == [ACCESSED] * 4


def test_a_write_marks_the_page_as_dirty(prober: Prober) -> None:
    """A write sets the dirty flag in the entry that maps the page, and in none above it.

    Intel SDM volume 3, 4.8: the dirty flag belongs to the entry "that identifies the final physical address".
    """
    prober.page(GVA, MARK)
    use_and_clear(prober)
    assert prober.write(GVA, 1) is None
    assert flags(prober) == [ACCESSED, ACCESSED, ACCESSED, BOTH]


def test_a_write_after_a_read_marks_the_page_as_dirty(prober: Prober) -> None:
    """A translation that a read has cached still sets the dirty flag at the first write.

    Intel SDM volume 3, 4.8.
    """
    prober.page(GVA, MARK)
    use_and_clear(prober)
    assert prober.read(GVA) == MARK
    assert flags(prober, levels=(1,)) == [ACCESSED]
    assert prober.write(GVA, 1) is None
    assert flags(prober, levels=(1,)) == [BOTH]


def test_a_large_page_has_flags_of_its_own(prober: Prober) -> None:
    """For a large page the flags are in the entry that maps it, for an access anywhere in it.

    Intel SDM volume 3, 4.8.
    """
    gva = prober.vm.alloc(SIZE_2M, gva=GVA, page_size=SIZE_2M, user=True)
    levels = (4, 3, 2)
    use_and_clear(prober, gva, levels)
    assert prober.read(gva + 300 * PAGE_SIZE) == 0
    assert flags(prober, gva, levels) == [ACCESSED] * 3
    assert prober.write(gva + 17 * PAGE_SIZE, 1) is None
    assert flags(prober, gva, levels) == [ACCESSED, ACCESSED, BOTH]


def test_flags_are_set_again_after_they_were_cleared(prober: Prober) -> None:
    """Who clears the flags and flushes learns of the next access, time and again.

    Intel SDM volume 3, 4.8 and 4.10.4.2.
    """
    prober.page(GVA, MARK)
    for turn in range(4):
        use_and_clear(prober)
        assert prober.read(GVA) == (turn or MARK)
        assert flags(prober, levels=(1,)) == [ACCESSED]
        assert prober.write(GVA, turn + 1) is None
        assert flags(prober, levels=(1,)) == [BOTH]


def test_a_refused_write_does_not_make_a_page_dirty(prober: Prober, page_fault: PageFault) -> None:
    """The dirty flag is for writes that happen: one that faults leaves it clear.

    Intel SDM volume 3, 4.8: "Whenever there is a write to a linear address".
    """
    prober.page(GVA, MARK, writable=False)
    use_and_clear(prober, write=False)
    u = PfErr.U if prober.ring else 0
    assert prober.write(GVA, 1) == page_fault(PfErr.P | PfErr.W | u, GVA)
    assert flags(prober, levels=(1,))[0] & DIRTY == 0


def test_another_vcpu_sets_them_too(make_prober: MakeProber, ring: int) -> None:
    """Flags are in memory that all vCPUs share: the second one's write shows although the first only read.

    Intel SDM volume 3, 4.8.
    """
    first = make_prober(ring=ring, vcpus=2)
    second = first.on_vcpu(1)
    first.page(GVA, MARK)
    assert second.read(GVA) == MARK
    use_and_clear(first)
    second.kernel.invlpg(GVA)
    assert first.read(GVA) == MARK
    assert flags(first, levels=(1,)) == [ACCESSED]
    assert second.write(GVA, 1) is None
    assert flags(first, levels=(1,)) == [BOTH]
