# SPDX-License-Identifier: Apache-2.0
"""What a guest wrote into its GHCB, and what is wrong with it.

AMD's GHCB specification (56421): section 2.6 for the page, 4.1 for the events.  KVM clears the valid bitmap
when it takes a request, and answers in the words of the event: what is read at an exit is decoded as *taken*.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmpy.x86.ghcb import (
    BITMAP_END,
    GHCB,
    GHCB_SIZE,
    SHARED_BUFFER_SIZE,
    PageOperation,
    VmgExit,
    event_name,
    is_valid,
    valid_fields,
)

if TYPE_CHECKING:
    from kvmpy.guest.vcpu import GuestVcpu
    from kvmpy.guest.vm import GuestVm

VERSIONS = range(1, 4)
MAX_PSC_ENTRIES = 253
_SVM_READ_DR7, _SVM_WRITE_DR7 = 0x27, 0x37
_SVM_RDPMC, _SVM_CPUID, _SVM_IOIO, _SVM_MSR, _SVM_VMMCALL = 0x6F, 0x72, 0x7B, 0x7C, 0x81
_SVM_MONITOR, _SVM_MWAIT = 0x8A, 0x8B
_BUFFER = GHCB["shared_buffer"].offset
_COMMON = ("sw_exit_code", "sw_exit_info_1", "sw_exit_info_2")

# What each event needs besides the exit code and its two words.
_REQUIRED: dict[int, tuple[str, ...]] = {
    _SVM_WRITE_DR7: ("rax",),
    _SVM_RDPMC: ("rcx",),
    _SVM_CPUID: ("rax", "rcx"),
    _SVM_MSR: ("rcx",),
    _SVM_VMMCALL: ("rax", "cpl"),
    _SVM_MONITOR: ("rax", "rcx", "rdx"),
    _SVM_MWAIT: ("rax", "rcx"),
    VmgExit.MMIO_READ: ("sw_scratch",),
    VmgExit.MMIO_WRITE: ("sw_scratch",),
    VmgExit.PSC: ("sw_scratch",),
    VmgExit.EXT_GUEST_REQUEST: ("rax", "rbx"),
}
_KNOWN = {
    *_REQUIRED,
    _SVM_READ_DR7,
    _SVM_IOIO,
    0x6E,  # RDTSC
    0x76,  # INVD
    0x87,  # RDTSCP
    0x89,  # WBINVD
    *VmgExit,
}


@dataclass(frozen=True)
class PscEntry:
    """One entry of a page state change: *done* of its pages (of 1, or 512 of a huge one)."""

    gfn: int
    operation: int
    huge: bool
    done: int
    reserved: int = 0

    @classmethod
    def from_int(cls, value: int) -> PscEntry:
        """Read the eight bytes of an entry."""
        return cls(
            gfn=value >> 12 & (1 << 40) - 1,
            operation=value >> 52 & 0xF,
            huge=bool(value >> 56 & 1),
            done=value & 0xFFF,
            reserved=value >> 57,
        )

    def __int__(self) -> int:
        return self.done | self.gfn << 12 | self.operation << 52 | self.huge << 56 | self.reserved << 57


@dataclass(frozen=True)
class GhcbRequest:
    """A request: exit code, its two words, its fields (the valid ones, all when taken) and *problems*."""

    exit_code: int
    info_1: int
    info_2: int
    version: int
    usage: int
    fields: dict[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def event(self) -> str:
        """The event by name."""
        return event_name(self.exit_code)

    def lines(self) -> Iterator[str]:
        """Yield the request as text, its problems last."""
        yield (
            f"{self.event} ({self.exit_code:#x}) info {self.info_1:#x} {self.info_2:#x}, "
            f"protocol {self.version}"
        )
        words = [f"{name} {value:#x}" for name, value in self.fields.items() if name not in _COMMON]
        if words:
            yield " ".join(words)
        for problem in self.problems:
            yield f"wrong: {problem}"


def _number(page: memoryview, name: str) -> int:
    return int.from_bytes(page[GHCB[name].offset : GHCB[name].offset + GHCB[name].size], "little")


def _reserved(page: memoryview) -> Iterator[str]:
    """Yield the runs of bytes that belong to no field and are not zero."""
    end = 0
    for place in [*GHCB.places.values(), None]:
        start = GHCB_SIZE if place is None else place.offset
        gap = bytes(page[end:start])
        if gap.strip(b"\0"):
            first = next(index for index, byte in enumerate(gap) if byte)
            yield (
                f"reserved bytes {end:#x} to {start - 1:#x} are not zero "
                f"(at {end + first:#x}: {gap[first]:#x})"
            )
        if place is not None:
            end = place.offset + place.size


def _scratch(page: memoryview, gpa: int | None, version: int, size: int) -> Iterator[str]:
    address = _number(page, "sw_scratch")
    # A field that was never given is a problem of its own.
    if gpa is None or version < 2 or not address:
        return
    start, end = gpa + _BUFFER, gpa + _BUFFER + SHARED_BUFFER_SIZE
    if not start <= address <= address + size <= end:
        yield (
            f"the scratch area {address:#x}, {size:#x} bytes, is outside the shared buffer "
            f"{start:#x} to {end - 1:#x}"
        )


def _ioio(info_1: int, info_2: int) -> tuple[list[str], tuple[str, ...], int]:
    problems: list[str] = []
    sizes = [size for bit, size in ((4, 1), (5, 2), (6, 4)) if info_1 >> bit & 1]
    if len(sizes) != 1:
        problems.append(f"IOIO information {info_1:#x} names {len(sizes)} operand sizes")
    if (info_1 >> 7 & 7).bit_count() > 1:
        problems.append(f"IOIO information {info_1:#x} names several address sizes")
    if info_1 & 2 or info_1 >> 13 & 7 or info_1 >> 32:
        problems.append(f"IOIO information {info_1:#x} has reserved bits set")
    size = sizes[0] if sizes else 0
    if info_1 & 4:
        return problems, ("sw_scratch",), size * info_2
    return problems, () if info_1 & 1 else ("rax",), 0


def _psc(page: memoryview) -> Iterator[str]:
    current, end, reserved = struct.unpack_from("<HHI", page, _BUFFER)
    if reserved:
        yield f"the header of the page state change has reserved bits set: {reserved:#x}"
    if end >= MAX_PSC_ENTRIES:
        yield f"the last entry is {end}, a page state change holds {MAX_PSC_ENTRIES}"
        return
    if current > end + 1:
        yield f"the current entry {current} is behind the last, {end}"
    for number in range(end + 1):
        entry = PscEntry.from_int(struct.unpack_from("<Q", page, _BUFFER + 8 + 8 * number)[0])
        if entry.operation not in list(PageOperation):
            yield f"entry {number}: operation {entry.operation} is unknown"
        if entry.huge and entry.gfn % 512:
            yield f"entry {number}: gfn {entry.gfn:#x} does not begin a 2 MiB page"
        if entry.reserved:
            yield f"entry {number}: reserved bits are set"
        if entry.done > (512 if entry.huge else 1):
            yield f"entry {number}: {entry.done} pages are said to be done"


def _guest_request(info_1: int, info_2: int) -> Iterator[str]:
    for name, gpa in (("request", info_1), ("response", info_2)):
        if gpa % GHCB_SIZE:
            yield f"the {name} page {gpa:#x} is not aligned"
    if info_1 == info_2:
        yield f"request and response are the same page {info_1:#x}"


def _ap_creation(info_1: int, info_2: int) -> tuple[list[str], tuple[str, ...]]:
    request = info_1 & 0xFFFF_FFFF
    problems = []
    if request & 0xFFFF > 2:
        problems.append(f"AP creation request {request:#x} is unknown")
    if request & 0xFFFF != 2:
        if info_2 % GHCB_SIZE:
            problems.append(f"the VMSA {info_2:#x} is not page aligned")
        elif info_2 % (1 << 21) == 0:
            problems.append(f"the VMSA {info_2:#x} begins a 2 MiB page, which SNP hosts refuse")
        return problems, ("rax",)
    return problems, ()


def _unknown(code: int) -> str:
    return f"exit code {code:#x} is none that a guest may send"


def _event(page: memoryview, gpa: int | None, version: int) -> tuple[list[str], tuple[str, ...]]:
    """Return what is wrong with the event's own words, and the fields that it needs."""
    code, info_1, info_2 = (_number(page, name) for name in _COMMON)
    needs = _REQUIRED.get(code, ())
    problems: list[str] = []
    if code not in _KNOWN:
        problems.append(_unknown(code))
    elif code == _SVM_IOIO:
        problems, needs, size = _ioio(info_1, info_2)
        if info_1 & 4:
            problems += _scratch(page, gpa, version, size)
    elif code == _SVM_MSR:
        if info_1 > 1:
            problems.append(f"MSR access {info_1:#x} is neither a read (0) nor a write (1)")
        needs = ("rcx", "rax", "rdx") if info_1 else ("rcx",)
    elif code == _SVM_CPUID and _number(page, "rax") == 0xD:
        needs = ("rax", "rcx", "xcr0")
    elif code in (VmgExit.MMIO_READ, VmgExit.MMIO_WRITE):
        if not 1 <= info_2 <= (8 if version >= 2 else SHARED_BUFFER_SIZE):
            problems.append(f"MMIO access of {info_2} bytes")
        problems += _scratch(page, gpa, version, info_2)
    elif code == VmgExit.PSC:
        problems += [*_scratch(page, gpa, version, 8), *_psc(page)]
    elif code in (VmgExit.GUEST_REQUEST, VmgExit.EXT_GUEST_REQUEST):
        problems += _guest_request(info_1, info_2)
    elif code == VmgExit.AP_CREATION:
        problems, needs = _ap_creation(info_1, info_2)
    return problems, needs


