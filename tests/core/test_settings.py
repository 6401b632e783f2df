# SPDX-License-Identifier: Apache-2.0
"""What a descriptor remembers of the calls that KVM cannot be asked about."""

from __future__ import annotations

import pytest

from kvmpy.core.settings import Argument, Settings
from kvmpy.uapi import ioctls
from kvmpy.uapi.constants import KVM_IOEVENTFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_DEASSIGN
from kvmpy.uapi.ioctls import Ioctl
from kvmpy.uapi.structs import kvm_coalesced_mmio_zone, kvm_enable_cap, kvm_ioeventfd, kvm_irqfd

CAP = ioctls.KVM_ENABLE_CAP
REGISTER, UNREGISTER = ioctls.KVM_REGISTER_COALESCED_MMIO, ioctls.KVM_UNREGISTER_COALESCED_MMIO


def after(*calls: tuple[Ioctl, Argument]) -> list[tuple[Ioctl, Argument]]:
    """Return what is remembered of *calls*."""
    settings = Settings()
    for op, arg in calls:
        assert op.lasting is not None
        settings.remember(op, arg)
    return settings.calls()


def test_in_order_and_copied() -> None:
    cap = kvm_enable_cap(cap=1)
    settings = Settings()
    settings.remember(ioctls.KVM_CREATE_IRQCHIP, None)
    settings.remember(CAP, cap)
    cap.cap = 9
    assert settings.calls() == [(ioctls.KVM_CREATE_IRQCHIP, None), (CAP, kvm_enable_cap(cap=1))]


def test_the_last_of_the_same_counts_in_its_place() -> None:
    first, other, last = kvm_enable_cap(cap=1), kvm_enable_cap(cap=2), kvm_enable_cap(cap=1, args=[7])
    assert after((CAP, first), (CAP, other), (CAP, last)) == [(CAP, other), (CAP, last)]


@pytest.mark.parametrize(
    ("op", "one", "two", "gone"),
    [
        (
            ioctls.KVM_IRQFD,
            kvm_irqfd(fd=5, gsi=1),
            kvm_irqfd(fd=6, gsi=1),
            kvm_irqfd(fd=5, gsi=1, flags=KVM_IRQFD_FLAG_DEASSIGN),
        ),
        (
            ioctls.KVM_IOEVENTFD,
            kvm_ioeventfd(fd=5, addr=0x10, len=4),
            kvm_ioeventfd(fd=5, addr=0x10, len=2),
            kvm_ioeventfd(fd=5, addr=0x10, len=4, flags=KVM_IOEVENTFD_FLAG_DEASSIGN),
        ),
    ],
    ids=["irqfd", "ioeventfd"],
)
def test_a_deassigned_eventfd_is_forgotten(op: Ioctl, one: Argument, two: Argument, gone: Argument) -> None:
    assert after((op, one), (op, two), (op, gone)) == [(op, two)]


def test_zones_that_contain_an_unregistered_range_are_forgotten() -> None:
    wide = kvm_coalesced_mmio_zone(addr=0x1000, size=0x1000)
    port = kvm_coalesced_mmio_zone(addr=0x1000, size=0x1000, pio=1)
    aside = kvm_coalesced_mmio_zone(addr=0x1800, size=0x1000)
    gone = kvm_coalesced_mmio_zone(addr=0x1400, size=0x100)
    results = [(REGISTER, zone) for zone in (wide, port, aside)]
    assert after(*results, (UNREGISTER, gone)) == [(REGISTER, port), (REGISTER, aside)]


def test_arguments_of_a_wrong_kind_are_not_noted() -> None:
    assert after((CAP, 5), (CAP, None)) == []
