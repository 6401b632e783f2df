# SPDX-License-Identifier: Apache-2.0
"""What the links of file descriptors mean."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmpy.core.kvm import Kvm
from kvmpy.uapi.constants import KVM_CAP_GUEST_MEMFD
from kvmpy.uapi.links import Link, LinkKind, is_mapped, link_of


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/dev/kvm", Link("system", "kvm")),
        ("/dev/sev", Link("sev", "sev")),
        ("anon_inode:kvm-vm", Link("vm", "vm")),
        ("anon_inode:kvm-vcpu:12", Link("vcpu", "vcpu12", 12)),
        ("anon_inode:kvm-vcpu:12 (deleted)", Link("vcpu", "vcpu12", 12)),
        ("anon_inode:kvm-vm-stats", Link("stats", "vm-stats")),
        ("anon_inode:kvm-vcpu-stats:3", Link("stats", "vcpu-stats:3", 3)),
        ("anon_inode:kvm-vfio", Link("device", "vfio")),
        ("anon_inode:[kvm-gmem]", Link("gmem", "gmem")),
        ("/[kvm-gmem] (deleted)", Link("gmem", "gmem")),
        ("anon_inode:[eventfd]", Link("eventfd", "eventfd")),
        ("anon_inode:[userfaultfd]", Link("uffd", "uffd")),
        ("/dev/userfaultfd", Link("uffd_dev", "/dev/userfaultfd")),
        ("/memfd:backing (deleted)", Link("memfd", "memfd:backing")),
        ("/tmp/kvm-vm", Link("other", "/tmp/kvm-vm")),
        ("anon_inode:[timerfd]", Link("other", "anon_inode:[timerfd]")),
        ("/dev/kvm-clone", Link("other", "/dev/kvm-clone")),
    ],
)
def test_links(target: str, expected: Link) -> None:
    assert link_of(target) == expected


@pytest.mark.parametrize(
    ("name", "seen"),
    [("/[kvm-gmem] (deleted)", True), ("anon_inode:[kvm-gmem]", True), ("anon_inode:kvm-vcpu:0", True),
     ("/memfd:x (deleted)", True), ("/usr/lib/libc.so.6", False), ("[heap]", False)],
)  # fmt: skip
def test_names_of_mappings(name: str, seen: bool) -> None:
    line = f"7fd996f7f000-7fd996f80000 rw-s 00000000 00:10 1060140                    {name}"
    assert is_mapped(line) == seen


@pytest.mark.requires("kvm")
def test_what_this_kvm_makes(kvm: Kvm) -> None:
    """The links of this kernel are told apart, too."""
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(7)
        expected: dict[int, LinkKind] = {kvm.fd: "system", vm.fd: "vm", vcpu.fd: "vcpu"}
        if vm.check_extension(KVM_CAP_GUEST_MEMFD):
            expected[vm.create_guest_memfd(4096).fd] = "gmem"
        links = {fd: link_of(os.readlink(Path("/proc/self/fd") / str(fd))) for fd in expected}
        assert {fd: link.kind for fd, link in links.items()} == expected
        assert links[vcpu.fd].number == 7
