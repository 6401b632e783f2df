# SPDX-License-Identifier: Apache-2.0
"""A guest that reads and writes MSRs as the host asks it to, and tells how that ended."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmpy import AGENT, Agent, Fault, GuestVm, MakeVm, Msr, MsrExit, RdmsrExit, Registers, WrmsrExit

# IA32_APIC_BASE: the APIC enabled, in x2APIC mode (Intel SDM volume 3, 12.4.4).
_X2APIC = 1 << 11 | 1 << 10


class MsrGuest:
    """Call read() or write(), then exactly one of value(), done(), fault() or exit()."""

    def __init__(self, vm: GuestVm) -> None:
        self.vm = vm
        self.vcpu = vm.vcpus[0]
        self._agent = Agent(self.vcpu)
        self._agent.start()

    def read(self, index: int) -> MsrGuest:
        """Let the guest execute RDMSR at the next run."""
        self._agent.begin_rdmsr(index)
        return self

    def write(self, index: int, value: int) -> MsrGuest:
        """Let the guest execute WRMSR at the next run."""
        self._agent.begin_wrmsr(index, value)
        return self

    def enable_x2apic(self) -> None:
        """Switch the guest's local APIC to x2APIC mode."""
        base = self._agent.rdmsr(Msr.MSR_IA32_APICBASE)
        assert isinstance(base, int)
        assert self._agent.wrmsr(Msr.MSR_IA32_APICBASE, base | _X2APIC) is None

    def value(self) -> int:
        """Run to the end of a read that must succeed, and return what the guest got."""
        result = self._agent.end()
        assert isinstance(result, Registers)
        return result.edx_eax

    def done(self) -> None:
        """Run to the end of a write that must succeed."""
        assert isinstance(self._agent.end(), Registers)

    def fault(self) -> tuple[int, int]:
        """Run to the end of an access that must fault; return the vector and the error code."""
        result = self._agent.end()
        assert isinstance(result, Fault), "the access did not fault"
        return result.vector, result.error_code

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
        vm = make_vm(AGENT)
        if reasons:
            vm.msrs.enable_user_space(reasons)
        return MsrGuest(vm)

    return make
