# SPDX-License-Identifier: Apache-2.0
"""What the tests of memory slots share: host memory, and both ioctls behind one signature."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import pytest

from kvmpy import KVM_CAP_USER_MEMORY2, PAGE_SIZE, Anonymous, Mapping, Vm


class SetRegion(Protocol):
    """Sets, changes or deletes a slot of the fixture ``vm``."""

    def __call__(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None: ...


@pytest.fixture
def area() -> Iterator[Mapping]:
    """16 pages of host memory."""
    mapping = Anonymous(huge="never").map(16 * PAGE_SIZE)
    yield mapping
    mapping.close()


@pytest.fixture(params=["KVM_SET_USER_MEMORY_REGION", "KVM_SET_USER_MEMORY_REGION2"])
def set_region(request: pytest.FixtureRequest, vm: Vm) -> SetRegion:
    """Both ioctls in turn: what one promises, the other does too (api.rst 4.140)."""
    if request.param == "KVM_SET_USER_MEMORY_REGION":
        return vm.set_user_memory_region
    vm.need_cap(KVM_CAP_USER_MEMORY2)
    return vm.set_user_memory_region2
