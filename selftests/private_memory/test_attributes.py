# SPDX-License-Identifier: Apache-2.0
"""KVM_SET_MEMORY_ATTRIBUTES: what it accepts, and what it refuses without doing anything."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kvmpy import KVM_CAP_MEMORY_ATTRIBUTES, PAGE_SIZE, Kvm, Vm, VmType, ioctls, refused
from selftests.private_memory.conftest import PRIVATE, Region

pytestmark = pytest.mark.requires("vm-type:KVM_X86_SW_PROTECTED_VM")

ADDRESS = 1 << 30
VALUE = 0x600D_0000

# Sets attributes of a VM that another process made.
STRANGER = """
import fcntl, struct, sys
try:
    fcntl.ioctl(int(sys.argv[1]), int(sys.argv[2]), struct.pack("<4Q", 0, 4096, 8, 0))
except OSError as error:
    print(error.errno)
"""


@pytest.fixture
def protected(kvm: Kvm) -> Iterator[Vm]:
    """A bare software-protected VM."""
    with kvm.create_vm(VmType.KVM_X86_SW_PROTECTED_VM) as vm:
        yield vm


def test_which_attributes_there_are(protected: Vm) -> None:
    """A software-protected VM has KVM_MEMORY_ATTRIBUTE_PRIVATE, and no attribute that KVM as a whole lacks.

    Documentation/virt/kvm/api.rst 4.141: "precisely returns the attributes supported by that VM".
    """
    here = protected.check_extension(KVM_CAP_MEMORY_ATTRIBUTES)
    assert here & PRIVATE
    assert here & ~protected.kvm.check_extension(KVM_CAP_MEMORY_ATTRIBUTES) == 0


def test_a_default_vm_beside_it_has_none(protected: Vm) -> None:
    """A VM of the default type refuses PRIVATE on a KVM that has it for others: EINVAL.

    Documentation/virt/kvm/api.rst 4.141.
    """
    with protected.kvm.create_vm() as plain:
        assert plain.check_extension(KVM_CAP_MEMORY_ATTRIBUTES) == 0
        with refused(errno.EINVAL):
            plain.set_memory_attributes(ADDRESS, PAGE_SIZE, PRIVATE)
        plain.set_memory_attributes(ADDRESS, PAGE_SIZE, 0)


def test_unsupported_attributes_are_refused(protected: Vm) -> None:
    """Every attribute that KVM_CAP_MEMORY_ATTRIBUTES does not name is EINVAL, alone and beside PRIVATE.

    Documentation/virt/kvm/api.rst 4.141.
    """
    here = protected.check_extension(KVM_CAP_MEMORY_ATTRIBUTES)
    for bit in range(64):
        if not here >> bit & 1:
            with refused(errno.EINVAL, about=f"bit {bit}"):
                protected.set_memory_attributes(ADDRESS, PAGE_SIZE, 1 << bit)
            with refused(errno.EINVAL, about=f"bit {bit}"):
                protected.set_memory_attributes(ADDRESS, PAGE_SIZE, 1 << bit | PRIVATE)


def test_flags_must_be_zero(protected: Vm) -> None:
    """ "The flags field is reserved for future extensions and must be '0'": each bit is EINVAL.

    Documentation/virt/kvm/api.rst 4.141.
    """
    for bit in range(64):
        with refused(errno.EINVAL, about=f"bit {bit}"):
            protected.set_memory_attributes(ADDRESS, PAGE_SIZE, PRIVATE, flags=1 << bit)


@pytest.mark.parametrize(
    ("address", "size"),
    [
        (ADDRESS + 1, PAGE_SIZE),
        (ADDRESS + PAGE_SIZE - 1, PAGE_SIZE),
        (ADDRESS + 0x800, PAGE_SIZE),
        (ADDRESS, 1),
        (ADDRESS, PAGE_SIZE - 1),
        (ADDRESS, PAGE_SIZE + 1),
        (ADDRESS + 0x800, 0x800),
    ],
    ids=["address+1", "address-1", "half-page", "byte", "size-1", "size+1", "end-aligned"],
)
def test_parts_of_pages_are_refused(protected: Vm, address: int, size: int) -> None:
    """ "The address and size must be page aligned": EINVAL.

    Documentation/virt/kvm/api.rst 4.141.
    """
    with refused(errno.EINVAL):
        protected.set_memory_attributes(address, size, PRIVATE)


@pytest.mark.parametrize("address", [0, ADDRESS])
def test_nothing_is_no_range(protected: Vm, address: int) -> None:
    """A size of zero is EINVAL.

    kvm_vm_ioctl_set_mem_attributes(), virt/kvm/kvm_main.c.
    """
    with refused(errno.EINVAL):
        protected.set_memory_attributes(address, 0, PRIVATE)


@pytest.mark.parametrize(
    ("address", "size"),
    [
        ((1 << 64) - PAGE_SIZE, PAGE_SIZE),
        ((1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE),
        (PAGE_SIZE, (1 << 64) - PAGE_SIZE),
        (1 << 63, 1 << 63),
        (ADDRESS, (1 << 64) - ADDRESS),
    ],
    ids=["last-page", "across-the-end", "all-but-one", "upper-half", "up-to-the-end"],
)
def test_ranges_that_overflow_are_refused(protected: Vm, address: int, size: int) -> None:
    """A range whose end does not fit into 64 bits is EINVAL, the very last page included.

    kvm_vm_ioctl_set_mem_attributes(), virt/kvm/kvm_main.c.
    """
    with refused(errno.EINVAL):
        protected.set_memory_attributes(address, size, PRIVATE)


def test_no_slot_is_needed(protected: Vm) -> None:
    """Attributes can be set and taken back where no slot is, as often as one likes.

    Documentation/virt/kvm/api.rst 4.141: "a range of guest physical memory".
    """
    for attributes in (PRIVATE, PRIVATE, 0, 0, PRIVATE):
        protected.set_memory_attributes(ADDRESS, 64 * PAGE_SIZE, attributes)


def test_page_zero(protected: Vm) -> None:
    """The range may begin at address 0.

    Documentation/virt/kvm/api.rst 4.141.
    """
    protected.set_memory_attributes(0, PAGE_SIZE, PRIVATE)
    protected.set_memory_attributes(0, 2 * PAGE_SIZE, 0)


def test_the_argument_is_read_only(protected: Vm) -> None:
    """The struct comes back as it was: the ioctl has no output.

    Documentation/virt/kvm/api.rst 4.141: "struct kvm_memory_attributes (in)".
    """
    packed = bytearray(struct.pack("<4Q", ADDRESS, PAGE_SIZE, PRIVATE, 0))
    assert fcntl.ioctl(protected.fd, ioctls.KVM_SET_MEMORY_ATTRIBUTES.nr, packed) == 0
    assert struct.unpack("<4Q", packed) == (ADDRESS, PAGE_SIZE, PRIVATE, 0)


def test_an_argument_out_of_reach(protected: Vm) -> None:
    """A pointer to nothing is EFAULT.

    Documentation/virt/kvm/api.rst 4.141.
    """
    assert protected.ioctl_raw(ioctls.KVM_SET_MEMORY_ATTRIBUTES, 8) == (-1, errno.EFAULT)


def test_another_process_may_not(protected: Vm) -> None:
    """VM ioctls "must be issued from the same process (address space) that was used to create the VM": EIO.

    Documentation/virt/kvm/api.rst 2, File descriptors.
    """
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            STRANGER,
            str(protected.fd),
            str(ioctls.KVM_SET_MEMORY_ATTRIBUTES.nr),
        ],
        pass_fds=[protected.fd],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == f"{errno.EIO}\n"


def test_only_the_vm_has_it(protected: Vm) -> None:
    """It is a VM ioctl: to a vCPU and to the system file descriptor it is EINVAL.

    Documentation/virt/kvm/api.rst 4.141: "Type: vm ioctl".
    """
    vcpu = protected.create_vcpu()
    for fd in (vcpu.fd, protected.kvm.fd):
        with refused(errno.EINVAL, by=OSError):
            fcntl.ioctl(
                fd, ioctls.KVM_SET_MEMORY_ATTRIBUTES.nr, struct.pack("<4Q", ADDRESS, PAGE_SIZE, PRIVATE, 0)
            )


@pytest.mark.protections("sw-protected")
def test_a_refused_call_changes_nothing(region: Region) -> None:
    """A call that fails leaves attributes and content as they were, also in the aligned part of its range.

    Documentation/virt/kvm/api.rst 4.141.
    """
    region.fill(0, 16, VALUE)
    start = int(region.gpa(4))
    for address, size, attributes, flags in (
        (start, 4 * PAGE_SIZE + 1, PRIVATE, 0),
        (start + 1, 4 * PAGE_SIZE, PRIVATE, 0),
        (start, (1 << 64) - start, PRIVATE, 0),
        (start, 4 * PAGE_SIZE, PRIVATE | 1, 0),
        (start, 4 * PAGE_SIZE, PRIVATE, 1),
    ):
        with refused(errno.EINVAL):
            region.vm.set_memory_attributes(address, size, attributes, flags)
    region.check(0, 16, VALUE)


@pytest.mark.protections("sw-protected")
def test_after_vcpus_ran(region: Region) -> None:
    """Attributes can be changed at any time: pages that vCPUs use already change at once.

    Documentation/virt/kvm/api.rst 4.140: "by toggling KVM_MEMORY_ATTRIBUTE_PRIVATE [...] as needed".
    """
    for turn in range(8):
        region.convert(5, 1, private=turn % 2 == 1)
        assert region.read(5) == (0 if turn < 2 else VALUE + turn - 2)
        region.write(5, VALUE + turn)


@pytest.mark.protections("sw-protected")
def test_a_page_that_was_never_touched_keeps_no_memory(region: Region) -> None:
    """Setting attributes allocates nothing: neither host memory nor pages of the file appear.

    Documentation/virt/kvm/api.rst 4.141: attributes mark a range, the guest's accesses allocate.
    """
    region.launch()
    gmem = region.parts[0].gmem
    assert gmem is not None
    before = region.stats()["pages_4k"]
    region.convert(0, 16, private=True)
    assert region.stats()["pages_4k"] <= before
    assert os.fstat(gmem.fd).st_size == 16 * PAGE_SIZE
