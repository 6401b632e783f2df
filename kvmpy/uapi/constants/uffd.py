# SPDX-License-Identifier: Apache-2.0
"""userfaultfd."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class UffdApi(IntEnum):
    """API number, ioctl types, and what the API offers."""

    USERFAULTFD_IOC = 0xAA
    UFFD_API = 0xAA
    UFFD_API_REGISTER_MODES = 7
    UFFD_API_FEATURES = 0x1FFFF
    UFFD_API_IOCTLS = 0x8000000000000003
    UFFD_API_RANGE_IOCTLS = 0x1FC
    UFFD_API_RANGE_IOCTLS_BASIC = 0x1CC
    UFFDIO = 0xAA


class UffdOpenFlag(IntFlag):
    """Flags of the userfaultfd system call."""

    UFFD_USER_MODE_ONLY = 1


class UffdFeature(IntFlag):
    """``features`` of struct uffdio_api."""

    UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1
    UFFD_FEATURE_EVENT_FORK = 2
    UFFD_FEATURE_EVENT_REMAP = 4
    UFFD_FEATURE_EVENT_REMOVE = 8
    UFFD_FEATURE_MISSING_HUGETLBFS = 1 << 4
    UFFD_FEATURE_MISSING_SHMEM = 1 << 5
    UFFD_FEATURE_EVENT_UNMAP = 1 << 6
    UFFD_FEATURE_SIGBUS = 1 << 7
    UFFD_FEATURE_THREAD_ID = 1 << 8
    UFFD_FEATURE_MINOR_HUGETLBFS = 1 << 9
    UFFD_FEATURE_MINOR_SHMEM = 1 << 10
    UFFD_FEATURE_EXACT_ADDRESS = 1 << 11
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
    UFFD_FEATURE_WP_UNPOPULATED = 1 << 13
    UFFD_FEATURE_POISON = 1 << 14
    UFFD_FEATURE_WP_ASYNC = 1 << 15
    UFFD_FEATURE_MOVE = 1 << 16


class UffdEvent(IntEnum):
    """``event`` of struct uffd_msg."""

    UFFD_EVENT_PAGEFAULT = 0x12
    UFFD_EVENT_FORK = 0x13
    UFFD_EVENT_REMAP = 0x14
    UFFD_EVENT_REMOVE = 0x15
    UFFD_EVENT_UNMAP = 0x16


class UffdPagefaultFlag(IntFlag):
    """``arg.pagefault.flags`` of struct uffd_msg."""

    UFFD_PAGEFAULT_FLAG_WRITE = 1
    UFFD_PAGEFAULT_FLAG_WP = 2
    UFFD_PAGEFAULT_FLAG_MINOR = 4


class UffdRegisterMode(IntFlag):
    """``mode`` of struct uffdio_register."""

    UFFDIO_REGISTER_MODE_MISSING = 1
    UFFDIO_REGISTER_MODE_WP = 2
    UFFDIO_REGISTER_MODE_MINOR = 4


class UffdCopyMode(IntFlag):
    """``mode`` of struct uffdio_copy."""

    UFFDIO_COPY_MODE_DONTWAKE = 1
    UFFDIO_COPY_MODE_WP = 2


class UffdZeropageMode(IntFlag):
    """``mode`` of struct uffdio_zeropage."""

    UFFDIO_ZEROPAGE_MODE_DONTWAKE = 1


class UffdWriteprotectMode(IntFlag):
    """``mode`` of struct uffdio_writeprotect."""

    UFFDIO_WRITEPROTECT_MODE_WP = 1
    UFFDIO_WRITEPROTECT_MODE_DONTWAKE = 2


class UffdContinueMode(IntFlag):
    """``mode`` of struct uffdio_continue."""

    UFFDIO_CONTINUE_MODE_DONTWAKE = 1
    UFFDIO_CONTINUE_MODE_WP = 2


class UffdPoisonMode(IntFlag):
    """``mode`` of struct uffdio_poison."""

    UFFDIO_POISON_MODE_DONTWAKE = 1


class UffdMoveMode(IntFlag):
    """``mode`` of struct uffdio_move."""

    UFFDIO_MOVE_MODE_DONTWAKE = 1
    UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES = 2


class UffdioNr(IntEnum):
    """Command numbers of the userfaultfd ioctls."""

    _UFFDIO_REGISTER = 0
    _UFFDIO_UNREGISTER = 1
    _UFFDIO_WAKE = 2
    _UFFDIO_COPY = 3
    _UFFDIO_ZEROPAGE = 4
    _UFFDIO_MOVE = 5
    _UFFDIO_WRITEPROTECT = 6
    _UFFDIO_CONTINUE = 7
    _UFFDIO_POISON = 8
    _UFFDIO_API = 63
