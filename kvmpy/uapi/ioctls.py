# SPDX-License-Identifier: Apache-2.0
"""Every KVM ioctl of x86 Linux 7.2, and those of /dev/sev and userfaultfd: the table that everything reads.

``IOCTLS`` maps names to entries, ``BY_NR`` request numbers; every entry is a module attribute too.
Capabilities and directions follow Documentation/virt/kvm/api.rst and what the kernel does with the argument.
guest_memfd, the dirty ring and statistics descriptors have no ioctls of their own: KVM_CREATE_GUEST_MEMFD,
KVM_CAP_DIRTY_LOG_RING and KVM_GET_STATS_FD make them.
"""

from __future__ import annotations

from typing import Any

from kvmpy.uapi import ffi
from kvmpy.uapi.buffer_type import Buffer, Size, bytes_at, fixed_at
from kvmpy.uapi.commands import (
    SEV_COMMANDS,
    SEV_PLATFORM_COMMANDS,
    TDX_COMMANDS,
    Command,
    SevCommand,
    SevPlatformCommand,
    TdxCommand,
)
from kvmpy.uapi.constants import (
    KVM_CAP_VM_COPY_ENC_CONTEXT_FROM,
    KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM,
    KVM_CREATE_DEVICE_TEST,
    KVM_IOEVENTFD_FLAG_DEASSIGN,
    KVM_IRQFD_FLAG_DEASSIGN,
    KVM_IRQFD_FLAG_RESAMPLE,
    KVM_MEM_GUEST_MEMFD,
    Cap,
    VmType,
)
from kvmpy.uapi.ioctl_type import (
    NONE,
    READ,
    WRITE,
    ArgKind,
    FdField,
    FdKind,
    Ioctl,
    Lasting,
    Request,
    decode,
    encode,
)

__all__ = [
    "BY_NR",
    "IOCTLS",
    "MAKERS",
    "SETS_SLOT",
    "SEV_COMMANDS",
    "SEV_PLATFORM_COMMANDS",
    "TDX_COMMANDS",
    "ArgKind",
    "Command",
    "FdField",
    "FdKind",
    "Ioctl",
    "Lasting",
    "Request",
    "SevCommand",
    "SevPlatformCommand",
    "TdxCommand",
    "decode",
    "encode",
]

KVMIO = 0xAE
UFFDIO = 0xAA
SEV_IOC_TYPE = ord("S")

Also = tuple[tuple[FdKind, str | None], ...]

_DIRECTION: dict[ArgKind, int] = {"none": NONE, "int": NONE, "out": READ, "in": WRITE, "inout": READ | WRITE}

IOCTLS: dict[str, Ioctl] = {}


def _io(
    name: str,
    fd: FdKind,
    how: ArgKind,
    number: int,
    pointee: str | None,
    cap: str | None,
    doc: str,
    also: Also = (),
    *,
    arg: ArgKind | None = None,
    encoded: str | None = None,
    kind: int = KVMIO,
    asks: bool | None = None,
    **more: Any,
) -> Ioctl:
    # The number says `how`; `arg` is given where the truth differs, `encoded` where the size does. What is
    # called GET asks, unless `asks` says otherwise. *more* are further fields of the entry.
    scalar = pointee if pointee is not None and pointee.endswith("_t") else None
    struct = None if scalar else pointee
    direction = _DIRECTION[how]
    size = ffi.sizeof(encoded or scalar or f"struct {struct}") if direction else 0
    nr = encode(direction, kind, number, size)
    asks = "_GET_" in name if asks is None else asks
    entry = Ioctl(name, nr, fd, struct, arg or how, cap, doc, scalar, also, asks=asks, **more)
    IOCTLS[name] = entry
    return entry


# fmt: off
# /dev/kvm
KVM_GET_API_VERSION = _io("KVM_GET_API_VERSION", "system", "none", 0x00, None, None,
    "Return the API version, 12.")
KVM_CREATE_VM = _io("KVM_CREATE_VM", "system", "int", 0x01, None, None,
    "Create a VM of the given type; returns its file descriptor.", makes="vm",
    names=VmType, made_name="vm{count}")
KVM_CHECK_EXTENSION = _io("KVM_CHECK_EXTENSION", "system", "int", 0x03, None, None,
    "Return what KVM offers of a capability.", (("vm", "KVM_CAP_CHECK_EXTENSION_VM"),), asks=True, names=Cap)
