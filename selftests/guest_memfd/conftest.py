# SPDX-License-Identifier: Apache-2.0
"""What the guest_memfd tests share: VMs that have it, its flags, and a process apart to touch its mapping."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Protocol

import pytest

from kvmpy import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_CAP_GUEST_MEMFD,
    KVM_CAP_GUEST_MEMFD_FLAGS,
    GuestMemfd,
    Kvm,
    MissingError,
    Vm,
    VmType,
)

# Maps a file descriptor that it inherited and accesses one byte; a signal ends it where there is none.
CHILD = """
import ctypes, resource, sys
fd, size, offset, value = (int(word) for word in sys.argv[1:])
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
area = libc.mmap(None, size, 3, 1, fd, 0)
if area == 2**64 - 1:
    sys.exit(f"mmap: errno {ctypes.get_errno()}")
print("mapped", flush=True)
byte = ctypes.c_ubyte.from_address(area + offset)
if value >= 0:
    byte.value = value
print(byte.value)
"""


class Touch(Protocol):
    """Maps a guest_memfd in another process and accesses one byte."""

    def __call__(self, gmem: GuestMemfd, size: int, offset: int, value: int = -1) -> tuple[int, str]: ...


def need_gmem(vm: Vm, flags: int = 0) -> Vm:
    """Return *vm*; MissingError unless it offers guest_memfd with *flags*."""
    vm.need_cap(KVM_CAP_GUEST_MEMFD, "CONFIG_KVM_GUEST_MEMFD, and Linux 6.18 for VMs of the default type")
    if flags & ~vm.check_extension(KVM_CAP_GUEST_MEMFD_FLAGS):
        raise MissingError(f"guest_memfd flags {flags:#x}", "Linux 6.18 or newer (KVM_CAP_GUEST_MEMFD_FLAGS)")
    return vm


@pytest.fixture
def default_vm(vm: Vm) -> Vm:
    """A bare VM of the default type that offers guest_memfd."""
    return need_gmem(vm)


@pytest.fixture(params=["default", "sw-protected"])
def gmem_vm(request: pytest.FixtureRequest, kvm: Kvm) -> Iterator[Vm]:
    """A bare VM that offers guest_memfd, of each type that needs no hardware."""
    vm_type = VmType.KVM_X86_DEFAULT_VM
    if request.param == "sw-protected":
        vm_type = VmType.KVM_X86_SW_PROTECTED_VM
        if vm_type not in kvm.vm_types():
            how = "CONFIG_KVM_SW_PROTECTED_VM and kvm.tdp_mmu=Y, as in `kvmpy lab run`"
            raise MissingError(f"VM type {vm_type.name}", how)
    with kvm.create_vm(vm_type) as bare:
        yield need_gmem(bare)


@pytest.fixture
def mmap_vm(vm: Vm) -> Vm:
    """A bare VM of the default type whose guest_memfds can be mapped by the host."""
    return need_gmem(vm, GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)


@pytest.fixture
def touch() -> Touch:
    """Access a byte (write *value* unless it is negative) in a new process: its exit status and output."""

    def in_a_child(gmem: GuestMemfd, size: int, offset: int, value: int = -1) -> tuple[int, str]:
        numbers = [str(number) for number in (gmem.fd, size, offset, value)]
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", CHILD, *numbers],
            pass_fds=[gmem.fd],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return in_a_child
