# SPDX-License-Identifier: Apache-2.0
"""Names of CPUID feature bits, as Linux calls them (X86_FEATURE_*, KVM_FEATURE_*; v7.2)."""

from __future__ import annotations

# Names from bit 0 upwards, "." for a bit without one.
_TABLE = {
    (0x1, 0, "ecx"): """
        XMM3 PCLMULQDQ DTES64 MWAIT DSCPL VMX SMX EST TM2 SSSE3 CID SDBG FMA CX16 XTPR PDCM . PCID
        DCA XMM4_1 XMM4_2 X2APIC MOVBE POPCNT TSC_DEADLINE_TIMER AES XSAVE OSXSAVE AVX F16C RDRAND
        HYPERVISOR
    """,
    (0x1, 0, "edx"): """
        FPU VME DE PSE TSC MSR PAE MCE CX8 APIC . SEP MTRR PGE MCA CMOV PAT PSE36 PN CLFLUSH . DS
        ACPI MMX FXSR XMM XMM2 SELFSNOOP HT ACC IA64 PBE
    """,
    (0x6, 0, "eax"): """
        DTHERM IDA ARAT . PLN . PTS HWP HWP_NOTIFY HWP_ACT_WINDOW HWP_EPP HWP_PKG_REQ . . .
        HWP_HIGHEST_PERF_CHANGE . . . HFI
    """,
    (0x7, 0, "ebx"): """
        FSGSBASE TSC_ADJUST SGX BMI1 HLE AVX2 FDP_EXCPTN_ONLY SMEP BMI2 ERMS INVPCID RTM CQM
        ZERO_FCS_FDS MPX RDT_A AVX512F AVX512DQ RDSEED ADX SMAP AVX512IFMA . CLFLUSHOPT CLWB
        INTEL_PT AVX512PF AVX512ER AVX512CD SHA_NI AVX512BW AVX512VL
    """,
    (0x7, 0, "ecx"): """
        . AVX512VBMI UMIP PKU OSPKE WAITPKG AVX512_VBMI2 SHSTK GFNI VAES VPCLMULQDQ AVX512_VNNI
        AVX512_BITALG TME AVX512_VPOPCNTDQ . LA57 . . . . . RDPID . BUS_LOCK_DETECT CLDEMOTE .
        MOVDIRI MOVDIR64B ENQCMD SGX_LC
    """,
    (0x7, 0, "edx"): """
        . . AVX512_4VNNIW AVX512_4FMAPS FSRM . . . AVX512_VP2INTERSECT SRBDS_CTRL MD_CLEAR
        RTM_ALWAYS_ABORT . TSX_FORCE_ABORT SERIALIZE HYBRID_CPU TSXLDTRK . PCONFIG ARCH_LBR IBT .
        AMX_BF16 AVX512_FP16 AMX_TILE AMX_INT8 SPEC_CTRL INTEL_STIBP FLUSH_L1D ARCH_CAPABILITIES
        CORE_CAPABILITIES SPEC_CTRL_SSBD
    """,
    (0x7, 1, "eax"): """
        SHA512 SM3 SM4 . AVX_VNNI AVX512_BF16 LASS CMPCCXADD ARCH_PERFMON_EXT . FZRM FSRS FSRC . . .
        . FRED LKGS WRMSRNS . AMX_FP16 . AVX_IFMA . . LAM . . . . MOVRS
    """,
    (0x7, 1, "ecx"): """
        . . . . . MSR_IMM
    """,
    (0x7, 1, "edx"): """
        . . . . AVX_VNNI_INT8 AVX_NE_CONVERT . . AMX_COMPLEX . AVX_VNNI_INT16 . . . PREFETCHITI . .
        . . AVX10
    """,
    (0x7, 2, "edx"): """
        INTEL_PSFD IPRED_CTRL RRSBA_CTRL DDPD_U BHI_CTRL MCDT_NO
    """,
    (0xD, 1, "eax"): """
        XSAVEOPT XSAVEC XGETBV1 XSAVES XFD
    """,
    (0x12, 0, "eax"): """
        SGX1 SGX2 . . . . . . . . . SGX_EDECCSSA
    """,
    (0x1E, 1, "eax"): """
        AMX_INT8_ALIAS AMX_BF16_ALIAS AMX_COMPLEX_ALIAS AMX_FP16_ALIAS AMX_FP8 . AMX_TF32 AMX_AVX512
        AMX_MOVRS
    """,
    (0x24, 0, "ebx"): """
        . . . . . . . . . . . . . . . . AVX10_128 AVX10_256 AVX10_512
    """,
    (0x24, 1, "ecx"): """
        . . AVX10_VNNI_INT
    """,
    (0x4000_0001, 0, "eax"): """
        KVM_CLOCKSOURCE KVM_NOP_IO_DELAY KVM_MMU_OP KVM_CLOCKSOURCE2 KVM_ASYNC_PF KVM_STEAL_TIME
        KVM_PV_EOI KVM_PV_UNHALT . KVM_PV_TLB_FLUSH KVM_ASYNC_PF_VMEXIT KVM_PV_SEND_IPI
        KVM_POLL_CONTROL KVM_PV_SCHED_YIELD KVM_ASYNC_PF_INT KVM_MSI_EXT_DEST_ID
        KVM_HC_MAP_GPA_RANGE KVM_MIGRATION_CONTROL . . . . . . KVM_CLOCKSOURCE_STABLE
    """,
    (0x4000_0001, 0, "edx"): """
        KVM_HINTS_REALTIME
    """,
    (0x8000_0001, 0, "ecx"): """
        LAHF_LM CMP_LEGACY SVM EXTAPIC CR8_LEGACY ABM SSE4A MISALIGNSSE 3DNOWPREFETCH OSVW IBS XOP
        SKINIT WDT . LWP FMA4 TCE . NODEID_MSR . TBM TOPOEXT PERFCTR_CORE PERFCTR_NB . BPEXT PTSC
        PERFCTR_LLC MWAITX
    """,
    (0x8000_0001, 0, "edx"): """
        . . . . . . . . . . . SYSCALL . . . . . . . MP NX . MMXEXT . . FXSR_OPT GBPAGES RDTSCP . LM
        3DNOWEXT 3DNOW
    """,
    (0x8000_0007, 0, "ebx"): """
        OVERFLOW_RECOV SUCCOR CPPC_PERF_PRIO SMCA
    """,
    (0x8000_0007, 0, "edx"): """
        . . . . . . . . CONSTANT_TSC
    """,
    (0x8000_0008, 0, "ebx"): """
        CLZERO IRPERF XSAVEERPTR INVLPGB RDPRU . . . . WBNOINVD . . AMD_IBPB . AMD_IBRS AMD_STIBP .
        AMD_STIBP_ALWAYS_ON . AMD_IBRS_SAME_MODE EFER_LMSLE_MBZ . . AMD_PPIN AMD_SSBD VIRT_SSBD
        AMD_SSB_NO CPPC AMD_PSFD BTC_NO AMD_IBPB_RET BRS
    """,
    (0x8000_000A, 0, "edx"): """
        NPT LBRV SVML NRIPS TSCRATEMSR VMCBCLEAN FLUSHBYASID DECODEASSISTS . . PAUSEFILTER .
        PFTHRESHOLD AVIC . V_VMSAVE_VMLOAD VGIF GMET X2AVIC . V_SPEC_CTRL . . . . VNMI . .
        SVME_ADDR_CHK BUS_LOCK_THRESHOLD IDLE_HLT
    """,
    (0x8000_001F, 0, "eax"): """
        SME SEV VM_PAGE_FLUSH SEV_ES SEV_SNP . . . SNP_SECURE_TSC V_TSC_AUX SME_COHERENT . . .
        DEBUG_SWAP . . . . . . RMPREAD . SEGMENTED_RMP . . . ALLOWED_SEV_FEATURES SVSM .
        HV_INUSE_WR_ALLOWED
    """,
    (0x8000_0021, 0, "eax"): """
        NO_NESTED_DATA_BP WRMSR_XX_BASE_NS LFENCE_RDTSC . TLBSYNC_SFW_NO VERW_CLEAR
        NULL_SEL_CLR_BASE . AUTOIBRS NO_SMM_CTL_MSR . . . . . . . GP_ON_USER_CPUID . . PREFETCHI . .
        AVX512_BMM ERAPS . . SBPB IBPB_BRTYPE SRSO_NO SRSO_USER_KERNEL_NO SRSO_BP_SPEC_REDUCE
    """,
    (0x8000_0021, 0, "ecx"): """
        . TSA_SQ_NO TSA_L1_NO
    """,
    (0x8000_0022, 0, "eax"): """
        PERFMON_V2
    """,
}

Word = tuple[int, int, str]
"""A register of a CPUID leaf: function, index, ``eax`` to ``edx``."""

BITS: dict[Word, dict[int, str]] = {
    word: {bit: name for bit, name in enumerate(names.split()) if name != "."}
    for word, names in _TABLE.items()
}
"""Names of feature bits by register and bit."""

FEATURES: dict[str, tuple[Word, int]] = {
    name: (word, bit) for word, names in BITS.items() for bit, name in names.items()
}
"""Where each feature is."""

ALIASES = {
    "SSE": "XMM",
    "SSE2": "XMM2",
    "SSE3": "XMM3",
    "PNI": "XMM3",
    "SSE4_1": "XMM4_1",
    "SSE4_2": "XMM4_2",
    "PDPE1GB": "GBPAGES",
    "MONITOR": "MWAIT",
    "CLFSH": "CLFLUSH",
    "CET_SS": "SHSTK",
    "CET_IBT": "IBT",
}
"""Other names that are in use."""
