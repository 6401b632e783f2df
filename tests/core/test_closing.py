# SPDX-License-Identifier: Apache-2.0
"""What is dropped without close() says so, and leaves no descriptor."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import pytest

from kvmpy.coco.kvm import Kvm
from kvmpy.core.backing import MemFd
from kvmpy.core.eventfd import EventFd
from kvmpy.core.uffd import Userfaultfd, explain_open_failure
from kvmpy.guest.program import GuestProgram
from kvmpy.guest.vm import GuestVm

GUEST = "#include <kvmpy/guest.h>\nvoid guest_main(void) { }\n"


def descriptors() -> list[str]:
    gc.collect()
    return sorted(os.listdir("/proc/self/fd"))


def forget(holder: list[GuestVm]) -> None:
    holder.clear()
    gc.collect()


def uffd() -> Userfaultfd:
    try:
        return Userfaultfd()
    except type(explain_open_failure(1)) as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("make", [EventFd, uffd, lambda: MemFd().map(4096)], ids=["eventfd", "uffd", "memfd"])
def test_a_dropped_descriptor(make: Callable[[], Any]) -> None:
    before = descriptors()
    thing = make()
    assert len(descriptors()) > len(before)
    with pytest.warns(ResourceWarning, match="was not closed"):
        del thing
    assert descriptors() == before


def test_a_closed_descriptor_says_nothing() -> None:
    eventfd = EventFd()
    eventfd.close()
    del eventfd


def test_a_dropped_vm(kvm: Kvm) -> None:
    """One warning, of the VM: its vCPUs, memory and descriptors are closed with it."""
    before = descriptors()
    vm = kvm.create_vm(GuestProgram.from_c(GUEST), vcpus=2, protection="none", backing=MemFd())
    vm.launch()
    vm.vcpus[1].run_to_done()
    assert len(descriptors()) > len(before) + 2
    holder = [vm]
    del vm
    with pytest.warns(ResourceWarning) as caught:
        forget(holder)
    assert [str(each.message).split()[0] for each in caught] == ["<GuestVm"]
    assert descriptors() == before
