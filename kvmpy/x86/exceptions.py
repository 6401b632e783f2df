# SPDX-License-Identifier: Apache-2.0
"""Exception vectors, their names and error codes (Intel SDM volume 3, 6.15; AMD APM volume 2, 8.2)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from kvmpy.x86 import pferr
from kvmpy.x86.svm_exits import event_words


class Vector(IntEnum):
    """The exception vectors by their mnemonics."""

    DE = 0
    DB = 1
    NMI = 2
    BP = 3
    OF = 4
    BR = 5
    UD = 6
    NM = 7
    DF = 8
    CSO = 9
    TS = 10
    NP = 11
    SS = 12
    GP = 13
    PF = 14
    MF = 16
    AC = 17
    MC = 18
    XM = 19
    VE = 20
    CP = 21
    HV = 28
    VC = 29
    SX = 30


@dataclass(frozen=True)
class Exception_:
    """What the architecture says of a vector; *kind* is fault, trap, abort, interrupt or ``fault/trap``."""

    vector: Vector
    title: str
    kind: str
    has_error_code: bool = False

    @property
    def mnemonic(self) -> str:
        """``#GP`` and so on; ``NMI`` without the sign."""
        return "NMI" if self.vector is Vector.NMI else f"#{self.vector.name}"


EXCEPTIONS: dict[int, Exception_] = {
    item.vector: item
    for item in (
        Exception_(Vector.DE, "divide error", "fault"),
        Exception_(Vector.DB, "debug", "fault/trap"),
        Exception_(Vector.NMI, "non-maskable interrupt", "interrupt"),
        Exception_(Vector.BP, "breakpoint", "trap"),
        Exception_(Vector.OF, "overflow", "trap"),
        Exception_(Vector.BR, "bound range exceeded", "fault"),
        Exception_(Vector.UD, "invalid opcode", "fault"),
        Exception_(Vector.NM, "device not available", "fault"),
        Exception_(Vector.DF, "double fault", "abort", has_error_code=True),
        Exception_(Vector.CSO, "coprocessor segment overrun", "fault"),
        Exception_(Vector.TS, "invalid TSS", "fault", has_error_code=True),
        Exception_(Vector.NP, "segment not present", "fault", has_error_code=True),
        Exception_(Vector.SS, "stack-segment fault", "fault", has_error_code=True),
        Exception_(Vector.GP, "general protection", "fault", has_error_code=True),
        Exception_(Vector.PF, "page fault", "fault", has_error_code=True),
        Exception_(Vector.MF, "x87 floating-point error", "fault"),
        Exception_(Vector.AC, "alignment check", "fault", has_error_code=True),
        Exception_(Vector.MC, "machine check", "abort"),
        Exception_(Vector.XM, "SIMD floating-point error", "fault"),
        Exception_(Vector.VE, "virtualization exception", "fault"),
        Exception_(Vector.CP, "control protection", "fault", has_error_code=True),
        Exception_(Vector.HV, "hypervisor injection", "fault/trap"),
        Exception_(Vector.VC, "VMM communication", "fault", has_error_code=True),
        Exception_(Vector.SX, "security exception", "fault", has_error_code=True),
    )
}

ERROR_CODE_VECTORS = frozenset(vector for vector, item in EXCEPTIONS.items() if item.has_error_code)

_CONTROL_PROTECTION = {
    1: "near RET",
    2: "far RET or IRET",
    3: "missing ENDBRANCH",
    4: "RSTORSSP",
    5: "SETSSBSY",
}


def name(vector: int) -> str:
    """Return ``#GP``, ``NMI`` and so on, ``vector 42`` for what is no defined exception."""
    known = EXCEPTIONS.get(vector)
    return known.mnemonic if known else f"vector {vector}"


def has_error_code(vector: int) -> bool:
    """Tell whether the CPU pushes an error code for *vector*."""
    return vector in ERROR_CODE_VECTORS


def vc_reason(error_code: int) -> str:
    """Return the name of the SVM exit code that a #VC carries as its error code."""
    known = event_words(error_code)
    if known is not None:
        return known
    if 0x40 <= error_code < 0x60:
        return f"exception {name(error_code - 0x40)}"
    return f"exit code {error_code:#x}"


def selector_words(error_code: int) -> str:
    """Return the selector form of an error code (#TS, #NP, #SS, #GP) as words, such as ``IDT vector 66``."""
    index = error_code >> 3 & 0x1FFF
    if not error_code:
        return "no selector"
    table = "IDT" if error_code & 2 else "LDT" if error_code & 4 else "GDT"
    where = f"IDT vector {index}" if table == "IDT" else f"{table} selector {index << 3 | error_code & 4:#x}"
    return where + (", external event" if error_code & 1 else "")


def describe_error_code(vector: int, error_code: int) -> str:
    """Return what *error_code* says for *vector*; empty where the vector has none."""
    if vector == Vector.PF:
        return str(pferr.decode(error_code))
    if vector in (Vector.TS, Vector.NP, Vector.SS, Vector.GP):
        return selector_words(error_code)
    if vector == Vector.CP:
        reason = _CONTROL_PROTECTION.get(error_code & 0x7FFF, f"reason {error_code & 0x7FFF}")
        return reason + (" in an enclave" if error_code & 0x8000 else "")
    if vector == Vector.VC:
        return vc_reason(error_code)
    if vector in ERROR_CODE_VECTORS:
        return "always zero" if not error_code else f"{error_code:#x}, though always zero"
    return ""


def describe(vector: int, error_code: int | None = None) -> str:
    """Return an exception as a line of text, such as ``#GP general protection (0x0: no selector)``."""
    exception = EXCEPTIONS.get(vector)
    text = f"{exception.mnemonic} {exception.title}" if exception else name(vector)
    if error_code is None or not has_error_code(vector):
        return text
    return f"{text} ({error_code:#x}: {describe_error_code(vector, error_code)})"
