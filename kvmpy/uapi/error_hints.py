# SPDX-License-Identifier: Apache-2.0
"""What an errno means for an ioctl of KVM, and what to do about it (Documentation/virt/kvm/api.rst)."""

from __future__ import annotations

import errno as _errno
import os

from kvmpy.uapi.error_rules import Slots, broken_rule

EHWPOISON = 133
"""errno lacks it before Python 3.14."""

HINTS: dict[tuple[str | None, int], str] = {
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
    ("KVM_SET_USER_MEMORY_REGION", _errno.EFAULT): "userspace_addr is not an address of this process",
    ("KVM_SET_USER_MEMORY_REGION2", _errno.EFAULT): "userspace_addr is not an address of this process",
    ("KVM_SET_USER_MEMORY_REGION2", _errno.EBADF): "guest_memfd is not an open file descriptor",
    ("KVM_SET_MEMORY_ATTRIBUTES", _errno.EINVAL): (
        "address and size page aligned and not 0, flags 0, attributes as KVM_CAP_MEMORY_ATTRIBUTES says"
    ),
    ("KVM_CREATE_GUEST_MEMFD", _errno.EINVAL): (
        "size page aligned and not 0, flags among those of KVM_CAP_GUEST_MEMFD_FLAGS"
    ),
    ("KVM_ENABLE_CAP", _errno.EINVAL): (
        "this fd does not take the capability, its arguments are out of range, or it comes too late"
    ),
    ("KVM_SET_REGS", _errno.EINVAL): "the guest's state is protected (SEV-ES, SNP, TDX) after its launch",
    ("KVM_GET_REGS", _errno.EINVAL): "the guest's state is protected (SEV-ES, SNP, TDX) after its launch",
    ("KVM_GET_SREGS", _errno.EINVAL): "the guest's state is protected (SEV-ES, SNP, TDX) after its launch",
    (
        "KVM_GET_SUPPORTED_CPUID",
        _errno.E2BIG,
    ): "nent is too small: give more room",
    ("KVM_GET_EMULATED_CPUID", _errno.E2BIG): "nent is too small: give more room",
    ("KVM_GET_CPUID2", _errno.E2BIG): "nent is too small: it holds the number of entries now",
    ("KVM_GET_MSR_INDEX_LIST", _errno.E2BIG): "nmsrs is too small: it holds the number that is needed now",
    ("KVM_GET_MSR_FEATURE_INDEX_LIST", _errno.E2BIG): "nmsrs is too small: it holds the number needed now",
    ("KVM_GET_REG_LIST", _errno.E2BIG): "n is too small: it holds the number of registers now",
    ("KVM_GET_NESTED_STATE", _errno.E2BIG): "size is too small: it holds what is needed now",
    ("KVM_SET_CPUID2", _errno.E2BIG): "more entries than KVM takes (256)",
    ("KVM_SET_MSRS", _errno.E2BIG): "more MSRs than KVM takes in one call (256)",
    ("KVM_GET_MSRS", _errno.E2BIG): "more MSRs than KVM takes in one call (256)",
    (
        "KVM_SET_VCPU_EVENTS",
        _errno.EINVAL,
    ): "an unknown flag, a vector that is not an exception, or both kinds of event",
    ("KVM_SET_DEBUGREGS", _errno.EINVAL): "flags must be 0 and the upper halves of DR6 and DR7 clear",
    ("KVM_SET_XSAVE", _errno.EINVAL): "a feature bit or reserved MXCSR bit that the vCPU does not have",
    ("KVM_SET_XCRS", _errno.EINVAL): "an XCR0 that this CPU or the vCPU's CPUID does not allow",
    ("KVM_SET_GUEST_DEBUG", _errno.EBUSY): "an exception is pending in the vCPU",
    ("KVM_SET_MP_STATE", _errno.EINVAL): "no in-kernel APIC, or a state that x86 does not have",
    ("KVM_SET_TSC_KHZ", _errno.EINVAL): "out of the range that the host can scale to",
    (
        "KVM_SET_NESTED_STATE",
        _errno.EINVAL,
    ): "a format or state that this vendor module or CPUID does not have",
    ("KVM_GET_DEVICE_ATTR", _errno.ENXIO): "no such group or attribute: ask with KVM_HAS_DEVICE_ATTR",
    ("KVM_SET_DEVICE_ATTR", _errno.ENXIO): "no such group or attribute: ask with KVM_HAS_DEVICE_ATTR",
    ("KVM_HAS_DEVICE_ATTR", _errno.ENXIO): "no such group or attribute",
    (
        "KVM_X86_SET_MSR_FILTER",
        _errno.EINVAL,
    ): "unknown flags, a range without flags, or a bitmap beyond 1536 bytes",
    ("KVM_SIGNAL_MSI", _errno.EINVAL): "the VM has no in-kernel APIC",
    ("KVM_IRQFD", _errno.EINVAL): "unknown flags, or the VM has no in-kernel irqchip",
    ("KVM_IRQFD", _errno.EBADF): "fd is not an open eventfd",
    ("KVM_IOEVENTFD", _errno.EINVAL): "len must be 0, 1, 2, 4 or 8, flags known, and addr + len not wrap",
    ("KVM_CREATE_IRQCHIP", _errno.EEXIST): "the VM has one already",
    ("KVM_PRE_FAULT_MEMORY", _errno.EOPNOTSUPP): "the vCPU has no two-dimensional paging",
    ("KVM_PRE_FAULT_MEMORY", _errno.ENOENT): "the range is not covered by memory slots",
    ("KVM_MEMORY_ENCRYPT_OP", _errno.ENOTTY): "no SEV or TDX here, or the VM is of another type",
    ("KVM_MEMORY_ENCRYPT_OP", _errno.EIO): "the firmware refused: its status is in the field error",
    ("KVM_MEMORY_ENCRYPT_OP", _errno.EPERM): "the VM's type or state does not take this command",
    ("KVM_RUN", _errno.EINTR): "a signal or immediate_exit: nothing is wrong",
    ("KVM_RUN", _errno.EAGAIN): "the vCPU waits for INIT or SIPI, or was just made runnable: run it again",
    (
        "KVM_RUN",
        _errno.EINVAL,
    ): "a dirty synchronised register is not a legal state, or an unknown kvm_valid_regs bit",
    ("KVM_RUN", EHWPOISON): "guest memory is poisoned: KVM_EXIT_MEMORY_FAULT carries the gpa",
}
"""By (ioctl, errno); None stands for every ioctl."""


