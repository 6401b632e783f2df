# SPDX-License-Identifier: Apache-2.0
"""A record as a script that can be carried out again: its addresses and descriptors are references.

Replay executes a script, the C writer prints it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from errno import EINTR
from itertools import groupby

from kvmpy.debug.record.events import (
    Close,
    Deadline,
    Event,
    FileCall,
    Ioctl,
    Kick,
    Map,
    Memory,
    Object,
    Unmap,
    Write,
)
from kvmpy.debug.record.format import MEMORY_INITIAL, ObjectKind, What, When
from kvmpy.debug.record.model import Entry, Record, request_name
from kvmpy.uapi import ioctls, lib
from kvmpy.uapi.buffers import BUFFERS, Buffer, children_of, descriptors_in, field_place
from kvmpy.uapi.structs import kvm_run

_RUN = ioctls.KVM_RUN.nr
_USER_END = 1 << 47
_LARGEST = 1 << 42
_IN, _OUT = int(When.IN), int(When.OUT)
_IMMEDIATE_EXIT = kvm_run.fields()["immediate_exit"][0]
_RUN_HEAD = lib.KVMPY_RUN_HEAD
# What KVM serves to the process alone that made it: its ioctls compare the caller's memory with the VM's.
_OWNED = (ObjectKind.VM, ObjectKind.VCPU, ObjectKind.DEVICE)


class ProcessesError(ValueError):
    """Processes share a VM, which no replay in one process can do; the text says which ones."""


@dataclass(eq=False)
class Region:
    """Host memory that guests use: [start, end) in the recorded process.

    *object* is the guest_memfd or vCPU that was mapped there, at *offset*; 0 for anonymous memory.  *pid* is
    the process whose addresses these are, *vms* are the VMs that have a slot there.
    """

    start: int
    end: int
    object: int = 0
    offset: int = 0
    since: int = 0
    until: int = 1 << 63
    initial: list[tuple[int, bytes]] = field(default_factory=list, repr=False)
    flags: int = 0
    pid: int = 0
    vms: set[int] = field(default_factory=set, repr=False)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


@dataclass(eq=False)
class Node:
    """Memory that an ioctl's argument consists of: *data*, and what must be put into it."""

    data: bytes
    struct: str | None = None
    refs: list[Ref] = field(default_factory=list)
    after: bytes | None = None
    what: Buffer | None = None


@dataclass(frozen=True, eq=False)
class Ref:
    """At *offset* of a node lie *size* bytes that name something: a region, a node, an object, nothing."""

    offset: int
    size: int
    value: int
    region: Region | None = None
    node: Node | None = None
    object: int = 0
    bad: bool = False


@dataclass(eq=False)
class Step:
    """One thing to do; *after* and *during* name steps that must have ended and begun by then.

    Of a KVM_RUN: *run_in* is what the host changed in the run area, *immediate_exit* that flag as the run
    saw it.  *unsteady*: it comes between a run that was interrupted and the exit that its vCPU then came
    to, so that where the guest stands is up to the machine.
    """

    index: int
    entry: Entry
    thread: int
    after: tuple[int, ...] = ()
    during: tuple[int, ...] = ()
    argument: Ref | None = None
    run_in: tuple[tuple[int, bytes], ...] = ()
    run_out: tuple[tuple[int, bytes], ...] = ()
    immediate_exit: bool = False
    unsteady: bool = False
    makes: int = 0
    region: Region | None = None
    data: bytes = field(default=b"", repr=False)

    @property
    def ioctl(self) -> Ioctl | None:
        """The ioctl, where it is one."""
        return self.entry.what if isinstance(self.entry.what, Ioctl) else None

    @property
    def request(self) -> int:
        """The request number, 0 where it is no ioctl."""
        return self.entry.what.request if isinstance(self.entry.what, Ioctl) else 0

    @property
    def ended_by_signal(self) -> bool:
        """Whether it is a KVM_RUN that failed with EINTR, interrupted or because of immediate_exit."""
        call = self.ioctl
        return call is not None and call.request == _RUN and call.result < 0 and call.errno == EINTR

    @property
    def interrupted(self) -> bool:
        """Whether it is a KVM_RUN that was interrupted while the guest ran."""
        return self.ended_by_signal and not self.immediate_exit


