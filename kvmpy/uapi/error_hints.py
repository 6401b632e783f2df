# SPDX-License-Identifier: Apache-2.0
"""What an errno means for an ioctl of KVM or a command of SEV, and what to do about it.

Sources: Documentation/virt/kvm/api.rst; arch/x86/kvm/svm/sev.c by command; of /dev/sev, sev_ioctl() in
drivers/crypto/ccp/sev-dev.c.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import NamedTuple

from kvmpy.uapi.commands import SEV_COMMANDS, SEV_PLATFORM_COMMANDS
from kvmpy.uapi.constants import SevCmd, SevRet
from kvmpy.uapi.error_rules import Rule, Slots, memory_slot_rule, snp_start_rule, sregs_rule
from kvmpy.uapi.structs import kvm_sev_cmd

EHWPOISON = 133
"""errno lacks it before Python 3.14."""


class Checked(NamedTuple):
    """An errno with many rules behind it: *rule* says which one the argument breaks, else there is *text*."""

    rule: Rule
    text: str


_DEAD = "the secure processor does not answer; reboot"
_REFUSED = "the firmware refused: its status is in the field error"
_UNNAMED = "each command has rules of its own: name the command, such as KVM_SEV_LAUNCH_MEASURE"
_NOT_ASKED = (
    "not the firmware's refusal (its status is 0): the kernel refused, or the firmware did not answer"
)

HINTS: Mapping[str, Mapping[str, str | Checked]] = {
    "": {
        "ENOTTY": "this KVM does not know the ioctl; check its capability with kvm.check_extension()",
        "EMFILE": "too many open files in this process: raise RLIMIT_NOFILE (ulimit -n)",
        "ENFILE": "too many open files on this host: raise fs.file-max",
        "ENOMEM": "the host refused memory: check RLIMIT_AS, cgroup limits and free memory",
        "EIO": "the VM is dead or belongs to another process (KVM objects work in their creator only)",
    },
    "KVM_CREATE_VM": {
        "EINVAL": "this VM type is not offered: see KVM_CAP_VM_TYPES in `kvmpy doctor`",
        "EBUSY": "another hypervisor owns the virtualisation extensions",
    },
    "KVM_CREATE_VCPU": {
        "EEXIST": "a vCPU with this id exists in the VM",
        "EINVAL": "ids must be below KVM_CAP_MAX_VCPU_ID, and the count within KVM_CAP_MAX_VCPUS",
    },
    "KVM_SET_USER_MEMORY_REGION": {
        "EEXIST": Checked(memory_slot_rule, "the range overlaps another memory slot"),
        "EINVAL": Checked(
            memory_slot_rule, "size, gpa and hva must be page aligned, flags known, the slot in range"
        ),
        "EFAULT": "userspace_addr is not an address of this process",
    },
    "KVM_SET_USER_MEMORY_REGION2": {
        "EEXIST": Checked(memory_slot_rule, "the range overlaps another memory slot or guest_memfd binding"),
        "EINVAL": Checked(
            memory_slot_rule, "size, gpa and hva must be page aligned, flags known, the slot in range"
        ),
        "EFAULT": "userspace_addr is not an address of this process",
        "EBADF": "guest_memfd is not an open file descriptor",
    },
    "KVM_SET_SREGS": {
        "EINVAL": Checked(
            sregs_rule, "the state is not a legal one: check CR0/CR4/EFER combinations and reserved bits"
        ),
    },
    "KVM_SET_SREGS2": {
        "EINVAL": Checked(
            sregs_rule, "the state is not a legal one: check CR0/CR4/EFER combinations and reserved bits"
        ),
    },
    "KVM_GET_DIRTY_LOG": {
        "ENOENT": "no such slot, or it lacks KVM_MEM_LOG_DIRTY_PAGES",
        "ENXIO": "the VM has dirty rings instead of a log: use dirty_ring(vcpu)",
    },
    "KVM_CLEAR_DIRTY_LOG": {"EINVAL": "first_page and num_pages: multiples of 64, within the slot"},
    "KVM_RESET_DIRTY_RINGS": {"EINVAL": "the VM has no dirty rings: call enable_dirty_ring() first"},
    "KVM_CREATE_IRQCHIP": {
        "EINVAL": "it comes before the first vCPU",
        "EEXIST": "the VM has one already",
    },
    "KVM_GET_IRQCHIP": {"ENXIO": "the VM has no full in-kernel irqchip: call create_irqchip() first"},
    "KVM_IRQ_LINE": {"ENXIO": "the VM has no in-kernel irqchip: call create_irqchip() first"},
    "KVM_CREATE_PIT2": {"ENOENT": "the PIT needs the full in-kernel irqchip: call create_irqchip()"},
    "KVM_GET_LAPIC": {"EINVAL": "no in-kernel APIC: the irqchip comes before the vCPU"},
    "KVM_SET_LAPIC": {"EINVAL": "no in-kernel APIC: the irqchip comes before the vCPU"},
    "KVM_INTERRUPT": {"ENXIO": "the PIC is in the kernel: use irq_line(), signal_msi() or an irqfd"},
    "KVM_IRQFD": {
        "EBUSY": "the eventfd raises an interrupt of this VM already",
        "EINVAL": "unknown flags, or the VM has no in-kernel irqchip",
        "EBADF": "fd is not an open eventfd",
    },
    "KVM_IOEVENTFD": {
        "EEXIST": "one with this address, size and datamatch is registered",
        "ENOENT": "none is registered with this address, size, datamatch and eventfd",
        "EINVAL": "len must be 0, 1, 2, 4 or 8, flags known, and addr + len not wrap",
    },
    "KVM_CREATE_DEVICE": {"ENODEV": "this KVM has no such device type: see test_device()"},
    "KVM_SET_CPUID2": {
        "EINVAL": "CPUID is fixed once the vCPU ran",
        "E2BIG": "more entries than KVM takes (256)",
    },
    "KVM_KVMCLOCK_CTRL": {"EINVAL": "the guest has not switched kvmclock on"},
    "KVM_SET_GSI_ROUTING": {"EINVAL": "a GSI, pin or type is out of range, or two routes clash"},
    "KVM_RUN": {
        "EFAULT": (
            "KVM could not reach guest memory: see the exit reason (KVM_EXIT_MEMORY_FAULT carries the gpa)"
        ),
        "EINTR": "a signal or immediate_exit: nothing is wrong",
        "EAGAIN": "the vCPU waits for INIT or SIPI, or was just made runnable: run it again",
        "EINVAL": "a dirty synchronised register is not a legal state, or an unknown kvm_valid_regs bit",
        "EHWPOISON": "guest memory is poisoned: KVM_EXIT_MEMORY_FAULT carries the gpa",
    },
    "KVM_SET_MEMORY_ATTRIBUTES": {
        "EINVAL": (
            "address and size page aligned and not 0, flags 0, attributes as KVM_CAP_MEMORY_ATTRIBUTES says"
        ),
    },
    "KVM_CREATE_GUEST_MEMFD": {
        "EINVAL": "size page aligned and not 0, flags among those of KVM_CAP_GUEST_MEMFD_FLAGS",
    },
    "KVM_ENABLE_CAP": {
        "EINVAL": "this fd does not take the capability, an argument is out of range, or it comes too late",
    },
    "KVM_SET_REGS": {"EINVAL": "the guest's state is protected (SEV-ES, SNP, TDX) after its launch"},
    "KVM_GET_REGS": {"EINVAL": "the guest's state is protected (SEV-ES, SNP, TDX) after its launch"},
    "KVM_GET_SREGS": {"EINVAL": "the guest's state is protected (SEV-ES, SNP, TDX) after its launch"},
    "KVM_GET_SUPPORTED_CPUID": {"E2BIG": "nent is too small: give more room"},
    "KVM_GET_EMULATED_CPUID": {"E2BIG": "nent is too small: give more room"},
    "KVM_GET_CPUID2": {"E2BIG": "nent is too small: it holds the number of entries now"},
    "KVM_GET_MSR_INDEX_LIST": {"E2BIG": "nmsrs is too small: it holds the number that is needed now"},
    "KVM_GET_MSR_FEATURE_INDEX_LIST": {"E2BIG": "nmsrs is too small: it holds the number needed now"},
    "KVM_GET_REG_LIST": {"E2BIG": "n is too small: it holds the number of registers now"},
    "KVM_GET_NESTED_STATE": {"E2BIG": "size is too small: it holds what is needed now"},
    "KVM_SET_MSRS": {"E2BIG": "more MSRs than KVM takes in one call (256)"},
    "KVM_GET_MSRS": {"E2BIG": "more MSRs than KVM takes in one call (256)"},
    "KVM_SET_VCPU_EVENTS": {
        "EINVAL": "an unknown flag, a vector that is not an exception, or both kinds of event",
    },
    "KVM_SET_DEBUGREGS": {"EINVAL": "flags must be 0 and the upper halves of DR6 and DR7 clear"},
    "KVM_SET_XSAVE": {"EINVAL": "a feature bit or reserved MXCSR bit that the vCPU does not have"},
    "KVM_SET_XCRS": {"EINVAL": "an XCR0 that this CPU or the vCPU's CPUID does not allow"},
    "KVM_SET_GUEST_DEBUG": {"EBUSY": "an exception is pending in the vCPU"},
    "KVM_SET_MP_STATE": {"EINVAL": "no in-kernel APIC, or a state that x86 does not have"},
    "KVM_SET_TSC_KHZ": {"EINVAL": "out of the range that the host can scale to"},
    "KVM_SET_NESTED_STATE": {"EINVAL": "a format or state that this vendor module or CPUID does not have"},
    "KVM_GET_DEVICE_ATTR": {"ENXIO": "no such group or attribute: ask with KVM_HAS_DEVICE_ATTR"},
    "KVM_SET_DEVICE_ATTR": {"ENXIO": "no such group or attribute: ask with KVM_HAS_DEVICE_ATTR"},
    "KVM_HAS_DEVICE_ATTR": {"ENXIO": "no such group or attribute"},
    "KVM_X86_SET_MSR_FILTER": {
        "EINVAL": "unknown flags, a range without flags, or a bitmap beyond 1536 bytes"
    },
    "KVM_SIGNAL_MSI": {"EINVAL": "the VM has no in-kernel APIC"},
    "KVM_PRE_FAULT_MEMORY": {
        "ENOTSUP": "the vCPU has no two-dimensional paging",
        "ENOENT": "the range is not covered by memory slots",
    },
    "KVM_MEMORY_ENCRYPT_OP": {
        "ENOTTY": (
            "kvm_amd runs without SEV, or there is no TDX (see `kvmpy doctor`), or the VM is of another type"
        ),
        "EIO": _REFUSED,
        "EPERM": "the VM's type or state does not take this command",
        "EBADF": "the command needs an open /dev/sev",
        "ETIMEDOUT": _DEAD,
        "ENOMEM": "the range cannot be pinned: see RLIMIT_MEMLOCK (ulimit -l) and free memory",
    },
    "KVM_SEV_INIT": {"EINVAL": "it is for default VMs without vCPUs, once; others take KVM_SEV_INIT2"},
    "KVM_SEV_ES_INIT": {"EINVAL": "it is for default VMs without vCPUs, once; others take KVM_SEV_INIT2"},
    "KVM_SEV_INIT2": {
        "EINVAL": (
            "it is for VMs of the types SEV, SEV-ES and SNP, before the first vCPU, once; flags "
            "0, vmsa_features as KVM_X86_SEV_VMSA_FEATURES says, ghcb_version at most 2 (0 for "
            "SEV, 0 or 2 for SNP)"
        ),
        "EBUSY": (
            "no free ASID: other SEV guests hold them all, or misc.max of this process's cgroup is reached"
        ),
        "ENOTTY": "no ASID is for guests of this kind: see `kvmpy doctor`",
    },
    "KVM_SEV_LAUNCH_START": {"EINVAL": "dh_len or session_len is more than 16 KiB"},
    "KVM_SEV_LAUNCH_UPDATE_DATA": {"EINVAL": "len is 0, or the range wraps"},
    "KVM_SEV_LAUNCH_MEASURE": {"EINVAL": "len is more than 16 KiB"},
    "KVM_SEV_LAUNCH_SECRET": {"EINVAL": "the guest's range is not contiguous in host memory, or is empty"},
    "KVM_SEV_SEND_START": {"EINVAL": "len of a certificate or session is more than 16 KiB"},
    "KVM_SEV_SEND_UPDATE_DATA": {
        "EINVAL": (
            "guest_uaddr + guest_len goes beyond a page, or an address or guest_len is 0 (hdr_len or "
            "trans_len 0 asks for both lengths)"
        ),
    },
    "KVM_SEV_RECEIVE_START": {"EINVAL": "pdh_uaddr or session_uaddr is 0, or a len is more than 16 KiB"},
    "KVM_SEV_RECEIVE_UPDATE_DATA": {
        "EINVAL": (
            "guest_uaddr + guest_len goes beyond a page, an address or length is 0, or hdr_len or "
            "trans_len is more than 16 KiB"
        ),
    },
    "KVM_SEV_GET_ATTESTATION_REPORT": {"EINVAL": "len is more than 16 KiB"},
    "KVM_SEV_DBG_DECRYPT": {"EINVAL": "len is 0, or a range wraps"},
    "KVM_SEV_DBG_ENCRYPT": {"EINVAL": "len is 0, or a range wraps"},
    "KVM_SEV_SNP_LAUNCH_START": {
        "EINVAL": Checked(
            snp_start_rule,
            (
                "it was issued already, flags are not 0, or the policy has bits that KVM does not "
                "know (KVM_X86_SNP_POLICY_BITS) or lacks bit 17"
            ),
        ),
        "ENOTTY": (
            "the VM is of another type, or the firmware made no context for the guest "
            "(SNP_GCTX_CREATE, whatever it said: snp_launch_start() in Linux); see dmesg | grep "
            "-i ccp"
        ),
    },
    "KVM_SEV_SNP_LAUNCH_UPDATE": {
        "EINVAL": (
            "before KVM_SEV_SNP_LAUNCH_START, len is 0, len or uaddr not page aligned, flags not "
            "0, an unknown type, or gfn_start is in no slot with guest_memfd"
        ),
        "EIO": (
            "the firmware was not asked (its status is 0): KVM wants every page of the range "
            "private (KVM_SET_MEMORY_ATTRIBUTES), in a guest_memfd, and not launched already, and "
            "its source readable"
        ),
    },
    "KVM_SEV_SNP_LAUNCH_FINISH": {
        "EINVAL": "before KVM_SEV_SNP_LAUNCH_START, flags not 0, or a pointer of the ID block is bad",
    },
    "KVM_SEV_LAUNCH_UPDATE_VMSA": {
        "EINVAL": "once for each vCPU, without guest debugging and with DR7 at its reset value",
    },
    "SEV_ISSUE_CMD": {
        "EIO": _REFUSED,
        "EBUSY": _DEAD,
        "ETIMEDOUT": _DEAD,
        "ENOTTY": "the file is no /dev/sev",
        "EPERM": "the command needs a /dev/sev that is open for writing, and no other right",
        "ENODEV": "the secure processor, or SNP for a command of SNP, is not initialised",
    },
    "SEV_FACTORY_RESET": {"EBUSY": "guests are active"},
    "SEV_PDH_CERT_EXPORT": {
        "EIO": (
            "with ccp.psp_init_on_probe=0 and no guest the platform is not initialised: ccp does "
            "that for this command, and shuts it down again, SNP too (sev_ioctl_do_pdh_export() "
            "in Linux)"
        ),
    },
}
"""By ioctl or command, and errno; what holds for every ioctl stands under ``""``."""

_IOCTL_OF = {
    **dict.fromkeys(SEV_COMMANDS, "KVM_MEMORY_ENCRYPT_OP"),
    **dict.fromkeys(SEV_PLATFORM_COMMANDS, "SEV_ISSUE_CMD"),
}
_FIRST_SNP = SevCmd.KVM_SEV_SNP_LAUNCH_START
# A status of the firmware's that it did not give.
_NO_STATUS = (0, SevRet.SEV_RET_NO_FW_CALL & 0xFFFF_FFFF)


def errno_name(number: int) -> str:
    """Return the symbolic name of an errno, such as ``EINVAL``."""
    return "EHWPOISON" if number == EHWPOISON else errno.errorcode.get(number, f"errno {number}")


def hint(
    name: str | None,
    number: int,
    content: bytes = b"",
    slots: Slots | None = None,
    nested: bytes = b"",
    status: int | None = None,
) -> str:
    """Return what errno *number* means for the ioctl or command *name*, ``""`` where that is not known.

    With *content*, the argument's bytes, the rule that it breaks, where kvmpy knows the rules; *slots* are
    the memory slots of the VM, *nested* what the pointer of a SEV command leads to.  *status* is the
    firmware's, of a SEV command.
    """
    if name == "KVM_MEMORY_ENCRYPT_OP" and len(content) >= kvm_sev_cmd.SIZE:
        command = kvm_sev_cmd.from_bytes(content[: kvm_sev_cmd.SIZE])
        if command.id in SevCmd._value2member_map_:
            return hint(SevCmd(command.id).name, number, nested, status=command.error)
        if number == errno.EINVAL:
            return f"there is no command {command.id}"
    elif name == "KVM_MEMORY_ENCRYPT_OP" and number == errno.EINVAL:
        return _UNNAMED
    ioctl = _IOCTL_OF.get(name or "", "")
    if name in SEV_COMMANDS and number == errno.EPERM and SEV_COMMANDS[name].id < _FIRST_SNP:
        return f"an SNP VM takes the SNP commands only, not {name}"
    code = errno_name(number)
    places = [name or "", ioctl, ""]
    if ioctl and status not in (None, *_NO_STATUS):
        del places[0]
    elif ioctl and status is not None and code == "EIO" and code not in HINTS.get(places[0], {}):
        return _NOT_ASKED
    known = next((HINTS[place][code] for place in places if code in HINTS.get(place, {})), "")
    if isinstance(known, str):
        return known
    return (content and known.rule(content, slots, number)) or known.text


def error_words(name: str | None, number: int) -> str:
    """Return an errno with its meaning, such as ``EEXIST (File exists): the range overlaps another slot``."""
    known = number in errno.errorcode or number == EHWPOISON
    text = f"{errno_name(number)} ({os.strerror(number)})" if known else errno_name(number)
    meaning = hint(name, number)
    return f"{text}: {meaning}" if meaning else text
