# SPDX-License-Identifier: Apache-2.0
"""Names that the decoder takes from rooms it does not know: MSRs, registers, policies, features."""

from __future__ import annotations

from collections.abc import Callable

from kvmpy.coco.policy import SevPolicy, SnpPolicy
from kvmpy.core.sev_errors import firmware_meaning
from kvmpy.debug.decode.decoder import Decoder
from kvmpy.x86 import apic, msrs
from kvmpy.x86.bits import bit_words, cr0_words, cr4_words, efer_words, rflags_words
from kvmpy.x86.hyperv import HvCall, HvControl
from kvmpy.x86.vmsa import SevFeature


def sev_policy_words(value: int) -> str:
    """Return the policy of an SEV or SEV-ES guest as words."""
    return _policy_words(SevPolicy.from_int, value)


def snp_policy_words(value: int) -> str:
    """Return the policy of an SNP guest as words."""
    return _policy_words(SnpPolicy.from_int, value)


def _policy_words(read: Callable[[int], object], value: int) -> str:
    try:
        return str(read(value)).partition(" ")[2].strip("()")
    except ValueError as error:
        return str(error)


def feature_words(value: int) -> str:
    """Return SEV features as words."""
    return " ".join(bit_words(SevFeature, value))


def hyperv_call_words(value: int) -> str:
    """Return the control word of a Hyper-V hypercall as words, empty where the code has no name."""
    names = {int(call): name for name, call in HvCall.__members__.items()}
    name = names.get(value & 0xFFFF, "")
    return f"{name} fast" if name and value & HvControl.HV_HYPERCALL_FAST_BIT else name


NAMES: dict[tuple[str, str], Callable[[int], str]] = {
    ("kvm_msr_entry", "index"): msrs.name,
    ("kvm_msr_list", "indices"): msrs.name,
    ("kvm_msr_filter_range", "base"): msrs.name,
    ("kvm_run__msr", "index"): msrs.name,
    ("kvm_hyperv_exit__u__synic", "msr"): msrs.name,
    ("kvm_hyperv_exit__u__syndbg", "msr"): msrs.name,
    ("kvm_hyperv_exit__u__hcall", "input"): hyperv_call_words,
    ("kvm_regs", "rflags"): rflags_words,
    ("kvm_sregs", "cr0"): cr0_words,
    ("kvm_sregs", "cr4"): cr4_words,
    ("kvm_sregs", "efer"): efer_words,
    ("kvm_sregs2", "cr0"): cr0_words,
    ("kvm_sregs2", "cr4"): cr4_words,
    ("kvm_sregs2", "efer"): efer_words,
    ("kvm_sev_launch_start", "policy"): sev_policy_words,
    ("kvm_sev_guest_status", "policy"): sev_policy_words,
    ("kvm_sev_receive_start", "policy"): sev_policy_words,
    ("kvm_sev_send_start", "policy"): sev_policy_words,
    ("kvm_sev_snp_launch_start", "policy"): snp_policy_words,
    ("kvm_sev_init", "vmsa_features"): feature_words,
}


def lapic_words(state: bytes) -> str:
    """Return the registers of a local APIC that are not 0."""
    values = {
        name: int.from_bytes(state[offset : offset + 4], "little") for offset, name in apic.REGISTERS.items()
    }
    return ", ".join(f"{name}={value:#x}" for name, value in values.items() if value)


ARRAYS = {("kvm_lapic_state", "regs"): lapic_words}


def decoder(*, full: bool = False) -> Decoder:
    """Return a decoder that knows every name kvmpy has."""
    return Decoder(NAMES, firmware=firmware_meaning, arrays=ARRAYS, full=full)
