# SPDX-License-Identifier: Apache-2.0
"""A guest that reads and writes MSRs as the host asks it to, and tells how that ended."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmpy import GuestVm, MakeVm, MsrExit, RdmsrExit, Ucall, WrmsrExit
from kvmpy.guest.ucall import USER

_READ, _WRITE, _X2APIC = 1, 2, 3

GUEST = """
#include <kvmpy/guest.h>

GUEST_SHARED u64 msr_index;
GUEST_SHARED u64 msr_value;

void guest_main(void)
{
	struct guest_fault fault = { 0 };

	for (;;) {
		switch (GUEST_ASK(KVMPY_UCALL_CMD_USER, fault.faulted, fault.vector, fault.error_code)) {
		case 1:
			fault = rdmsr_safe(msr_index, &msr_value);
			break;
		case 2:
			fault = wrmsr_safe(msr_index, msr_value);
			break;
		case 3:
			x2apic_enable();
			break;
		}
	}
}
"""


class MsrGuest:
    """Call read() or write(), then exactly one of value(), done(), fault() or exit()."""

    def __init__(self, vm: GuestVm) -> None:
        self.vm = vm
        self.vcpu = vm.vcpus[0]
        vm.launch()
        self._call = self.vcpu.sync()

    def read(self, index: int) -> MsrGuest:
        """Let the guest execute RDMSR at the next run."""
        return self._ask(_READ, index, 0xDEAD_DEAD_DEAD_DEAD)

    def write(self, index: int, value: int) -> MsrGuest:
        """Let the guest execute WRMSR at the next run."""
        return self._ask(_WRITE, index, value)

    def enable_x2apic(self) -> None:
        """Switch the guest's local APIC to x2APIC mode."""
        self._ask(_X2APIC, 0, 0)._result()

    def _ask(self, what: int, index: int, value: int) -> MsrGuest:
        self.vm.symbol("msr_index").u64 = index
        self.vm.symbol("msr_value").u64 = value
        self._call.reply(what)
        return self

    def _result(self) -> tuple[int, int] | None:
        got = self.vcpu.next()
        if not isinstance(got, Ucall) or got.cmd != USER:
            raise self.vcpu.unexpected(got, "the end of the access")
        self._call = got
        faulted, vector, error_code = got.args
        return (vector, error_code) if faulted else None

    def value(self) -> int:
        """Run to the end of a read that must succeed, and return what the guest got."""
        assert self._result() is None
        return int(self.vm.symbol("msr_value").u64)

    def done(self) -> None:
        """Run to the end of a write that must succeed."""
        assert self._result() is None

    def fault(self) -> tuple[int, int]:
        """Run to the end of an access that must fault; return the vector and the error code."""
        found = self._result()
        assert found is not None
        return found

    def exit(self) -> MsrExit:
        """Run to the exit that the access must end in."""
        got = self.vcpu.next()
        if not isinstance(got, (RdmsrExit, WrmsrExit)):
            raise self.vcpu.unexpected(got, "an MSR exit")
        return got


MsrGuestMaker = Callable[..., MsrGuest]


@pytest.fixture
def msr_guest(make_vm: MakeVm) -> MsrGuestMaker:
    """Make the guest, with user-space MSR exits for *reasons*."""

    def make(reasons: int = 0) -> MsrGuest:
        vm = make_vm(GUEST)
        if reasons:
            vm.enable_user_space_msr(reasons)
        return MsrGuest(vm)

    return make
