# SPDX-License-Identifier: Apache-2.0
"""VMs whose interrupts have to do with each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmpy import Kvm, Vm


@pytest.fixture
def two_vms(kvm: Kvm) -> Iterator[tuple[Vm, Vm]]:
    """Two bare VMs with the full in-kernel irqchip."""
    with kvm.create_vm() as one, kvm.create_vm() as other:
        one.irq.create_chip()
        other.irq.create_chip()
        yield one, other