KVM_GET_VCPU_MMAP_SIZE = _io("KVM_GET_VCPU_MMAP_SIZE", "system", "none", 0x04, None, None,
    "Return the size of the mapping of a vCPU.")
KVM_GET_MSR_INDEX_LIST = _io("KVM_GET_MSR_INDEX_LIST", "system", "inout", 0x02, "kvm_msr_list", None,
    "List the MSRs that KVM saves and restores.", fills=True)
KVM_GET_SUPPORTED_CPUID = _io("KVM_GET_SUPPORTED_CPUID", "system", "inout", 0x05, "kvm_cpuid2",
    "KVM_CAP_EXT_CPUID", "Read the CPUID that KVM and the host support.", volatile=("entries",), fills=True)
KVM_GET_EMULATED_CPUID = _io("KVM_GET_EMULATED_CPUID", "system", "inout", 0x09, "kvm_cpuid2",
    "KVM_CAP_EXT_EMUL_CPUID", "Read the CPUID features that KVM emulates.", fills=True)
KVM_GET_MSR_FEATURE_INDEX_LIST = _io("KVM_GET_MSR_FEATURE_INDEX_LIST", "system", "inout", 0x0A,
    "kvm_msr_list", "KVM_CAP_GET_MSR_FEATURES", "List the MSRs that describe features.", fills=True)
KVM_X86_GET_MCE_CAP_SUPPORTED = _io("KVM_X86_GET_MCE_CAP_SUPPORTED", "system", "out", 0x9D, "uint64_t",
    "KVM_CAP_MCE", "Read the machine check capabilities.")

# VM
KVM_CREATE_VCPU = _io("KVM_CREATE_VCPU", "vm", "int", 0x41, None, None,
    "Create the vCPU with the given id; returns its file descriptor.", makes="vcpu", made_name="vcpu{arg}")
KVM_GET_DIRTY_LOG = _io("KVM_GET_DIRTY_LOG", "vm", "in", 0x42, "kvm_dirty_log", None,
    "Read the bitmap of the pages written in a memory slot.", asks=False,
    pointers=(Buffer(None, "out", Size(special="slot-bitmap"), "dirty_bitmap"),))
KVM_SET_NR_MMU_PAGES = _io("KVM_SET_NR_MMU_PAGES", "vm", "int", 0x44, None,
    "KVM_CAP_MMU_SHADOW_CACHE_CONTROL", "Limit the shadow page tables.")
KVM_GET_NR_MMU_PAGES = _io("KVM_GET_NR_MMU_PAGES", "vm", "none", 0x45, None,
    "KVM_CAP_MMU_SHADOW_CACHE_CONTROL", "Read that limit; recent kernels lack it (ENOTTY).")
KVM_SET_USER_MEMORY_REGION = _io("KVM_SET_USER_MEMORY_REGION", "vm", "in", 0x46,
    "kvm_userspace_memory_region", "KVM_CAP_USER_MEMORY", "Add, move, change or delete a memory slot.",
    addresses=("userspace_addr",))
KVM_SET_TSS_ADDR = _io("KVM_SET_TSS_ADDR", "vm", "int", 0x47, None, "KVM_CAP_SET_TSS_ADDR",
    "Place three pages that VMX needs in guest memory.", lasting=Lasting())
KVM_SET_IDENTITY_MAP_ADDR = _io("KVM_SET_IDENTITY_MAP_ADDR", "vm", "in", 0x48, "uint64_t",
    "KVM_CAP_SET_IDENTITY_MAP_ADDR", "Place the identity map that VMX needs in guest memory.",
    lasting=Lasting())
KVM_SET_USER_MEMORY_REGION2 = _io("KVM_SET_USER_MEMORY_REGION2", "vm", "in", 0x49,
    "kvm_userspace_memory_region2", "KVM_CAP_USER_MEMORY2", "The same, with a guest_memfd behind the slot.",
    addresses=("userspace_addr",),
    fd_fields=(FdField("guest_memfd", "flags", KVM_MEM_GUEST_MEMFD, KVM_MEM_GUEST_MEMFD),))
KVM_CREATE_IRQCHIP = _io("KVM_CREATE_IRQCHIP", "vm", "none", 0x60, None, "KVM_CAP_IRQCHIP",
    "Create PIC, IOAPIC and local APICs inside KVM.", lasting=Lasting())
KVM_IRQ_LINE = _io("KVM_IRQ_LINE", "vm", "in", 0x61, "kvm_irq_level", "KVM_CAP_IRQCHIP",
    "Set the level of an interrupt line.")
