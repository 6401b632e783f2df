# SPDX-License-Identifier: Apache-2.0
"""`kvmpy trace -o`: records that hold what happened and what guest memory held; filters; summaries; -p."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpy.cli.trace import LOST_STATUS
from kvmpy.debug.decode.decoder import Decoder
from kvmpy.debug.record.events import Ioctl, Memory, Object, Pages, unpack
from kvmpy.debug.record.format import Frame, FrameReader, FrameType, ObjectKind, parse_lines
from kvmpy.debug.record.model import Record, request_name
from kvmpy.debug.record.replay import Replay
from kvmpy.debug.record.script import build
from kvmpy.debug.watch.trace import Sink, open_record
from kvmpy.debug.watch.trace_events import Stream
from tests.debug.tracing import ROOT, Trace, compile_program, kvmpy, kvmpy_command, need_kvm

CODE = bytes.fromhex("b042e610e411f4")
SHELL = 10


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, dynamically linked."""
    need_kvm()
    return compile_program(tmp_path_factory.mktemp("dynamic"))


@pytest.fixture(scope="module")
def record(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of the mode fork."""
    path = tmp_path_factory.mktemp("record") / "fork.rec"
    done = kvmpy("trace", "-q", "-o", path, "--", program, "fork")
    assert (done.returncode, done.stderr) == (0, "")
    return path


def reader_of(path: Path) -> FrameReader:
    return FrameReader(path.read_bytes())


def test_records_are_whole(record: Path) -> None:
    reader = reader_of(record)
    reader.check()
    frames = list(reader)
    assert reader.problem is None
    assert frames[0].type == FrameType.HOST
    assert parse_lines(frames[0].payload)["recorder"] == "preload"
    assert frames[-1].type == FrameType.END
    orders = [frame.order for frame in frames if frame.type not in (FrameType.ENTER, FrameType.PAGES)]
    assert len(orders) == len(set(orders))


def test_objects_have_their_parents(record: Path) -> None:
    objects = [said for frame in reader_of(record) if isinstance(said := unpack(frame), Object)]
    by_id = {each.id: each for each in objects}
    assert len(by_id) == len(objects)
    rows = {(each.name, by_id[each.parent].name if each.parent else "", each.kind) for each in objects}
    assert rows == {
        ("kvm", "", ObjectKind.SYSTEM),
        ("vm0", "kvm", ObjectKind.VM),
        ("vm1", "kvm", ObjectKind.VM),
        ("vm1/vcpu0", "vm1", ObjectKind.VCPU),
        ("vm0/vcpu5", "vm0", ObjectKind.VCPU),
    }
    opened = {frame.order: said for frame in reader_of(record) if isinstance(said := unpack(frame), Ioctl)}
    assert all(opened[each.made_by].result == each.fd for each in objects if each.made_by)


def memory_of(path: Path) -> dict[int, bytes]:
    """Return the pages that the slots held before the first run, by their place in guest memory."""
    pages: dict[int, bytes] = {0: bytes(4096)}
    held: dict[int, bytes] = {}
    bases: list[int] = []
    for frame in reader_of(path):
        said = unpack(frame)
        if isinstance(said, Pages):
            pages |= {said.first + number: page for number, page in enumerate(said.pages)}
        elif isinstance(said, Memory) and said.flags:
            held |= {said.address + 4096 * number: pages[ident] for number, ident in enumerate(said.ids)}
        elif isinstance(said, Ioctl) and said.request == 0x4020AE46:
            bases.append(int.from_bytes((said.argument_in or b"")[24:32], "little"))
    return {
        address - base: page
        for base in bases
        for address, page in held.items()
        if 0 <= address - base < 0x108000
    }


def test_guest_memory_is_in_the_record(record: Path) -> None:
    """What a VM's slots hold before it runs first: the code at 0x1000."""
    held = memory_of(record)
    assert held[0x1000][: len(CODE)] == CODE
    # The pages of both VMs are the same: one content in the file.
    contents = [said for frame in reader_of(record) if isinstance(said := unpack(frame), Pages)]
    assert sum(len(said.pages) for said in contents) == 1


@pytest.mark.parametrize("mode", ["basic", "elsewhere", "threads"])
def test_ptrace_records_the_same_memory(program: Path, tmp_path: Path, mode: str) -> None:
    """Read from outside, at the same moments: also what the program itself never touched."""
    recorded, stopped = tmp_path / "recorded", tmp_path / "stopped"
    for path, options in ((recorded, []), (stopped, ["--ptrace"])):
        done = kvmpy("trace", "-q", *options, "-o", path, "--", program, mode)
        assert (done.returncode, done.stderr) == (0, "")
    if mode == "elsewhere" and os.geteuid() != 0:
        pytest.skip("needs root to open /proc/PID/map_files")
    assert memory_of(recorded)[0x1000][: len(CODE)] == CODE
    assert memory_of(stopped) == memory_of(recorded)


def test_a_static_program_can_be_replayed(tmp_path: Path) -> None:
    """Its record is made through ptrace, and holds what the guest executes."""
    need_kvm()
    static = compile_program(tmp_path, "-static")
    record = tmp_path / "static.rec"
    assert kvmpy("trace", "-q", "-o", record, "--", static, "basic").returncode == 0
    done = kvmpy("replay", record)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "17 ioctls replayed, 0 with a different result" in done.stdout
    assert kvmpy("trace", "-q", "--no-memory", "-o", record, "--", static, "basic").returncode == 0
    assert memory_of(record) == {}


def recorded_answers(program: Path, path: Path, *options: str) -> Record:
    done = kvmpy("trace", "-q", *options, "-o", path, "--", program, "answers")
    assert (done.returncode, done.stderr) == (0, "")
    return Record.load(path)


def test_what_the_program_writes_between_runs(program: Path, tmp_path: Path) -> None:
    """--host-writes: pages that the program changed are told before the next run, the guest's own are not."""
    record = recorded_answers(program, tmp_path / "a.rec", "--host-writes")
    asked = [e.what for e in record.ioctls if isinstance(e.what, Ioctl) and e.what.request == 0x4020AE46]
    base = int.from_bytes((asked[0].argument_in or b"")[24:32], "little")
    later = [e.what for e in record.entries if isinstance(e.what, Memory) and not e.what.flags]
    assert [(said.address - base, len(said.ids)) for said in later] == [(0x2000, 1)] * 3
    assert [record.content(said)[0] for said in later] == [0x20, 0x30, 0x40]
    result = Replay(build(record)).run()
    assert (result.stopped, result.first_difference) == ("", None)


def test_without_them_the_replay_differs(program: Path, tmp_path: Path) -> None:
    """The same program recorded without --host-writes: the second run sends what the first one sent."""
    result = Replay(build(recorded_answers(program, tmp_path / "a.rec"))).run()
    assert result.first_difference is not None
    assert request_name(result.first_difference.step.entry.what) == "KVM_RUN"


def test_host_writes_are_for_records_of_the_recorder(program: Path, tmp_path: Path) -> None:
    for options in (["--host-writes"], ["--host-writes", "-o", tmp_path / "a.rec", "--ptrace"]):
        done = kvmpy("trace", *options, "--", program, "nothing")
        assert done.returncode == 2
        assert "--host-writes needs -o" in done.stderr


def test_records_can_be_shown(record: Path) -> None:
    trace = Trace("--read", record)
    assert [row["target"] for row in trace.named("KVM_RUN")] == ["vm1/vcpu0"] * 3 + ["vm0/vcpu5"] * 3
    text = kvmpy("trace", "--read", record).stdout
    assert "KVM_EXIT_IO {direction=KVM_EXIT_IO_OUT" in text


def test_damaged_records_show_what_can_be_read(record: Path, tmp_path: Path) -> None:
    raw = record.read_bytes()
    cut = tmp_path / "cut.rec"
    cut.write_bytes(raw[: len(raw) - 700])
    done = kvmpy("trace", "--read", cut)
    assert done.returncode == 1
    assert "KVM_CREATE_VM KVM_X86_DEFAULT_VM" in done.stdout
    assert "what could be read is above" in done.stderr
    none = tmp_path / "none.rec"
    none.write_text("hello")
    assert "this is not a record" in kvmpy("trace", "--read", none).stderr
    assert "No such file" in kvmpy("trace", "--read", tmp_path / "absent").stderr


def test_filters(record: Path) -> None:
    def names(*filters: str) -> set[tuple[str, str]]:
        arguments = [part for text in filters for part in ("-f", text)]
        trace = Trace(*arguments, "--read", record)
        return {(row["ioctl"], row["target"]) for row in trace.rows}

    assert names("run") == {("KVM_RUN", "vm1/vcpu0"), ("KVM_RUN", "vm0/vcpu5")}
    assert names("exit=hlt", "fd=vm1*") == {("KVM_RUN", "vm1/vcpu0")}
    assert names("errno=*") == {("KVM_CREATE_VCPU", "vm0")}
    assert names("errno=EIO,EINVAL") == {("KVM_CREATE_VCPU", "vm0")}
    assert names("get_*,KVM_SET_REGS", "!fd=vm0/*") == {
        ("KVM_GET_SREGS", "vm1/vcpu0"),
        ("KVM_SET_REGS", "vm1/vcpu0"),
    }
    assert names("exit=MMIO") == set()


def test_summary(program: Path) -> None:
    done = kvmpy("trace", "--summary", "--", program, "basic")
    lines = done.stderr.splitlines()
    assert any(line.endswith("KVM_SET_USER_MEMORY_REGION  (1 EINVAL)") for line in lines)
    assert lines[-1] == "exits of KVM_RUN: 2 KVM_EXIT_IO, 1 KVM_EXIT_HLT"
    assert not any("KVM_CREATE_VM KVM_X86_DEFAULT_VM" in line for line in lines)
    done = kvmpy("trace", "--summary", "--json", "--", program, "basic")
    summary = json.loads(done.stderr.splitlines()[-1])["summary"]
    assert summary["exits"] == {"KVM_EXIT_IO": 2, "KVM_EXIT_HLT": 1}
    assert summary["ioctls"]["KVM_SET_REGS"]["errors"] == {"EFAULT": 1}


def test_nothing_is_lost_however_many_ioctls(program: Path, tmp_path: Path) -> None:
    """More frames than the ring holds, faster than JSON is written: each is there, and is counted."""
    trace = Trace("--", program, "threads", "2", "16000", timeout=150)
    assert trace.status == 0
    assert len(trace.named("KVM_GET_REGS")) == 32000
    assert not [row for row in trace.notes if row["warning"]]
    done = kvmpy("trace", "--summary", "--json", "--", program, "threads", "2", "16000", timeout=150)
    summary = json.loads(done.stderr.splitlines()[-1])["summary"]
    assert (done.returncode, summary["ioctls"]["KVM_GET_REGS"]["calls"]) == (0, 32000)


def test_what_is_lost_is_the_last_line_and_the_exit_status(program: Path, tmp_path: Path) -> None:
    """The program runs to its end, and the trace says that it is not whole."""
    target, record = tmp_path / "lines", tmp_path / "record"
    done = kvmpy("trace", "-s", "-t", target, "-o", record, "--", program, "scribble", "1", "3000")
    assert done.returncode == LOST_STATUS
    last = done.stderr.splitlines()[-1]
    assert last.startswith("kvmpy trace: incomplete: ")
    assert target.read_text().splitlines()[-1] == last
    assert any(frame.type == FrameType.LOST for frame in reader_of(record))


def test_a_record_on_a_full_disk_is_incomplete(tmp_path: Path) -> None:
    """What could not be written is counted and said."""
    record = open_record(str(tmp_path / "record"), "preload", ["program"])
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, record.fd)
    os.close(full)
    sink = Sink(Stream(Decoder()), None, record)
    sink.take([Frame(FrameType.NOTE, b"a=b\n")] * 3)
    sink.finish(7)
    assert sink.lost == [f"3 frames could not be written to {tmp_path / 'record'}"]


