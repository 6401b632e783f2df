# SPDX-License-Identifier: Apache-2.0
"""Ioctls printed as they return."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import pytest

from kvmpy.core import observe
from kvmpy.debug.decode.live import LivePrinter
from kvmpy.uapi import ioctls
from kvmpy.uapi.structs import kvm_msr_entry, kvm_msrs, kvm_regs

VM: Any = SimpleNamespace(name="vm0", kind="vm", vm_type=0)
VCPU: Any = SimpleNamespace(name="vm0/vcpu0", kind="vcpu", vm=VM)


def printed(op: Any, arg: Any, result: int = 0, number: int = 0, after: Any = None) -> str:
    """What one ioctl prints, *after* changes its argument meanwhile."""
    lines: list[str] = []
    printer = LivePrinter(lines.append)
    printer.ioctl_enter(VCPU, op, arg)
    if after is not None:
        after(arg)
    printer.ioctl_exit(VCPU, op, arg, result, number)
    (line,) = lines
    return line


def test_an_argument_that_is_read() -> None:
    """What the kernel is given is shown."""
    assert printed(ioctls.KVM_SET_REGS, kvm_regs(rax=5)) == "vm0/vcpu0 KVM_SET_REGS {rax=0x5} = 0"


def test_an_argument_that_is_written() -> None:
    """What the kernel gives back is shown behind an arrow, and not what stood there before."""
    line = printed(ioctls.KVM_GET_REGS, kvm_regs(rbx=1), after=lambda regs: setattr(regs, "rax", 7))
    assert line == "vm0/vcpu0 KVM_GET_REGS -> {rax=0x7, rbx=0x1} = 0"


def test_in_and_out() -> None:
    """Both are shown where the kernel reads and writes."""
    msrs = kvm_msrs.of([kvm_msr_entry(index=0x10)])
    line = printed(
        ioctls.KVM_GET_MSRS, msrs, 1, after=lambda msrs: setattr(msrs.entries_list()[0], "data", 9)
    )
    before, arrow, after = line.partition(" -> ")
    assert arrow
    assert "data" not in before
    assert "data=0x9" in after


def test_a_failure() -> None:
    """An error has its name and what it means for this ioctl."""
    line = printed(ioctls.KVM_CREATE_VCPU, 0, -1, errno.EEXIST)
    assert line.startswith("vm0/vcpu0 KVM_CREATE_VCPU 0 = -1 EEXIST (File exists): ")


def test_a_look_at_the_vm_is_not_printed() -> None:
    """A post-mortem's own ioctls are not."""
    lines: list[str] = []
    printer = LivePrinter(lines.append)
    with observe.inspecting():
        printer.ioctl_enter(VCPU, ioctls.KVM_GET_REGS, kvm_regs())
        printer.ioctl_exit(VCPU, ioctls.KVM_GET_REGS, kvm_regs(), 0, 0)
        printer.fd_closed(VCPU)
    assert lines == []


def test_switched_off() -> None:
    """What is switched off, twice even, is attached no more."""
    printer = LivePrinter(print)
    for on in (True, True, False, False):
        printer.switch(on)
        assert printer.on is on
        assert (printer in observe.active) is on


def test_switched_on_in_the_middle() -> None:
    """An ioctl that was on its way when printing began is passed over."""
    lines: list[str] = []
    LivePrinter(lines.append).ioctl_exit(VCPU, ioctls.KVM_GET_REGS, kvm_regs(), 0, 0)
    assert lines == []


def test_bad_pointers() -> None:
    """An argument that leads nowhere is no crash."""
    line = printed(ioctls.KVM_SET_REGS, 8, -1, errno.EFAULT)
    assert "KVM_SET_REGS" in line
    assert "EFAULT" in line
    entry = kvm_msr_entry(index=0x10)
    assert "{index=" in printed(ioctls.KVM_SET_MSRS, kvm_msrs.of([entry]).host_address, 1)


@pytest.mark.requires("kvm")
def test_a_real_vm() -> None:
    """A run prints its exit, with the port."""
    from kvmpy import Kvm
    from kvmpy.guest import GuestProgram

    source = "#include <kvmpy/guest.h>\nvoid guest_main(void)\n{\n\toutb(0x80, 1);\n}\n"
    lines: list[str] = []
    with Kvm() as kvm, kvm.create_vm(GuestProgram.from_c(source)) as vm:
        vm.launch()
        with LivePrinter(lines.append):
            vm.vcpus[0].next()
    (line,) = lines
    assert "KVM_RUN = 0 KVM_EXIT_IO" in line
    assert "port=0x80" in line