KVM_GET_IRQCHIP = _io("KVM_GET_IRQCHIP", "vm", "inout", 0x62, "kvm_irqchip", "KVM_CAP_IRQCHIP",
    "Read the state of an interrupt controller.")
KVM_SET_IRQCHIP = _io("KVM_SET_IRQCHIP", "vm", "out", 0x63, "kvm_irqchip", "KVM_CAP_IRQCHIP",
    "Write the state of an interrupt controller.", arg="in")
KVM_CREATE_PIT = _io("KVM_CREATE_PIT", "vm", "none", 0x64, None, "KVM_CAP_PIT",
    "Create the timer, older form.")
KVM_GET_PIT = _io("KVM_GET_PIT", "vm", "inout", 0x65, "kvm_pit_state", "KVM_CAP_PIT",
    "Read the timer's state, older form.", volatile=("",))
KVM_SET_PIT = _io("KVM_SET_PIT", "vm", "out", 0x66, "kvm_pit_state", "KVM_CAP_PIT",
    "Write the timer's state, older form.", arg="in")
KVM_IRQ_LINE_STATUS = _io("KVM_IRQ_LINE_STATUS", "vm", "inout", 0x67, "kvm_irq_level",
    "KVM_CAP_IRQ_INJECT_STATUS", "Set an interrupt line and learn whether it was delivered.")
KVM_REGISTER_COALESCED_MMIO = _io("KVM_REGISTER_COALESCED_MMIO", "vm", "in", 0x67, "kvm_coalesced_mmio_zone",
    "KVM_CAP_COALESCED_MMIO", "Queue the writes of a range in a ring.",
    lasting=Lasting(("addr", "size", "pio")))
KVM_UNREGISTER_COALESCED_MMIO = _io("KVM_UNREGISTER_COALESCED_MMIO", "vm", "in", 0x68,
    "kvm_coalesced_mmio_zone", "KVM_CAP_COALESCED_MMIO", "Undo that.",
    lasting=Lasting(removes="KVM_REGISTER_COALESCED_MMIO"))
KVM_SET_GSI_ROUTING = _io("KVM_SET_GSI_ROUTING", "vm", "in", 0x6A, "kvm_irq_routing", "KVM_CAP_IRQ_ROUTING",
    "Replace the interrupt routing table.", lasting=Lasting(late=True))
KVM_REINJECT_CONTROL = _io("KVM_REINJECT_CONTROL", "vm", "none", 0x71, "kvm_reinject_control",
    "KVM_CAP_REINJECT_CONTROL", "Choose whether lost timer ticks are repeated.", arg="in")
KVM_IRQFD = _io("KVM_IRQFD", "vm", "in", 0x76, "kvm_irqfd", "KVM_CAP_IRQFD",
    "Bind an eventfd to an interrupt.",
    lasting=Lasting(("fd", "gsi"), KVM_IRQFD_FLAG_DEASSIGN, late=True),
    fd_fields=(FdField("fd"),
        FdField("resamplefd", "flags", KVM_IRQFD_FLAG_RESAMPLE, KVM_IRQFD_FLAG_RESAMPLE)))
KVM_CREATE_PIT2 = _io("KVM_CREATE_PIT2", "vm", "in", 0x77, "kvm_pit_config", "KVM_CAP_PIT2",
    "Create the timer.", lasting=Lasting())
KVM_SET_BOOT_CPU_ID = _io("KVM_SET_BOOT_CPU_ID", "vm", "int", 0x78, None, "KVM_CAP_SET_BOOT_CPU_ID",
    "Choose the bootstrap processor.", lasting=Lasting())
KVM_IOEVENTFD = _io("KVM_IOEVENTFD", "vm", "in", 0x79, "kvm_ioeventfd", "KVM_CAP_IOEVENTFD",
    "Bind an eventfd to an address that the guest writes.",
    fd_fields=(FdField("fd"),),
    lasting=Lasting(("addr", "len", "fd", "flags", "datamatch"), KVM_IOEVENTFD_FLAG_DEASSIGN, late=True))
KVM_XEN_HVM_CONFIG = _io("KVM_XEN_HVM_CONFIG", "vm", "in", 0x7A, "kvm_xen_hvm_config", "KVM_CAP_XEN_HVM",
    "Set the Xen hypercall page and features.", lasting=Lasting(),
    pointers=(
        Buffer(None, "in", Size(count="blob_size_32", unit=4096), "blob_addr_32"),
        Buffer(None, "in", Size(count="blob_size_64", unit=4096), "blob_addr_64"),
    ))
