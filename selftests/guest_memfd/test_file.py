# SPDX-License-Identifier: Apache-2.0
"""guest_memfd as a file: what file system calls may do to it, and what not."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading

import pytest

from kvmpy import PAGE_SIZE, GuestMemfd, Vm, refused
from kvmpy.core.gmem import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE

PAGES = 4
SIZE = PAGES * PAGE_SIZE
FALLOC_FL_ZERO_RANGE = 0x10
FALLOC_FL_UNSHARE_RANGE = 0x40
PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


@pytest.fixture
def gmem(gmem_vm: Vm) -> GuestMemfd:
    return gmem_vm.create_guest_memfd(SIZE)


def test_signals_do_not_stop_an_allocation(gmem_vm: Vm) -> None:
    """Signals that come all the time, as of a deadline that has passed, only make it take longer.

    fallocate(2), EINTR: "A signal was caught during execution; see signal(7)"; kvmpy goes on.
    """
    seen, over, main = list[int](), threading.Event(), threading.get_ident()
    gmem = gmem_vm.create_guest_memfd(64 << 20)

    def disturb() -> None:
        while not over.wait(0.002):
            signal.pthread_kill(main, signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, lambda number, _frame: seen.append(number))
    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(5):
            gmem.allocate()
            gmem.punch_hole()
    finally:
        over.set()
        thread.join(30)
        signal.signal(signal.SIGUSR2, before)
    assert seen


@pytest.mark.parametrize("size", [0, SIZE - PAGE_SIZE, SIZE, SIZE + PAGE_SIZE])
def test_the_size_is_fixed(gmem: GuestMemfd, size: int) -> None:
    """guest_memfd files "cannot be resized": ftruncate() is EINVAL for every size.

    Documentation/virt/kvm/api.rst 4.142.
    """
    with refused(errno.EINVAL, by=OSError):
        gmem.truncate(size)
    assert os.fstat(gmem.fd).st_size == SIZE


def test_read_is_refused(gmem: GuestMemfd) -> None:
    """guest_memfd files "cannot be [...] read [...] by userspace": read() is EINVAL.

    Documentation/virt/kvm/api.rst 4.142; read(2), EINVAL: "unsuitable for reading".
    """
    with refused(errno.EINVAL, by=OSError):
        os.read(gmem.fd, 64)


def test_write_is_refused(gmem: GuestMemfd) -> None:
    """guest_memfd files "cannot be [...] written by userspace": write() is EINVAL.

    Documentation/virt/kvm/api.rst 4.142; write(2), EINVAL: "unsuitable for writing".
    """
    with refused(errno.EINVAL, by=OSError):
        os.write(gmem.fd, bytes(64))


def test_positioned_reads_and_writes_are_refused(gmem: GuestMemfd) -> None:
    """guest_memfd files cannot be read or written at a position either: they have none, ESPIPE.

    Documentation/virt/kvm/api.rst 4.142; lseek(2), ESPIPE, for what cannot seek.
    """
    with refused(errno.ESPIPE, by=OSError):
        os.pread(gmem.fd, 64, 0)
    with refused(errno.ESPIPE, by=OSError):
        os.pwrite(gmem.fd, bytes(64), 0)


def test_seals_are_refused(gmem: GuestMemfd) -> None:
    """The seals of memfd_create() do not exist here: F_ADD_SEALS and F_GET_SEALS are EINVAL.

    fcntl(2), File Sealing: EINVAL when "the filesystem containing the inode does not support sealing".
    """
    with refused(errno.EINVAL, by=OSError):
        fcntl.fcntl(gmem.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with refused(errno.EINVAL, by=OSError):
        fcntl.fcntl(gmem.fd, fcntl.F_GET_SEALS)


def test_it_cannot_be_opened_again(gmem: GuestMemfd) -> None:
    """A guest_memfd is an anonymous file of one VM: /proc gives no second file of it (ENXIO).

    Documentation/virt/kvm/api.rst 4.142: "creates an anonymous file".
    """
    with refused(errno.ENXIO, by=OSError):
        os.close(os.open(f"/proc/self/fd/{gmem.fd}", os.O_RDWR))


@pytest.mark.parametrize(
    ("offset", "size"), [(0, SIZE), (PAGE_SIZE, PAGE_SIZE), (SIZE - PAGE_SIZE, PAGE_SIZE)]
)
def test_pages_can_be_allocated_and_given_back(gmem: GuestMemfd, offset: int, size: int) -> None:
    """fallocate() allocates whole pages and punches holes, again and again; the size stays.

    Documentation/virt/kvm/api.rst 4.142: "guest_memfd files do however support PUNCH_HOLE".
    """
    for _ in range(2):
        gmem.allocate(offset, size)
        gmem.punch_hole(offset, size)
    assert os.fstat(gmem.fd).st_size == SIZE


@pytest.mark.parametrize("mode", [PUNCH, FALLOC_FL_KEEP_SIZE], ids=["punch", "allocate"])
def test_parts_of_pages_are_refused(gmem: GuestMemfd, mode: int) -> None:
    """fallocate() takes whole pages: any other offset or length is EINVAL.

    kvm_gmem_fallocate(), virt/kvm/guest_memfd.c.
    """
    page = PAGE_SIZE
    for offset, size in (
        (0, 1),
        (0, page - 1),
        (0, page + 1),
        (1, page),
        (page - 1, page),
        (page, 1),
        (1, 1),
    ):
        with refused(errno.EINVAL, by=OSError, about=(offset, size)):
            gmem.fallocate(mode, offset, size)


@pytest.mark.parametrize(
    ("offset", "size"), [(SIZE, PAGE_SIZE), (SIZE - PAGE_SIZE, 2 * PAGE_SIZE), (SIZE + PAGE_SIZE, PAGE_SIZE)]
)
def test_nothing_is_allocated_behind_the_end(gmem: GuestMemfd, offset: int, size: int) -> None:
    """The size is fixed, so allocating behind it is EINVAL.

    Documentation/virt/kvm/api.rst 4.142; kvm_gmem_allocate(), virt/kvm/guest_memfd.c.
    """
    with refused(errno.EINVAL, by=OSError):
        gmem.allocate(offset, size)


@pytest.mark.parametrize(
    "mode",
    [0, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, FALLOC_FL_UNSHARE_RANGE | FALLOC_FL_KEEP_SIZE],
    ids=["without-keep-size", "zero-range", "unshare-range"],
)
def test_other_modes_are_not_supported(gmem: GuestMemfd, mode: int) -> None:
    """fallocate() knows KEEP_SIZE, alone or with PUNCH_HOLE; every other mode is EOPNOTSUPP.

    kvm_gmem_fallocate(), virt/kvm/guest_memfd.c; fallocate(2).
    """
    with refused(errno.EOPNOTSUPP, by=OSError):
        gmem.fallocate(mode, 0, PAGE_SIZE)
