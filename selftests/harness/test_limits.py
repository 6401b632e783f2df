# SPDX-License-Identifier: Apache-2.0
"""Limits of the host that a VM meets while it is made."""

from __future__ import annotations

import errno

import pytest

from kvmpy import KvmFd, MakeVm, refused

GUEST = """
#include <kvmpy/guest.h>

void guest_main(void)
{
}
"""


@pytest.mark.protections("none")
def test_vcpu_that_cannot_be_mapped(make_vm: MakeVm, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the host has no file descriptor left for a vCPU's mapping, that very error is raised: EMFILE."""

    def refuse(fd: KvmFd, *arguments: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(KvmFd, "mmap", refuse)
    with refused(errno.EMFILE, by=OSError, match="Too many open files"):
        make_vm(GUEST)
