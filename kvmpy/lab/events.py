# SPDX-License-Identifier: Apache-2.0
"""What a session inside says to the host, as types: the other end may be a kernel that writes anything.

A line that is no event at all is left out: it is half a line of a process that died. An event that is not as
it should be is a BadEventError, and ends its machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

import msgspec
import pytest

from kvmpy.platforms import LARGE_GMEM
from kvmpy.testing.configurations import is_value, nearest
from kvmpy.testing.dealer import DealError
from kvmpy.testing.host import HostSummary
from kvmpy.testing.journal import from_json

if TYPE_CHECKING:
    from kvmpy.lab.qemu import Options

# What a whole line may take, in bytes: a report with evidence and memory maps is some hundred KiB.
MAX_LINE = 64 << 20

# Why a kernel may lack a parameter that kvmpy's own hooks bring.
_ABSENT = {
    LARGE_GMEM: ": it comes with the software AMD-SP (`kvmpy lab build --soft-sev`), and does not fit"
    " guest_memfd of Linux 6.12"
}

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]
Location = tuple[str, int | None, str]
# What the firmware keeps of the memory, at most, in MiB.
_HOLES = 16


class BadEventError(DealError):
    """An event from inside that is not as it should be."""


class _Event(msgspec.Struct, frozen=True):
    """Fields that are not declared do not matter."""


class Host(_Event, frozen=True):
    """The machine describes itself, as :func:`kvmpy.lab.readback.read` does; *memory* is in MiB."""

    summary: HostSummary
    cpus: int
    memory: int
    nodes: int
    parameters: dict[str, str | None] = {}
    known: dict[str, list[str]] = {}
    ignored: list[str] = []
    flags: dict[str, bool] = {}

    def refused(self, wanted: Options) -> list[str]:
        """Return what of *wanted* is not so inside."""
        answers = [*self._parameters(wanted), *(f"the kernel does not know {word}" for word in self.ignored)]
        for sign, flag in ((word[0], word[1:]) for word in wanted.cpu):
            if self.flags.get(flag) is not (sign == "+"):
                answers.append(f"the CPU inside has {'no' if sign == '+' else 'the flag'} {flag}")
        if self.cpus != wanted.cpus:
            answers.append(f"there are {self.cpus} CPUs inside, not {wanted.cpus}")
        if not wanted.memory - _HOLES <= self.memory <= wanted.memory:
            answers.append(f"there are {self.memory} MiB of memory inside, not {wanted.memory}")
        if wanted.nodes is not None and self.nodes != wanted.nodes:
            answers.append(f"there are {self.nodes} NUMA nodes inside, not {wanted.nodes}")
        return answers

    def _parameters(self, wanted: Options) -> Iterator[str]:
        for word in (*wanted.parameters, *wanted.optional):
            name, _, value = word.partition("=")
            module, dot, parameter = name.partition(".")
            if not dot:
                continue
            real = self.parameters.get(name)
            if real is not None:
                if not is_value(name, value, real):
                    yield f"{name} is {real} inside, not {value}"
            elif word not in wanted.optional:
                hint = nearest(parameter, self.known.get(module, [])).replace("mean ", f"mean {module}.")
                yield f"the kernel inside has no parameter {name}{_ABSENT.get(name, hint)}"


class Frozen(_Event, frozen=True):
    """The machine waits for its run, as a snapshot of it will."""


class Labels(_Event, frozen=True):
    """What the host lacks for each label that it was asked for, empty where it lacks nothing."""

    labels: dict[str, str]


class Ready(_Event, frozen=True):
    """It wants the share *number*."""

    number: int


class Collected(_Event, frozen=True):
    """The tests of a share."""

    number: int
    ids: list[Name]


class Done(_Event, frozen=True):
    """All tests of a share have run."""

    number: int


class Start(_Event, frozen=True):
    """A test begins; it may take *limit* seconds."""

    nodeid: Name
    limit: Seconds = 0.0
    location: Location | None = None

    @property
    def place(self) -> Location:
        """The location, where none was told the one that the name tells."""
        file, _, test = self.nodeid.partition("::")
        return self.location or (file, None, test)


class Finish(_Event, frozen=True):
    """A test has ended."""

    nodeid: Name


class Report(_Event, frozen=True):
    """A phase of a test, as pytest serializes it."""

    data: dict[str, Any]


class Uncollected(_Event, frozen=True):
    """A file that could not be collected, as pytest serializes that."""

    data: dict[str, Any]


class Record(_Event, frozen=True):
    """A piece of a record, compressed and in base64."""

    name: Annotated[str, msgspec.Meta(pattern=r"\A[^/\x00.][^/\x00]{0,250}\Z")]
    first: bool
    last: bool
    data: str


class Objects(_Event, frozen=True):
    """The objects of the kernel that count what they execute."""

    names: list[Name]
    suite: Annotated[str, msgspec.Meta(max_length=100)] = ""


class Counted(_Event, frozen=True):
    """What a test, or a file of tests, executed: its counters, packed and in base64."""

    test: Name
    data: str
    seconds: Seconds = 0.0


class Program(_Event, frozen=True):
    """A guest program that is to be compiled."""

    key: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{1,128}\Z")]
    recipe: dict[str, Any]


class Uncompiled(_Event, frozen=True):
    """Modules without bytecode."""

    files: list[Name]


class Exit(_Event, frozen=True):
    """The test process has ended."""

    status: int


class Over(_Event, frozen=True):
    """A test and all that belongs to it has come through."""


class End(_Event, frozen=True):
    """The session inside is over."""


Event = Union[
    Host,
    Frozen,
    Labels,
    Ready,
    Collected,
    Done,
    Start,
    Finish,
    Report,
    Uncollected,
    Record,
    Objects,
    Counted,
    Program,
    Uncompiled,
    Exit,
    Over,
    End,
]
_KINDS: Mapping[str, type[Event]] = {kind.__name__.lower(): kind for kind in get_args(Event)}


def parse(line: bytes) -> Event | None:
    """Return the event of one line; None for half a line and for what the host does not wait for.

    BadEventError for an event that lacks a field, or has one of another type or size.
    """
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError):
        return None
    kind = _KINDS.get(str(raw.get("event"))) if isinstance(raw, dict) else None
    if kind is None:
        return None
    try:
        return msgspec.convert(raw, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise BadEventError(f"event {kind.__name__.lower()!r}: {error}") from None


class _Attached(msgspec.Struct):
    """What the plugin of the process that ran the test puts beside pytest's own fields."""

    promise: str = ""
    protection: str | None = None
    postmortem: str | None = None
    missing: list[tuple[str, str]] = []
    ioctls: list[dict[str, Any]] = []
    memory_maps: list[dict[str, Any]] = []
    rss: int | None = None