KVM_SET_CLOCK = _io("KVM_SET_CLOCK", "vm", "in", 0x7B, "kvm_clock_data", "KVM_CAP_ADJUST_CLOCK",
    "Set kvmclock.")
KVM_GET_CLOCK = _io("KVM_GET_CLOCK", "vm", "out", 0x7C, "kvm_clock_data", "KVM_CAP_ADJUST_CLOCK",
    "Read kvmclock.", volatile=("",))
KVM_GET_PIT2 = _io("KVM_GET_PIT2", "vm", "out", 0x9F, "kvm_pit_state2", "KVM_CAP_PIT_STATE2",
    "Read the timer's state.", volatile=("",))
KVM_SET_PIT2 = _io("KVM_SET_PIT2", "vm", "in", 0xA0, "kvm_pit_state2", "KVM_CAP_PIT_STATE2",
    "Write the timer's state.")
KVM_SIGNAL_MSI = _io("KVM_SIGNAL_MSI", "vm", "in", 0xA5, "kvm_msi", "KVM_CAP_SIGNAL_MSI",
    "Deliver a message signalled interrupt.")
KVM_SET_PMU_EVENT_FILTER = _io("KVM_SET_PMU_EVENT_FILTER", "vm", "in", 0xB2, "kvm_pmu_event_filter",
    "KVM_CAP_PMU_EVENT_FILTER", "Allow or deny events of the performance counters.",
    lasting=Lasting(late=True))
KVM_MEMORY_ENCRYPT_OP = _io("KVM_MEMORY_ENCRYPT_OP", "vm", "inout", 0xBA, "kvm_sev_cmd", None,
    "Issue a SEV command (kvm_sev_cmd) or a TDX one (kvm_tdx_cmd).", (("vcpu", None),),
    encoded="unsigned long", memory="inout", fd_fields=(FdField("sev_fd", seen=True),),
    select="id", commands=tuple(SEV_COMMANDS.values()))
KVM_MEMORY_ENCRYPT_REG_REGION = _io("KVM_MEMORY_ENCRYPT_REG_REGION", "vm", "out", 0xBB, "kvm_enc_region",
    None, "Pin memory that may become encrypted.", arg="in", addresses=("addr",))
KVM_MEMORY_ENCRYPT_UNREG_REGION = _io("KVM_MEMORY_ENCRYPT_UNREG_REGION", "vm", "out", 0xBC, "kvm_enc_region",
    None, "Undo that.", arg="in", addresses=("addr",))
KVM_HYPERV_EVENTFD = _io("KVM_HYPERV_EVENTFD", "vm", "in", 0xBD, "kvm_hyperv_eventfd",
    "KVM_CAP_HYPERV_EVENTFD", "Bind an eventfd to a Hyper-V connection.", fd_fields=(FdField("fd"),))
KVM_CLEAR_DIRTY_LOG = _io("KVM_CLEAR_DIRTY_LOG", "vm", "inout", 0xC0, "kvm_clear_dirty_log",
    "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", "Clear pages of the dirty log and protect them again.", arg="in",
    pointers=(Buffer(None, "in", Size(count="num_pages", per=8, round=8), "dirty_bitmap"),))
KVM_X86_SET_MSR_FILTER = _io("KVM_X86_SET_MSR_FILTER", "vm", "in", 0xC6, "kvm_msr_filter",
    "KVM_CAP_X86_MSR_FILTER", "Choose the MSRs whose accesses are denied.",
    pointers=tuple(
        Buffer(None, "in", Size(count=f"ranges[{number}].nmsrs", per=8, round=8), f"ranges[{number}].bitmap")
        for number in range(16)
    ))
KVM_RESET_DIRTY_RINGS = _io("KVM_RESET_DIRTY_RINGS", "vm", "none", 0xC7, None, "KVM_CAP_DIRTY_LOG_RING",
    "Take back harvested entries of all dirty rings; returns how many.")
KVM_XEN_HVM_GET_ATTR = _io("KVM_XEN_HVM_GET_ATTR", "vm", "inout", 0xC8, "kvm_xen_hvm_attr", "KVM_CAP_XEN_HVM",
    "Read a Xen attribute of the VM.")
KVM_XEN_HVM_SET_ATTR = _io("KVM_XEN_HVM_SET_ATTR", "vm", "in", 0xC9, "kvm_xen_hvm_attr", "KVM_CAP_XEN_HVM",
    "Write a Xen attribute of the VM.")
