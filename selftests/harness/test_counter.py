# SPDX-License-Identifier: Apache-2.0
"""The test that the README explains: twenty lines that run under every protection."""

from __future__ import annotations

from kvmpy import MakeVm

GUEST = """
#include <kvmpy/guest.h>

u64 counter GUEST_SHARED;

void guest_main(void)
{
	while (counter < 3)
		GUEST_SYNC(counter++);
	GUEST_DONE();
}
"""


def test_counter(make_vm: MakeVm) -> None:
    """A guest's SYNC ucalls reach the host in order with their arguments, and its shared globals by name."""
    vm = make_vm(GUEST, vcpus=1)
    vm.launch()
    assert [call.args[0] for call in vm.vcpus[0].syncs()] == [0, 1, 2]
    assert vm.symbol("counter").u64 == 3
