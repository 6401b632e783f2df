# SPDX-License-Identifier: Apache-2.0
"""A page of guest_memfd with a memory error: what guest and host are told."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from kvmpy import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_MEM_GUEST_MEMFD,
    PAGE_SIZE,
    Gpa,
    GuestMemfd,
    Gva,
    Mapping,
    MemoryFaultExit,
    MissingError,
)
from kvmpy.core.vcpu import EHWPOISON
from selftests.conftest import Accessor
from selftests.guest_memfd.conftest import Touch

# A poisoned page is lost to the host until it is unpoisoned or the machine starts again.
pytestmark = [
    pytest.mark.dangerous,
    pytest.mark.requires("root", "KVM_CAP_MEMORY_FAULT_INFO", "KVM_CAP_USER_MEMORY2"),
    pytest.mark.parametrize("ring", [3], ids=["ring3"], indirect=True),
]

GPA = Gpa(0x8000_0000)
GVA = Gva(0x70_0000_0000)
SLOT, PAGES = 1000, 4
SIZE = PAGES * PAGE_SIZE
VALUE = 0x9015_0000
POISONED = 2

# Poisons one page of a file that it inherited: who does it is not who suffers.
POISON = """
import ctypes, sys
fd, size, offset = (int(word) for word in sys.argv[1:])
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
area = libc.mmap(None, size, 3, 1, fd, 0)
ctypes.c_ubyte.from_address(area + offset).value
print(ctypes.get_errno() if libc.madvise(area + offset, 4096, 100) else 0)
"""

Poison = Callable[[int], None]


@pytest.fixture
def mapped(accessor: Accessor) -> tuple[GuestMemfd, Mapping]:
    """A guest_memfd that the guest has at GVA and the host maps; its pages hold VALUE and their number."""
    from selftests.guest_memfd.conftest import need_gmem

    flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
    vm = need_gmem(accessor.vm, flags)
    gmem = vm.create_guest_memfd(SIZE, flags)
    mapping = vm.own(gmem.map())
    for page in range(PAGES):
        mapping.view(page * PAGE_SIZE, 8)[:] = (VALUE + page).to_bytes(8, "little")
    vm.set_user_memory_region2(SLOT, GPA, SIZE, mapping.hva, KVM_MEM_GUEST_MEMFD, gmem=gmem)
    accessor.map(GVA, GPA, SIZE)
    return gmem, mapping


@pytest.fixture
def poison(mapped: tuple[GuestMemfd, Mapping]) -> Poison:
    """Poison a page (MADV_HWPOISON)."""
    gmem, _ = mapped

    def madvise(page: int) -> None:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", POISON, str(gmem.fd), str(SIZE), str(page * PAGE_SIZE)],
            pass_fds=[gmem.fd],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        # Where it succeeds the process may be killed: it had the page mapped.
        number = int(done.stdout) if done.stdout else 0
        if number == errno.EINVAL:
            raise MissingError("MADV_HWPOISON", "a kernel with CONFIG_MEMORY_FAILURE=y")
        assert number == 0, os.strerror(number)
        assert done.returncode in (0, -signal.SIGBUS), done.stderr

    return madvise


@pytest.mark.protections("none")
@pytest.mark.parametrize("used", [True, False], ids=["mapped-by-the-guest", "not-mapped"])
@pytest.mark.parametrize("value", [None, 1], ids=["read", "write"])
def test_the_guests_access_is_a_memory_fault(
    accessor: Accessor, poison: Poison, used: bool, value: int | None
) -> None:
    """An access of a poisoned page leaves KVM_RUN with EHWPOISON and a memory fault that names the page.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_MEMORY_FAULT: "EFAULT or EHWPOISON"; __kvm_gmem_get_pfn().
    """
    if used:
        assert accessor.read(GVA + POISONED * PAGE_SIZE) == VALUE + POISONED
    else:
        assert accessor.read(GVA) == VALUE
    poison(POISONED)
    accessor.order(GVA + POISONED * PAGE_SIZE + 0x40, 8, value)
    got = accessor.vcpu.expect(MemoryFaultExit)
    assert (got.errno, got.gpa, got.size) == (EHWPOISON, int(GPA) + POISONED * PAGE_SIZE, PAGE_SIZE)


@pytest.mark.protections("none")
def test_other_pages_stay(accessor: Accessor, poison: Poison) -> None:
    """The other pages of the file keep their content, for guest and host.

    kvm_gmem_error_folio(), virt/kvm/guest_memfd.c.
    """
    assert accessor.read(GVA + POISONED * PAGE_SIZE) == VALUE + POISONED
    poison(POISONED)
    for page in (0, 1, 3):
        assert accessor.read(GVA + page * PAGE_SIZE) == VALUE + page
        accessor.write(GVA + page * PAGE_SIZE + 8, page)


@pytest.mark.protections("none")
def test_the_host_gets_a_bus_error(
    accessor: Accessor, mapped: tuple[GuestMemfd, Mapping], poison: Poison, touch: Touch
) -> None:
    """A process that maps the file and touches the poisoned page gets SIGBUS, and none for the others.

    madvise(2), MADV_HWPOISON; kvm_gmem_fault_user_mapping(), virt/kvm/guest_memfd.c.
    """
    gmem, _ = mapped
    poison(POISONED)
    assert touch(gmem, SIZE, POISONED * PAGE_SIZE) == (-signal.SIGBUS, "mapped\n")
    assert touch(gmem, SIZE, 0)[0] == 0


@pytest.mark.protections("none")
def test_a_hole_replaces_the_page(
    accessor: Accessor, mapped: tuple[GuestMemfd, Mapping], poison: Poison
) -> None:
    """Punching the poisoned page gives the guest a new one, of zeroes: the access goes on.

    Documentation/virt/kvm/api.rst 4.142: PUNCH_HOLE; the kernel gives a poisoned page to nobody again.
    """
    gmem, _ = mapped
    assert accessor.read(GVA + POISONED * PAGE_SIZE) == VALUE + POISONED
    poison(POISONED)
    accessor.order(GVA + POISONED * PAGE_SIZE, 8)
    assert accessor.vcpu.expect(MemoryFaultExit).errno == EHWPOISON
    gmem.punch_hole(POISONED * PAGE_SIZE, PAGE_SIZE)
    assert accessor.result() == 0
