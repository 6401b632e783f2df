# SPDX-License-Identifier: Apache-2.0
"""The declaration files in the order in which cffi and the C compiler read them (plain data: build.py runs this file)."""

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
