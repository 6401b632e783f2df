# SPDX-License-Identifier: Apache-2.0
"""``kvmpy trace``: every KVM ioctl of an unmodified program and its children, decoded as it happens."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

import click

if TYPE_CHECKING:
    from kvmpy.debug.record.writer import RecordWriter
    from kvmpy.debug.watch.trace import Sink
    from kvmpy.debug.watch.trace_events import Event, Stream
    from kvmpy.debug.watch.trace_output import Filter, Summary


LOST_STATUS = 125
"""The exit status of a trace from which something is missing, as that of env(1) and timeout(1) themselves."""


class _Output:
    """Lines or JSON to a file, or to a stream that may go away."""

    def __init__(
        self,
        chosen: Filter,
        summary: Summary | None,
        *,
        as_json: bool,
        quiet: bool,
        path: str | None,
        stream: TextIO,
    ) -> None:
        self.chosen = chosen
        self.summary = summary
        self.as_json = as_json
        self.quiet = quiet
        self.file = open(path, "w") if path else None  # noqa: SIM115 - closed by close()
        self.stream = stream
        self.name = path or ("standard output" if stream is sys.stdout else "standard error")
        self.start: float | None = None
        self.gone = False
        self.missing = ""
        """What became of the lines that could not be written, ``""`` where all were."""

    def write(self, text: str) -> None:
        if self.gone:
            return
        try:
            # In one piece: the program may write to the same terminal or pipe.
            stream = self.file or self.stream
            stream.write(text + "\n")
            if self.file is None:
                stream.flush()
        except (OSError, ValueError) as error:
            self._failed(error)

    def _failed(self, error: OSError | ValueError) -> None:
        # The program goes on.  Where a stream's reader left, it has enough.
        self.gone = True
        if isinstance(error, OSError) and (self.file is not None or error.errno != errno.EPIPE):
            self.missing = f"lines are missing from {self.name}: {error.strerror}"

    def event(self, event: Event) -> None:
        if self.start is None:
            self.start = event.seconds
        if not self.chosen(event):
            return
        if self.summary is not None:
            self.summary.add(event)
        if event.warning or not self.quiet:
            self.write(json.dumps(event.json(self.start)) if self.as_json else event.line(self.start))

    def flush(self) -> None:
        if self.file is not None and not self.gone:
            try:
                self.file.flush()
            except OSError as error:
                self._failed(error)

    def close(self, lost: Sequence[str] = ()) -> bool:
        """Write the summary and, as the last line, what is missing; return whether anything is."""
        if self.summary is not None:
            if self.as_json:
                self.write(json.dumps({"summary": self.summary.json()}))
            else:
                for line in self.summary.lines():
                    self.write(line)
        self.flush()
        missing = [*lost, self.missing] if self.missing else lost
        if missing:
            text = f"kvmpy trace: incomplete: {'; '.join(missing)}"
            self.write(json.dumps({"note": text, "warning": True}) if self.as_json else text)
            self.flush()
            if self.file is not None or self.stream is not sys.stderr:
                with suppress(OSError):
                    click.echo(text, err=True)
        if self.file is not None:
            # What it could not take was said.
            with suppress(OSError):
                self.file.close()
        return bool(missing)


@click.command(context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@click.option("-o", "--output", "record", metavar="REC", help="Write a record for replay, shrink and repro.")
@click.option("-t", "--text", metavar="FILE", help="Write the lines to FILE instead of standard error.")
@click.option("-p", "--pid", type=click.IntRange(min=1), help="Trace a running process through ptrace.")
@click.option("--ptrace", is_flag=True, help="Use ptrace even if the recorder can be loaded.")
@click.option("--read", "source", metavar="REC", help="Show a record instead of running a command.")
@click.option(
    "-f",
    "--filter",
    "filters",
    multiple=True,
    metavar="TERM",
    help="Show only matching lines: [!][ioctl|fd|errno|exit|thread=]PATTERN[,PATTERN...]; repeat to narrow.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@click.option(
    "-s", "--summary", is_flag=True, help="Print only a summary at the end: count, time and errors by ioctl."
)
@click.option("-a", "--all", "full", is_flag=True, help="Print arrays in full.")
@click.option("-q", "--quiet", is_flag=True, help="Print no lines (use with -o).")
@click.option("--no-memory", is_flag=True, help="Leave guest memory out of the record.")
@click.option(
    "--host-writes",
    is_flag=True,
    help="Also record what the program writes to guest memory between runs; slow for large guests.",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def trace(
    record: str | None,
    text: str | None,
    pid: int | None,
    ptrace: bool,
    source: str | None,
    filters: tuple[str, ...],
    as_json: bool,
    summary: bool,
    full: bool,
    quiet: bool,
    no_memory: bool,
    host_writes: bool,
    command: tuple[str, ...],
) -> None:
    """Trace every KVM, guest_memfd and /dev/sev ioctl of COMMAND and its children, and print it decoded.

    Each line has time, thread, file descriptor, ioctl with its argument before -> after, = result or errno
    with its meaning, the exit of KVM_RUN, <duration>.  Lines go to standard error; with --read, to standard
    output.  The exit status is COMMAND's, or 125 if the trace is incomplete.

    Dynamically linked programs run with a recorder in LD_PRELOAD.  Static programs and running processes (-p)
    are traced through ptrace, which is much slower.
    """
    if sum((pid is not None, source is not None, bool(command))) != 1:
        raise click.UsageError("give one of: a command (after --), -p PID, --read REC")
    if source is not None and (record or ptrace):
        raise click.UsageError("--read cannot be combined with -o or --ptrace")
    if host_writes and (no_memory or pid is not None or ptrace or record is None):
        raise click.UsageError("--host-writes needs -o, and excludes --no-memory, -p and --ptrace")
    from kvmpy.cli.names import decoder
    from kvmpy.debug.watch.trace import Sink
    from kvmpy.debug.watch.trace_events import Stream
    from kvmpy.debug.watch.trace_output import Filter, FilterError, Summary

    try:
        chosen = Filter(filters)
        output = _Output(
            chosen,
            Summary() if summary else None,
            as_json=as_json,
            quiet=quiet or summary,
            path=text,
            # The lines of a record are this command's output; beside a program they keep out of its way.
            stream=sys.stderr if source is None else sys.stdout,
        )
    except FilterError as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{text}: {error.strerror}") from None
    # A filter needs names and descriptors; without one an ioctl that is only counted needs neither.
    counted = output.summary.add_frame if output.summary is not None and not filters else None
    stream = Stream(decoder(full=full), quiet=counted is not None or (quiet and not summary), count=counted)
    emit = output.event if counted is None and (not quiet or summary) else _warnings(output)
    sink = Sink(stream, emit, None, output.flush)
    status = 0
    try:
        if source is not None:
            _read(source, stream, emit)
        else:
            status = _trace(command, pid, ptrace, sink, record, memory=not no_memory, writes=host_writes)
    finally:
        incomplete = output.close(sink.lost)
    sys.exit(LOST_STATUS if incomplete else status)


def _warnings(output: _Output) -> Callable[[Event], None]:
    def emit(event: Event) -> None:
        if event.warning:
            output.event(event)

    return emit


def _read(source: str, stream: Stream, emit: Callable[[Event], None]) -> None:
    from kvmpy.debug.record.format import RecordError
    from kvmpy.debug.watch.trace import read_record

    try:
        read_record(source, stream, emit)
    except OSError as error:
        raise click.ClickException(f"{source}: {error.strerror}") from None
    except RecordError as error:
        raise click.ClickException(str(error)) from None


def _open(record: str | None, mode: str, command: tuple[str, ...], pid: int = 0) -> RecordWriter | None:
    from kvmpy.debug.watch.trace import open_record

    if record is None:
        return None
    try:
        return open_record(record, mode, command, pid)
    except OSError as error:
        raise click.ClickException(f"{record}: {error.strerror}") from None


def _trace(
    command: tuple[str, ...],
    pid: int | None,
    ptrace: bool,
    sink: Sink,
    record: str | None,
    *,
    memory: bool,
    writes: bool,
) -> int:
    from kvmpy.debug.preload.build import RecorderBuildError
    from kvmpy.debug.watch.ptrace import PtraceError, attach, launch
    from kvmpy.debug.watch.trace import PreloadTracer, reason
    from kvmpy.debug.watch.trace_program import ProgramError, examine

    recorded = memory and record is not None
    try:
        if pid is not None:
            return attach(pid, sink, lambda: _open(record, "ptrace", (), pid), memory=recorded)
        program = examine(command[0])
        why = reason(program.static, program.privileged, program.foreign)
        if program.privileged or program.foreign:
            raise click.ClickException(
                f"{program.path} is {why}: it cannot be traced as another user; trace it as that user"
                if program.privileged
                else f"{program.path} is {why}: kvmpy traces 64-bit programs only"
            )
        if program.static or ptrace:
            sink.record = _open(record, "ptrace", command)
            if program.static:
                sink.remark(f"{program.path} is {why}: traced through ptrace, which is much slower")
            if writes:
                sink.remark("what it writes to guest memory between runs is not recorded through ptrace")
            return launch(command, sink, memory=recorded)
        sink.record = _open(record, "preload", command)
        return PreloadTracer(command, sink, memory=recorded, writes=writes).run()
    except (ProgramError, RecorderBuildError, PtraceError) as error:
        raise click.ClickException(str(error)) from None
    except PermissionError as error:
        raise click.ClickException(f"{error.filename or os.curdir}: {error.strerror}") from None