def about(vm: GuestVm, vcpu: GuestVcpu) -> Iterator[str]:
    """Yield what the GHCB of *vcpu* holds, as far as KVM left it there."""
    if vcpu.ghcb_gpa is None:
        return
    page = vm.memory.shared_view(vcpu.ghcb_gpa, GHCB_SIZE)
    if not any(page[GHCB["protocol_version"].offset : GHCB["protocol_version"].offset + 2]):
        yield f"gpa {vcpu.ghcb_gpa}: never used"
        return
    yield f"gpa {vcpu.ghcb_gpa}, last request:"
    yield from decode(page, gpa=int(vcpu.ghcb_gpa), taken=True).lines()


def decode(
    page: bytes | bytearray | memoryview, *, gpa: int | None = None, taken: bool = False
) -> GhcbRequest:
    """Decode a GHCB of 4096 bytes as the guest filled it, at *gpa* where that is known.

    *taken*: KVM has the request already: it cleared the bitmap and put its answer into both words, so only
    the page itself is checked.  ValueError for a page cut short.
    """
    if len(page) != GHCB_SIZE:
        raise ValueError(f"a GHCB has {GHCB_SIZE} bytes, not {len(page)}")
    view = memoryview(page).cast("B")
    version, usage = _number(view, "protocol_version"), _number(view, "ghcb_usage")
    problems = []
    if version not in VERSIONS:
        problems.append(f"protocol version {version} is not one of {VERSIONS.start} to {VERSIONS.stop - 1}")
    if usage:
        problems.append(f"usage {usage:#x} is not 0, the only one that is defined")
    problems += _reserved(view)
    code = _number(view, "sw_exit_code")
    if not taken:
        wrong, needs = _event(view, gpa, version)
        problems += wrong
    elif code not in _KNOWN:
        problems.append(_unknown(code))
    named = [place.name for place in GHCB.places.values() if place.offset < BITMAP_END]
    if not taken:
        problems += [
            f"{name} is not declared valid" for name in (*_COMMON, *needs) if not is_valid(view, name)
        ]
        problems += [
            f"the valid bitmap names {name}, which is not a field"
            for name in valid_fields(view)
            if name not in GHCB.places
        ]
        named = [name for name in named if is_valid(view, name)]
    return GhcbRequest(
        exit_code=_number(view, "sw_exit_code"),
        info_1=_number(view, "sw_exit_info_1"),
        info_2=_number(view, "sw_exit_info_2"),
        version=version,
        usage=usage,
        fields={name: _number(view, name) for name in named if not taken or _number(view, name)},
        problems=tuple(problems),
    )
