# SPDX-License-Identifier: Apache-2.0
"""Where a vCPU stands and how it came there: calls, inlined calls, and the exceptions in between.

Guest code keeps frame pointers.  The vector stubs of the runtime leave a struct exception_frame
(guest_asm/include/kvmpy/exception.h) below what the CPU pushed: the chain goes on at what was interrupted.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from kvmpy.core.address import Gva
from kvmpy.core.errors import PrivateMemoryError
from kvmpy.guest import layout, ucall
from kvmpy.guest.space import linear
from kvmpy.x86 import exceptions
from kvmpy.x86.paging_errors import TableAccessError

if TYPE_CHECKING:
    from kvmpy.guest.space import AddressSpace
    from kvmpy.guest.ucall import Ucall
    from kvmpy.guest.vm import GuestVm
    from kvmpy.uapi.structs import kvm_regs, kvm_sregs

MAX_FRAMES = 4096
MAX_STACK = 1 << 20
_MOST_SHOWN = 4
_RET = b"\xc3"
_STUBS = ("guest_vectors", "entry_common", "entry_vc", "entry_paranoid", "entry_nmi")
_U64 = (1 << 64) - 1

# Where a GuestExceptionError's ucall keeps what the handler saved: see ucall EXCEPTION.
_EXCEPTION_RIP, _EXCEPTION_RSP, _EXCEPTION_CR2, _EXCEPTION_RBP = 2, 3, 4, 7


class _Abi(NamedTuple):
    """What the two kinds of programs have differently.

    *frame* is struct exception_frame, in words, of which *rbp* to *rip* are numbers; from RIP on the CPU
    pushed it, without RSP and SS where *pushed* is 3.  *argument* is the word between the stub's return
    address and the frame.
    """

    word: int
    frame: struct.Struct
    rbp: int
    vector: int
    error: int
    rip: int
    pushed: int
    prologue: bytes
    selectors: tuple[int, ...]
    argument: int

    def words(self, data: bytes) -> tuple[int, ...]:
        """Split *data* into words."""
        return struct.unpack(f"<{len(data) // self.word}{'Q' if self.word == 8 else 'I'}", data)


# push rbp; mov rbp, rsp
_ABIS = {
    64: _Abi(
        8, struct.Struct("<22Q"), 10, 15, 16, 17, 5, b"\x55\x48\x89\xe5",
        (layout.KERNEL_CS, layout.USER_CS), 0,
    ),
    32: _Abi(4, struct.Struct("<15I"), 2, 8, 9, 10, 3, b"\x55\x89\xe5", (layout.KERNEL_CS32,), 4),
}  # fmt: skip
_RFLAGS_ONE, _RFLAGS_END = 1 << 1, 1 << 22


@dataclass(frozen=True)
class Place:
    """Where the guest stood, by linear addresses: at the fault or assertion, else at the registers.

    *called* says that *rip* is a return address: what matters is the call before it, and the frames of the
    runtime up to it are left out.
    """

    rip: int
    rsp: int
    rbp: int
    cr2: int = 0
    called: bool = False

    @property
    def instruction(self) -> int:
        """An address inside the instruction that matters."""
        return (self.rip - 1 if self.called else self.rip) & _U64


@dataclass(frozen=True)
class Frame(Place):
    """One step of a backtrace; *exception* is what happened here and led to the frames before it."""

    exception: str = ""


def place_of(state: list[tuple[kvm_regs, kvm_sregs]], call: Ucall | None) -> Place | None:
    """Return where a vCPU stands: as *call* says, else by its registers; None where both are hidden."""
    if call is not None and call.cmd == ucall.EXCEPTION:
        args = ucall.padded(call.args)
        return Place(args[_EXCEPTION_RIP], args[_EXCEPTION_RSP], args[_EXCEPTION_RBP], args[_EXCEPTION_CR2])
    if state:
        regs, sregs = state[0]
        rsp, rbp = (linear(sregs, sregs.ss, value) for value in (regs.rsp, regs.rbp))
        if call is not None and call.rip is not None:
            return Place(call.rip, rsp, rbp, sregs.cr2, called=True)
        return Place(linear(sregs, sregs.cs, regs.rip), rsp, rbp, sregs.cr2)
    return None


def describe(vm: GuestVm, address: int) -> str:
    """Return ``function+offset at file:line`` for a guest code address, as far as it is known."""
    return _described(vm, address)[-1]


def _described(vm: GuestVm, address: int) -> list[str]:
    """Return the same for each call that was inlined there, innermost first, and for the function itself."""
    gva = Gva(address)
    function, line = vm.program.function(gva), vm.program.line(gva)
    steps = []
    for name, file, number in vm.program.inlined(gva):
        steps.append(f"{name} (inlined){_at(line)}")
        line = (file, number)
    steps.append(f"{f'{function[0]}+{function[1]:#x}' if function else '?'}{_at(line)}")
    return steps


def _at(line: tuple[str, int] | None) -> str:
    return f" at {line[0]}:{line[1]}" if line else ""


def code_bytes(vm: GuestVm, start: int, end: int, space: AddressSpace | None = None) -> bytes:
    """Return guest code, by default in the program's address space; ValueError where nothing is mapped."""
    if space is not None and not space.own:
        return space.read(start, end - start)
    # The image is the program's own: it needs no look into guest memory, which may be hidden.
    for segment in vm.program.segments:
        base = int(segment.gva)
        if segment.executable and base <= start and end <= base + len(segment.data):
            return bytes(segment.data[start - base : end - base])
    return vm.read(Gva(start), end - start)