KVM_GET_STATS_FD = _io("KVM_GET_STATS_FD", "vm", "none", 0xCE, None, "KVM_CAP_BINARY_STATS_FD",
    "Return a file descriptor of statistics.", (("vcpu", "KVM_CAP_BINARY_STATS_FD"),),
    makes="stats", asks=False, made_name="stats")
KVM_XEN_HVM_EVTCHN_SEND = _io("KVM_XEN_HVM_EVTCHN_SEND", "vm", "in", 0xD0, "kvm_irq_routing_xen_evtchn",
    "KVM_CAP_XEN_HVM", "Deliver a Xen event.")
KVM_SET_MEMORY_ATTRIBUTES = _io("KVM_SET_MEMORY_ATTRIBUTES", "vm", "in", 0xD2, "kvm_memory_attributes",
    "KVM_CAP_MEMORY_ATTRIBUTES", "Make a range private or shared.")
KVM_CREATE_GUEST_MEMFD = _io("KVM_CREATE_GUEST_MEMFD", "vm", "inout", 0xD4, "kvm_create_guest_memfd",
    "KVM_CAP_GUEST_MEMFD", "Create guest memory that is a file; returns its descriptor.", arg="in",
    makes="gmem", made_name="gmem{count}")
KVM_CREATE_DEVICE = _io("KVM_CREATE_DEVICE", "vm", "inout", 0xE0, "kvm_create_device", "KVM_CAP_DEVICE_CTRL",
    "Create a device; its descriptor is in the struct.", makes="device", made_in="fd",
    made_name="device{type}", made_unless=("flags", KVM_CREATE_DEVICE_TEST))

# devices, and attributes of other objects
KVM_SET_DEVICE_ATTR = _io("KVM_SET_DEVICE_ATTR", "device", "in", 0xE1, "kvm_device_attr",
    "KVM_CAP_DEVICE_CTRL", "Write an attribute.", (("vcpu", "KVM_CAP_VCPU_ATTRIBUTES"),),
    pointers=(fixed_at("addr", 8, "in"),))
KVM_GET_DEVICE_ATTR = _io("KVM_GET_DEVICE_ATTR", "device", "in", 0xE2, "kvm_device_attr",
    "KVM_CAP_DEVICE_CTRL", "Read an attribute into addr.",
    (("vcpu", "KVM_CAP_VCPU_ATTRIBUTES"), ("system", "KVM_CAP_SYS_ATTRIBUTES")),
    pointers=(fixed_at("addr", 8, "out"),))
KVM_HAS_DEVICE_ATTR = _io("KVM_HAS_DEVICE_ATTR", "device", "in", 0xE3, "kvm_device_attr",
    "KVM_CAP_DEVICE_CTRL", "Learn whether an attribute exists.",
    (("vcpu", "KVM_CAP_VCPU_ATTRIBUTES"), ("system", "KVM_CAP_SYS_ATTRIBUTES")), asks=True)

# vCPU
KVM_RUN = _io("KVM_RUN", "vcpu", "none", 0x80, None, None, "Run the vCPU until it needs user space.",
    memory="inout")
KVM_GET_REGS = _io("KVM_GET_REGS", "vcpu", "out", 0x81, "kvm_regs", None, "Read the general registers.")
KVM_SET_REGS = _io("KVM_SET_REGS", "vcpu", "in", 0x82, "kvm_regs", None, "Write the general registers.")
KVM_GET_SREGS = _io("KVM_GET_SREGS", "vcpu", "out", 0x83, "kvm_sregs", None, "Read the system registers.")
KVM_SET_SREGS = _io("KVM_SET_SREGS", "vcpu", "in", 0x84, "kvm_sregs", None, "Write the system registers.")
KVM_TRANSLATE = _io("KVM_TRANSLATE", "vcpu", "inout", 0x85, "kvm_translation", None,
    "Translate a linear address through the guest's page tables.", asks=True, memory="in")
KVM_INTERRUPT = _io("KVM_INTERRUPT", "vcpu", "in", 0x86, "kvm_interrupt", None,
    "Queue an external interrupt, without an APIC in KVM.")
KVM_GET_MSRS = _io("KVM_GET_MSRS", "vcpu", "inout", 0x88, "kvm_msrs", None,
    "Read MSRs; returns how many. On /dev/kvm: those that describe features.",
    (("system", "KVM_CAP_GET_MSR_FEATURES"),))
