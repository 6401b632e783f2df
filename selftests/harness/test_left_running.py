# SPDX-License-Identifier: Apache-2.0
"""A VM can be taken away from threads that run it."""

from __future__ import annotations

import threading

import pytest

from kvmpy import MakeVm, VcpuBusyError, VcpuKickedError, VcpuThread
from kvmpy.core.errors import ClosedError

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
    vm = make_vm.start(FOREVER, vcpus=3)
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


SYNCS = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	for (;;)
		GUEST_SYNC(1);
}
"""


@pytest.mark.parametrize("how", ["stop", "close"])
def test_between_two_runs(make_vm: MakeVm, how: str) -> None:
    """A thread that is between two KVM_RUNs when its VM is stopped or closed comes to no further one.

    It gets an error that says why, of a stopped VM at each attempt.
    """
    vm = make_vm.start(SYNCS, vcpus=2)
    left, go_on = threading.Event(), threading.Event()

    def between(_call: object) -> None:
        left.set()
        assert go_on.wait(10)

    vcpu = vm.vcpus[1]
    thread = VcpuThread(lambda: vcpu.run_to_done(on_sync=between)).start()
    assert left.wait(10)
    exits = vcpu.exits
    if how == "stop":
        vm.stop()
    else:
        vm.close()
    go_on.set()
    with pytest.raises(VcpuKickedError if how == "stop" else ClosedError):
        thread.join(10)
    if how == "stop":
        for each in vm.vcpus:
            with pytest.raises(VcpuKickedError, match="stopped"):
                each.next()
        assert vcpu.exits == exits
        vm.close()
    for each in vm.vcpus:
        with pytest.raises(ClosedError):
            each.next()
        with pytest.raises(ClosedError):
            each.kick()
