# SPDX-License-Identifier: Apache-2.0
"""What the links in ``/proc/PID/fd`` and the names in ``/proc/PID/maps`` say that a file is.

Sources: virt/kvm/kvm_main.c and virt/kvm/guest_memfd.c, fs/eventfd.c, fs/userfaultfd.c, mm/memfd.c. The
recorder in C searches the same rows.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from kvmpy.uapi.ioctl_type import FdKind

LinkKind = FdKind | Literal["eventfd", "memfd", "hugetlb", "other"]


class Link(NamedTuple):
    """A file: its kind, its name such as ``vcpu3``, and the vCPU's id where the link tells."""

    kind: LinkKind
    name: str
    number: int | None = None

    @property
    def kvm(self) -> bool:
        """Whether it takes ioctls of KVM or of /dev/sev."""
        return self.kind in KVM_KINDS

    @property
    def of_vm(self) -> bool:
        """Whether it belongs to a VM."""
        return self.kind in VM_KINDS


VM_KINDS = frozenset(("vcpu", "device", "gmem", "stats"))
KVM_KINDS = VM_KINDS | {"system", "vm", "sev"}

# The link, the kind, the name; what "*" stands for is appended to the name. The first that fits counts.
LINKS: tuple[tuple[str, LinkKind, str], ...] = (
    ("/dev/kvm", "system", "kvm"),
    ("/dev/sev", "sev", "sev"),
    ("/dev/userfaultfd", "uffd_dev", "/dev/userfaultfd"),
    ("anon_inode:kvm-vm", "vm", "vm"),
    ("anon_inode:kvm-vcpu:*", "vcpu", "vcpu"),
    ("anon_inode:kvm-vm-stats", "stats", "vm-stats"),
    ("anon_inode:kvm-vcpu-stats:*", "stats", "vcpu-stats:"),
    ("anon_inode:kvm-*", "device", ""),
    # Since Linux 6.18 guest_memfd has a file system of its own.
    ("anon_inode:[kvm-gmem]", "gmem", "gmem"),
    ("/[kvm-gmem]", "gmem", "gmem"),
    ("anon_inode:[eventfd]", "eventfd", "eventfd"),
    ("anon_inode:[userfaultfd]", "uffd", "uffd"),
    ("/memfd:*", "memfd", "memfd:"),
    ("/anon_hugepage", "hugetlb", "/anon_hugepage"),
    ("/dev/hugepages*", "hugetlb", "/dev/hugepages"),
)
_ROWS = tuple((text.rstrip("*"), text.endswith("*"), kind, name) for text, kind, name in LINKS)

_MAPPED = ("anon_inode:", *(row[0] for row in _ROWS if row[0][0] == "/"))


def is_mapped(maps: str) -> bool:
    """Tell whether lines of /proc/PID/maps name such a file, or any other anonymous inode."""
    # One expression with all of them takes three times as long.
    return any(name in maps for name in _MAPPED)


def link_of(target: str) -> Link:
    """Return what a link leads to, ``other`` with the link as its name for a file that is none of these."""
    # Files that never had a name in a folder, and those that lost it.
    path = target.removesuffix(" (deleted)")
    for text, is_open, kind, name in _ROWS:
        if path == text or (is_open and path.startswith(text)):
            rest = path[len(text) :]
            number = rest if kind in ("vcpu", "stats") else ""
            return Link(kind, name + rest, int(number) if number.isdecimal() else None)
    return Link("other", target)