KVM_SET_MSRS = _io("KVM_SET_MSRS", "vcpu", "in", 0x89, "kvm_msrs", None, "Write MSRs; returns how many.")
KVM_SET_CPUID = _io("KVM_SET_CPUID", "vcpu", "in", 0x8A, "kvm_cpuid", None, "Set the CPUID, older form.")
KVM_SET_SIGNAL_MASK = _io("KVM_SET_SIGNAL_MASK", "vcpu", "in", 0x8B, "kvm_signal_mask", None,
    "Set the signals that are blocked while the vCPU runs.")
KVM_GET_FPU = _io("KVM_GET_FPU", "vcpu", "out", 0x8C, "kvm_fpu", None, "Read the floating point state.")
KVM_SET_FPU = _io("KVM_SET_FPU", "vcpu", "in", 0x8D, "kvm_fpu", None, "Write the floating point state.")
KVM_GET_LAPIC = _io("KVM_GET_LAPIC", "vcpu", "out", 0x8E, "kvm_lapic_state", "KVM_CAP_IRQCHIP",
    "Read the local APIC.", volatile=("regs",))
KVM_SET_LAPIC = _io("KVM_SET_LAPIC", "vcpu", "in", 0x8F, "kvm_lapic_state", "KVM_CAP_IRQCHIP",
    "Write the local APIC.")
KVM_SET_CPUID2 = _io("KVM_SET_CPUID2", "vcpu", "in", 0x90, "kvm_cpuid2", "KVM_CAP_EXT_CPUID",
    "Set the CPUID that the guest sees.")
KVM_GET_CPUID2 = _io("KVM_GET_CPUID2", "vcpu", "inout", 0x91, "kvm_cpuid2", "KVM_CAP_EXT_CPUID",
    "Read the CPUID that the guest sees.", fills=True)
KVM_TPR_ACCESS_REPORTING = _io("KVM_TPR_ACCESS_REPORTING", "vcpu", "inout", 0x92, "kvm_tpr_access_ctl",
    "KVM_CAP_VAPIC", "Exit on accesses to the task priority.", lasting=Lasting())
KVM_SET_VAPIC_ADDR = _io("KVM_SET_VAPIC_ADDR", "vcpu", "in", 0x93, "kvm_vapic_addr", "KVM_CAP_VAPIC",
    "Place the shared task priority in guest memory.", lasting=Lasting())
KVM_GET_MP_STATE = _io("KVM_GET_MP_STATE", "vcpu", "out", 0x98, "kvm_mp_state", "KVM_CAP_MP_STATE",
    "Read whether the vCPU runs, halts or waits.")
KVM_SET_MP_STATE = _io("KVM_SET_MP_STATE", "vcpu", "in", 0x99, "kvm_mp_state", "KVM_CAP_MP_STATE",
    "Write that state.")
KVM_NMI = _io("KVM_NMI", "vcpu", "none", 0x9A, None, "KVM_CAP_USER_NMI", "Queue a non-maskable interrupt.")
KVM_SET_GUEST_DEBUG = _io("KVM_SET_GUEST_DEBUG", "vcpu", "in", 0x9B, "kvm_guest_debug",
    "KVM_CAP_SET_GUEST_DEBUG", "Set breakpoints and single stepping.", lasting=Lasting())
KVM_X86_SETUP_MCE = _io("KVM_X86_SETUP_MCE", "vcpu", "in", 0x9C, "uint64_t", "KVM_CAP_MCE",
    "Set the machine check capabilities.")
KVM_X86_SET_MCE = _io("KVM_X86_SET_MCE", "vcpu", "in", 0x9E, "kvm_x86_mce", "KVM_CAP_MCE",
    "Queue a machine check.")
KVM_GET_VCPU_EVENTS = _io("KVM_GET_VCPU_EVENTS", "vcpu", "out", 0x9F, "kvm_vcpu_events",
    "KVM_CAP_VCPU_EVENTS", "Read pending exceptions and interrupts.")
KVM_SET_VCPU_EVENTS = _io("KVM_SET_VCPU_EVENTS", "vcpu", "in", 0xA0, "kvm_vcpu_events", "KVM_CAP_VCPU_EVENTS",
    "Write pending exceptions and interrupts.")
KVM_GET_DEBUGREGS = _io("KVM_GET_DEBUGREGS", "vcpu", "out", 0xA1, "kvm_debugregs", "KVM_CAP_DEBUGREGS",
    "Read the debug registers.")
KVM_SET_DEBUGREGS = _io("KVM_SET_DEBUGREGS", "vcpu", "in", 0xA2, "kvm_debugregs", "KVM_CAP_DEBUGREGS",
    "Write the debug registers.")
