# SPDX-License-Identifier: Apache-2.0
"""The state of a VM as text, taken when a test fails: what a kernel developer would ask for first.

What a protection keeps from the host is said to be hidden, and a section that cannot be made says why: the
failure that brought us here must never be lost behind another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kvmpy.core import observe, recent
from kvmpy.core.address import PAGE_SIZE, Gva
from kvmpy.core.errors import KvmError, PrivateMemoryError, errno_name
from kvmpy.guest import ucall
from kvmpy.guest.backtrace import Place, backtrace, code_bytes, describe, place_of, standing
from kvmpy.guest.disasm import disassemble
from kvmpy.guest.errors import printable
from kvmpy.guest.postmortem_interrupts import interrupts
from kvmpy.guest.postmortem_nested import nested
from kvmpy.guest.space import AddressSpace
from kvmpy.uapi.constants import ExitReason, MpState
from kvmpy.x86 import registers
from kvmpy.x86.bits import EFER
from kvmpy.x86.paging_errors import TableAccessError

if TYPE_CHECKING:
    from kvmpy.guest.ucall import Ucall
    from kvmpy.guest.vcpu import GuestVcpu
    from kvmpy.guest.vm import GuestVm
    from kvmpy.uapi.structs import kvm_regs, kvm_sregs

# What is imported by the first failure, as most programs never fail.
IMPORTED_LATER = ("capstone", "kvmpy.guest.memorymap", "kvmpy.uapi.argument_text")
CODE_BYTES_AFTER = 32
TRAIL_OF_OTHERS = 64
MOST_OTHERS = 16
_RFLAGS_IF = 1 << 9


def postmortem(vm: GuestVm, vcpu: GuestVcpu, cause: str, call: Ucall | None = None) -> str:
    """Return the post-mortem of *vcpu*, whose run ended with *cause* (and with the ucall *call*, where it
    was one).
    """
    asked = recent.taken()  # before what is asked here
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
    if state and state[0][1].efer & EFER.SVME:
        section("nested guest", lambda: nested(vm, vcpu))
    section("interrupts", lambda: _unless_running(vcpu, lambda: interrupts(vcpu)))
    if vcpu.ghcb_gpa is not None:
        section("GHCB", lambda: list(vm.protection.about_vcpu(vm, vcpu)))
    place = place_of(state, call)
    if place is not None:
        space = AddressSpace(vm, state[0][1] if state else None)
        section("code", lambda: _code(vm, place, space))
        if space.own:
            section("backtrace", lambda: backtrace(vm, place))
        for name, address in (("RIP", place.rip), ("RSP", place.rsp), ("CR2", place.cr2)):
            if name != "CR2" or address:
                title = f"page-table walk of {name} {address:#x}"
                section(title, lambda address=address: space.walk_lines(address))  # type: ignore[misc]
    if len(vm.vcpus) > 1:
        section("other vCPUs", lambda: _others(vm, vcpu))
    for other in [vcpu, *(peer for peer in vm.vcpus if peer is not vcpu)][:TRAIL_OF_OTHERS]:
        section(f"last exits of {other.name} ({other.exits} in all)", lambda other=other: _trail(other))  # type: ignore[misc]
    section(f"last ioctls of {vm.name} (KVM_RUN aside)", lambda: _ioctls(vm, asked))
    if vm.console:
        section("console", lambda: vm.console.splitlines()[-20:])
    section("KVM statistics (not zero)", lambda: _unless_running(vcpu, lambda: _stats(vcpu)))
    return printable("\n".join(lines))


def _ioctls(vm: GuestVm, asked: list[recent.Call]) -> list[str]:
    return [recent.line(entry) for entry in recent.entries(recent.of_vm(vm.name, asked))] or ["none"]


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
    regs, sregs = vcpu.regs.get(), vcpu.regs.get_sregs()
    state.append((regs, sregs))
    yield from registers.format_regs(regs).splitlines()
    yield from registers.format_sregs(sregs, regs.rflags).splitlines()
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


def _code(vm: GuestVm, place: Place, space: AddressSpace) -> Iterator[str]:
    rip = place.instruction
    yield f"{place.rip:#x}  {describe(vm, rip)}"
    function = vm.program.function(Gva(rip))
    # From the function's head, or decoding could begin inside an instruction.
    start = rip - function[1] if function else rip
    raw: bytes | None = None
    for end in (rip + CODE_BYTES_AFTER, (rip | PAGE_SIZE - 1) + 1, rip + 1):
        try:
            raw = code_bytes(vm, start, end, space)
            break
        except ValueError:
            continue
    if raw is None:
        yield "no code is mapped here"
        return
    listing = list(disassemble(raw, start, bits=space.bits))
    here = max((number for number, (address, _) in enumerate(listing) if address <= rip), default=0)
    begin = listing[here][0] - start if listing else 0
    before, after = (
        " ".join(f"{byte:02x}" for byte in part)
        for part in (raw[max(0, begin - 16) : begin], raw[begin + 1 : begin + 16])
    )
    yield f"bytes: {before} <{raw[begin]:02x}> {after}"
    for number in range(max(0, here - 5), min(len(listing), here + 6)):
        address, text = listing[number]
        yield f"{'=>' if number == here else '  '} {address:#x}: {text}"


def _others(vm: GuestVm, vcpu: GuestVcpu) -> Iterator[str]:
    for other in [peer for peer in vm.vcpus if peer is not vcpu][:MOST_OTHERS]:
        yield f"{other.name}: {where(vm, other) or 'nothing is known of it'}"
        state = _state_of(vm, other)
        if state is not None and not other.done:
            yield from ("  " + line for line in list(backtrace(vm, state))[1:])


def _state_of(vm: GuestVm, vcpu: GuestVcpu, call: Ucall | None = None) -> Place | None:
    hidden = vcpu.closed or vcpu.running or (vm.launched and not vm.protection.traits.can_read_registers)
    return place_of([] if hidden else [(vcpu.regs.get(), vcpu.regs.get_sregs())], call)


def where(vm: GuestVm, vcpu: GuestVcpu, call: Ucall | None = None) -> str:
    """Return in a few words where *vcpu* is now, after the ucall *call*; empty where nobody can know."""
    with observe.inspecting():
        try:
            if vcpu.done:
                return "DONE"
            if vcpu.running:
                return f"running in thread {vcpu.thread_id}"
            place = _state_of(vm, vcpu, call)
            if place is None:
                return ""
            # A vCPU that waits looks like one that loops.
            waits = " (halted)" if vcpu.get_mp_state() == MpState.KVM_MP_STATE_HALTED else ""
            return standing(vm, place) + waits
        except Exception as error:  # noqa: BLE001 - the failure that brought us here must not be lost behind this one
            return f"not available: {type(error).__name__}: {error}"


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
    for name, value in vcpu.stats.get().items():
        if not value.is_histogram and value.value:
            words.append(f"{name}={value.value}")
    for start in range(0, len(words), 6):
        yield "  ".join(words[start : start + 6])
