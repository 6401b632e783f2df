# SPDX-License-Identifier: Apache-2.0
"""kvmclock and Xen's clocks of one vCPU: the same time, and each with the flags of its own interface."""

from __future__ import annotations

import pytest

from kvmpy import KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, PAGE_SIZE, Gva
from kvmpy.x86.xen import XenLayout

from .conftest import MakeXen, put

pytestmark = [pytest.mark.requires("KVM_CAP_XEN_HVM"), pytest.mark.protections("none", "cbit")]

SYSTEM_TIME_NEW = 0x4B56_4D01
FLAGS, STOPPED = 29, 2


def test_stopped(make_xen: MakeXen) -> None:
    """KVM_KVMCLOCK_CTRL tells kvmclock alone that the guest was stopped, until the guest takes the flag away.

    Documentation/virt/kvm/api.rst, 4.75 KVM_KVMCLOCK_CTRL (a flag of pvclock_vcpu_time_info "specified for
    kvmclock"); Xen's public header has no such flag, so that no guest of its would clear it.
    """
    xen = make_xen()
    page = xen.vm.alloc(PAGE_SIZE, private=False)
    put(xen.vcpu, KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, xen.gpa(page))
    clocks = {
        "kvmclock": page + 512,
        "time info": page,
        "vcpu_info": Gva(int(xen.infos) + XenLayout.XEN_VCPU_TIME),
    }
    assert xen.agent.wrmsr(SYSTEM_TIME_NEW, xen.gpa(clocks["kvmclock"]) | 1) is None

    def stopped() -> list[str]:
        # An order makes the vCPU enter the guest, which is when KVM writes its clocks.
        return [
            name
            for name, clock in clocks.items()
            if int(xen.agent.must(b"\x8a\x07", rdi=int(clock) + FLAGS).rax) & STOPPED
        ]

    assert stopped() == []
    for _ in range(2):
        xen.vcpu.clock.kvmclock_ctrl()
        assert xen.agent.read(page) is not None
        assert stopped() == ["kvmclock"]
        place = clocks["kvmclock"] + FLAGS
        flags = xen.agent.read(place, 1)
        assert isinstance(flags, int)
        assert xen.agent.write(place, flags & ~STOPPED, 1) is None
        assert stopped() == []
