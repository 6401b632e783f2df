# SPDX-License-Identifier: Apache-2.0
"""What kvmpy knows of x86: page tables, segments, CPUID, MSRs, exceptions, registers, XSAVE, APIC."""
