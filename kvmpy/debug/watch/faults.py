# SPDX-License-Identifier: Apache-2.0
"""KVM's page-fault events of one VM as typed objects, as they happen.

Events are told apart by the threads that run the VM's vCPUs: ``tids`` lists them (Vcpu.thread_id, or the
threads of a VMM).  Timestamps are CLOCK_MONOTONIC in nanoseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Union

from kvmpy.debug.watch.tracefs import BUFFER_KIB, Tracefs, TraceInstance
from kvmpy.debug.watch.tracering import EventFormat, Record
from kvmpy.x86.pferr import PageFault, decode

PAGE_SHIFT = 12


@dataclass(frozen=True)
class Traced:
    """What every event has: when, where, and by which thread."""

    timestamp: int
    cpu: int
    tid: int


def _where(record: Record) -> tuple[int, int, int]:
    return record.timestamp, record.cpu, record.tid


@dataclass(frozen=True)
class PageFaultEvent(Traced):
    """kvm:kvm_page_fault: a fault that KVM's MMU has to resolve.

    *address* is guest-physical under two-dimensional paging, guest-virtual under shadow paging. *rip* is 0
    where KVM may not see it.  The error code is what the hardware reported: KVM adds PRIVATE_ACCESS for a
    software-protected VM after this event.
    """

    vcpu_id: int
    rip: int
    address: int
    error: PageFault

    @classmethod
    def read(cls, record: Record) -> PageFaultEvent:
        """Make the event from *record*."""
        return cls(
            *_where(record),
            record["vcpu_id"],
            record["guest_rip"],
            record["fault_address"],
            decode(record["error_code"]),
        )

    def __str__(self) -> str:
        place = f"vcpu {self.vcpu_id}  address {self.address:#014x}  rip {self.rip:#x}"
        return f"fault       {place}  [{self.error.words}] {self.error}"


@dataclass(frozen=True)
class ExitEvent(Traced):
    """kvm:kvm_exit: the guest was left; *reason* and the rest are the hardware's numbers.

    For a nested page fault on AMD *reason* is 0x400, *info1* the error code and *info2* the address.
    """

    vcpu_id: int
    rip: int
    isa: int
    reason: int
    info1: int
    info2: int

    @classmethod
    def read(cls, record: Record) -> ExitEvent:
        """Make the event from *record*."""
        return cls(
            *_where(record),
            record["vcpu_id"],
            record["guest_rip"],
            record["isa"],
            record["exit_reason"],
            record["info1"],
            record["info2"],
        )

    def __str__(self) -> str:
        numbers = f"reason {self.reason:#x}  info {self.info1:#x} {self.info2:#x}"
        return f"exit        vcpu {self.vcpu_id}  {numbers}  rip {self.rip:#x}"


@dataclass(frozen=True)
class AttributesEvent(Traced):
    """kvm:kvm_vm_set_mem_attributes: a thread of the VM changed attributes of *size* bytes from *gpa* on."""

    gpa: int
    size: int
    attributes: int

    @classmethod
    def read(cls, record: Record) -> AttributesEvent:
        """Make the event from *record*, which counts in pages."""
        start, end = record["start"], record["end"]
        return cls(
            *_where(record),
            start << PAGE_SHIFT,
            end - start << PAGE_SHIFT,
            record["attr"],
        )

    def __str__(self) -> str:
        kind = {0: "shared", 8: "private"}.get(self.attributes, f"{self.attributes:#x}")
        return f"attributes  gpa {self.gpa:#014x}  size {self.size:#x}  -> {kind}"


@dataclass(frozen=True)
class MappingEvent(Traced):
    """kvmmmu:kvm_mmu_spte_requested: KVM maps a page of *size* bytes, to answer a fault at *gpa*."""

    gpa: int
    pfn: int
    size: int

    @classmethod
    def read(cls, record: Record) -> MappingEvent:
        """Make the event from *record*; level 1 is 4 KiB, each further one 512 times that."""
        return cls(
            *_where(record),
            record["gfn"] << PAGE_SHIFT,
            record["pfn"],
            1 << PAGE_SHIFT + 9 * (record["level"] - 1),
        )

    def __str__(self) -> str:
        return f"map         gpa {self.gpa:#014x}  pfn {self.pfn:#x}  {self.size >> 10} KiB"


@dataclass(frozen=True)
class RmpFaultEvent(Traced):
    """kvm:kvm_rmp_fault: KVM answered a nested fault of an SNP guest with the RMP bit.

    *size* is that of the page's RMP entry before, in bytes; *psmash* is 0, or PSMASH's error where it had to
    split the entry.
    """

    vcpu_id: int
    address: int
    pfn: int
    error: PageFault
    size: int
    psmash: int

    @classmethod
    def read(cls, record: Record) -> RmpFaultEvent:
        """Make the event from *record*; level 1 is 4 KiB, level 2 is 2 MiB."""
        return cls(
            *_where(record),
            record["vcpu_id"],
            record["gpa"],
            record["pfn"],
            decode(record["error_code"]),
            1 << PAGE_SHIFT + 9 * (record["rmp_level"] - 1),
            record["psmash_ret"],
        )

    def __str__(self) -> str:
        done = f"PSMASH {self.psmash}" if self.size > 1 << PAGE_SHIFT else "nothing to split"
        place = f"vcpu {self.vcpu_id}  gpa {self.address:#014x}  pfn {self.pfn:#x}"
        return f"rmp fault   {place}  entry of {self.size >> 10} KiB, {done}  [{self.error.words}]"


FaultEvent = Union[PageFaultEvent, ExitEvent, AttributesEvent, MappingEvent, RmpFaultEvent]


@dataclass(frozen=True)
class Kind:
    """A kind of event: where the kernel has it, and what its fields must be."""

    system: str
    event: str
    fields: tuple[str, ...]
    read: Callable[[Record], FaultEvent]


KINDS = {
    "faults": Kind(
        "kvm", "kvm_page_fault", ("vcpu_id", "guest_rip", "fault_address", "error_code"), PageFaultEvent.read
    ),
    "exits": Kind(
        "kvm",
        "kvm_exit",
        ("vcpu_id", "guest_rip", "isa", "exit_reason", "info1", "info2"),
        ExitEvent.read,
    ),
    "attributes": Kind("kvm", "kvm_vm_set_mem_attributes", ("start", "end", "attr"), AttributesEvent.read),
    "mappings": Kind("kvmmmu", "kvm_mmu_spte_requested", ("gfn", "pfn", "level"), MappingEvent.read),
    "rmp": Kind(
        "kvm",
        "kvm_rmp_fault",
        ("vcpu_id", "gpa", "pfn", "error_code", "rmp_level", "psmash_ret"),
        RmpFaultEvent.read,
    ),
}


class FaultTracer:
    """Traces page faults (and other *kinds* of events) of the threads *tids*; a context manager.

    With *children* threads that these start later are traced, too. TracefsError where tracing is impossible
    or an event of *kinds* is missing; *optional* kinds may be missing.  *root* is a folder to use as tracefs.
    """

    def __init__(
        self,
        tids: Iterable[int],
        *,
        kinds: Iterable[str] = ("faults",),
        optional: Iterable[str] = (),
        children: bool = False,
        buffer_kib: int = BUFFER_KIB,
        root: Path | str | None = None,
    ) -> None:
        self._formats: dict[int, Kind] = {}
        with ExitStack() as undo:
            self._tracefs = undo.enter_context(Tracefs(root))
            self._instance: TraceInstance = undo.enter_context(self._tracefs.instance(buffer_kib))
            self._instance.watch(tids, children=children)
            for name in kinds:
                self._enable(KINDS[name])
            for name in optional:
                kind = KINDS[name]
                if self._tracefs.has(kind.system, kind.event):
                    self._enable(kind)
            self._instance.start()
            self._undo = undo.pop_all()

    def _enable(self, kind: Kind) -> None:
        event_format: EventFormat = self._instance.enable(kind.system, kind.event)
        event_format.need(*kind.fields)
        self._formats[event_format.id] = kind

    @property
    def lost(self) -> int:
        """How many records did not fit into the kernel's buffers."""
        return self._instance.lost

    def read(self) -> list[FaultEvent]:
        """Return the events since the last call, in the order of time, without waiting."""
        return [self._formats[record.format.id].read(record) for record in self._instance.read()]

    def faults(self) -> list[PageFaultEvent]:
        """Return the page faults since the last call; other events are dropped."""
        return [event for event in self.read() if isinstance(event, PageFaultEvent)]

    def follow(self, until: Callable[[], bool], *, interval: float = 0.2) -> Iterator[FaultEvent]:
        """Yield events as they happen until *until* says so, asked at least every *interval* seconds."""
        while True:
            last = until()
            if not last:
                self._instance.wait(interval)
            yield from self.read()
            if last:
                return

    def stop(self) -> None:
        """Record no more; :meth:`read` gives what was recorded."""
        self._instance.stop()

    def close(self) -> None:
        """Remove the instance; twice is harmless."""
        self._undo.close()

    def __enter__(self) -> FaultTracer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def threads_of(pid: int) -> list[int]:
    """Return the threads of process *pid*; ProcessLookupError when there is no such process."""
    try:
        return sorted(int(name) for name in (path.name for path in Path(f"/proc/{pid}/task").iterdir()))
    except (FileNotFoundError, NotADirectoryError):
        raise ProcessLookupError(f"no process {pid}") from None
