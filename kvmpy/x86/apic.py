# SPDX-License-Identifier: Apache-2.0
"""Local APIC: registers of both modes, the interrupt command, and the state that KVM_GET_LAPIC returns.

Offsets are those of the memory page (xAPIC); in x2APIC mode a register is the MSR ``0x800 + offset / 16``
(Intel SDM volume 3, 10 and 10.12; AMD APM volume 2, 16).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

DEFAULT_BASE = 0xFEE0_0000
STATE_SIZE = 1024

ID, LVR, TPR, APR, PPR, EOI, RRR = 0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0, 0xC0
LDR, DFR, SPIV, ISR, TMR, IRR, ESR = 0xD0, 0xE0, 0xF0, 0x100, 0x180, 0x200, 0x280
LVT_CMCI, ICR, ICR2, LVT_TIMER, LVT_THERMAL, LVT_PMC = 0x2F0, 0x300, 0x310, 0x320, 0x330, 0x340
LVT_LINT0, LVT_LINT1, LVT_ERROR, TIMER_INITIAL, TIMER_CURRENT, TIMER_DIVIDE = (
    0x350,
    0x360,
    0x370,
    0x380,
    0x390,
    0x3E0,
)
SELF_IPI = 0x3F0  # x2APIC only

REGISTERS: dict[int, str] = {
    ID: "ID", LVR: "LVR", TPR: "TPR", APR: "APR", PPR: "PPR", EOI: "EOI", RRR: "RRR", LDR: "LDR", DFR: "DFR",
    SPIV: "SPIV", ESR: "ESR", LVT_CMCI: "LVT_CMCI", ICR: "ICR", ICR2: "ICR2", LVT_TIMER: "LVT_TIMER",
    LVT_THERMAL: "LVT_THERMAL", LVT_PMC: "LVT_PMC", LVT_LINT0: "LVT_LINT0", LVT_LINT1: "LVT_LINT1",
    LVT_ERROR: "LVT_ERROR", TIMER_INITIAL: "TIMER_INITIAL", TIMER_CURRENT: "TIMER_CURRENT",
    TIMER_DIVIDE: "TIMER_DIVIDE", SELF_IPI: "SELF_IPI",
    **{ISR + 16 * n: f"ISR{n}" for n in range(8)},
    **{TMR + 16 * n: f"TMR{n}" for n in range(8)},
    **{IRR + 16 * n: f"IRR{n}" for n in range(8)},
}  # fmt: skip
"""Register names by offset."""

# What x2APIC mode lacks: arbitration, remote read, DFR, and the upper half of the ICR (which is one 64-bit
# MSR).
_XAPIC_ONLY = frozenset({APR, RRR, DFR, ICR2})

SPIV_ENABLED = 1 << 8
LVT_MASKED = 1 << 16

_ESR_BITS = {
    0: "send-checksum", 1: "receive-checksum", 2: "send-accept", 3: "receive-accept", 4: "redirectable-IPI",
    5: "send-illegal-vector", 6: "received-illegal-vector", 7: "illegal-register",
}  # fmt: skip
_TIMER_MODES = ("one-shot", "periodic", "tsc-deadline", "reserved")
_SHORTHANDS = ("", "self", "all", "all-but-self")


class Delivery(IntEnum):
    """How an interrupt is delivered (bits 8 to 10 of the ICR and of LVT entries)."""

    FIXED = 0
    LOWEST = 1
    SMI = 2
    REMOTE_READ = 3
    NMI = 4
    INIT = 5
    STARTUP = 6
    EXTINT = 7


class Shorthand(IntEnum):
    """Destination shorthands of the ICR."""

    NONE = 0
    SELF = 1
    ALL = 2
    ALL_BUT_SELF = 3


def x2apic_msr(offset: int) -> int:
    """Return the MSR of the register at *offset* in x2APIC mode; ValueError where that mode has no such
    register.
    """
    if offset % 16 or offset in _XAPIC_ONLY or not 0 <= offset < 0x1000:
        raise ValueError(f"APIC register {offset:#x} does not exist in x2APIC mode")
    return 0x800 + (offset >> 4)


def register_name(offset: int) -> str:
    """Return the name of the register at *offset*, or the offset in hexadecimal."""
    return REGISTERS.get(offset, f"{offset:#x}")


def icr(
    vector: int = 0,
    *,
    delivery: Delivery = Delivery.FIXED,
    shorthand: Shorthand = Shorthand.NONE,
    destination: int = 0,
    logical: bool = False,
    level: bool = False,
    asserted: bool = True,
    x2apic: bool = False,
) -> int:
    """Return a 64-bit interrupt command: *destination* in bits 56 to 63, or 32 to 63 with *x2apic*.

    ValueError for a vector over 255 or a destination that does not fit.
    """
    if not 0 <= vector <= 255:
        raise ValueError(f"vector {vector} is outside 0..255")
    if not 0 <= destination < 1 << (32 if x2apic else 8):
        raise ValueError(f"destination {destination:#x} does not fit {'x2APIC' if x2apic else 'xAPIC'} mode")
    low = vector | delivery << 8 | logical << 11 | asserted << 14 | level << 15 | shorthand << 18
    return low | destination << (32 if x2apic else 56)


def icr_words(value: int, *, x2apic: bool = False) -> str:
    """Return an interrupt command as words."""
    destination = value >> 32 if x2apic else value >> 56
    words = [f"vector {value & 0xFF}", Delivery(value >> 8 & 7).name.lower()]
    words.append(
        _SHORTHANDS[value >> 18 & 3] or f"{'logical' if value >> 11 & 1 else 'physical'} {destination:#x}"
    )
    words += [word for bit, word in ((12, "pending"), (14, "assert"), (15, "level")) if value >> bit & 1]
    return " ".join(words)


def lvt_words(value: int, *, timer: bool = False) -> str:
    """Return an entry of the local vector table as words."""
    words = [f"vector {value & 0xFF}"]
    if timer:
        words.append(_TIMER_MODES[value >> 17 & 3])
    else:
        words.append(Delivery(value >> 8 & 7).name.lower())
        words += [
            word for bit, word in ((13, "active-low"), (14, "remote-IRR"), (15, "level")) if value >> bit & 1
        ]
    if value >> 12 & 1:
        words.append("pending")
    if value & LVT_MASKED:
        words.append("masked")
    return " ".join(words)


def divide_value(register: int) -> int:
    """Return by how much the timer's divide configuration divides (1 to 128)."""
    code = register & 3 | register >> 1 & 4
    return 1 if code == 7 else 2 << code


