# SPDX-License-Identifier: Apache-2.0
"""The steps of a C reproducer: what the template repro.c.j2 writes for each of them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvmpy.debug.record.carguments import CArguments, Scope, Variable
from kvmpy.debug.record.cmemory import pieces
from kvmpy.debug.record.command import command_of, status_of
from kvmpy.debug.record.compare import (
    comparable,
    exit_payload,
    exit_reason,
    reason_text,
    recorded_outcome,
    result_text,
    volatile,
)
from kvmpy.debug.record.csource import byte_rows, number
from kvmpy.debug.record.events import Close, Event, FileCall, Ioctl, Kick, Memory, Object, Write
from kvmpy.debug.record.format import EVENT_WRITTEN, FILE_FALLOCATE, KICK_SIGNAL, PAGE_SIZE, ObjectKind
from kvmpy.debug.record.guestcode import discover
from kvmpy.debug.record.prune import is_question
from kvmpy.debug.record.script import Region, Script, Step
from kvmpy.uapi import ioctls
from kvmpy.uapi.constants import KVM_DIRTY_LOG_PAGE_OFFSET, ExitReason
from kvmpy.uapi.field_words import ARGUMENTS

_RUN = ioctls.KVM_RUN.nr
_READS_MEMORY = frozenset(op.nr for op in ioctls.IOCTLS.values() if op.memory != "none")
_MOST_CHECKS = 400
_DIRTY_RING = KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE
_SHORTEST_US, _LONGEST_US = 50, 2_000_000


@dataclass
class Call:
    """An ioctl (or fallocate) and what it has to return; *guard* must hold for the checks to make sense."""

    label: str
    expression: str
    result: str
    errno: str
    function: str = "need"
    gives: str = ""
    guard: str = ""
    checks: list[str] = field(default_factory=list)


@dataclass
class Block:
    """A step: what it waits for, what it declares and does, its call, and what it tells other threads.

    *begins* and *ends* say that others wait for that; *final*, that the verdict follows.
    """

    index: int
    waits: list[str] = field(default_factory=list)
    begins: bool = False
    ends: bool = False
    comment: str = ""
    scope: Scope = field(default_factory=Scope)
    statements: list[str] = field(default_factory=list)
    call: Call | None = None
    behind: list[str] = field(default_factory=list)
    final: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is nothing to write for it."""
        return not (self.waits or self.begins or self.ends or self.statements or self.call)


