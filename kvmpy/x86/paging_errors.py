# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a mapping that was asked for; all are ValueErrors through :class:`PagingError`."""

from __future__ import annotations


class PagingError(ValueError):
    """A mapping that cannot be made, or an address without one."""


class UnalignedError(PagingError):
    """An address or a size is no multiple of the page size."""


class NonCanonicalError(PagingError):
    """A guest-virtual address is not canonical, or a range crosses the hole of non-canonical addresses."""


class PhysicalRangeError(PagingError):
    """A guest-physical address lies above the physical address width."""


class EncryptionBitError(PhysicalRangeError):
    """A Gpa carries the encryption bit."""


class OverlapError(PagingError):
    """Something is mapped there already."""


class NotMappedError(PagingError):
    """Nothing is mapped there."""


class MixedPrivacyError(PagingError):
    """The pages under one huge leaf are neither all private nor all shared."""


class TableAccessError(PagingError):
    """A page table lies where the host has no view of it."""