@dataclass(frozen=True)
class LapicState:
    """The 1024 bytes of ``kvm_lapic_state``.

    *x2apic* says how the ID is stored: the whole 32-bit register, as KVM does in x2APIC mode once
    KVM_CAP_X2APIC_API allows 32-bit IDs, instead of 8 bits in the upper byte.
    """

    data: bytes
    x2apic: bool = False

    def __post_init__(self) -> None:
        if len(self.data) < STATE_SIZE:
            raise ValueError(f"a local APIC state has {STATE_SIZE} bytes, not {len(self.data)}")

    def register(self, offset: int) -> int:
        """Return the 32-bit register at *offset*."""
        return int(struct.unpack_from("<I", self.data, offset)[0])

    def replaced(self, changes: dict[int, int]) -> LapicState:
        """Return the state with other values in the 32-bit registers at the given offsets."""
        data = bytearray(self.data)
        for offset, value in changes.items():
            struct.pack_into("<I", data, offset, value)
        return LapicState(bytes(data), self.x2apic)

    def vectors(self, offset: int) -> tuple[int, ...]:
        """Return the vectors whose bit is set in ISR, TMR or IRR, given by its first offset."""
        return tuple(v for v in range(256) if self.register(offset + 16 * (v >> 5)) >> (v & 31) & 1)

    @property
    def apic_id(self) -> int:
        """The APIC ID."""
        return self.register(ID) if self.x2apic else self.register(ID) >> 24

    @property
    def enabled(self) -> bool:
        """Whether the spurious-interrupt register enables the APIC by software."""
        return bool(self.register(SPIV) & SPIV_ENABLED)

    @property
    def icr(self) -> int:
        """The 64-bit interrupt command."""
        return self.register(ICR) | self.register(ICR2) << 32

    def __str__(self) -> str:
        def vectors(offset: int) -> str:
            return _ranges(self.vectors(offset)) or "none"

        errors = [name for bit, name in _ESR_BITS.items() if self.register(ESR) >> bit & 1]
        version = self.register(LVR)
        state = "enabled" if self.enabled else "disabled"
        lines = [
            f"id {self.apic_id:#x}  version {version & 0xFF:#x}, {(version >> 16 & 0xFF) + 1} LVT entries",
            "  ".join(
                f"{REGISTERS[address].lower()} {self.register(address):#x}"
                for address in (TPR, PPR, LDR, DFR)
            ),
            f"spiv {self.register(SPIV):#x}: vector {self.register(SPIV) & 0xFF}, {state}",
            f"in service: {vectors(ISR)}",
            f"requested: {vectors(IRR)}",
            f"level-triggered: {vectors(TMR)}",
            f"errors: {' '.join(errors) or 'none'}",
            f"icr {self.icr:#x}: {icr_words(self.icr, x2apic=self.x2apic)}",
        ]
        for offset in (LVT_TIMER, LVT_THERMAL, LVT_PMC, LVT_LINT0, LVT_LINT1, LVT_ERROR, LVT_CMCI):
            value = self.register(offset)
            if value or offset != LVT_CMCI:
                lines.append(f"{REGISTERS[offset].lower():<11} {lvt_words(value, timer=offset == LVT_TIMER)}")
        lines.append(
            f"timer: initial {self.register(TIMER_INITIAL)}, current {self.register(TIMER_CURRENT)}, "
            f"divided by {divide_value(self.register(TIMER_DIVIDE))}"
        )
        return "\n".join(lines)


def _ranges(vectors: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for vector in vectors:
        if runs and runs[-1][1] == vector - 1:
            runs[-1][1] = vector
        else:
            runs.append([vector, vector])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