@pytest.mark.parametrize("options", [(), ("-s",), ("--json",), ("-s", "--json"), ("-f", "run")], ids=" ".join)
def test_lines_on_a_full_disk_are_missed(program: Path, options: tuple[str, ...]) -> None:
    """The program's own status would say that the lines are there."""
    done = kvmpy("trace", *options, "-t", "/dev/full", "--", program, "basic")
    assert (done.returncode, done.stderr.splitlines()) == (
        LOST_STATUS,
        ["kvmpy trace: incomplete: lines are missing from /dev/full: No space left on device"],
    )


def test_lines_that_filled_the_disk(record: Path, tmp_path: Path) -> None:
    """Some lines are there, the later ones are not."""
    limit = "import resource, signal, sys; from kvmpy.cli.main import main"
    limit += "; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    limit += "; resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)); main()"
    command = [sys.executable, "-c", limit, "trace", "--read", str(record), "-t", str(tmp_path / "lines")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == LOST_STATUS
    assert done.stderr.endswith(f"incomplete: lines are missing from {tmp_path / 'lines'}: File too large\n")
    assert (tmp_path / "lines").stat().st_size == 500


@pytest.mark.parametrize("source", ["command", "record"])
def test_a_stream_that_is_full_is_no_reader_who_left(program: Path, record: Path, source: str) -> None:
    options = ["--read", record] if source == "record" else ["--", program, "basic"]
    command = [*kvmpy_command(), "trace", *map(str, options)]
    name = "stdout" if source == "record" else "stderr"
    other = "stderr" if source == "record" else "stdout"
    with open("/dev/full", "w") as full:
        streams = {name: full, other: subprocess.PIPE}
        done = subprocess.run(command, **streams, text=True, timeout=60, check=False, cwd=ROOT)  # type: ignore[call-overload]
    assert done.returncode == LOST_STATUS
    if source == "record":
        text = "kvmpy trace: incomplete: lines are missing from standard output: No space left on device\n"
        assert done.stderr == text


@pytest.mark.parametrize("source", ["command", "record"])
def test_a_reader_who_left_misses_nothing(program: Path, record: Path, source: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    options = ["--read", record] if source == "record" else ["--", program, "basic"]
    command = [*kvmpy_command(), "trace", *map(str, options)]
    name = "stdout" if source == "record" else "stderr"
    done = subprocess.run(command, **{name: writing}, timeout=60, check=False, cwd=ROOT)  # type: ignore[call-overload]
    os.close(writing)
    assert done.returncode == 0


def test_text_goes_to_a_file(program: Path, tmp_path: Path) -> None:
    target = tmp_path / "lines"
    done = kvmpy("trace", "-t", target, "--", program, "basic")
    assert done.stderr == ""
    assert target.read_text().count("KVM_RUN") == 3


def test_a_run_on_no_vcpu_can_be_written_as_c(program: Path, tmp_path: Path) -> None:
    """The fixture of this folder compiles it: KVM_RUN on descriptor -1 has no run area."""
    done = kvmpy("trace", "-q", "-o", tmp_path / "refusals.rec", "--", program, "refusals")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def looping(program: Path) -> Iterator[subprocess.Popen[str]]:
    """A program that runs a vCPU again and again."""
    child = subprocess.Popen([program, "loop"], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().startswith("ready")
    yield child
    child.kill()
    child.wait(SHELL)
    child.stdout.close()


def _tracer_of(pid: int) -> str:
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(row.split()[1] for row in rows if row.startswith("TracerPid:"))


def test_attach_and_detach(looping: subprocess.Popen[str], tmp_path: Path) -> None:
    """A running program is traced, and runs on when the tracer goes."""
    record = tmp_path / "attached.rec"
    tracer = subprocess.Popen(
        [*kvmpy_command(), "trace", "-p", str(looping.pid), "-o", str(record)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert tracer.stderr is not None
    lines = []
    for line in tracer.stderr:
        lines.append(line)
        if sum("KVM_EXIT_HLT" in each for each in lines) == 3:
            break
    tracer.send_signal(signal.SIGINT)
    rest = tracer.stderr.read()
    tracer.stderr.close()
    assert tracer.wait(SHELL) == 0
    assert "attached to process" in lines[0]
    assert rest.splitlines()[-1].endswith("detached")
    assert any("vm0/vcpu0 KVM_SET_REGS {rip=0x1000, rflags=0x2} = 0" in line for line in lines)
    assert looping.poll() is None
    assert _tracer_of(looping.pid) == "0"
    frames = list(reader_of(record))
    assert frames[-1].type == FrameType.END
    assert sum(frame.type == FrameType.IOCTL for frame in frames) >= 12


def test_attach_is_refused_with_the_reason(looping: subprocess.Popen[str]) -> None:
    assert "there is no process 4194999" in kvmpy("trace", "-p", "4194999").stderr
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    script = (
        "import os\nos.setgid(65534)\nos.setuid(65534)\n"
        "from kvmpy.debug.watch.ptrace import PtraceError, attach\n"
        "try:\n"
        f"    attach({looping.pid}, None, None)\n"
        "except PtraceError as error:\n"
        "    print(error)\n"
    )
    preload = "import kvmpy.debug.watch.ptrace\n"
    done = subprocess.run(
        [kvmpy_command()[0], "-c", preload + script],
        capture_output=True,
        text=True,
        check=False,
        timeout=SHELL,
        cwd=ROOT,
    )
    assert f"no permission to trace process {looping.pid}" in done.stdout, done.stderr
    assert "CAP_SYS_PTRACE" in done.stdout
    assert looping.poll() is None


def test_a_traced_program_can_be_replayed(program: Path, tmp_path: Path) -> None:
    """A record of a C program is as good as one of kvmpy: every ioctl ends as it did."""
    record = tmp_path / "basic.rec"
    assert kvmpy("trace", "-q", "-o", record, "--", program, "basic").returncode == 0
    done = kvmpy("replay", record)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "17 ioctls replayed, 0 with a different result" in done.stdout


def test_qemu_can_be_replayed(tmp_path: Path) -> None:
    """What QEMU asks of KVM before its machine starts, eventfds included."""
    need_kvm()
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("qemu-system-x86_64 is not installed (apt-get install qemu-system-x86)")
    record = tmp_path / "qemu.rec"
    machine = ("-accel", "kvm", "-M", "microvm", "-m", "32M", "-nodefaults", "-display", "none", "-S")
    kvmpy("trace", "-q", "-o", record, "--", "timeout", "5", qemu, *machine)
    done = kvmpy("replay", record)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 with a different result" in done.stdout
