# SPDX-License-Identifier: Apache-2.0
"""Errors of the core: what was asked, what came back, and what to do about it."""

from __future__ import annotations

import errno as _errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmpy.uapi.ioctls import Ioctl
    from kvmpy.uapi.structs import Struct

_HINTS: dict[tuple[str | None, int], str] = {
    (
        None,
        _errno.ENOTTY,
    ): "this KVM does not know the ioctl; check its capability with kvm.check_extension()",
    (None, _errno.EMFILE): "too many open files in this process: raise RLIMIT_NOFILE (ulimit -n)",
    (None, _errno.ENFILE): "too many open files on this host: raise fs.file-max",
    (None, _errno.ENOMEM): "the host refused memory: check RLIMIT_AS, cgroup limits and free memory",
    (
        None,
        _errno.EIO,
    ): "the VM is dead or belongs to another process (KVM objects work in their creator only)",
    ("KVM_CREATE_VM", _errno.EINVAL): "this VM type is not offered: see KVM_CAP_VM_TYPES in `kvmpy doctor`",
    ("KVM_CREATE_VM", _errno.EBUSY): "another hypervisor owns the virtualisation extensions",
    ("KVM_CREATE_VCPU", _errno.EEXIST): "a vCPU with this id exists in the VM",
    (
        "KVM_CREATE_VCPU",
        _errno.EINVAL,
    ): "ids must be below KVM_CAP_MAX_VCPU_ID, and the count within KVM_CAP_MAX_VCPUS",
    ("KVM_SET_USER_MEMORY_REGION", _errno.EEXIST): "the range overlaps another memory slot",
    (
        "KVM_SET_USER_MEMORY_REGION2",
        _errno.EEXIST,
    ): "the range overlaps another memory slot or guest_memfd binding",
    (
        "KVM_SET_USER_MEMORY_REGION",
        _errno.EINVAL,
    ): "size, gpa and hva must be page aligned, flags known, the slot in range",
    (
        "KVM_SET_USER_MEMORY_REGION2",
        _errno.EINVAL,
    ): "size, gpa and hva must be page aligned, flags known, the slot in range",
    (
        "KVM_SET_SREGS",
        _errno.EINVAL,
    ): "the state is not a legal one: check CR0/CR4/EFER combinations and reserved bits",
    (
        "KVM_SET_SREGS2",
        _errno.EINVAL,
    ): "the state is not a legal one: check CR0/CR4/EFER combinations and reserved bits",
    ("KVM_GET_DIRTY_LOG", _errno.ENOENT): "no such slot, or it lacks KVM_MEM_LOG_DIRTY_PAGES",
    ("KVM_GET_DIRTY_LOG", _errno.ENXIO): "the VM has dirty rings instead of a log: use dirty_ring(vcpu)",
    ("KVM_CLEAR_DIRTY_LOG", _errno.EINVAL): "first_page and num_pages: multiples of 64, within the slot",
    ("KVM_RESET_DIRTY_RINGS", _errno.EINVAL): "the VM has no dirty rings: call enable_dirty_ring() first",
    ("KVM_CREATE_IRQCHIP", _errno.EINVAL): "it comes before the first vCPU",
    ("KVM_GET_IRQCHIP", _errno.ENXIO): "the VM has no full in-kernel irqchip: call create_irqchip() first",
    ("KVM_IRQ_LINE", _errno.ENXIO): "the VM has no in-kernel irqchip: call create_irqchip() first",
    ("KVM_CREATE_PIT2", _errno.ENOENT): "the PIT needs the full in-kernel irqchip: call create_irqchip()",
    ("KVM_GET_LAPIC", _errno.EINVAL): "no in-kernel APIC: the irqchip comes before the vCPU",
    ("KVM_SET_LAPIC", _errno.EINVAL): "no in-kernel APIC: the irqchip comes before the vCPU",
    ("KVM_INTERRUPT", _errno.ENXIO): "the PIC is in the kernel: use irq_line(), signal_msi() or an irqfd",
    ("KVM_IRQFD", _errno.EBUSY): "the eventfd raises an interrupt of this VM already",
    ("KVM_IOEVENTFD", _errno.EEXIST): "one with this address, size and datamatch is registered",
    ("KVM_IOEVENTFD", _errno.ENOENT): "none is registered with this address, size, datamatch and eventfd",
    ("KVM_CREATE_DEVICE", _errno.ENODEV): "this KVM has no such device type: see test_device()",
    ("KVM_SET_CPUID2", _errno.EINVAL): "CPUID is fixed once the vCPU ran",
    ("KVM_KVMCLOCK_CTRL", _errno.EINVAL): "the guest has not switched kvmclock on",
    ("KVM_SET_GSI_ROUTING", _errno.EINVAL): "a GSI, pin or type is out of range, or two routes clash",
    (
        "KVM_RUN",
        _errno.EFAULT,
    ): "KVM could not reach guest memory: see the exit reason (KVM_EXIT_MEMORY_FAULT carries the gpa)",
}


def errno_name(number: int) -> str:
    """Return the symbolic name of an errno, such as ``EINVAL``."""
    return _errno.errorcode.get(number, f"errno {number}")


class KvmError(OSError):
    """An ioctl that failed: ``.op``, ``.errno``, ``.arg`` (the decoded argument as text) and a hint.

    ``.target`` names the file descriptor, such as ``vm0/vcpu1``.
    """

    def __init__(self, op: Ioctl, number: int, target: str, arg: Struct | int | None = None) -> None:
        self.op = op
        self.target = target
        self.arg = "" if arg is None else (hex(arg) if isinstance(arg, int) else repr(arg))
        self.hint = _HINTS.get((op.name, number)) or _HINTS.get((None, number)) or ""
        text = f"{op.name} on {target} failed: {errno_name(number)} ({os.strerror(number)})"
        if self.arg:
            text += f"\n  argument: {self.arg}"
        if self.hint:
            text += f"\n  hint: {self.hint}"
        super().__init__(number, text)

    def __reduce__(self) -> tuple[object, ...]:
        return (OSError, (self.errno, self.strerror))

    def __str__(self) -> str:
        return str(self.strerror)


class MissingError(RuntimeError):
    """This host lacks something: ``.missing`` names it exactly, ``.how`` says how to get it."""

    def __init__(self, missing: str, how: str) -> None:
        self.missing = missing
        self.how = how
        super().__init__(f"{missing}: {how}" if how else missing)


class ClosedError(RuntimeError):
    """A KVM object was used after it was closed."""


class VcpuBusyError(RuntimeError):
    """A vCPU is running in another thread."""


class PrivateMemoryError(RuntimeError):
    """The host asked for guest memory that a protection keeps from it."""
