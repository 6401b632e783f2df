# SPDX-License-Identifier: Apache-2.0
"""What emulated platforms are called, wherever their results are shown. Pure."""

from __future__ import annotations

SOFTWARE_SP = "software AMD-SP"
LARGE_GMEM = "kvm.large_gmem"
"""The parameter that switches large folios of guest_memfd on, in a kernel with the software AMD-SP."""
LARGE_GMEM_PLATFORM = "large guest_memfd folios by kvmpy's hook"


def bugs_platform(on: str) -> str:
    """Return what a kernel with the bug catalogue is called, with the bugs *on*, such as ``3,17``."""
    return "kernel with the bug catalogue" + (f", bug {on} on" if on.strip("0") else "")