class _Test(msgspec.Struct):
    """The fields of a serialized TestReport that terminal and report files read."""

    nodeid: Name
    location: Location
    outcome: Literal["passed", "failed", "skipped"]
    when: Literal["setup", "call", "teardown"]
    keywords: dict[str, Any]
    longrepr: Union[str, dict[str, Any], list[Any], None] = None
    wasxfail: str = ""
    sections: list[tuple[str, str]] = []
    user_properties: list[tuple[str, Any]] = []
    duration: Seconds = 0.0
    start: float = 0.0
    stop: float = 0.0
    kvmpy: _Attached = msgspec.field(default_factory=_Attached)


class _File(msgspec.Struct):
    """The fields of a serialized CollectReport that the host reads."""

    nodeid: Name
    outcome: Literal["failed", "skipped"]
    longrepr: Union[str, dict[str, Any], list[Any], None] = None
    sections: list[tuple[str, str]] = []


_REPORTS: Mapping[str, type[msgspec.Struct]] = {"TestReport": _Test, "CollectReport": _File}


def deserialize(data: dict[str, Any], kind: Literal["TestReport", "CollectReport"]) -> Any:
    """Return pytest's report of *kind*, which can be printed; BadEventError for *data* that is none."""
    if data.get("$report_type") != kind:
        raise BadEventError(f"a {kind} was due, not {data.get('$report_type')!r}")
    try:
        msgspec.convert(data, _REPORTS[kind])
        values = from_json(data)
        if isinstance(values.get("longrepr"), tuple):
            msgspec.convert(values["longrepr"], tuple[str, int, str])
        del values["$report_type"]
        known: Any = pytest.TestReport if kind == "TestReport" else pytest.CollectReport
        report = known._from_json(values)
        # What a traceback's text is made of shows when it is made.
        crash = getattr(report.longrepr, "reprcrash", None)
        if isinstance(report.longrepr, dict) or not isinstance(getattr(crash, "message", ""), str):
            raise BadEventError("a traceback that is none")
        report.longreprtext  # noqa: B018
    except Exception as error:  # noqa: BLE001 - whatever goes wrong with data of somebody else's making
        raise BadEventError(f"a {kind} that is none: {str(error) or type(error).__name__}") from None
    return report
