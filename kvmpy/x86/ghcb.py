# SPDX-License-Identifier: Apache-2.0
"""The guest-hypervisor communication block and its MSR protocol, as fields, numbers and words.

AMD's GHCB specification (publication 56421): section 2.3.1 for the MSR protocol, 2.6 for the page, 4 for the
events. Fields carry Linux's names (struct ghcb).
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from kvmpy.x86.bits import bit_words
from kvmpy.x86.exceptions import vc_reason
from kvmpy.x86.save_area import Layout, Place, row

GHCB_SIZE = 4096
SHARED_BUFFER_SIZE = 2032
GHCB_MSR = 0xC001_0130

GHCB = Layout(
    "ghcb",
    GHCB_SIZE,
    [
        Place("cpl", 0x0CB, 1),
        Place("xss", 0x140, 8),
        Place("dr7", 0x160, 8),
        Place("rip", 0x178, 8),
        Place("rsp", 0x1D8, 8),
        Place("rax", 0x1F8, 8),
        *row(0x308, 8, "rcx", "rdx", "rbx", "", "rbp", "rsi", "rdi"),
        *row(0x340, 8, "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
        *row(0x390, 8, "sw_exit_code", "sw_exit_info_1", "sw_exit_info_2", "sw_scratch"),
        Place("xcr0", 0x3E8, 8),
        Place("valid_bitmap", 0x3F0, 16),
        Place("x87_state_gpa", 0x400, 8),
        Place("shared_buffer", 0x800, SHARED_BUFFER_SIZE),
        Place("protocol_version", 0xFFA, 2),
        Place("ghcb_usage", 0xFFC, 4),
    ],
)
"""Every field of the page by name."""

_BITMAP = GHCB["valid_bitmap"]
BITMAP_END = _BITMAP.offset
"""Fields below this offset have a bit in ``valid_bitmap``: the offset's quadword."""


def valid_bit(name: str) -> int:
    """Return the number of the field's bit in ``valid_bitmap``; ValueError for a field that has none."""
    place = GHCB[name]
    if place.offset >= BITMAP_END:
        raise ValueError(f"ghcb.{name} has no bit in the valid bitmap")
    return place.offset // 8