KVM_SET_TSC_KHZ = _io("KVM_SET_TSC_KHZ", "vcpu", "int", 0xA2, None, "KVM_CAP_TSC_CONTROL",
    "Set the frequency of the time stamp counter.", (("vm", "KVM_CAP_VM_TSC_CONTROL"),), unit="kHz")
KVM_GET_TSC_KHZ = _io("KVM_GET_TSC_KHZ", "vcpu", "none", 0xA3, None, "KVM_CAP_GET_TSC_KHZ",
    "Return the frequency of the time stamp counter.", (("vm", "KVM_CAP_VM_TSC_CONTROL"),),
    volatile=("",), unit="kHz")
KVM_ENABLE_CAP = _io("KVM_ENABLE_CAP", "vcpu", "in", 0xA3, "kvm_enable_cap", "KVM_CAP_ENABLE_CAP",
    "Switch a capability on.", (("vm", "KVM_CAP_ENABLE_CAP_VM"),),
    lasting=Lasting(("cap",)),
    fd_fields=tuple(FdField("args[0]", "cap", 0xFFFF_FFFF, cap, seen=True) for cap in (
        KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM)))
KVM_GET_XSAVE = _io("KVM_GET_XSAVE", "vcpu", "out", 0xA4, "kvm_xsave", "KVM_CAP_XSAVE",
    "Read the extended state, its first 4 KiB.")
KVM_SET_XSAVE = _io("KVM_SET_XSAVE", "vcpu", "in", 0xA5, "kvm_xsave", "KVM_CAP_XSAVE",
    "Write the extended state.", size="xsave")
KVM_GET_XCRS = _io("KVM_GET_XCRS", "vcpu", "out", 0xA6, "kvm_xcrs", "KVM_CAP_XCRS",
    "Read the extended control registers.")
KVM_SET_XCRS = _io("KVM_SET_XCRS", "vcpu", "in", 0xA7, "kvm_xcrs", "KVM_CAP_XCRS",
    "Write the extended control registers.")
KVM_GET_ONE_REG = _io("KVM_GET_ONE_REG", "vcpu", "in", 0xAB, "kvm_one_reg", "KVM_CAP_ONE_REG",
    "Read one register into addr.",
    pointers=(Buffer(None, "out", Size(special="one-reg"), "addr"),))
KVM_SET_ONE_REG = _io("KVM_SET_ONE_REG", "vcpu", "in", 0xAC, "kvm_one_reg", "KVM_CAP_ONE_REG",
    "Write one register from addr.",
    pointers=(Buffer(None, "in", Size(special="one-reg"), "addr"),))
KVM_KVMCLOCK_CTRL = _io("KVM_KVMCLOCK_CTRL", "vcpu", "none", 0xAD, None, "KVM_CAP_KVMCLOCK_CTRL",
    "Tell the guest that it was paused.")
KVM_GET_REG_LIST = _io("KVM_GET_REG_LIST", "vcpu", "inout", 0xB0, "kvm_reg_list", "KVM_CAP_ONE_REG",
    "List the registers of KVM_GET_ONE_REG.", fills=True)
KVM_SMI = _io("KVM_SMI", "vcpu", "none", 0xB7, None, "KVM_CAP_X86_SMM",
    "Queue a system management interrupt.")
KVM_GET_NESTED_STATE = _io("KVM_GET_NESTED_STATE", "vcpu", "inout", 0xBE, "kvm_nested_state",
    "KVM_CAP_NESTED_STATE", "Read the state of a nested hypervisor.", fills=True)
KVM_SET_NESTED_STATE = _io("KVM_SET_NESTED_STATE", "vcpu", "in", 0xBF, "kvm_nested_state",
    "KVM_CAP_NESTED_STATE", "Write the state of a nested hypervisor.", memory="in")
KVM_GET_SUPPORTED_HV_CPUID = _io("KVM_GET_SUPPORTED_HV_CPUID", "vcpu", "inout", 0xC1, "kvm_cpuid2",
    "KVM_CAP_HYPERV_CPUID", "Read the Hyper-V leaves that KVM supports.",
    (("system", "KVM_CAP_SYS_HYPERV_CPUID"),), volatile=("entries",), fills=True)
KVM_XEN_VCPU_GET_ATTR = _io("KVM_XEN_VCPU_GET_ATTR", "vcpu", "inout", 0xCA, "kvm_xen_vcpu_attr",
    "KVM_CAP_XEN_HVM", "Read a Xen attribute of the vCPU.", volatile=("",))
