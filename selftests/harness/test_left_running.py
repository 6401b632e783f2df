# SPDX-License-Identifier: Apache-2.0
"""A VM can be taken away from threads that run it."""

from __future__ import annotations

import pytest

from kvmpy import MakeVm, VcpuBusyError, VcpuKickedError, VcpuThread

FOREVER = """
#include <kvmpy/guest.h>

u32 started GUEST_SHARED;

void guest_main(void)
{
	started = 1;
	for (;;)
		cpu_relax();
}
"""


def test_stop(make_vm: MakeVm) -> None:
    """Vm.stop() ends KVM_RUN in every thread, after which the VM can be closed; before it cannot."""
    vm = make_vm(FOREVER, vcpus=3)
    vm.launch()
    threads = [VcpuThread(vcpu.run_to_done, vcpu=vcpu) for vcpu in vm.vcpus]
    for thread in threads:
        thread.start()
    while not all(vcpu.running for vcpu in vm.vcpus):
        assert all(thread.alive for thread in threads)
    with pytest.raises(VcpuBusyError, match="kick it"):
        vm.close()
    vm.stop()
    assert not any(vcpu.running for vcpu in vm.vcpus)
    for thread in threads:
        with pytest.raises(VcpuKickedError):
            thread.join(5)
    vm.close()
    assert vm.closed