def backtrace(vm: GuestVm, place: Place) -> Iterator[str]:
    """Yield the frames from *place* outwards as text, a line each."""
    frames = list(frames_of(vm, place))
    if place.called:
        # The runtime's own frames, which sent the call.
        own = next((n for n, frame in enumerate(frames) if n and frame.rip == place.rip), 0)
        frames = [frames[0], *frames[own + 1 :]]
    number, times = 0, 0
    last: tuple[tuple[str, int], ...] = ()
    for part in [*_parts(frames), []]:
        key = tuple((frame.exception, frame.rip) for frame in part)
        if key == last:
            times += 1
            number += sum(len(_described(vm, frame.instruction)) for frame in part)
            continue
        if times:
            yield f"... and the same {times} times more"
        last, times = key, 0
        for frame in part:
            if frame.exception:
                yield f"--- {frame.exception} ---"
            for step in _described(vm, frame.instruction):
                yield f"#{number}  {frame.rip:#x} {step}"
                number += 1


def _parts(frames: list[Frame]) -> list[list[Frame]]:
    """Return the frames in parts, each of which but the first begins at an exception."""
    parts: list[list[Frame]] = [[]]
    for frame in frames:
        if frame.exception:
            parts.append([])
        parts[-1].append(frame)
    return parts


def standing(vm: GuestVm, place: Place) -> str:
    """Return in one line where a vCPU stands, and which exceptions of what it deals with there."""
    try:
        happened = [frame for frame in frames_of(vm, place) if frame.exception]
    except (PrivateMemoryError, TableAccessError):
        happened = []
    texts = [f"{frame.exception} of {describe(vm, frame.instruction)}" for frame in happened]
    different = [text for text, before in zip(texts, ["", *texts], strict=False) if text != before]
    shown = different if len(different) <= _MOST_SHOWN else [*different[: _MOST_SHOWN - 1], different[-1]]
    depth = f" ({len(texts)} exceptions deep)" if len(texts) > 1 else ""
    return ", in ".join([describe(vm, place.instruction), *shown]) + depth


def frames_of(vm: GuestVm, place: Place) -> Iterator[Frame]:
    """Yield *place* and what it returns to, across exceptions, as far as the stack tells."""
    frame: Frame | None = Frame(place.rip, place.rsp, place.rbp, called=place.called)
    for _ in range(MAX_FRAMES):
        if frame is None:
            return
        yield frame
        frame = _outer(vm, frame)