def is_valid(page: bytes | bytearray | memoryview, name: str) -> bool:
    """Tell whether the bitmap of *page* declares the field valid."""
    bit = valid_bit(name)
    return bool(page[_BITMAP.offset + bit // 8] >> bit % 8 & 1)


def valid_fields(page: bytes | bytearray | memoryview) -> list[str]:
    """Return the fields that the bitmap of *page* declares valid; a bit without a field is ``quadword N``."""
    bits = int.from_bytes(page[_BITMAP.offset : _BITMAP.offset + _BITMAP.size], "little")
    names = {place.offset // 8: name for name, place in GHCB.places.items() if place.offset < BITMAP_END}
    return [names.get(bit, f"quadword {bit:#x}") for bit in range(_BITMAP.size * 8) if bits >> bit & 1]


def set_valid(page: bytearray | memoryview, name: str, value: int | bytes) -> None:
    """Write a field of *page* and set its bit in the bitmap."""
    bit = valid_bit(name)
    GHCB.write(page, name, value)
    page[_BITMAP.offset + bit // 8] |= 1 << bit % 8


class VmgExit(IntEnum):
    """``sw_exit_code`` of events that only software defines (section 4.1, table 6)."""

    MMIO_READ = 0x8000_0001
    MMIO_WRITE = 0x8000_0002
    NMI_COMPLETE = 0x8000_0003
    AP_HLT_LOOP = 0x8000_0004
    AP_JUMP_TABLE = 0x8000_0005
    PSC = 0x8000_0010
    GUEST_REQUEST = 0x8000_0011
    EXT_GUEST_REQUEST = 0x8000_0012
    AP_CREATION = 0x8000_0013
    SNP_RUN_VMPL = 0x8000_0018
    SAVIC = 0x8000_001A
    HV_FEATURES = 0x8000_FFFD
    TERM_REQUEST = 0x8000_FFFE
    UNSUPPORTED_EVENT = 0x8000_FFFF


def event_name(exit_code: int) -> str:
    """Return what a ``sw_exit_code`` asks for: ``PSC``, or the instruction or event that was intercepted."""
    return VmgExit(exit_code).name if exit_code in list(VmgExit) else vc_reason(exit_code)


class InputError(IntEnum):
    """``sw_exit_info_2`` where the low half of ``sw_exit_info_1`` is 2: malformed input (section 4.1)."""

    NOT_REGISTERED = 1
    INVALID_USAGE = 2
    INVALID_SCRATCH_AREA = 3
    MISSING_INPUT = 4
    INVALID_INPUT = 5
    INVALID_EVENT = 6


class HvFeature(IntFlag):
    """The hypervisor's features (event HV_FEATURES and its MSR form)."""

    SNP = 1 << 0
    SNP_AP_CREATION = 1 << 1
    RESTRICTED_INJECTION = 1 << 2
    RESTRICTED_INJECTION_TIMER = 1 << 3
    APIC_ID_LIST = 1 << 4
    MULTI_VMPL = 1 << 5


class PageOperation(IntEnum):
    """What a page state change asks for."""

    PRIVATE = 1
    SHARED = 2
    PSMASH = 3
    UNSMASH = 4


class MsrInfo(IntEnum):
    """Low 12 bits of the GHCB MSR: what the rest is; 0 is the GPA of the page."""

    GPA = 0x000
    SEV_INFO_RESP = 0x001
    SEV_INFO_REQ = 0x002
    CPUID_REQ = 0x004
    CPUID_RESP = 0x005
    AP_RESET_HOLD_REQ = 0x006
    AP_RESET_HOLD_RESP = 0x007
    PREF_GPA_REQ = 0x010
    PREF_GPA_RESP = 0x011
    REG_GPA_REQ = 0x012
    REG_GPA_RESP = 0x013
    PSC_REQ = 0x014
    PSC_RESP = 0x015
    VMPL_REQ = 0x016
    VMPL_RESP = 0x017
    HV_FT_REQ = 0x080
    HV_FT_RESP = 0x081
    TERM_REQ = 0x100


TERMINATION: dict[tuple[int, int], str] = {
    (0, 0): "general termination request",
    (0, 1): "SEV-ES/GHCB protocol not supported",
    (0, 2): "SEV-SNP features not supported",
    (1, 0): "Linux: the GHCB's GPA could not be registered",
    (1, 1): "Linux: page state change failed",
    (1, 2): "Linux: PVALIDATE failed",
    (1, 3): "Linux: the guest does not run at VMPL 0",
    (1, 4): "Linux: CPUID validation failed",
    (1, 5): "Linux: CPUID from the hypervisor failed",
    (1, 6): "Linux: the secrets page is bad",
    (1, 7): "Linux: no SVSM in the secrets page",
    (1, 8): "Linux: the SVSM put the guest at VMPL 0",
    (1, 9): "Linux: the SVSM's calling area is not page aligned",
    (1, 10): "Linux: Secure TSC could not be set up",
    (1, 11): "Linux: the SVSM's calling area could not be mapped again",
    (1, 12): "Linux: Secure AVIC failed",
    (5, 1): "kvmpy: the hypervisor does not know this GHCB's GPA as the registered one",
    (5, 2): "kvmpy: the hypervisor did not take the request out of the GHCB",
    (5, 3): "kvmpy: the hypervisor refused the port write of a ucall",
}
"""Meaning of a termination request by (reason set, reason)."""

_REGISTERS = ("EAX", "EBX", "ECX", "EDX")
_NO_GPA = (1 << 52) - 1


def termination(reason_set: int, reason: int) -> str:
    """Return what a termination request of the guest says."""
    return TERMINATION.get((reason_set, reason), f"reason {reason:#x} of set {reason_set:#x}")


def termination_words(data: tuple[int, ...]) -> str:
    """Return what the data of KVM_SYSTEM_EVENT_SEV_TERM say: the request in the GHCB MSR, or the GPA of the
    page that holds it.
    """
    value = data[0] if data else 0
    if value & 0xFFF == MsrInfo.TERM_REQ:
        return termination(value >> 12 & 0xF, value >> 16 & 0xFF)
    if value & 0xFFF:
        return f"the hypervisor refuses its request {msr_words(value)}"
    return f"by TERM_REQUEST in the GHCB at {value:#x}"


def _msr_details(info: int, value: int) -> str:
    data = value >> 12
    high = value >> 32
    if info == MsrInfo.SEV_INFO_RESP:
        return f"protocol {value >> 32 & 0xFFFF} to {value >> 48}, C-bit {value >> 24 & 0xFF}"
    if info in (MsrInfo.CPUID_REQ, MsrInfo.CPUID_RESP):
        register = _REGISTERS[value >> 30 & 3]
        return f"leaf {high:#x}, {register}" if info == MsrInfo.CPUID_REQ else f"{register} = {high:#x}"
    if info == MsrInfo.PSC_REQ:
        operation = value >> 52 & 0xF
        known = operation in list(PageOperation)
        words = PageOperation(operation).name.lower() if known else f"operation {operation:#x}"
        return f"gfn {data & (1 << 40) - 1:#x} to {words}"
    if info in (MsrInfo.PSC_RESP, MsrInfo.VMPL_RESP):
        return f"result {high:#x}"
    if info == MsrInfo.VMPL_REQ:
        return f"VMPL {high & 0xFF}"
    if info == MsrInfo.HV_FT_RESP:
        return f"features {' '.join(bit_words(HvFeature, data)) or 'none'}"
    if info == MsrInfo.TERM_REQ:
        return termination(value >> 12 & 0xF, value >> 16 & 0xFF)
    if info == MsrInfo.AP_RESET_HOLD_RESP:
        return f"result {data:#x}"
    if info in (MsrInfo.PREF_GPA_RESP, MsrInfo.REG_GPA_RESP) and data == _NO_GPA:
        return "no GPA"
    if info in (MsrInfo.GPA, MsrInfo.PREF_GPA_RESP, MsrInfo.REG_GPA_REQ, MsrInfo.REG_GPA_RESP):
        return f"GPA {data << 12:#x}"
    return f"data {data:#x}" if data else ""


def msr_words(value: int) -> str:
    """Return what a value of the GHCB MSR says, such as ``PSC_REQ: gfn 0x100 to private``."""
    info = value & 0xFFF
    name = MsrInfo(info).name if info in list(MsrInfo) else f"info {info:#x}"
    details = _msr_details(info, value)
    return f"{name}: {details}" if details else name