KVM_XEN_VCPU_SET_ATTR = _io("KVM_XEN_VCPU_SET_ATTR", "vcpu", "in", 0xCB, "kvm_xen_vcpu_attr",
    "KVM_CAP_XEN_HVM", "Write a Xen attribute of the vCPU.")
KVM_GET_SREGS2 = _io("KVM_GET_SREGS2", "vcpu", "out", 0xCC, "kvm_sregs2", "KVM_CAP_SREGS2",
    "Read the system registers with the page directory pointers.")
KVM_SET_SREGS2 = _io("KVM_SET_SREGS2", "vcpu", "in", 0xCD, "kvm_sregs2", "KVM_CAP_SREGS2",
    "Write the system registers with the page directory pointers.")
KVM_GET_XSAVE2 = _io("KVM_GET_XSAVE2", "vcpu", "out", 0xCF, "kvm_xsave", "KVM_CAP_XSAVE2",
    "Read the extended state, all of it.", size="xsave")
KVM_PRE_FAULT_MEMORY = _io("KVM_PRE_FAULT_MEMORY", "vcpu", "inout", 0xD5, "kvm_pre_fault_memory",
    "KVM_CAP_PRE_FAULT_MEMORY", "Map guest memory before the guest touches it.")

# /dev/sev
SEV_ISSUE_CMD = _io("SEV_ISSUE_CMD", "sev", "inout", 0x00, "sev_issue_cmd", None,
    "Issue a command to the SEV firmware.", kind=SEV_IOC_TYPE, volatile=("data",),
    select="cmd", commands=tuple(SEV_PLATFORM_COMMANDS.values()))

# userfaultfd
USERFAULTFD_IOC_NEW = _io("USERFAULTFD_IOC_NEW", "uffd_dev", "int", 0x00, None, None,
    "Create a userfaultfd; the argument holds its flags.", kind=UFFDIO, makes="uffd")
UFFDIO_REGISTER = _io("UFFDIO_REGISTER", "uffd", "inout", 0x00, "uffdio_register", None, "Watch a range.",
    kind=UFFDIO)
UFFDIO_UNREGISTER = _io("UFFDIO_UNREGISTER", "uffd", "out", 0x01, "uffdio_range", None,
    "Watch a range no more.", arg="in", kind=UFFDIO)
UFFDIO_WAKE = _io("UFFDIO_WAKE", "uffd", "out", 0x02, "uffdio_range", None,
    "Wake the threads that wait for a range.", arg="in", kind=UFFDIO)
UFFDIO_COPY = _io("UFFDIO_COPY", "uffd", "inout", 0x03, "uffdio_copy", None,
    "Fill missing pages with a copy.", kind=UFFDIO,
    pointers=(bytes_at("src", "len", "in", guest=True),))
UFFDIO_ZEROPAGE = _io("UFFDIO_ZEROPAGE", "uffd", "inout", 0x04, "uffdio_zeropage", None,
    "Fill missing pages with zeros.", kind=UFFDIO)
UFFDIO_MOVE = _io("UFFDIO_MOVE", "uffd", "inout", 0x05, "uffdio_move", None,
    "Fill missing pages with pages from elsewhere.", kind=UFFDIO)
UFFDIO_WRITEPROTECT = _io("UFFDIO_WRITEPROTECT", "uffd", "inout", 0x06, "uffdio_writeprotect", None,
    "Write-protect a range or lift that.", arg="in", kind=UFFDIO)
UFFDIO_CONTINUE = _io("UFFDIO_CONTINUE", "uffd", "inout", 0x07, "uffdio_continue", None,
    "Map pages that the page cache holds.", kind=UFFDIO)
UFFDIO_POISON = _io("UFFDIO_POISON", "uffd", "inout", 0x08, "uffdio_poison", None,
    "Make a range raise SIGBUS.", kind=UFFDIO)
UFFDIO_API = _io("UFFDIO_API", "uffd", "inout", 0x3F, "uffdio_api", None,
    "Agree on the API and its features.", kind=UFFDIO)
# fmt: on

BY_NR: dict[int, Ioctl] = {entry.nr: entry for entry in IOCTLS.values()}

SETS_SLOT = frozenset(entry.nr for entry in IOCTLS.values() if "userspace_addr" in entry.addresses)
"""Request numbers that set a memory slot; their structs begin alike."""

MAKERS = {entry.nr: entry.makes for entry in IOCTLS.values() if entry.makes is not None}
"""What kind of object a request makes."""
