# SPDX-License-Identifier: Apache-2.0
"""The XSAVE area in its standard format, as KVM_GET_XSAVE and KVM_GET_XSAVE2 return it (Intel SDM volume 1,
13.4).

Where a component lies comes from CPUID leaf 0xD; x87 and SSE have fixed places in the legacy part.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmpy.x86.bits import XCR0, xcr0_words

if TYPE_CHECKING:
    from kvmpy.uapi.structs import kvm_xsave
    from kvmpy.x86.cpuid import Cpuid

LEGACY_SIZE = 512
HEADER_SIZE = 64
X87, SSE, AVX, OPMASK, ZMM_HI256, HI16_ZMM, PKRU = 0, 1, 2, 5, 6, 7, 9

FCW_INIT = 0x037F
MXCSR_INIT = 0x1F80

_FCW, _FSW, _FTW, _FOP, _FIP, _FDP, _MXCSR, _MXCSR_MASK = 0, 2, 4, 6, 8, 16, 24, 28
_ST, _XMM = 32, 160
_XSTATE_BV, _XCOMP_BV = 512, 520
_COMPACTED = 1 << 63


@dataclass(frozen=True)
class Component:
    """A state component: its number, and offset and size in bytes in the standard format."""

    number: int
    offset: int
    size: int

    @property
    def name(self) -> str:
        """The name of its bit in XCR0."""
        return xcr0_words(1 << self.number)


@dataclass(frozen=True)
class Layout:
    """Where the components of an XSAVE area lie; *size* is that of the whole area."""

    components: dict[int, Component]
    size: int

    @classmethod
    def from_cpuid(cls, cpuid: Cpuid) -> Layout:
        """Read the layout of user components (those of XCR0) from leaf 0xD."""
        main = cpuid.find(0xD, 0)
        offered = 0 if main is None else main.eax | main.edx << 32
        results = {
            X87: Component(X87, 0, 160),
            SSE: Component(SSE, 160, 256),
        }
        for number in range(2, 63):
            if offered >> number & 1:
                leaf = cpuid.find(0xD, number)
                if leaf is not None and leaf.eax and not leaf.ecx & 1:
                    results[number] = Component(number, leaf.ebx, leaf.eax)
        return cls(results, max([LEGACY_SIZE + HEADER_SIZE, *(c.offset + c.size for c in results.values())]))

    def __str__(self) -> str:
        return "\n".join(
            f"{c.number:2d} {c.name:<10} offset {c.offset:5d} size {c.size:5d}"
            for c in self.components.values()
        )


class XsaveArea:
    """An XSAVE area to read and change.

    A component whose bit in XSTATE_BV is clear reads as its initial value, as XRSTOR would load it; writing
    one sets the bit. ValueError for an area that is too small or compacted, LookupError for a component that
    the layout does not have.
    """

    def __init__(self, data: bytes | bytearray, layout: Layout) -> None:
        if len(data) < LEGACY_SIZE + HEADER_SIZE:
            raise ValueError(f"an XSAVE area has at least {LEGACY_SIZE + HEADER_SIZE} bytes, not {len(data)}")
        self.data = bytearray(data)
        self.layout = layout
        if self._u64(_XCOMP_BV) & _COMPACTED:
            raise ValueError("the XSAVE area is in the compacted format; KVM's is the standard one")

    @classmethod
    def initial(cls, layout: Layout) -> XsaveArea:
        """Return an area in which every component has its initial value."""
        area = cls(bytes(max(layout.size, 4096)), layout)
        struct.pack_into("<H", area.data, _FCW, FCW_INIT)
        struct.pack_into("<I", area.data, _MXCSR, MXCSR_INIT)
        return area

    @classmethod
    def from_struct(cls, xsave: kvm_xsave, layout: Layout) -> XsaveArea:
        """Take a copy of what KVM_GET_XSAVE or KVM_GET_XSAVE2 returned."""
        return cls(xsave.to_bytes(), layout)

    def to_struct(self) -> kvm_xsave:
        """Return the area for KVM_SET_XSAVE."""
        from kvmpy.uapi.structs import kvm_xsave

        return kvm_xsave.from_bytes(self.data)

    def _u64(self, offset: int) -> int:
        return int(struct.unpack_from("<Q", self.data, offset)[0])

    @property
    def xstate_bv(self) -> int:
        """Which components are not in their initial state."""
        return self._u64(_XSTATE_BV)

    @xstate_bv.setter
    def xstate_bv(self, value: int) -> None:
        struct.pack_into("<Q", self.data, _XSTATE_BV, value)

    def in_use(self, number: int) -> bool:
        """Tell whether component *number* is not in its initial state."""
        return bool(self.xstate_bv >> number & 1)

    def _place(self, number: int) -> Component:
        if number not in self.layout.components:
            raise LookupError(f"this CPU has no XSAVE component {number} ({xcr0_words(1 << number)})")
        component = self.layout.components[number]
        if component.offset + component.size > len(self.data):
            raise ValueError(
                f"component {component.name} ends at byte {component.offset + component.size}, the area has "
                f"{len(self.data)}: get it with KVM_GET_XSAVE2"
            )
        return component

    def component(self, number: int) -> bytes:
        """Return the bytes of a component of the extended part, zeros when it is in its initial state."""
        place = self._place(number)
        raw = bytes(self.data[place.offset : place.offset + place.size])
        return raw if self.in_use(number) else bytes(place.size)

    def _read(self, number: int, start: int, size: int) -> bytes:
        return self.component(number)[start : start + size]

    def _write(self, number: int, position: int, value: bytes) -> None:
        place = self._place(number)
        if not self.in_use(number):
            self.data[place.offset : place.offset + place.size] = bytes(place.size)
            self.xstate_bv |= 1 << number
        self.data[place.offset + position : place.offset + position + len(value)] = value

    # x87 and SSE.

    def _x87(self, offset: int, size: int, initial: int) -> int:
        raw = int.from_bytes(self.data[offset : offset + size], "little")
        return raw if self.in_use(X87) else initial

    def _set_x87(self, offset: int, value: bytes) -> None:
        if not self.in_use(X87):
            mxcsr = bytes(self.data[_MXCSR : _MXCSR + 8])
            self.data[0:160] = bytes(160)
            self.data[_MXCSR : _MXCSR + 8] = mxcsr
            struct.pack_into("<H", self.data, _FCW, FCW_INIT)
            self.xstate_bv |= int(XCR0.X87)
        self.data[offset : offset + len(value)] = value

    @property
    def fcw(self) -> int:
        """The x87 control word."""
        return self._x87(_FCW, 2, FCW_INIT)

    @fcw.setter
    def fcw(self, value: int) -> None:
        self._set_x87(_FCW, struct.pack("<H", value))

    @property
    def fsw(self) -> int:
        """The x87 status word."""
        return self._x87(_FSW, 2, 0)

    @fsw.setter
    def fsw(self, value: int) -> None:
        self._set_x87(_FSW, struct.pack("<H", value))

    @property
    def ftw(self) -> int:
        """The abridged tag word: a bit for each physical register, set when it is not empty."""
        return self._x87(_FTW, 1, 0)

    @ftw.setter
    def ftw(self, value: int) -> None:
        self._set_x87(_FTW, struct.pack("<B", value))

    def st(self, number: int) -> bytes:
        """Return the 10 bytes of ST(*number*), which is also MM*number* (its lower 8)."""
        offset = _ST + 16 * _index(number, 8)
        return self._x87(offset, 10, 0).to_bytes(10, "little")

    def set_st(self, number: int, value: bytes) -> None:
        """Set the 10 bytes of ST(*number*)."""
        self._set_x87(_ST + 16 * _index(number, 8), _exact(value, 10))

    @property
    def mxcsr(self) -> int:
        """The SSE control and status register, which XRSTOR loads for SSE and AVX."""
        used = self.in_use(SSE) or self.in_use(AVX)
        return int(struct.unpack_from("<I", self.data, _MXCSR)[0]) if used else MXCSR_INIT

    @mxcsr.setter
    def mxcsr(self, value: int) -> None:
        self._start_sse()
        struct.pack_into("<I", self.data, _MXCSR, value)

    def _start_sse(self) -> None:
        if not self.in_use(SSE):
            if not self.in_use(AVX):
                struct.pack_into("<I", self.data, _MXCSR, MXCSR_INIT)
            self.data[_XMM : _XMM + 256] = bytes(256)
            self.xstate_bv |= int(XCR0.SSE)

    def xmm(self, number: int) -> bytes:
        """Return the 16 bytes of XMM0 to XMM15, or with AVX-512 to XMM31."""
        if number >= 16:
            return self.zmm(number)[:16]
        offset = _XMM + 16 * _index(number, 16)
        return bytes(self.data[offset : offset + 16]) if self.in_use(SSE) else bytes(16)

    def set_xmm(self, number: int, value: bytes) -> None:
        """Set the 16 bytes of XMM0 to XMM15; the upper parts of YMM and ZMM stay."""
        offset = _XMM + 16 * _index(number, 16)
        self._start_sse()
        self.data[offset : offset + 16] = _exact(value, 16)

    # AVX and later.

    def ymm(self, number: int) -> bytes:
        """Return the 32 bytes of YMM0 to YMM15, or with AVX-512 to YMM31; LookupError without AVX."""
        if number >= 16:
            return self.zmm(number)[:32]
        return self.xmm(number) + self._read(AVX, 16 * _index(number, 16), 16)

    def set_ymm(self, number: int, value: bytes) -> None:
        """Set the 32 bytes of YMM0 to YMM15; the upper part of ZMM stays."""
        raw = _exact(value, 32)
        self._place(AVX)
        self.set_xmm(number, raw[:16])
        self._write(AVX, 16 * number, raw[16:])

    def zmm(self, number: int) -> bytes:
        """Return the 64 bytes of ZMM0 to ZMM31; LookupError without AVX-512."""
        if _index(number, 32) >= 16:
            return self._read(HI16_ZMM, 64 * (number - 16), 64)
        return self.ymm(number) + self._read(ZMM_HI256, 32 * number, 32)

    def set_zmm(self, number: int, value: bytes) -> None:
        """Set the 64 bytes of ZMM0 to ZMM31."""
        raw = _exact(value, 64)
        if _index(number, 32) >= 16:
            self._write(HI16_ZMM, 64 * (number - 16), raw)
            return
        self._place(ZMM_HI256)
        self.set_ymm(number, raw[:32])
        self._write(ZMM_HI256, 32 * number, raw[32:])

    def opmask(self, number: int) -> int:
        """Return the mask register K0 to K7."""
        return int.from_bytes(self._read(OPMASK, 8 * _index(number, 8), 8), "little")

    def set_opmask(self, number: int, value: int) -> None:
        """Set the mask register K0 to K7."""
        self._write(OPMASK, 8 * _index(number, 8), struct.pack("<Q", value))

    @property
    def pkru(self) -> int:
        """The protection-key rights of user pages."""
        return int.from_bytes(self._read(PKRU, 0, 4), "little")

    @pkru.setter
    def pkru(self, value: int) -> None:
        self._write(PKRU, 0, struct.pack("<I", value))

    def __str__(self) -> str:
        lines = [
            f"in use: {xcr0_words(self.xstate_bv) or 'nothing'}",
            f"fcw {self.fcw:04x} fsw {self.fsw:04x} ftw {self.ftw:02x} mxcsr {self.mxcsr:08x}",
        ]
        if self.in_use(X87):
            lines += [f"st{n} {self.st(n)[::-1].hex()}" for n in range(8) if any(self.st(n))]
        wide = AVX in self.layout.components and self.in_use(AVX)
        for number in range(16):
            value = self.ymm(number) if wide else self.xmm(number)
            if any(value):
                lines.append(f"{'ymm' if wide else 'xmm'}{number:<2} {value[::-1].hex()}")
        return "\n".join(lines)


def _index(number: int, limit: int) -> int:
    if not 0 <= number < limit:
        raise IndexError(f"register {number} is outside 0..{limit - 1}")
    return number


def _exact(value: bytes, size: int) -> bytes:
    if len(value) != size:
        raise ValueError(f"the register has {size} bytes, {len(value)} were given")
    return bytes(value)
