# SPDX-License-Identifier: Apache-2.0
"""``kvmpy faults``: the page faults of a VM as KVM resolves them, decoded."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kvmpy.debug.watch.faults import FaultEvent, FaultTracer

# Waits until its threads are watched, and becomes the command.
_WAIT = """
import os, sys
gate = int(sys.argv[1])
if not os.read(gate, 1):
    sys.exit()
os.close(gate)
os.execvp(sys.argv[2], sys.argv[2:])
"""
_STOP_TIMEOUT = 5.0
NO_FAULTS = (
    "kvmpy faults: no page fault was seen: no guest ran, or the vendor module has no kvm_page_fault event "
    "(kvm_amd and kvm_intel have one{more})"
)
MAPPINGS = "; --mappings works with every KVM"


class _StopError(Exception):
    """A signal asked for the end."""


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--pid", type=click.IntRange(1), help="Trace the threads of this process, and those it starts.")
@click.option("--exits", is_flag=True, help="Also show every exit of the guest (kvm_exit).")
@click.option(
    "--mappings", is_flag=True, help="Also show what KVM maps to resolve a fault, and the page size."
)
@click.option("--count", type=click.IntRange(1), help="Stop after this many events.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each event.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def faults(
    pid: int | None, exits: bool, mappings: bool, count: int | None, as_json: bool, command: tuple[str, ...]
) -> None:
    """Show page faults and conversions of a VM live, for a process (--pid) or for COMMAND (after --).

    Needs root and tracefs, which is mounted for this command alone where it is not mounted.  With COMMAND
    the exit status is the command's.
    """
    from kvmpy.debug.watch.faults import FaultTracer, PageFaultEvent, threads_of
    from kvmpy.debug.watch.tracefs import TracefsError
    from kvmpy.debug.watch.tracering import FormatError

    if (pid is None) == (not command):
        raise click.UsageError("give either a process (--pid N) or a command (-- COMMAND...)")
    kinds = ["faults", *(["exits"] if exits else [])]
    optional = ["attributes", "rmp", *(["mappings"] if mappings else [])]
    status = 0
    with ExitStack() as undo:
        undo.enter_context(_ended_by_signals())
        shown = decoded = 0
        child: _Command | None = None
        try:
            child = undo.enter_context(_command(command)) if command else None
            tids = [child.pid] if child is not None else threads_of(pid or 0)
            tracer = undo.enter_context(FaultTracer(tids, kinds=kinds, optional=optional, children=True))
            try:
                until = undo.enter_context(_process_ended(pid or 0)) if child is None else child.start()
                for event in _limited(tracer, until, count):
                    _show(event, as_json)
                    shown += 1
                    decoded += isinstance(event, PageFaultEvent)
            finally:
                tracer.stop()
                lost = f", {tracer.lost} lost" if tracer.lost else ""
                click.echo(f"kvmpy faults: {shown} events{lost}", err=True)
                if not decoded:
                    click.echo(NO_FAULTS.format(more="" if mappings else MAPPINGS), err=True)
        except (TracefsError, FormatError, ProcessLookupError) as error:
            click.echo(f"kvmpy faults: {error}", err=True)
            sys.exit(1)
        except _StopError:
            pass
        except BrokenPipeError:
            # Whoever read this has seen enough; the interpreter must not try to flush once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if child is not None:
            status = child.status()
    sys.exit(status)


def _limited(tracer: FaultTracer, until: Callable[[], bool], count: int | None) -> Iterator[FaultEvent]:
    left = count
    for event in tracer.follow(until):
        yield event
        if left is not None:
            left -= 1
            if left == 0:
                return


def _show(event: FaultEvent, as_json: bool) -> None:
    if not as_json:
        seconds = event.timestamp / 1e9
        click.echo(f"{seconds:14.6f}  cpu {event.cpu}  tid {event.tid:<7} {event}")
        return
    fields = {name: getattr(event, name) for name in event.__dataclass_fields__}
    if "error" in fields:
        error = fields.pop("error")
        fields |= {"error_code": error.value, "error_bits": error.words.split(), "error_text": str(error)}
    click.echo(json.dumps({"event": type(event).__name__.removesuffix("Event").lower(), **fields}))


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        raise _StopError(number)

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def _process_ended(pid: int) -> Iterator[Callable[[], bool]]:
    import select

    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        yield lambda: True
        return
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        yield lambda: bool(poll.poll(0))
    finally:
        os.close(fd)


class _Command:
    """A command that waits for its start; ended with this object."""

    def __init__(self, command: tuple[str, ...]) -> None:
        reader, self._gate = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _WAIT, str(reader), *command], pass_fds=[reader]
            )
        except BaseException:
            os.close(self._gate)
            raise
        finally:
            os.close(reader)

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> Callable[[], bool]:
        """Let it run, and return what tells whether it has ended."""
        os.write(self._gate, b"\n")
        return self.ended

    def ended(self) -> bool:
        return self._process.poll() is not None

    def status(self) -> int:
        """Return its exit status, as a shell would; ask it to end first where it has not."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
        code = self._process.wait()
        return 128 - code if code < 0 else code

    def close(self) -> None:
        os.close(self._gate)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@contextmanager
def _command(command: tuple[str, ...]) -> Iterator[_Command]:
    if shutil.which(command[0]) is None:
        raise ProcessLookupError(f"no command {command[0]}")
    child = _Command(command)
    try:
        yield child
    finally:
        child.close()
