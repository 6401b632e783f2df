# SPDX-License-Identifier: Apache-2.0
"""A process that dies while its vCPU is in L2."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from kvmpy import L1, L2, GuestProgram, Kvm, SvmExit

pytestmark = pytest.mark.requires("cpuid:svm")

VICTIM = """
import signal, sys
from kvmpy import L1, L2, GuestProgram, Kvm

with Kvm() as kvm:
    vm = kvm.create_vm(GuestProgram.from_c(L1), protection="none")
    l2 = L2(vm.vcpus[0], npt=sys.argv[1] == "npt")
    l2.load(b"\\xe6\\x42" if sys.argv[2] == "exit" else b"\\xeb\\xfe")
    l2.begin()
    if sys.argv[2] == "exit":
        l2.vcpu.next()
        assert l2.vcpu.nested.get().flags & 1
    print("in L2", flush=True)
    if sys.argv[2] == "exit":
        signal.alarm(60)
        signal.pause()
    l2.vcpu.next(60)
"""


@pytest.mark.parametrize("where", ["exit", "running"])
def test_killed_in_l2(npt: bool, where: str) -> None:
    """A process that is killed while its vCPU is in L2, at an exit or running, leaves a KVM that works.

    arch/x86/kvm/svm/nested.c, svm_free_nested(): the vCPU is freed out of L2.
    """
    with subprocess.Popen(
        [sys.executable, "-c", VICTIM, "npt" if npt else "shadow", where],
        stdout=subprocess.PIPE,
        text=True,
    ) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == "in L2\n"
        victim.send_signal(signal.SIGKILL)
        assert victim.wait(timeout=20) == -signal.SIGKILL
    with Kvm() as kvm, kvm.create_vm(GuestProgram.from_c(L1), protection="none") as vm:
        l2 = L2(vm.vcpus[0], npt=npt)
        assert l2.run(b"\x90").code == SvmExit.VMMCALL
