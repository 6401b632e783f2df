# SPDX-License-Identifier: Apache-2.0
"""The virtual machine control block of SVM, and what an exit of its guest says.

AMD APM volume 2, appendix B: table B-1 for the control area, table B-2 for the state save area, which shares
its fields with the VMSA's beginning (:mod:`kvmpy.x86.vmsa`).  Fields carry Linux's names; the intercept
vectors are ``intercept_cr`` and so on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from kvmpy.x86 import exceptions, pferr
from kvmpy.x86.bits import bit_words
from kvmpy.x86.exceptions import Vector, vc_reason
from kvmpy.x86.save_area import Layout, Place, row
from kvmpy.x86.svm_exits import INTERCEPTS, SvmExit
from kvmpy.x86.vmsa import VMSA

VMCB_SIZE = 4096
SAVE_OFFSET = 0x400
"""Where the save area begins."""
MSRPM_SIZE = 0x2000
IOPM_SIZE = 0x3000
"""Bytes of the permission maps: two bits for an MSR, one for a port, set where it is intercepted."""

# The VMSA has more than the VMCB: what only encrypted guests have, and what no VMCB saves.
_NOT_IN_VMCB = frozenset(
    (
        *("pl0_ssp", "pl1_ssp", "pl2_ssp", "pl3_ssp", "u_cet", "vmpl", "xss"),
        *(f"dr{number}{part}" for number in range(4) for part in ("", "_addr_mask")),
    )
)
_SAVE_END = VMSA["spec_ctrl"].offset + VMSA["spec_ctrl"].size

VMCB = Layout(
    "vmcb",
    VMCB_SIZE,
    [
        *row(0x000, 4, "intercept_cr", "intercept_dr", "intercept_exceptions"),
        *row(0x00C, 4, "intercept_3", "intercept_4", "intercept_5"),
        *row(0x03C, 2, "pause_filter_thresh", "pause_filter_count"),
        *row(0x040, 8, "iopm_base_pa", "msrpm_base_pa", "tsc_offset"),
        Place("asid", 0x058, 4),
        *row(0x05C, 1, "tlb_ctl", "erap_ctl"),
        *row(0x060, 4, "int_ctl", "int_vector", "int_state"),
        *row(0x070, 8, "exit_code", "exit_info_1", "exit_info_2"),
        *row(0x088, 4, "exit_int_info", "exit_int_info_err"),
        *row(0x090, 8, "misc_ctl", "avic_vapic_bar", "ghcb_gpa"),
        *row(0x0A8, 4, "event_inj", "event_inj_err"),
        *row(0x0B0, 8, "nested_cr3", "misc_ctl2"),
        Place("clean", 0x0C0, 4),
        Place("next_rip", 0x0C8, 8),
        Place("insn_len", 0x0D0, 1),
        Place("insn_bytes", 0x0D1, 15),
        Place("avic_backing_page", 0x0E0, 8),
        *row(0x0F0, 8, "avic_logical_id", "avic_physical_id"),
        Place("vmsa_pa", 0x108, 8),
        Place("bus_lock_counter", 0x120, 2),
        *row(0x138, 8, "allowed_sev_features", "guest_sev_features"),
        *(
            Place(place.name, SAVE_OFFSET + place.offset, place.size)
            for place in VMSA.places.values()
            if place.name not in _NOT_IN_VMCB and place.offset < _SAVE_END
        ),
    ],
)
"""Every field of the page by name."""


class IntCtl(IntFlag):
    """``int_ctl``: bits 7:0 are V_TPR, bits 19:16 the priority of V_IRQ."""

    V_IRQ = 1 << 8
    V_GIF = 1 << 9
    V_NMI_PENDING = 1 << 11
    V_NMI_BLOCKING = 1 << 12
    V_IGN_TPR = 1 << 20
    V_INTR_MASKING = 1 << 24
    V_GIF_ENABLE = 1 << 25
    V_NMI_ENABLE = 1 << 26
    X2AVIC = 1 << 30
    AVIC = 1 << 31


class IntState(IntFlag):
    """``int_state``."""

    INTERRUPT_SHADOW = 1 << 0
    GUEST_INTERRUPT_MASK = 1 << 1


class MiscCtl(IntFlag):
    """``misc_ctl``."""

    NP = 1 << 0
    SEV = 1 << 1
    SEV_ES = 1 << 2
    GMET = 1 << 3


class MiscCtl2(IntFlag):
    """``misc_ctl2``."""

    LBR = 1 << 0
    VLS = 1 << 1


class Clean(IntFlag):
    """``clean``: parts that have not changed since the last VMRUN."""

    INTERCEPTS = 1 << 0
    PERM_MAP = 1 << 1
    ASID = 1 << 2
    INTR = 1 << 3
    NPT = 1 << 4
    CR = 1 << 5
    DR = 1 << 6
    DT = 1 << 7
    SEG = 1 << 8
    CR2 = 1 << 9
    LBR = 1 << 10
    AVIC = 1 << 11
    CET = 1 << 12


class TlbControl(IntEnum):
    """``tlb_ctl``: what VMRUN flushes."""

    NOTHING = 0
    ALL = 1
    ASID = 3
    ASID_NOT_GLOBAL = 7


class EventType(IntEnum):
    """What is injected, or was being delivered."""

    INTR = 0
    NMI = 2
    EXCEPTION = 3
    SOFT = 4


class IoInfo(IntFlag):
    """EXITINFO1 of IOIO: bits 31:16 are the port, 12:10 the segment (APM volume 2, 15.10.2)."""

    IN = 1 << 0
    STR = 1 << 2
    REP = 1 << 3
    SZ8 = 1 << 4
    SZ16 = 1 << 5
    SZ32 = 1 << 6
    A16 = 1 << 7
    A32 = 1 << 8
    A64 = 1 << 9


_VALID, _HAS_ERROR_CODE = 1 << 31, 1 << 11
_IO_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
_MOV_CR = 1 << 63


@dataclass(frozen=True)
class Event:
    """An event of EVENTINJ or EXITINTINFO (APM volume 2, 15.20); *type* is an :class:`EventType`."""

    type: int
    vector: int = 0
    error_code: int | None = None

    @property
    def word(self) -> int:
        """The low half of the field; the error code is the other."""
        return _VALID | self.type << 8 | (0 if self.error_code is None else _HAS_ERROR_CODE) | self.vector

    @classmethod
    def of(cls, word: int, error_code: int) -> Event | None:
        """Return what a field holds, None where it is not valid."""
        if not word & _VALID:
            return None
        return cls(word >> 8 & 7, word & 0xFF, error_code if word & _HAS_ERROR_CODE else None)

    def __str__(self) -> str:
        if self.type == EventType.EXCEPTION:
            return exceptions.describe(self.vector, self.error_code)
        known = {EventType.INTR: "interrupt", EventType.NMI: "NMI", EventType.SOFT: "INT"}
        kind = known.get(self.type, f"type {self.type}, vector")  # type: ignore[call-overload]
        return "NMI" if self.type == EventType.NMI else f"{kind} {self.vector:#x}"


def exit_name(code: int) -> str:
    """Return ``CPUID``, ``CR3 write``, ``exception #PF`` and so on for an exit code."""
    return vc_reason(code)


