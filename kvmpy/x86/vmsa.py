# SPDX-License-Identifier: Apache-2.0
"""The VM save area of SEV-ES and SEV-SNP: where a vCPU's state lies in its encrypted page.

AMD APM volume 2, appendix B, table B-4 (Linux: struct sev_es_save_area). Fields carry Linux's names; a
segment's parts are called ``cs.selector``, ``cs.attrib``, ``cs.limit``, ``cs.base``.
"""

from __future__ import annotations

from enum import IntFlag

from kvmpy.x86.save_area import Layout, Place, row

VMSA_SIZE = 4096
SAVE_AREA_END = 0x670
"""The fields end here; the rest of the page is state of branch and instruction sampling."""

SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr")
SEGMENT_SIZE = 16


class SevFeature(IntFlag):
    """``sev_features``: APM volume 2, table B-4, offset 3B0h; those of KVM_SEV_INIT2's vmsa_features too."""

    SNP_ACTIVE = 1 << 0
    VTOM = 1 << 1
    REFLECT_VC = 1 << 2
    RESTRICTED_INJECTION = 1 << 3
    ALTERNATE_INJECTION = 1 << 4
    DEBUG_SWAP = 1 << 5
    PREVENT_HOST_IBS = 1 << 6
    BTB_ISOLATION = 1 << 7
    VMPL_SSS = 1 << 8
    SECURE_TSC = 1 << 9
    VMGEXIT_PARAMETER = 1 << 10
    IBS_VIRTUALIZATION = 1 << 12
    VMSA_REG_PROT = 1 << 14
    SMT_PROTECTION = 1 << 15


class SegmentAttribute(IntFlag):
    """``attrib`` of a segment: bits 55:52 and 47:40 of a descriptor, put together."""

    A = 1 << 0
    RW = 1 << 1
    CE = 1 << 2
    CODE = 1 << 3
    S = 1 << 4
    DPL1 = 1 << 5
    DPL2 = 1 << 6
    P = 1 << 7
    AVL = 1 << 8
    L = 1 << 9
    DB = 1 << 10
    G = 1 << 11


def _segment(name: str, offset: int) -> list[Place]:
    return [
        Place(f"{name}.selector", offset, 2),
        Place(f"{name}.attrib", offset + 2, 2),
        Place(f"{name}.limit", offset + 4, 4),
        Place(f"{name}.base", offset + 8, 8),
    ]


_SEGMENTS = [place for number, name in enumerate(SEGMENTS) for place in _segment(name, number * SEGMENT_SIZE)]

VMSA = Layout(
    "vmsa",
    VMSA_SIZE,
    [
        *_SEGMENTS,
        *row(0x0A0, 8, "pl0_ssp", "pl1_ssp", "pl2_ssp", "pl3_ssp", "u_cet"),
        *row(0x0CA, 1, "vmpl", "cpl"),
        Place("efer", 0x0D0, 8),
        *row(0x140, 8, "xss", "cr4", "cr3", "cr0", "dr7", "dr6", "rflags", "rip"),
        *row(0x180, 8, "dr0", "dr1", "dr2", "dr3"),
        *row(0x1A0, 8, "dr0_addr_mask", "dr1_addr_mask", "dr2_addr_mask", "dr3_addr_mask"),
        *row(0x1D8, 8, "rsp", "s_cet", "ssp", "isst_addr", "rax"),
        *row(0x200, 8, "star", "lstar", "cstar", "sfmask", "kernel_gs_base"),
        *row(0x228, 8, "sysenter_cs", "sysenter_esp", "sysenter_eip", "cr2"),
        *row(0x268, 8, "g_pat", "dbgctl", "br_from", "br_to", "last_excp_from", "last_excp_to"),
        Place("spec_ctrl", 0x2E0, 8),
        *row(0x2E8, 4, "pkru", "tsc_aux"),
        *row(0x2F0, 8, "tsc_scale", "tsc_offset"),
        *row(0x308, 8, "rcx", "rdx", "rbx", "", "rbp", "rsi", "rdi"),
        *row(0x340, 8, "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
        *row(0x390, 8, "guest_exit_info_1", "guest_exit_info_2", "guest_exit_int_info", "guest_nrip"),
        *row(0x3B0, 8, "sev_features", "vintr_ctrl", "guest_exit_code", "virtual_tom"),
        *row(0x3D0, 8, "tlb_id", "pcpu_id", "event_inj", "xcr0"),
        Place("x87_dp", 0x400, 8),
        Place("mxcsr", 0x408, 4),
        *row(0x40C, 2, "x87_ftw", "x87_fsw", "x87_fcw", "x87_fop", "x87_ds", "x87_cs"),
        Place("x87_rip", 0x418, 8),
        Place("fpreg_x87", 0x420, 80),
        Place("fpreg_xmm", 0x470, 256),
        Place("fpreg_ymm", 0x570, 256),
    ],
)
"""Every field of the page by name."""