class CSteps(CArguments):
    """Makes the blocks of *script*, whose step *target* the file is about."""

    def __init__(self, script: Script, target: Step) -> None:
        super().__init__(script)
        self.target = target
        self.threaded = len(script.threads) > 1
        self.statics: list[str] = []
        # vCPUs that run or whose run area is named, and those of them that may come to an exit before the run
        # that it belongs to.
        self.runs: dict[int, str] = {}
        self.early: dict[int, str] = {}
        self._kicks: list[tuple[int, int]] = []
        # What immediate_exit is at this point of the file, None where that is up to the machine.
        self._flags: dict[int, bool | None] = {}
        self._watched = {other for step in script.steps for other in step.during}
        self._awaited = {other for step in script.steps for other in step.after}
        self._filled: set[Region] = set()
        self._code = discover(script.steps)
        for ident in (ident for step in script.steps for ident in _run_areas(step) if self.is_vcpu(ident)):
            self.runs[ident] = f"{self.fd(ident)}_run"
        for step in script.steps:
            payload = step.entry.what
            runs = isinstance(payload, Ioctl) and payload.request == _RUN
            if isinstance(payload, (Ioctl, Kick)) and (runs or isinstance(payload, Kick)):
                if not self.is_vcpu(payload.object):
                    continue
                self.runs[payload.object] = f"{self.fd(payload.object)}_run"
                if isinstance(payload, Kick):
                    self._kicks.append((payload.object, step.entry.order))
                elif step.interrupted and step.unsteady:
                    self.early[payload.object] = f"{self.fd(payload.object)}_early"

    def block(self, step: Step) -> Block:
        """Return the block of *step*."""
        block = Block(step.index)
        if self.threaded:
            block.waits = [f"ended[{other}]" for other in step.after]
            block.waits += [f"begun[{other}]" for other in step.during]
            block.begins, block.ends = step.index in self._watched, step.index in self._awaited
            self.uses |= {"begun"} if block.begins else set()
            self.uses |= {"ended"} if block.ends else set()
        event = step.entry.what
        if isinstance(event, Ioctl):
            block.final = step is self.target
            block.call = (
                self._run(step, event, block) if event.request == _RUN else self._ioctl(step, event, block)
            )
        elif isinstance(event, FileCall) and event.call == FILE_FALLOCATE:
            arguments = f"{self.fd(event.object)}, {event.mode:#x}, {event.offset:#x}, {event.length:#x}"
            block.call = Call("fallocate", f"fallocate({arguments})", str(event.result), _errno(event.errno))
        else:
            block.statements += self._plain_step(step)
        return block

    def _plain_step(self, step: Step) -> Iterator[str]:
        payload = step.entry.what
        if isinstance(payload, Object):
            yield from self._open(payload)
        elif step.region is not None and not step.data:
            yield from self._map(step.region)
        elif isinstance(payload, (Write, Memory)) and step.region is not None:
            place = f"{self.region(step.region)} + {payload.address - step.region.start:#x}"
            if isinstance(payload, Memory) and not any(step.data):
                yield f"memset({place}, 0, {len(step.data):#x});"
            else:
                yield from self._store(place, step.data, "The host writes guest memory.")
        elif isinstance(payload, Kick) and payload.object in self.runs:
            self._flags[payload.object] = None
            name = self.fd(payload.object)
            if self.threaded and payload.how & KICK_SIGNAL:
                self.uses |= {"kick", "signals"}
                yield f"kick({name}_run, {name}_thread);"
            else:
                yield f"{name}_run->immediate_exit = 1;"
        elif isinstance(payload, Close):
            yield f"close({self.fd(payload.object)});"
        elif isinstance(payload, Event) and payload.what == EVENT_WRITTEN:
            yield f"eventfd_write({self.fd(payload.object)}, {payload.value});"

    def _open(self, payload: Object) -> Iterator[str]:
        name = self.fd(payload.id)
        if payload.kind == ObjectKind.EVENTFD:
            yield f"{name} = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);"
        elif payload.kind == ObjectKind.GMEM:
            yield f"{name} = dup({self.fd(payload.parent)});"
        elif payload.kind == ObjectKind.MEMFD:
            yield f'{name} = memfd_create("memory", MFD_CLOEXEC);'
        else:
            self.uses.add("open_device")
            named = payload.name if payload.name.startswith("/dev/") else "/dev/null"
            path = {ObjectKind.SYSTEM: "/dev/kvm", ObjectKind.SEV: "/dev/sev"}.get(
                ObjectKind(payload.kind), named
            )
            yield f'{name} = open_device("{path}");'
            if payload.kind == ObjectKind.SYSTEM and self.runs:
                yield f"run_size = ioctl({name}, KVM_GET_VCPU_MMAP_SIZE, 0);"

    def _map(self, region: Region) -> Iterator[str]:
        owner = self.script.objects.get(region.object)
        if owner is not None and owner.kind == ObjectKind.VCPU and region.offset < _DIRTY_RING:
            return  # its run area is mapped as soon as it is made
        self.uses.add("map_fd")
        place = f"{self.fd(region.object)}, {region.size:#x}, {region.offset:#x}"
        yield f"{self.region(region)} = map_fd({place});"
        yield from self.fill(region)

    def _store(self, place: str, data: bytes, comment: str = "") -> Iterator[str]:
        if len(data) <= 8:
            if comment:
                yield f"/* {comment} */"
            value = number(int.from_bytes(data, "little"))
            yield f"memcpy({place}, &(unsigned long long){{ {value} }}, {len(data)});"
        else:
            label = self._constant("written", data)
            yield f"memcpy({place}, {label}, sizeof({label}));"

    def _constant(self, base: str, data: bytes) -> str:
        label = self.label(base)
        self.statics += [f"static const unsigned char {label}[] = {{", *byte_rows(data), "};", ""]
        return label

    def fill(self, region: Region) -> Iterator[str]:
        """Yield the statements that give *region* the content that it begins with."""
        if region in self._filled or not any(step.request in _READS_MEMORY for step in self.script.steps):
            return
        self._filled.add(region)
        for piece in pieces(self.region(region), region.initial, self._code.get(region, {})):
            if piece.words:
                self.uses.add("put_words")
            self.statics += [*piece.definition, ""]
            yield piece.statement

    # Ioctls.

    def _ioctl(self, step: Step, ioctl: Ioctl, block: Block) -> Call:
        op = ioctls.BY_NR.get(ioctl.request)
        name = self.words.request(op) if op is not None else number(ioctl.request)
        known = command_of(ioctl) or op
        about = known.doc.rstrip(".") if known is not None else "an ioctl that kvmpy does not know"
        ended = "" if ioctl.result >= 0 else f" Recorded: {result_text(recorded_outcome(step))[3:]}."
        block.comment = f"{step.index}: {self.fd(ioctl.object)}: {about}.{ended}"
        node = step.argument.node if step.argument is not None else None
        variable = self.node(node, block.scope) if node is not None else None
        argument = variable.address if variable is not None else self._number(step, ioctl, block.scope)
        if step.unsteady and ioctl.object in self.early and not is_question(step):
            # The recorded state takes the place of what the guest has done since it was interrupted.
            block.statements.append(f"{self.early[ioctl.object]}.come = 0;")
        if ioctl.request == ioctls.KVM_RESET_DIRTY_RINGS.nr:
            self.uses.add("collect")
            block.statements.append(f"collected = {ioctl.result};")
            block.statements += [f"collect({ring}, {r.size:#x});" for r, ring in self.rings.items()]
        any_result = step.makes or ("" in volatile(ioctl.request) and ioctl.result >= 0)
        call = Call(
            str(command_of(ioctl) or name),
            f"ioctl({self.fd(ioctl.object)}, {name}, {argument})",
            "ANY" if any_result else str(ioctl.result),
            _errno(ioctl.errno),
        )
        if block.final:
            call.function = "same"
            call.checks = self._argument_checks(step, ioctl, variable)
        elif step.makes and ioctl.request == ioctls.KVM_CREATE_DEVICE.nr and variable is not None:
            block.behind.append(f"{self.fd(step.makes)} = {variable.member('fd')};")
        elif step.makes:
            call.gives = self.fd(step.makes)
        if step.makes in self.runs and not block.final:
            self.uses.add("map_fd")
            block.behind.append(f"{self.runs[step.makes]} = map_fd({self.fd(step.makes)}, run_size, 0);")
        return call

    def _number(self, step: Step, ioctl: Ioctl, scope: Scope) -> str:
        if step.argument is not None:
            return self.value(step.argument, scope)
        op = ioctls.BY_NR.get(ioctl.request)
        kind = ARGUMENTS.get(op.name) if op is not None else None
        if kind is not None:
            return self.words.words(kind, ioctl.arg)
        return number(ioctl.arg) if ioctl.arg else "NULL" if op and op.arg != "int" else "0"

    def _argument_checks(self, step: Step, ioctl: Ioctl, variable: Variable | None) -> list[str]:
        node = step.argument.node if step.argument is not None else None
        if variable is None or node is None or node.after is None or node.struct is None or step.unsteady:
            return []
        # Of what failed, the argument says no more than the status of the secure processor.
        failed = ioctl.result < 0
        if "" in volatile(ioctl.request) or (failed and status_of(ioctl.request, node.after) is None):
            return []
        return [
            self._value(step, path, variable.member(path), number(value))
            for path, value in comparable(step, node.after)
            if path == "error" or not failed
        ][:_MOST_CHECKS]

    def _value(self, step: Step, path: str, shown: str, recorded: str) -> str:
        self.uses.add("value")
        return f'value({step.index}, "{path}", {shown}, {recorded})'

    # KVM_RUN.

    def _run(self, step: Step, ioctl: Ioctl, block: Block) -> Call:
        vcpu, run = self.fd(ioctl.object), self.runs.get(ioctl.object)
        outcome = recorded_outcome(step)
        reason = exit_reason(outcome)
        ending = f"ends with {reason_text(reason)}" if ioctl.result >= 0 else result_text(outcome)[3:]
        block.comment = f"{step.index}: {vcpu} runs; {ending}."
        call = Call(
            "KVM_RUN", f"ioctl({vcpu}, KVM_RUN, NULL)", str(ioctl.result), _errno(ioctl.errno), "same"
        )
        if run is None:  # no vCPU: KVM refuses it
            return call
        if self._flags.get(ioctl.object, False) != step.immediate_exit:
            block.statements.append(f"{run}->immediate_exit = {int(step.immediate_exit)};")
        # Who kicks it or ends its run leaves the flag as the machine pleases.
        unknown = step.interrupted or self._kicked(step)
        self._flags[ioctl.object] = None if unknown else step.immediate_exit
        for offset, data in step.run_in:
            block.statements += self._store(f"(unsigned char *){run} + {offset:#x}", data)
        if self.threaded:
            block.statements.append(f"{vcpu}_thread = pthread_self();")
        early = f"&{self.early[ioctl.object]}" if ioctl.object in self.early else ""
        if step.interrupted or (step.ended_by_signal and step.unsteady):
            self.uses |= {"run_for", "signals"}
            took = (ioctl.end_ns - step.entry.frame.time_ns) // 1000
            us = 0 if step.immediate_exit or self._kicked(step) else max(_SHORTEST_US, min(_LONGEST_US, took))
            call.expression = f"run_for({vcpu}, {run}, {us}, {early if early and step.unsteady else 'NULL'})"
        elif not step.ended_by_signal and (early or any(kicked == ioctl.object for kicked, _ in self._kicks)):
            self.uses.add("run_on")
            call.expression = f"run_on({vcpu}, {run}, {early or 'NULL'})"
        fault = ioctl.result < 0 and reason == ExitReason.KVM_EXIT_MEMORY_FAULT
        if reason is not None and (ioctl.result >= 0 or fault):
            words = self.words.words(ExitReason, reason) if reason in set(ExitReason) else number(reason)
            call.guard = self._value(step, "exit_reason", f"{run}->exit_reason", words)
            call.checks = [
                self._payload_check(step, run, path, text)
                for path, text in exit_payload(outcome).items()
                if text
            ]
        return call

    def _kicked(self, step: Step) -> bool:
        ioctl = step.ioctl
        return ioctl is not None and any(
            kicked == ioctl.object and step.entry.order < order < ioctl.end_order
            for kicked, order in self._kicks
        )

    def _payload_check(self, step: Step, run: str, path: str, text: str) -> str:
        if path.startswith("memory_fault."):
            self.uses.add("memory_fault")
            return self._value(step, path, f"memory_fault({run}).{path.partition('.')[2]}", text)
        if text.startswith("0x"):
            return self._value(step, path, f"{run}->{path}", number(int(text, 16)))
        expected = self._constant("expected", bytes.fromhex(text))
        # Behind the check of the exit reason: of another exit this is no offset.
        shown = f"(char *){run} + {run}->io.data_offset" if path == "io.data" else f"{run}->{path}"
        return self._value(
            step, f"{path} differs", f"memcmp({shown}, {expected}, sizeof({expected})) != 0", "0"
        )


def _run_areas(step: Step) -> Iterator[int]:
    """Yield the objects whose mappings from the begin a step names."""
    refs = [step.argument] if step.argument is not None else []
    regions = [step.region] if step.region is not None and step.data else []
    for ref in refs:
        regions += [ref.region] if ref.region is not None else []
        refs += ref.node.refs if ref.node is not None else []
    yield from (region.object for region in regions if not region.offset)


def _errno(value: int) -> str:
    return errno.errorcode.get(value, str(value)) if value else "0"
