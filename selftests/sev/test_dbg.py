# SPDX-License-Identifier: Apache-2.0
"""DBG_DECRYPT and DBG_ENCRYPT: any address, any length, across pages, and what is refused.

Documentation/virt/kvm/x86/amd-memory-encryption.rst, KVM_SEV_DBG_DECRYPT and KVM_SEV_DBG_ENCRYPT; SEV API,
7.1 and 7.2, whose firmware wants blocks of 16 bytes: KVM makes them of whatever it is given.
"""

from __future__ import annotations

import errno

import pytest

from kvmpy import PAGE_SIZE, SevError, SevPolicy, SevRet, kvm_sev_dbg
from kvmpy.coco.sev_launch import SevRunning
from kvmpy.uapi import ffi
from selftests.sev.conftest import IN_PLACE, MEMORY, Bare, BareMaker, read_only, start_sev

EINVAL = (errno.EINVAL, 0)
LAUNCHED_PAGES = 4
TEXT = bytes((at * 7 + at // 256) & 0xFF for at in range(LAUNCHED_PAGES * PAGE_SIZE))
NEW = bytes((at * 5 + 0x80) & 0xFF for at in range(LAUNCHED_PAGES * PAGE_SIZE))

# Where a range begins in the guest, where the host's buffer begins in its page, and how many bytes.
RANGES = {
    "a page": (0, 0, PAGE_SIZE),
    "blocks": (16, 0, 32),
    "within a block": (5, 0, 3),
    "two bytes of two blocks": (15, 1, 2),
    "a byte": (1, 3, 1),
    "the last byte and the first": (PAGE_SIZE - 1, 0, 2),
    "across a page": (PAGE_SIZE - 7, 8, 20),
    "into two pages": (7, PAGE_SIZE - 5, 23),
    "two borders in different places": (PAGE_SIZE - 3, PAGE_SIZE - 9, 33),
    "two borders in the same place": (PAGE_SIZE - 16, PAGE_SIZE - 16, 32),
    "blocks over two borders": (PAGE_SIZE - 16, PAGE_SIZE - 32, 64),
    "an odd number of bytes of three pages": (9, 9, 2 * PAGE_SIZE + 1),
    "four pages": (PAGE_SIZE - 1, 3, 2 * PAGE_SIZE + 2),
}


def overflows(source: int, target: int, size: int) -> bool:
    """Tell whether KVM wrote behind a page of the target before 78ee2d50185a.

    Its steps ended where a page of the source did, whatever was left of the target's (sev_dbg_crypt()).
    """
    return source % PAGE_SIZE != target % PAGE_SIZE and target % PAGE_SIZE + size > PAGE_SIZE


def ranges(*, into_guest: bool) -> list[object]:
    """Return RANGES as cases; those that harm a host without the fix are marked."""
    fixed = pytest.mark.dangerous(unless="sev-dbg-page")
    cases: list[object] = []
    for name, (guest, host, size) in RANGES.items():
        source, target = (host, guest) if into_guest else (guest, host)
        marks = [fixed] if overflows(source, target, size) else []
        cases.append(pytest.param(guest, host, size, id=name, marks=marks))
    return cases


class Buffer:
    """Four pages of the host, of which *offset* is used."""

    def __init__(self, offset: int) -> None:
        self.bytes = bytearray(b"\xee" * (5 * PAGE_SIZE))
        self._place = ffi.from_buffer(self.bytes)
        base = int(ffi.cast("uintptr_t", self._place))
        self.start = -base % PAGE_SIZE + offset
        self.address = base + self.start

    def inside(self, size: int) -> bytes:
        return bytes(self.bytes[self.start : self.start + size])

    def outside(self, size: int) -> set[int]:
        """Return the values of the bytes around the used ones."""
        return {*self.bytes[: self.start], *self.bytes[self.start + size :]}


def running(bare: BareMaker, kind: str) -> tuple[Bare, SevRunning]:
    """Return a guest that may be debugged, with TEXT at the begin of its memory."""
    guest_vm = bare(kind)
    # From the last page on: in one piece of the host's memory a step over a border would do no harm.
    for page in reversed(range(-(-len(TEXT) // PAGE_SIZE))):
        guest_vm.vm.memory.write(MEMORY + page * PAGE_SIZE, b"\0")
    guest_vm.vm.memory.write(MEMORY, TEXT)
    return guest_vm, start_sev(guest_vm).update_data(MEMORY, len(TEXT)).measure().finish()


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize(("guest", "host", "size"), ranges(into_guest=False))
def test_decrypt(bare: BareMaker, kind: str, guest: int, host: int, size: int) -> None:
    """DBG_DECRYPT gives the guest's bytes, and touches no byte of the host's beside them.

    Documentation/virt/kvm/x86/amd-memory-encryption.rst, KVM_SEV_DBG_DECRYPT.
    """
    guest_vm, _ = running(bare, kind)
    buffer = Buffer(host)
    arg = kvm_sev_dbg(src_uaddr=guest_vm.hva + guest, dst_uaddr=buffer.address, len=size)
    assert guest_vm.raw("DBG_DECRYPT", arg) == (0, 0)
    assert buffer.inside(size) == TEXT[guest : guest + size]
    assert buffer.outside(size) == {0xEE}


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize(("guest", "host", "size"), ranges(into_guest=True))
def test_encrypt(bare: BareMaker, kind: str, guest: int, host: int, size: int) -> None:
    """DBG_ENCRYPT changes the guest's bytes that it names, and no other byte of their blocks and pages.

    Documentation/virt/kvm/x86/amd-memory-encryption.rst, KVM_SEV_DBG_ENCRYPT.
    """
    guest_vm, state = running(bare, kind)
    buffer = Buffer(host)
    buffer.bytes[buffer.start : buffer.start + size] = NEW[:size]
    arg = kvm_sev_dbg(src_uaddr=buffer.address, dst_uaddr=guest_vm.hva + guest, len=size)
    assert guest_vm.raw("DBG_ENCRYPT", arg) == (0, 0)
    assert state.dbg_decrypt(MEMORY, len(TEXT)) == TEXT[:guest] + NEW[:size] + TEXT[guest + size :]
    assert buffer.inside(size) == NEW[:size]


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize(
    ("at", "size"), [pytest.param(at, size, id=name) for name, (at, _, size) in RANGES.items()]
)
def test_a_debugger(bare: BareMaker, kind: str, at: int, size: int) -> None:
    """kvmpy's debugger reads and writes any range, in commands that no page of the host suffers from.

    What it hands to KVM is of one page, in whole blocks, at the same place in both pages: sev_dbg_crypt() in
    Linux before 78ee2d50185a, too.
    """
    _, state = running(bare, kind)
    assert state.dbg_decrypt(MEMORY + at, size) == TEXT[at : at + size]
    state.dbg_encrypt(MEMORY + at, NEW[:size])
    assert state.dbg_decrypt(MEMORY, len(TEXT)) == TEXT[:at] + NEW[:size] + TEXT[at + size :]


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("odd", [0, 3])
def test_a_target_that_cannot_be_written(bare: BareMaker, kind: str, odd: int) -> None:
    """DBG_DECRYPT into a page that can only be read gives ENOMEM: it cannot be pinned for writing.

    DBG_ENCRYPT out of one is fine.  sev_dbg_crypt() in Linux.
    """
    guest, state = running(bare, kind)
    with read_only(NEW[:PAGE_SIZE]) as uaddr:
        arg = kvm_sev_dbg(src_uaddr=guest.hva, dst_uaddr=uaddr + odd, len=16)
        assert guest.raw("DBG_DECRYPT", arg) == (errno.ENOMEM, 0)
        arg = kvm_sev_dbg(src_uaddr=uaddr + odd, dst_uaddr=guest.hva, len=16)
        assert guest.raw("DBG_ENCRYPT", arg) == (0, 0)
    assert state.dbg_decrypt(MEMORY, 32) == NEW[odd : odd + 16] + TEXT[16:32]


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("command", ["DBG_DECRYPT", "DBG_ENCRYPT"])
@pytest.mark.parametrize("end", ["src_uaddr", "dst_uaddr"])
def test_an_address_of_nothing(bare: BareMaker, kind: str, command: str, end: str) -> None:
    """Source or target that is not mapped gives ENOMEM.

    sev_dbg_crypt() in Linux.
    """
    guest, state = running(bare, kind)
    arg = kvm_sev_dbg(src_uaddr=guest.hva, dst_uaddr=guest.hva, len=16)
    # The first page of the address space is never mapped.
    setattr(arg, end, 16)
    assert guest.raw(command, arg) == (errno.ENOMEM, 0)
    assert state.dbg_decrypt(MEMORY, len(TEXT)) == TEXT


@pytest.mark.parametrize("kind", IN_PLACE)
def test_dbg_against_the_policy(bare: BareMaker, kind: str) -> None:
    """A policy that forbids debugging makes the firmware refuse it with POLICY_FAILURE."""
    guest_vm = bare(kind)
    policy = SevPolicy(no_debug=True, es=kind == "sev-es")
    guest = start_sev(guest_vm, policy).update_data(MEMORY, PAGE_SIZE).measure().finish()
    for attempt in (lambda: guest.dbg_decrypt(MEMORY, 16), lambda: guest.dbg_encrypt(MEMORY, bytes(16))):
        with pytest.raises(SevError) as caught:
            attempt()
        assert (caught.value.errno, caught.value.firmware) == (errno.EIO, SevRet.SEV_RET_POLICY_FAILURE)


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("command", ["DBG_DECRYPT", "DBG_ENCRYPT"])
def test_dbg_of_nothing(bare: BareMaker, kind: str, command: str) -> None:
    """Debugging no bytes, or from or to the null pointer, or around the end of the address space: EINVAL."""
    guest = bare(kind)
    start_sev(guest)
    here = guest.hva
    for source, target, size in (
        (here, here, 0),
        (0, here, 16),
        (here, 0, 16),
        ((1 << 64) - 8, here, 16),
        (here, (1 << 64) - 8, 16),
    ):
        arg = kvm_sev_dbg(src_uaddr=source, dst_uaddr=target, len=size)
        assert guest.raw(command, arg) == EINVAL
