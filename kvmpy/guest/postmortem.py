# SPDX-License-Identifier: Apache-2.0
"""The state of a VM as text, taken when a test fails: what a kernel developer would ask for first.

What a protection keeps from the host is said to be hidden, and a section that cannot be made says why: the
failure that brought us here must never be lost behind another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmpy.core import observe, recent
from kvmpy.core.address import PAGE_SIZE, Gva
from kvmpy.core.errors import KvmError, PrivateMemoryError, errno_name
from kvmpy.guest import ucall
from kvmpy.guest.disasm import disassemble
from kvmpy.guest.postmortem_interrupts import interrupts
from kvmpy.uapi.constants import ExitReason, MpState
from kvmpy.x86 import registers
from kvmpy.x86.paging_errors import TableAccessError

if TYPE_CHECKING:
    from kvmpy.guest.ucall import Ucall
    from kvmpy.guest.vcpu import GuestVcpu
    from kvmpy.guest.vm import GuestVm
    from kvmpy.uapi.structs import kvm_regs, kvm_sregs

# What is imported by the first failure, as most programs never fail.
IMPORTED_LATER = ("capstone", "kvmpy.guest.memorymap", "kvmpy.uapi.struct_text")
MAX_FRAMES = 32
CODE_BYTES_AFTER = 32
TRAIL_OF_OTHERS = 64
MAX_STACK = 1 << 20
_RFLAGS_IF = 1 << 9
_PROLOGUE = b"\x55\x48\x89\xe5"  # push rbp; mov rbp, rsp

# Where a GuestExceptionError's ucall keeps what the handler saved: see ucall EXCEPTION.
_EXCEPTION_RIP, _EXCEPTION_RSP, _EXCEPTION_CR2, _EXCEPTION_RBP = 2, 3, 4, 7


@dataclass(frozen=True)
class _Place:
    """Where the guest stood: at the fault or assertion when there was one, else at the registers.

    *called* says that *rip* is a return address: what matters is the call before it, and the frames of the
    runtime up to it are left out.
    """

    rip: int
    rsp: int
    rbp: int
    cr2: int
    called: bool = False

    @property
    def instruction(self) -> int:
        """An address inside the instruction that matters."""
        return self.rip - 1 if self.called else self.rip


def postmortem(vm: GuestVm, vcpu: GuestVcpu, cause: str, call: Ucall | None = None) -> str:
    """Return the post-mortem of *vcpu*, whose run ended with *cause* (and with the ucall *call*, where it
    was one).
    """
    asked = list(recent.calls)  # before what is asked here
    with observe.inspecting():
        return _postmortem(vm, vcpu, cause, call, asked)


def _postmortem(
    vm: GuestVm, vcpu: GuestVcpu, cause: str, call: Ucall | None, asked: list[recent.Call]
) -> str:
    lines: list[str] = []

    def section(title: str, make: Callable[[], Iterator[str] | list[str]]) -> None:
        lines.append(f"--- {title}")
        try:
            body = list(make())
        except (PrivateMemoryError, TableAccessError) as error:
            body = [f"hidden: {error}" if vm.memory.seal is not None else f"not available: {error}"]
        except Exception as error:  # noqa: BLE001 - the failure that brought us here must not be lost behind this one
            body = [f"not available: {type(error).__name__}: {error}"]
        lines.extend("  " + line for line in body)

    lines.append(f"=== post-mortem of {vcpu.name}: {cause.splitlines()[0].removeprefix(f'{vcpu.name}: ')}")
    section("vm", lambda: _about(vm))
    state: list[tuple[kvm_regs, kvm_sregs]] = []
    section("registers", lambda: _registers(vm, vcpu, state))
    section("interrupts", lambda: _unless_running(vcpu, lambda: interrupts(vcpu)))
    if vcpu.ghcb_gpa is not None:
        section("GHCB", lambda: list(vm.protection.about_vcpu(vm, vcpu)))
    place = _place(state, call)
    if place is not None:
        section("code", lambda: _code(vm, place))
        section("backtrace", lambda: _backtrace(vm, place))
        for name, address in (("RIP", place.rip), ("RSP", place.rsp), ("CR2", place.cr2)):
            if name != "CR2" or address:
                section(f"page-table walk of {name} {address:#x}", lambda address=address: _walk(vm, address))  # type: ignore[misc]
    for other in [vcpu, *(peer for peer in vm.vcpus if peer is not vcpu)][:TRAIL_OF_OTHERS]:
        section(f"last exits of {other.name} ({other.exits} in all)", lambda other=other: _trail(other))  # type: ignore[misc]
    section(f"last ioctls of {vm.name} (KVM_RUN aside)", lambda: recent.lines(vm.name, asked) or ["none"])
    if vm.console:
        section("console", lambda: vm.console.splitlines()[-20:])
    section("KVM statistics (not zero)", lambda: _unless_running(vcpu, lambda: _stats(vcpu)))
    return "\n".join(lines)


def _about(vm: GuestVm) -> Iterator[str]:
    label = vm.protection.label
    protection = f"{vm.protection.name} ({label})" if label else vm.protection.name
    yield f"{vm.name}: type {vm.vm_type}, protection {protection}, {len(vm.vcpus)} vCPU(s)"
    bit = vm.encryption
    yield f"encryption bit: {f'{bit.name} {bit.bit}' if bit is not None else 'none'}; CR3 {vm.pages.cr3}"
    for segment in vm.memory.segments():
        first, last = segment.gpa.gfn, segment.gpa.gfn + segment.size // PAGE_SIZE
        private = vm.memory.private.range_cardinality(first, last)
        end = int(segment.gpa) + segment.size - 1
        yield f"memory {segment.gpa}..{end:#x}: {private} of {last - first} pages private"


def _unless_running(vcpu: GuestVcpu, ask: Callable[[], Iterator[str]]) -> Iterator[str]:
    # Its ioctls would wait until the guest leaves.
    if vcpu.running:
        yield f"not available: {vcpu.name} is running in thread {vcpu.thread_id}"
    else:
        yield from ask()


def _registers(vm: GuestVm, vcpu: GuestVcpu, state: list[tuple[kvm_regs, kvm_sregs]]) -> Iterator[str]:
    if vm.launched and not vm.protection.traits.can_read_registers:
        yield f"hidden: protection {vm.protection.name} keeps registers from the host after launch"
        return
    yield from _unless_running(vcpu, lambda: _state(vcpu, state))


def _state(vcpu: GuestVcpu, state: list[tuple[kvm_regs, kvm_sregs]]) -> Iterator[str]:
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    state.append((regs, sregs))
    yield from registers.format_regs(regs).splitlines()
    yield from registers.format_sregs(sregs).splitlines()
    yield from _mp_state(vcpu, regs)


def _mp_state(vcpu: GuestVcpu, regs: kvm_regs) -> Iterator[str]:
    # A vCPU that waits looks like one that loops: it, too, ends at its deadline.
    try:
        state = vcpu.get_mp_state()
    except KvmError as error:
        yield f"mp state not available: {errno_name(error.errno or 0)}"
        return
    name = next((known.name for known in MpState if known == state), str(state))
    masked = state == MpState.KVM_MP_STATE_HALTED and not regs.rflags & _RFLAGS_IF
    yield f"mp state {name}{', interrupts off: no interrupt wakes it' if masked else ''}"


def _place(state: list[tuple[kvm_regs, kvm_sregs]], call: Ucall | None) -> _Place | None:
    if call is not None and call.cmd == ucall.EXCEPTION:
        args = call.args
        return _Place(args[_EXCEPTION_RIP], args[_EXCEPTION_RSP], args[_EXCEPTION_RBP], args[_EXCEPTION_CR2])
    if state:
        regs, sregs = state[0]
        if call is not None and call.rip is not None:
            return _Place(call.rip, regs.rsp, regs.rbp, sregs.cr2, called=True)
        return _Place(regs.rip, regs.rsp, regs.rbp, sregs.cr2)
    return None


def describe(vm: GuestVm, address: int) -> str:
    """Return ``function+offset at file:line`` for a guest code address, as far as it is known."""
    gva = Gva(address)
    function, line = vm.program.function(gva), vm.program.line(gva)
    name = f"{function[0]}+{function[1]:#x}" if function else "?"
    return f"{name} at {line[0]}:{line[1]}" if line else name


def _code_bytes(vm: GuestVm, start: int, end: int) -> bytes:
    # The image is the program's own: it needs no look into guest memory, which may be hidden.
    for segment in vm.program.segments:
        base = int(segment.gva)
        if segment.executable and base <= start and end <= base + len(segment.data):
            return bytes(segment.data[start - base : end - base])
    return vm.read(Gva(start), end - start)


def _code(vm: GuestVm, place: _Place) -> Iterator[str]:
    rip = place.instruction
    yield f"{place.rip:#x}  {describe(vm, rip)}"
    function = vm.program.function(Gva(rip))
    # From the function's head, or decoding could begin inside an instruction.
    start = rip - function[1] if function else rip
    raw: bytes | None = None
    for end in (rip + CODE_BYTES_AFTER, (rip | PAGE_SIZE - 1) + 1, rip + 1):
        try:
            raw = _code_bytes(vm, start, end)
            break
        except ValueError:
            continue
    if raw is None:
        yield "no code is mapped here"
        return
    listing = list(disassemble(raw, start))
    here = max((number for number, (address, _) in enumerate(listing) if address <= rip), default=0)
    at = listing[here][0] - start if listing else 0
    before, after = (
        " ".join(f"{byte:02x}" for byte in part)
        for part in (raw[max(0, at - 16) : at], raw[at + 1 : at + 16])
    )
    yield f"bytes: {before} <{raw[at]:02x}> {after}"
    for number in range(max(0, here - 5), min(len(listing), here + 6)):
        address, text = listing[number]
        yield f"{'=>' if number == here else '  '} {address:#x}: {text}"


def _frameless_caller(vm: GuestVm, place: _Place) -> int | None:
    # gcc gives a small leaf function no frame, and before its prologue no function has one.
    function = vm.program.function(Gva(place.rip))
    if place.called or function is None or function[0].endswith(".cold"):
        return None
    head = _code_bytes(vm, place.rip - function[1], place.rip)
    if _PROLOGUE in head:
        return None
    at = place.rsp + (8 if head.endswith(_PROLOGUE[:1]) else 0)
    try:
        back = int.from_bytes(vm.read(Gva(at), 8), "little")
    except ValueError:
        return None
    return back if back and vm.program.function(Gva(back - 1)) else None


def _frames(vm: GuestVm, place: _Place) -> Iterator[int]:
    caller = _frameless_caller(vm, place)
    if caller is not None:
        yield caller
    frame, last = place.rbp, place.rsp
    for _ in range(MAX_FRAMES):
        # A frame pointer that does not move up the stack, or leaves it, ends the chain.
        if frame < last or frame % 8 or frame - last > MAX_STACK:
            return
        try:
            raw = vm.read(Gva(frame), 16)
        except ValueError:
            return
        back = int.from_bytes(raw[8:16], "little")
        # The call is before the return address, which may already belong to the next function.  The first
        # frame returns to nowhere.
        if not back or not vm.program.function(Gva(back - 1)):
            return
        yield back
        last, frame = frame + 16, int.from_bytes(raw[0:8], "little")


def _backtrace(vm: GuestVm, place: _Place) -> Iterator[str]:
    frames = list(_frames(vm, place))
    if place.called and place.rip in frames:
        frames = frames[frames.index(place.rip) + 1 :]
    yield f"#0  {place.rip:#x} {describe(vm, place.instruction)}"
    for number, back in enumerate(frames, 1):
        yield f"#{number}  {back:#x} {describe(vm, back - 1)}"


def _walk(vm: GuestVm, address: int) -> Iterator[str]:
    yield from str(vm.pages.walk(Gva(address))).splitlines()


def _trail(vcpu: GuestVcpu) -> Iterator[str]:
    trail = vcpu.trail()
    if not trail:
        yield "none"
    for reason, command, data in trail:
        try:
            name = ExitReason(reason).name.removeprefix("KVM_EXIT_")
        except ValueError:
            name = f"exit {reason}"
        if command >= 0:
            yield " ".join(["ucall", ucall.command_name(command), *(f"{word:#x}" for word in data)])
        elif reason == ExitReason.KVM_EXIT_IO:
            way = "out" if data[1] & 1 else "in"
            yield f"{name} {way} port {data[0]:#x} size {data[1] >> 8} count {data[2]} data {data[3]:#x}"
        else:
            yield f"{name} {' '.join(f'{word:#x}' for word in data[:4])}"


def _stats(vcpu: GuestVcpu) -> Iterator[str]:
    words = []
    for name, value in vcpu.get_stats().items():
        if not value.is_histogram and value.value:
            words.append(f"{name}={value.value}")
    for start in range(0, len(words), 6):
        yield "  ".join(words[start : start + 6])
