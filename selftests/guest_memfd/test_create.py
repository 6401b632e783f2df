# SPDX-License-Identifier: Apache-2.0
"""KVM_CREATE_GUEST_MEMFD: sizes, flags, and what kind of file it makes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from kvmpy import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_CAP_GUEST_MEMFD_FLAGS,
    KVM_CAP_MEMORY_ATTRIBUTES,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    PAGE_SIZE,
    MissingError,
    Vm,
    ioctls,
    refused,
)

# Tries to create a guest_memfd for a VM that another process made.
STRANGER = """
import fcntl, struct, sys
try:
    fcntl.ioctl(int(sys.argv[1]), int(sys.argv[2]), struct.pack("<8Q", 4096, *[0] * 7))
except OSError as error:
    print(error.errno)
"""


@pytest.mark.parametrize(
    "size",
    [0, 1, PAGE_SIZE - 1, PAGE_SIZE + 1, 1 << 63, (1 << 64) - PAGE_SIZE],
    ids=["zero", "byte", "less-than-page", "more-than-page", "sign-bit", "negative"],
)
def test_sizes_that_no_file_can_have_are_refused(gmem_vm: Vm, size: int) -> None:
    """The size of a guest_memfd is a positive number of whole pages: EINVAL otherwise.

    Documentation/virt/kvm/api.rst 4.142; kvm_gmem_create(), virt/kvm/guest_memfd.c.
    """
    with refused(errno.EINVAL):
        gmem_vm.create_guest_memfd(size)


def test_unknown_flags_are_refused(gmem_vm: Vm) -> None:
    """KVM_CAP_GUEST_MEMFD_FLAGS "enumerates the flags that can be specified": any other is EINVAL.

    Documentation/virt/kvm/api.rst 4.142.
    """
    offered = gmem_vm.check_extension(KVM_CAP_GUEST_MEMFD_FLAGS)
    for bit in range(64):
        if not offered >> bit & 1:
            with refused(errno.EINVAL, about=f"flag bit {bit}"):
                gmem_vm.create_guest_memfd(PAGE_SIZE, 1 << bit)


def test_every_flag_on_offer_is_accepted(gmem_vm: Vm) -> None:
    """Every flag of KVM_CAP_GUEST_MEMFD_FLAGS can be given, alone and all at once.

    Documentation/virt/kvm/api.rst 4.142.
    """
    offered = gmem_vm.check_extension(KVM_CAP_GUEST_MEMFD_FLAGS)
    known = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
    for flags in (0, *(1 << bit for bit in range(32) if offered & known & 1 << bit), offered & known):
        assert os.fstat(gmem_vm.create_guest_memfd(PAGE_SIZE, flags).fd).st_size == PAGE_SIZE


def test_flags_of_each_vm_type(gmem_vm: Vm) -> None:
    """A VM without private memory offers INIT_SHARED, one with private memory does not; INIT_SHARED comes
    with MMAP only.

    Documentation/virt/kvm/api.rst 4.142; kvm_arch_supports_gmem_init_shared(), arch/x86/kvm/x86.c.
    """
    offered = gmem_vm.check_extension(KVM_CAP_GUEST_MEMFD_FLAGS)
    if not offered:
        raise MissingError("KVM_CAP_GUEST_MEMFD_FLAGS", "Linux 6.18 or newer")
    private = gmem_vm.check_extension(KVM_CAP_MEMORY_ATTRIBUTES) & KVM_MEMORY_ATTRIBUTE_PRIVATE
    assert offered & GUEST_MEMFD_FLAG_MMAP
    assert bool(offered & GUEST_MEMFD_FLAG_INIT_SHARED) == (not private)


@pytest.mark.parametrize("flags", range(4), ids=["none", "mmap", "init-shared", "mmap-init-shared"])
def test_every_combination_of_flags(gmem_vm: Vm, flags: int) -> None:
    """Any combination of the flags on offer makes a file, any other is EINVAL, for every VM type.

    Documentation/virt/kvm/api.rst 4.142.
    """
    assert GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED == 3
    if flags & ~gmem_vm.check_extension(KVM_CAP_GUEST_MEMFD_FLAGS):
        with refused(errno.EINVAL):
            gmem_vm.create_guest_memfd(PAGE_SIZE, flags)
    else:
        assert os.fstat(gmem_vm.create_guest_memfd(PAGE_SIZE, flags).fd).st_size == PAGE_SIZE


def test_the_file_has_the_size_asked_for(gmem_vm: Vm) -> None:
    """A guest_memfd is a file of the given size, in blocks of a page.

    Documentation/virt/kvm/api.rst 4.142: "roughly analogous to files created via memfd_create()".
    """
    for size in (PAGE_SIZE, 7 * PAGE_SIZE, 1 << 40):
        status = os.fstat(gmem_vm.create_guest_memfd(size).fd)
        assert (status.st_size, status.st_blksize) == (size, PAGE_SIZE)


def test_files_are_independent_of_each_other(gmem_vm: Vm) -> None:
    """Each call makes a new file of its own size: inodes differ.

    Documentation/virt/kvm/api.rst 4.142: "creates an anonymous file".
    """
    first = gmem_vm.create_guest_memfd(PAGE_SIZE)
    second = gmem_vm.create_guest_memfd(2 * PAGE_SIZE)
    one, two = os.fstat(first.fd), os.fstat(second.fd)
    assert (one.st_size, two.st_size) == (PAGE_SIZE, 2 * PAGE_SIZE)
    assert one.st_ino != two.st_ino


def test_another_process_cannot_create_one(gmem_vm: Vm) -> None:
    """VM ioctls "must be issued from the same process (address space) that was used to create the VM": EIO.

    Documentation/virt/kvm/api.rst 2, File descriptors.
    """
    request = str(ioctls.KVM_CREATE_GUEST_MEMFD.nr)
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", STRANGER, str(gmem_vm.fd), request],
        pass_fds=[gmem_vm.fd],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == f"{errno.EIO}\n"


def test_a_default_vm_has_no_private_memory(default_vm: Vm) -> None:
    """KVM_CAP_MEMORY_ATTRIBUTES "precisely returns the attributes supported by that VM": none by default.

    Documentation/virt/kvm/api.rst 4.141; setting PRIVATE is EINVAL, or ENOTTY where no VM has attributes.
    """
    assert default_vm.check_extension(KVM_CAP_MEMORY_ATTRIBUTES) == 0
    anywhere = default_vm.kvm.check_extension(KVM_CAP_MEMORY_ATTRIBUTES)
    with refused(errno.EINVAL if anywhere else errno.ENOTTY):
        default_vm.set_memory_attributes(0, PAGE_SIZE, KVM_MEMORY_ATTRIBUTE_PRIVATE)