def io_words(info1: int) -> str:
    """Return EXITINFO1 of an IOIO exit as words, such as ``out port 0xe6, 4 bytes``."""
    size = info1 >> 4 & 7
    way = "in" if info1 & IoInfo.IN else "out"
    rep = "rep " if info1 & IoInfo.REP else ""
    string = "s" if info1 & IoInfo.STR else ""
    text = f"{rep}{way}{string} port {info1 >> 16 & 0xFFFF:#x}, {size} byte{'s' if size != 1 else ''}"
    if string:
        segment = info1 >> 10 & 7
        text += f", {_IO_SEGMENTS[segment]}" if segment < len(_IO_SEGMENTS) else f", segment {segment}"
        address = {1: 16, 2: 32, 4: 64}.get(info1 >> 7 & 7)
        text += f", {address}-bit addresses" if address else ""
    return text


def _task_switch(info1: int, info2: int) -> str:
    causes = [text for bit, text in ((36, "IRET"), (38, "far jump")) if info2 >> bit & 1]
    text = f"to selector {info1 & 0xFFFF:#x} by {causes[0] if causes else 'call, interrupt or exception'}"
    return text + (f", error code {info2 & 0xFFFF_FFFF:#x}" if info2 >> 44 & 1 else "")


def exit_words(code: int, info1: int, info2: int) -> str:
    """Return what EXITINFO1 and EXITINFO2 say for an exit code; empty where they are not defined.

    APM volume 2, appendix C and the sections of each intercept.
    """
    if code == SvmExit.NPF:
        return f"guest-physical address {info2:#x}: {pferr.decode(info1)}"
    if code == SvmExit.EXCP_BASE + Vector.PF:
        return f"address {info2:#x}: {pferr.decode(info1)}"
    if SvmExit.EXCP_BASE <= code < SvmExit.EXCP_BASE + 32:
        return exceptions.describe_error_code(code - SvmExit.EXCP_BASE, info1)
    if code == SvmExit.IOIO:
        return f"{io_words(info1)}; next rip {info2:#x}"
    if code == SvmExit.MSR:
        return "WRMSR" if info1 else "RDMSR"
    if code == SvmExit.TASK_SWITCH:
        return _task_switch(info1, info2)
    # The others only with decode assists (15.33), whose absence leaves 0.
    if code < 0x20 and info1 & _MOV_CR:
        return f"MOV, general register {info1 & 0xF}"
    if 0x20 <= code < 0x40 and info1:
        return f"general register {info1 & 0xF}"
    if code == SvmExit.SWINT and info1:
        return f"INT {info1 & 0xFF:#x}"
    if code == SvmExit.INVLPG and info1:
        return f"address {info1:#x}"
    return ""