@dataclass
class Script:
    """All steps in order, the memory they use, and the objects that exist without an ioctl."""

    record: Record
    steps: list[Step]
    regions: list[Region]
    objects: dict[int, Object]
    threads: list[int]


class _Builder:
    def __init__(self, record: Record) -> None:
        self.record = record
        self.objects = record.objects
        self.regions: list[Region] = []
        # Descriptors by process and number; 0 stands for the process that used the number last.
        self.numbers: dict[tuple[int, int], int] = {}
        # Mappings by object, and what the run area of each vCPU holds at this point.
        self.areas: dict[int, list[Region]] = {}
        self.run_areas: dict[int, bytearray] = {}
        self.made: dict[int, int] = {each.made_by: each.id for each in self.objects.values() if each.made_by}

    # Memory.

    def find_regions(self) -> None:
        """Collect the memory that is mapped or that slots use, with the time in which it exists."""
        for entry in self.record.entries:
            payload = entry.what
            if isinstance(payload, Unmap):
                for region in self.regions:
                    if (
                        region.until > entry.order
                        and region.pid == entry.frame.pid
                        and payload.address <= region.start < payload.address + payload.length
                    ):
                        region.until = entry.order
            elif isinstance(payload, Map):
                self._claim(
                    entry, payload.address, payload.length, payload.object, payload.offset, payload.flags
                )
            elif isinstance(payload, Ioctl) and payload.request in ioctls.SETS_SLOT and payload.argument_in:
                raw = payload.argument_in
                size, address = (
                    int.from_bytes(raw[position : position + 8], "little") for position in (16, 24)
                )
                if 0 < size <= _LARGEST and address >= 0x10000 and address + size < _USER_END:
                    region = self._claim(entry, address & ~0xFFF, size + (address & 0xFFF))
                    region.vms.add(payload.object)
            elif isinstance(payload, Close):
                self._release(payload.object, entry.order)
            elif isinstance(payload, Memory) and payload.flags & MEMORY_INITIAL:
                # Content that a VM begins with is there as soon as the memory is.
                place = self.region_at(payload.address, entry)
                if place is not None:
                    place.initial.append((payload.address - place.start, self.record.content(payload)))
        for region in self.regions:
            if region.object and not region.offset:
                self.areas.setdefault(region.object, []).append(region)

    def _claim(
        self, entry: Entry, start: int, size: int, ident: int = 0, offset: int = 0, flags: int = 0
    ) -> Region:
        end, order, pid = start + size, entry.order, entry.frame.pid
        for region in self.regions:
            if region.until <= order or end <= region.start or region.end <= start or region.pid != pid:
                continue
            if ident or region.object:
                if ident:
                    region.until = order
                    continue
                return region
            added = region.start - min(region.start, start)
            region.initial = [(piece + added, data) for piece, data in region.initial]
            region.start, region.end = min(region.start, start), max(region.end, end)
            # The slot's ioctl comes first, what the memory is like behind it.
            region.flags |= flags
            return region
        self.regions.append(Region(start, end, ident, offset, order, flags=flags, pid=pid))
        return self.regions[-1]

    def _release(self, vm: int, order: int) -> None:
        # Whatever a later VM has at these addresses begins with what is told of that one.
        for region in self.regions:
            if vm in region.vms:
                region.vms.remove(vm)
                if not (region.vms or region.object):
                    region.until = min(region.until, order)

    def region_at(self, address: int, entry: Entry) -> Region | None:
        for region in self.regions:
            if (
                region.start <= address < region.end
                and entry.order < region.until
                and region.pid == entry.frame.pid
            ):
                return region
        return None

    # Arguments.

    def argument(self, entry: Entry, ioctl: Ioctl) -> Ref | None:
        """Return the reference that is the argument, None where it is a plain number."""
        buffer = BUFFERS.get(ioctl.request)
        before, after = ioctl.argument_in, ioctl.argument_out
        if before is None and after is None:
            if buffer is None or not ioctl.arg:
                return None
            return Ref(0, 8, ioctl.arg, bad=True)
        if not (before or after):
            return Ref(0, 8, ioctl.arg, bad=True)
        node = self._node(entry, ioctl, buffer, before, after)
        op = ioctls.BY_NR.get(ioctl.request)
        if op is not None and op.struct is not None:
            for name in op.addresses:
                self._address(entry, node, *field_place(op.struct, name))
            for place in descriptors_in(op, node.data):
                self._descriptor(entry, node, *place)
        return Ref(0, 8, ioctl.arg, node=node)

    def _node(
        self, entry: Entry, ioctl: Ioctl, buffer: Buffer | None, before: bytes | None, after: bytes | None
    ) -> Node:
        data = before if before is not None else bytes(len(after or b""))
        if after is not None:
            data = data.ljust(len(after), b"\0")
        if buffer is not None and buffer.size.own and buffer.size.count:
            # Another KVM may fill more of the room than this one did.
            room = buffer.size.bytes(_number(data, *buffer.place(buffer.size.count)))
            data = data.ljust(min(room, lib.KVMPY_CAPTURE_MOST), b"\0")
        node = Node(data, None if buffer is None else buffer.struct, after=after, what=buffer)
        if buffer is not None:
            self._pointers(entry, ioctl, buffer, node)
        return node

    def _pointers(self, entry: Entry, ioctl: Ioctl, buffer: Buffer, node: Node) -> None:
        selected = None
        if buffer.select:
            offset, size = buffer.place(buffer.select)
            selected = _number(node.data, offset, size)
        for child in children_of(buffer, selected):
            offset, size = buffer.place(child.pointer)
            value = _number(node.data, offset, size)
            if not value or offset + size > len(node.data):
                continue
            region = self.region_at(value, entry)
            before, after = ioctl.chunk(value, When.IN), ioctl.chunk(value, When.OUT)
            if region is not None:
                node.refs.append(Ref(offset, size, value, region=region))
            elif before or after:
                inner = self._node(entry, ioctl, child, before, after)
                node.refs.append(Ref(offset, size, value, node=inner))
            else:
                node.refs.append(Ref(offset, size, value, bad=True))

    def _address(self, entry: Entry, node: Node, offset: int, size: int) -> None:
        value = _number(node.data, offset, size)
        region = self.region_at(value, entry) if value else None
        if region is not None:
            node.refs.append(Ref(offset, size, value, region=region))
        elif 0x10000 <= value < _USER_END:
            node.refs.append(Ref(offset, size, value, bad=True))

    def _descriptor(self, entry: Entry, node: Node, offset: int, size: int) -> None:
        value = _number(node.data, offset, size)
        ident = self.numbers.get((entry.frame.pid, value), self.numbers.get((0, value)))
        if ident is not None:
            node.refs.append(Ref(offset, size, value, object=ident))

    # Steps.

    def steps(self) -> Iterator[Step]:
        """Yield the steps without their order between threads."""
        index = 0
        for entry in self.record.entries:
            event = entry.what
            step = Step(index, entry, 0)
            if isinstance(event, Object):
                self._opened(entry, event)
                if event.made_by:
                    continue
            elif isinstance(event, Ioctl):
                self._ioctl_step(step, event)
            elif isinstance(event, (Write, Memory)):
                step.region = self.region_at(event.address, entry)
                step.data = event.data if isinstance(event, Write) else self.record.content(event)
                initial = isinstance(event, Memory) and event.flags & MEMORY_INITIAL
                if step.region is None or initial:
                    continue
            elif isinstance(event, Map):
                if isinstance(event, Unmap) or not event.object:
                    continue
                step.region = next(
                    (r for r in self.regions if r.since == entry.order and r.object == event.object), None
                )
            elif not isinstance(event, (Close, Kick, Deadline, FileCall, Event)):
                continue
            yield step
            index += 1

    def _opened(self, entry: Entry, payload: Object) -> None:
        self.numbers[entry.frame.pid, payload.fd] = self.numbers[0, payload.fd] = payload.id

    def _ioctl_step(self, step: Step, ioctl: Ioctl) -> None:
        step.makes = self.made.get(step.entry.order, 0)
        if step.makes:
            self._opened(step.entry, self.objects[step.makes])
        if ioctl.request == _RUN:
            self._run_step(step, ioctl)
        else:
            step.argument = self.argument(step.entry, ioctl)

    def _run_step(self, step: Step, ioctl: Ioctl) -> None:
        chunks = [each for each in ioctl.chunks if each.what == What.RUN]
        mapped = self.areas.get(ioctl.object, ())
        begins = [each.start for each in mapped if each.since <= ioctl.end_order]
        # Where nobody saw the mapping: what KVM_RUN left begins where the area does.
        begins += [each.address for each in chunks if each.when & _OUT and len(each.data) >= _RUN_HEAD]
        start = begins[0] if begins else 0
        area = self.run_areas.setdefault(ioctl.object, bytearray(_RUN_HEAD))
        placed = [(c.when, c.address - start, c.data) for c in chunks if start and c.address >= start]
        for when, offset, data in placed:
            if when & _IN:
                step.run_in += tuple(_changed(area, offset, data))
                _put(area, offset, data)
        step.immediate_exit = bool(area[_IMMEDIATE_EXIT])
        for when, offset, data in placed:
            if when & _OUT:
                step.run_out += ((offset, data),)
                _put(area, offset, data)


