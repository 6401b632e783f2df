# SPDX-License-Identifier: Apache-2.0
"""Page-fault error codes: what the CPU pushes, what nested paging reports, what KVM adds.

Bits 0 to 15 and 31 are the architecture's (Intel SDM volume 3, 4.7; AMD APM volume 2, 8.4.2); 32 to 36 are
those of a nested page fault's EXITINFO1 (APM volume 2, 15.25.6 and 15.36.10); 48 and 49 are KVM's own (Linux:
PFERR_* in kvm_host.h).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag


class PfErr(IntFlag):
    """The bits of a page-fault error code."""

    P = 1 << 0
    W = 1 << 1
    U = 1 << 2
    RSVD = 1 << 3
    I = 1 << 4  # noqa: E741 - the architecture's name
    PK = 1 << 5
    SS = 1 << 6
    SGX = 1 << 15
    RMP = 1 << 31
    GUEST_FINAL = 1 << 32
    GUEST_PAGE = 1 << 33
    ENC = 1 << 34
    SIZEM = 1 << 35
    VMPL = 1 << 36
    IMPLICIT_ACCESS = 1 << 48
    PRIVATE_ACCESS = 1 << 49


GUEST_VISIBLE = (
    PfErr.P | PfErr.W | PfErr.U | PfErr.RSVD | PfErr.I | PfErr.PK | PfErr.SS | PfErr.SGX | PfErr.RMP
)
"""What a guest can find on its stack."""

NESTED = PfErr.GUEST_FINAL | PfErr.GUEST_PAGE | PfErr.ENC | PfErr.SIZEM | PfErr.VMPL
"""What only a nested page fault carries."""

SYNTHETIC = PfErr.IMPLICIT_ACCESS | PfErr.PRIVATE_ACCESS
"""What KVM itself sets; never seen in hardware."""

_MEANING = {
    PfErr.RSVD: "a reserved bit is set in a page-table entry",
    PfErr.PK: "forbidden by a protection key",
    PfErr.SS: "shadow-stack access",
    PfErr.SGX: "forbidden by SGX",
    PfErr.RMP: "RMP check failed",
    PfErr.GUEST_FINAL: "while translating the final guest-physical address",
    PfErr.GUEST_PAGE: "while reading the guest's page tables",
    PfErr.ENC: "the guest's effective C-bit is set",
    PfErr.SIZEM: "page sizes of RMP and access differ",
    PfErr.VMPL: "VMPL permissions forbid it",
    PfErr.IMPLICIT_ACCESS: "implicit supervisor access",
    PfErr.PRIVATE_ACCESS: "access to private memory",
}


@dataclass(frozen=True)
class PageFault:
    """A decoded error code; bits without a name are kept in ``unknown``."""

    value: int

    @property
    def flags(self) -> PfErr:
        """The known bits."""
        return PfErr(self.value & ~self.unknown)

    @property
    def unknown(self) -> int:
        """The bits that have no name."""
        return self.value & ~_ALL

    @property
    def access(self) -> str:
        """``read``, ``write`` or ``fetch``."""
        return "fetch" if self.value & PfErr.I else "write" if self.value & PfErr.W else "read"

    @property
    def user(self) -> bool:
        """Whether the access had user privilege."""
        return bool(self.value & PfErr.U)

    @property
    def present(self) -> bool:
        """Whether a present translation forbade it (instead of there being none)."""
        return bool(self.value & PfErr.P)

    @property
    def words(self) -> str:
        """The names of the bits, lowest first, such as ``P W U``; a bit without a name is ``bitN``."""
        return " ".join(
            _NAMES.get(1 << bit, f"bit{bit}")
            for bit in range(self.value.bit_length())
            if self.value >> bit & 1
        )

    def __str__(self) -> str:
        text = f"{'user' if self.user else 'supervisor'} {self.access}, "
        text += "protection violation" if self.present else "page not present"
        notes = [meaning for bit, meaning in _MEANING.items() if self.value & bit]
        notes += [f"unknown bit {bit}" for bit in range(self.unknown.bit_length()) if self.unknown >> bit & 1]
        return "; ".join([text, *notes])


def decode(value: int) -> PageFault:
    """Decode an error code of up to 64 bits; ValueError when it is negative or longer."""
    if not 0 <= value < 1 << 64:
        raise ValueError(f"page-fault error code {value:#x} is not an unsigned 64-bit value")
    return PageFault(value)


def encode(words: str | Iterable[str]) -> int:
    """Return the error code for bit names (``"P W U"`` or a list of them); ValueError for an unknown one."""
    value = 0
    for word in words.split() if isinstance(words, str) else words:
        name = word.upper()
        if name.startswith("BIT") and name[3:].isdecimal() and int(name[3:]) < 64:
            value |= 1 << int(name[3:])
        elif name in PfErr.__members__:
            value |= PfErr[name]
        else:
            raise ValueError(
                f"unknown page-fault bit {word!r}: expected {', '.join(PfErr.__members__)} or bitN"
            )
    return value


_NAMES = {int(bit): name for name, bit in PfErr.__members__.items()}
_ALL = sum(_NAMES)