def intercept_names(page: bytes | bytearray | memoryview) -> list[str]:
    """Return what a VMCB intercepts, in the order of the bits; ``bitN`` for one without a name."""
    return [_intercept_name(number) for number in sorted(_set_intercepts(page))]


def _intercept_name(number: int) -> str:
    name = vc_reason(number)
    return f"bit{number}" if name.startswith("exit code") else name.removeprefix("exception ")


def _set_intercepts(page: bytes | bytearray | memoryview) -> Iterator[int]:
    bits = int.from_bytes(page[: INTERCEPTS // 8], "little")
    return (number for number in range(INTERCEPTS) if bits >> number & 1)


def int_ctl_words(value: int) -> str:
    """Return ``int_ctl`` as words."""
    words = [f"V_TPR={value & 0xFF:#x}"] if value & 0xFF else []
    words += [f"V_INTR_PRIO={value >> 16 & 0xF}"] if value >> 16 & 0xF else []
    return " ".join([*words, *bit_words(IntCtl, value & ~0xF_00FF)])


class Vmcb:
    """A VMCB in memory: ``vmcb["rip"]`` reads a field of the page, and writes it; KeyError for no field.

    *page* is what is written to, or only read where it is bytes.
    """

    def __init__(self, page: bytes | bytearray | memoryview) -> None:
        self.page = page

    def __getitem__(self, name: str) -> int:
        place = VMCB[name]
        return int.from_bytes(self.page[place.offset : place.offset + place.size], "little")

    def __setitem__(self, name: str, value: int) -> None:
        VMCB.write(self._writable(), name, int(value))

    def _writable(self) -> bytearray | memoryview:
        if isinstance(self.page, bytes):
            raise TypeError("this VMCB is a copy: it cannot be written")
        return self.page

    @property
    def intercepts(self) -> frozenset[int]:
        """The numbers of the intercepts that are set: :class:`SvmExit`, ``EXCP_BASE`` + vector."""
        return frozenset(_set_intercepts(self.page))

    def intercept(self, *numbers: int, on: bool = True) -> None:
        """Set (or clear) intercepts by the codes of their exits; ValueError for an exit without one."""
        page = self._writable()
        for number in numbers:
            if not 0 <= number < INTERCEPTS:
                raise ValueError(f"exit {number:#x} ({exit_name(number)}) has no intercept bit")
            if on:
                page[number // 8] |= 1 << number % 8
            else:
                page[number // 8] &= ~(1 << number % 8)

    def inject(self, event: Event | None) -> None:
        """Let the next VMRUN deliver *event*, or none."""
        self["event_inj"] = event.word if event else 0
        self["event_inj_err"] = (event.error_code or 0) if event else 0

    @property
    def injected(self) -> Event | None:
        """What the next VMRUN delivers."""
        return Event.of(self["event_inj"], self["event_inj_err"])

    @property
    def interrupted(self) -> Event | None:
        """What was being delivered when the guest exited: EXITINTINFO."""
        return Event.of(self["exit_int_info"], self["exit_int_info_err"])

    def exit_text(self) -> str:
        """Return the last exit as a line of text."""
        code = self["exit_code"]
        words = exit_words(code, self["exit_info_1"], self["exit_info_2"])
        text = f"{exit_name(code)} ({code:#x})" + (f": {words}" if words else "")
        return text + (f"; while delivering {self.interrupted}" if self.interrupted else "")


def msrpm_bit(msr: int) -> int:
    """Return the number of the read bit of an MSR in the permission map; the write bit follows it.

    APM volume 2, 15.11.  ValueError for an MSR that the map does not have: those always exit.
    """
    for index, first in enumerate((0, 0xC000_0000, 0xC001_0000)):
        if first <= msr < first + 0x2000:
            return 2 * (index * 0x2000 + msr - first)
    raise ValueError(f"MSR {msr:#x} has no bits in the permission map")