def _put(area: bytearray, offset: int, data: bytes) -> None:
    area[offset : offset + len(data)] = data[: max(0, len(area) - offset)]


def _changed(area: bytearray, offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield where *data* differs from the head of *area*, but for immediate_exit, and all behind the head."""
    head = max(0, min(len(data), len(area) - offset))
    differs = [
        area[offset + start] != data[start] and offset + start != _IMMEDIATE_EXIT for start in range(head)
    ]
    for changed, group in groupby(range(head), key=differs.__getitem__):
        places = list(group)
        if changed:
            yield offset + places[0], data[places[0] : places[-1] + 1]
    if head < len(data):
        yield offset + head, data[head:]


def _number(data: bytes, offset: int, size: int) -> int:
    return int.from_bytes(data[offset : offset + size], "little")


def _order(steps: list[Step]) -> list[int]:
    """Give each step its thread and what it waits for; return the recorded thread ids, main first."""
    threads: dict[int, int] = {}
    last: list[list[Step]] = []
    waited: list[dict[int, int]] = []
    for step in steps:
        tid = step.entry.frame.tid
        number = threads.setdefault(tid, len(threads))
        if number == len(last):
            last.append([])
            waited.append({})
        step.thread = number
        after, during = [], []
        for other, theirs in enumerate(last):
            if other == number or not theirs:
                continue
            done = next((s for s in reversed(theirs) if 0 < s.entry.end < step.entry.order), None)
            if done is not None and waited[number].get(other, -1) < done.index:
                after.append(done.index)
                waited[number][other] = done.index
            if theirs[-1].entry.end > step.entry.order:
                during.append(theirs[-1].index)
        step.after, step.during = tuple(after), tuple(during)
        last[number].append(step)
    return list(threads)


def _progress(steps: list[Step]) -> None:
    """Mark what comes between interrupted runs and the exits that their vCPUs then come to."""
    behind: dict[int, list[Step]] = {}
    for step in steps:
        step.unsteady = False
        ioctl = step.ioctl
        if ioctl is None:
            continue
        if ioctl.request == _RUN and not step.ended_by_signal:
            for each in behind.pop(ioctl.object, ()):
                each.unsteady = True
        elif ioctl.object in behind or step.interrupted:
            behind.setdefault(ioctl.object, []).append(step)


def _refuse_shared(steps: list[Step], objects: dict[int, Object]) -> None:
    """ProcessesError where a process uses what another one made."""
    owners: dict[int, int] = {}
    for step in steps:
        ioctl, pid = step.ioctl, step.entry.frame.pid
        if step.makes:
            owners[step.makes] = pid
        each = objects.get(ioctl.object) if ioctl is not None else None
        if each is not None and each.kind in _OWNED and owners.get(each.id, pid) != pid:
            raise ProcessesError(
                f"process {pid} issued {request_name(step.entry.what)} on {each.name}, which process "
                f"{owners[each.id]} made: what KVM says to the other process cannot be repeated in one"
            )


def build(record: Record) -> Script:
    """Return *record* as a script; ProcessesError where it needs more than one process."""
    builder = _Builder(record)
    builder.find_regions()
    steps = list(builder.steps())
    _refuse_shared(steps, builder.objects)
    threads = _order(steps)
    _progress(steps)
    return Script(record, steps, builder.regions, builder.objects, threads)


def select(script: Script, steps: list[Step]) -> Script:
    """Return the script of *steps* alone, numbered anew, with their order between threads."""
    chosen = [replace(step, index=number) for number, step in enumerate(steps)]
    _progress(chosen)
    return Script(script.record, chosen, script.regions, script.objects, _order(chosen))
