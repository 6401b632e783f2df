# SPDX-License-Identifier: Apache-2.0
"""Debugging SEV guests: what kvmpy hands to KVM harms no kernel, and gives the bytes that were asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpy.coco.sev_launch import SevGuest
from kvmpy.core.address import PAGE_SIZE, Gpa
from kvmpy.core.backing import Anonymous, Mapping
from kvmpy.core.vm import Vm
from kvmpy.uapi import ffi
from kvmpy.uapi.structs import kvm_sev_dbg
from selftests.sev.test_dbg import RANGES, overflows

BASE = Gpa(0x10_0000)
PAGES = 4
PLAIN = bytes((at * 7 + at // 256) & 0xFF for at in range(PAGES * PAGE_SIZE))
NEW = bytes(reversed(PLAIN))
BLOCK = 16
SPANS = st.integers(0, PAGES * PAGE_SIZE - 1).flatmap(
    lambda at: st.tuples(st.just(at), st.integers(0, PAGES * PAGE_SIZE - at))
)


class FakeVm:
    """A guest's memory, and a firmware that takes what KVM hands on to it before Linux 7.2, too."""

    name = "vm0"

    def __init__(self, memory: Mapping) -> None:
        self.memory = self.sev = self
        self._mapping = memory

    def hva(self, gpa: Gpa, private: bool | None = None) -> int:
        """Return where the host has *gpa*."""
        assert private is False
        return self._mapping.hva + (gpa - BASE)

    def command(self, command: str, arg: kvm_sev_dbg, *, gpa: int) -> None:
        """Flip the bits that encryption flips, on the way."""
        source, target, size = int(arg.src_uaddr), int(arg.dst_uaddr), int(arg.len)
        assert source % PAGE_SIZE == target % PAGE_SIZE
        assert size
        assert source % PAGE_SIZE + size <= PAGE_SIZE
        assert not source % BLOCK
        assert not size % BLOCK
        guest = source if command == "DBG_DECRYPT" else target
        assert 0 <= guest - self._mapping.hva <= PAGES * PAGE_SIZE - size
        assert BASE <= gpa < BASE + PAGES * PAGE_SIZE
        raw = bytes(ffi.buffer(ffi.cast("uint8_t *", source), size))
        ffi.memmove(ffi.cast("uint8_t *", target), bytes(byte ^ 0xFF for byte in raw), size)


@pytest.fixture(scope="module")
def memory() -> Iterator[Mapping]:
    with closing(Anonymous().map(PAGES * PAGE_SIZE)) as mapping:
        yield mapping


def guest(memory: Mapping) -> SevGuest:
    """Return a guest whose memory is PLAIN."""
    memory.look(0, len(PLAIN))[:] = bytes(byte ^ 0xFF for byte in PLAIN)
    return SevGuest(cast(Vm, FakeVm(memory)))


@given(span=SPANS)
def test_a_read_and_a_write_of_any_range(memory: Mapping, span: tuple[int, int]) -> None:
    start, size = span
    result = guest(memory)
    assert result.dbg_decrypt(BASE + start, size) == PLAIN[start : start + size]
    result.dbg_encrypt(BASE + start, NEW[start : start + size])
    assert (
        result.dbg_decrypt(BASE, len(PLAIN))
        == PLAIN[:start] + NEW[start : start + size] + PLAIN[start + size :]
    )


def old_steps(source: int, target: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield place in the target's page, and length, of the steps of sev_dbg_crypt() before 78ee2d50185a."""
    while size:
        step = min(PAGE_SIZE - source % PAGE_SIZE, size)
        yield target % PAGE_SIZE, step
        source, target, size = source + step, target + step, size - step


@given(
    source=st.integers(0, PAGE_SIZE - 1),
    target=st.integers(0, PAGE_SIZE - 1),
    size=st.integers(1, 3 * PAGE_SIZE),
)
def test_ranges_that_harm_are_known(source: int, target: int, size: int) -> None:
    harms = any(place + step > PAGE_SIZE for place, step in old_steps(source, target, size))
    assert overflows(source, target, size) is harms


def test_the_selftests_ranges_have_both_kinds() -> None:
    judged: dict[str, Any] = {
        name: overflows(guest, host, size) for name, (guest, host, size) in RANGES.items()
    }
    assert judged["into two pages"]
    assert not judged["two borders in the same place"]
    assert not judged["a page"]
