# SPDX-License-Identifier: Apache-2.0
"""The declaration files in the order in which cffi and the C compiler read them (plain data for build.py).

Types that are nameless in the kernel's headers carry a tag here, the path to the member with ``__`` between
its parts (``struct kvm_run__io``): cffi cannot ask the compiler about the layout of a nameless type.
"""

FILES = (
    "regs.h",
    "cpuid_msr.h",
    "events.h",
    "memory.h",
    "irq.h",
    "xen.h",
    "nested.h",
    "device.h",
    "run.h",
    "sev.h",
    "tdx.h",
    "para.h",
    "psp_sev.h",
    "userfaultfd.h",
)

PACKED_FILES = ("psp_sev_packed.h",)
