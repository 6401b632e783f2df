# SPDX-License-Identifier: Apache-2.0
"""The statistics of halt polling, with polling on and off."""

from __future__ import annotations

import pytest

from kvmpy import KVM_CAP_HALT_POLL, MakeVm, Msi, Stats, VcpuThread
from selftests.conftest import wait_until

pytestmark = [
    pytest.mark.requires("KVM_CAP_BINARY_STATS_FD", "KVM_CAP_SPLIT_IRQCHIP", "KVM_CAP_HALT_POLL"),
    pytest.mark.protections("none"),
]

VECTOR, HALTS = 0x51, 4
POLLING = ("halt_attempted_poll", "halt_successful_poll", "halt_poll_success_ns", "halt_poll_fail_ns")

GUEST = """
#include "../irq/interrupts.h"

void guest_main(void)
{
	irq_install(0x51);
	apic_enable();
	for (u32 i = 0;; i++) {
		GUEST_SYNC(i);
		irq_wait(0x51, i + 1);
	}
}
"""


def halt(make_vm: MakeVm, nanoseconds: int) -> Stats:
    """Let a guest halt some times, each until it blocks, with polling for so long; return the statistics."""
    vm = make_vm(GUEST)
    vm.enable_cap(KVM_CAP_HALT_POLL, nanoseconds)
    vm.launch()
    vcpu = vm.vcpus[0]
    vcpu.sync()
    with vcpu.stats.get_fd() as stats:
        for _ in range(HALTS):
            with VcpuThread(vcpu.sync, vcpu=vcpu) as thread:
                wait_until(lambda: stats.read()["blocking"].value == 1, "the vCPU does not block")
                vm.irq.signal_msi(Msi.to(0, VECTOR))
                thread.join(10)
        return stats.read()


def test_off(make_vm: MakeVm) -> None:
    """A VM whose vCPUs do not poll has counted no attempt to, no time of it, and nothing in its histograms.

    Documentation/virt/kvm/api.rst, 7.20 KVM_CAP_HALT_POLL (0 disables polling); halt-polling.rst.
    """
    stats = halt(make_vm, 0)
    got = {name: stats[name].value for name in POLLING}
    assert got == dict.fromkeys(POLLING, 0)
    for name in ("halt_poll_success_hist", "halt_poll_fail_hist"):
        assert not any(stats[name].values), name
    assert stats["halt_exits"].value >= HALTS


def test_counted_once(make_vm: MakeVm) -> None:
    """With polling each halt is one attempt at most, and the successful ones are among them."""
    stats = halt(make_vm, 50_000)
    attempted = stats["halt_attempted_poll"].value
    assert stats["halt_successful_poll"].value <= attempted <= stats["halt_exits"].value