def _outer(vm: GuestVm, frame: Frame) -> Frame | None:
    try:
        function = vm.program.function(Gva(frame.instruction))
        if function is not None and function[0] in _STUBS:
            return _interrupted(vm, frame, function)
        return _frameless_caller(vm, frame, function) or _caller(vm, frame)
    except ValueError:  # not mapped, or no address at all
        return None


def _interrupted(vm: GuestVm, frame: Frame, function: tuple[str, int]) -> Frame | None:
    """Return what an exception interrupted, whose vector stub *frame* is in."""
    abi = _ABIS[vm.program.bits]
    if frame.called:
        start = frame.rsp + abi.argument
        words = abi.frame.unpack(vm.read(Gva(start), abi.frame.size))
        stack = start + abi.word * (abi.rip + abi.pushed)
        return _exception(abi, words[abi.rip :], words[abi.rbp], words[abi.vector], words[abi.error], stack)
    # Somewhere among its pushes and pops: what the CPU pushed is not far.
    for offset in range(frame.rsp, frame.rsp + abi.word * (abi.rip + 1), abi.word):
        pushed = abi.words(vm.read(Gva(offset), abi.word * abi.pushed))
        if pushed[1] in abi.selectors and pushed[2] & _RFLAGS_ONE and pushed[2] < _RFLAGS_END:
            if function[0] == _STUBS[0]:
                vector, error = function[1] // layout.VECTOR_STRIDE, 0
            else:
                vector, error = abi.words(vm.read(Gva(offset - 2 * abi.word), 2 * abi.word))
            stack = offset + abi.word * abi.pushed
            return _exception(abi, pushed, frame.rbp, vector, error, stack)
    return None


def _exception(
    abi: _Abi, pushed: tuple[int, ...], rbp: int, vector: int, error: int, stack: int
) -> Frame | None:
    rip, selector = pushed[:2]
    if selector not in abi.selectors or vector > 0xFF:
        return None
    name = exceptions.describe(vector, error) if vector < 32 else f"interrupt {vector:#x}"
    return Frame(rip, pushed[3] if abi.pushed > 3 else stack, rbp, exception=name)


def _frameless_caller(vm: GuestVm, frame: Frame, function: tuple[str, int] | None) -> Frame | None:
    # gcc gives a small leaf function no frame; before its prologue and at its RET no function has one.
    if frame.called or function is None or function[0].endswith(".cold"):
        return None
    abi = _ABIS[vm.program.bits]
    head = code_bytes(vm, frame.rip - function[1], frame.rip)
    returns = code_bytes(vm, frame.rip, frame.rip + 1) == _RET
    if abi.prologue in head and not returns:
        return None
    address = frame.rsp + (abi.word if head.endswith(abi.prologue[:1]) and not returns else 0)
    try:
        back = int.from_bytes(vm.read(Gva(address), abi.word), "little")
    except ValueError:
        return None
    return _returning(vm, back, address + abi.word, frame.rbp)


def _caller(vm: GuestVm, frame: Frame) -> Frame | None:
    # A frame pointer that does not move up the stack, or leaves it, ends the chain.
    abi = _ABIS[vm.program.bits]
    if frame.rbp < frame.rsp or frame.rbp % abi.word or frame.rbp - frame.rsp > MAX_STACK:
        return None
    rbp, back = abi.words(vm.read(Gva(frame.rbp), 2 * abi.word))
    return _returning(vm, back, frame.rbp + 2 * abi.word, rbp)


def _returning(vm: GuestVm, back: int, rsp: int, rbp: int) -> Frame | None:
    # The call is before the return address, which may already belong to the next function.  The first
    # frame returns to nowhere.
    if not back or not vm.program.function(Gva(back - 1)):
        return None
    return Frame(back, rsp, rbp, called=True)