def errno_name(number: int) -> str:
    """Return the symbolic name of an errno, such as ``EINVAL``."""
    return "EHWPOISON" if number == EHWPOISON else _errno.errorcode.get(number, f"errno {number}")


def hint(
    ioctl: str | None, number: int, content: bytes = b"", slots: Slots | None = None, nested: bytes = b""
) -> str:
    """Return what errno *number* means for an ioctl, ``""`` where that is not known.

    With *content*, the argument's bytes, the rule that it breaks, where kvmpy knows the rules; *slots* are
    the memory slots of the VM, *nested* what the pointer of a SEV command leads to.
    """
    return (
        (broken_rule(ioctl, number, content, slots, nested) if content else "")
        or HINTS.get((ioctl, number))
        or HINTS.get((None, number))
        or ""
    )


def error_words(
    ioctl: str | None, number: int, content: bytes = b"", slots: Slots | None = None, nested: bytes = b""
) -> str:
    """Return an errno with its meaning, such as ``EEXIST (File exists): the range overlaps another slot``."""
    known = number in _errno.errorcode or number == EHWPOISON
    text = f"{errno_name(number)} ({os.strerror(number)})" if known else errno_name(number)
    meaning = hint(ioctl, number, content, slots, nested)
    return f"{text}: {meaning}" if meaning else text
