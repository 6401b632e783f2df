# SPDX-License-Identifier: Apache-2.0
"""One boot of a lab kernel: QEMU's command line, the process, and what comes out of it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmpy.lab import places, snapshots, tools
from kvmpy.lab.errors import LabError
from kvmpy.lab.events import MAX_LINE, BadEventError, Event, parse
from kvmpy.lab.kernels import Kernel
from kvmpy.lab.process import end_group
from kvmpy.lab.readback import feature
from kvmpy.lab.root import JOB_TAG, Root, tag
from kvmpy.owned import dies_with_parent
from kvmpy.testing.configurations import nearest
from kvmpy.testing.kernelwatch import TROUBLE

# All that QEMU emulates, as an EPYC: what KVM does follows vendor and family. Without erms, for which the
# kernel copies byte by byte: emulated, that is slow.
_CPU = {
    "tcg": "max,vendor=AuthenticAMD,family=23,model=1,stepping=2,model-id=AMD EPYC Processor,-erms",
    "kvm": "host",
}
_ACCEL = {"tcg": "tcg,thread=multi", "kvm": "kvm"}
# Emulated, the first calibration of the TSC and the refined one differ by more than 250 ppm when the host is
# busy. KVM takes that for a wish to scale the TSC, which emulated SVM cannot: guests' TSCs have no offset.
# On such a host its watchdog would distrust the TSC, too, which cannot go wrong: it is the host's.
_TSC = "kvm.tsc_tolerance_ppm=100000 tsc=nowatchdog"
# A busy host's emulated timer ticks too late for the check: "IO-APIC + timer doesn't work", and a panic.
_TIMER = "no_timer_check"
EXCERPT_LINES = 60
# How many exported folders a machine has room for; a snapshot's machine has them all.
SHARES = 14
_MAX_TEXT = 64 << 20


@dataclass(frozen=True)
class Options:
    """What is booted; ``memory`` is in MiB, ``accel`` is ``tcg`` or ``kvm``.

    ``parameters`` are for the kernel's command line, those of modules as ``kvm_amd.npt=0``; not every kernel
    has the ``optional`` ones. ``cpu`` are flags such as ``+la57``. ``nodes`` None: two NUMA nodes, or one for
    one CPU. ``configuration`` is what reports call all that. With *snapshots* a machine that has booted is
    kept, and resumed where there is one. ``bugs`` are the numbers of the catalogue's bugs that are switched
    on in it, such as ``3,17``.
    """

    kernel: Kernel
    cpus: int = 2
    memory: int = 4096
    accel: str = "tcg"
    parameters: Sequence[str] = ()
    optional: Sequence[str] = ()
    cpu: Sequence[str] = ()
    nodes: int | None = None
    configuration: str = ""
    snapshots: bool = False
    bugs: str = ""


@dataclass(frozen=True)
class Job:
    """What runs inside: a command, its environment, the folder it begins in, and what is to be seen there."""

    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    root: Root
    programs: Path | None = None
    shell: bool = False
    pack: Path | None = None

    def text(self) -> str:
        """Return the file that the init script reads."""
        values = {
            **self.environment,
            "KVMPY_LAB_FOLDER": str(self.folder),
            "KVMPY_LAB_PROGRAMS": str(self.programs or ""),
            "KVMPY_LAB_SHELL": "1" if self.shell else "",
        }
        lines = [f"export {name}={shlex.quote(value)}" for name, value in values.items()]
        return "\n".join([*lines, f"set -- {shlex.join(self.command)}"]) + "\n"


def nested_works(modules: Path = Path("/sys/module")) -> bool:
    """Whether this host's KVM says that its guests can have a KVM of their own."""
    for module in ("kvm_amd", "kvm_intel"):
        try:
            value = (modules / module / "parameters" / "nested").read_text(encoding="ascii").strip()
        except OSError:
            continue
        return value in ("1", "Y")
    return False


def check_flag(word: str) -> None:
    """Raise LabError unless QEMU knows the CPU flag of *word*, such as ``+la57``, and it can be read back."""
    from kvmpy.x86.cpuid import FeatureNameError, feature_bit

    tools.need(tools.RUN, "the lab")
    text = subprocess.run(
        [tools.QEMU, "-cpu", "help"], check=False, capture_output=True, text=True, timeout=60
    ).stdout
    known = text.rpartition("CPUID flags:")[2].split()
    flag = word[1:]
    if flag not in known:
        raise LabError(f"--cpu {word}: QEMU knows no CPU flag {flag}{nearest(flag, known)}")
    try:
        feature_bit(feature(flag))
    except FeatureNameError:
        raise LabError(f"--cpu {word}: kvmpy knows no CPUID bit of {flag} to read it back") from None


def _escaped(path: Path) -> str:
    return str(path).replace(",", ",,")


@dataclass(frozen=True)
class Start:
    """How a machine starts: from *initramfs*; with *memory* that of the guest is files in that folder.

    *resumes*: what is in them stays as it is, and the machine waits for the state of its devices.
    """

    initramfs: Path
    memory: Path | None = None
    resumes: bool = False


def _memory(options: Options, start: Start) -> list[str]:
    """Return the words for the memory, and for NUMA nodes, each with its part of memory and CPUs."""
    nodes = options.nodes or min(2, options.cpus)
    words = []
    for node in range(nodes):
        first, end = (options.cpus * number // nodes for number in (node, node + 1))
        begin, stop = (options.memory * number // nodes for number in (node, node + 1))
        kind = "memory-backend-ram"
        if start.memory is not None:
            share = "off" if start.resumes else "on"
            kind = f"memory-backend-file,mem-path={_escaped(start.memory / f'memory{node}')},share={share}"
        words += ["-object", f"{kind},id=node{node},size={stop - begin}M"]
        cpus = f",cpus={first}-{end - 1}" if end > first else ""
        words += ["-numa", f"node,nodeid={node},memdev=node{node}{cpus}"]
    return words if nodes > 1 else [*words[:2], "-machine", "memory-backend=node0"]


def command_line(
    options: Options, folder: Path, root: Root, start: Start, *, interactive: bool = False
) -> list[str]:
    """Return the command that boots; *folder* holds the job, and gets console, journal and output.

    A machine that is resumed has the devices of the one that was saved: what differs between runs may be
    paths, and nothing else.
    """
    append = f"console=ttyS0 rdinit=/init panic=-1 oops=panic loglevel=5 {_TSC} {_TIMER}"
    append = " ".join([append, *options.parameters, *options.optional])
    command = [
        tools.QEMU,
        "-M",
        "q35,i8042=off",
        "-accel",
        _ACCEL[options.accel],
        "-cpu",
        ",".join([_CPU[options.accel], *options.cpu, "enforce"]),
    ]
    # A socket for each CPU: a cache that CPUs of two nodes shared would be a warning.
    command += ["-smp", f"{options.cpus},sockets={options.cpus},cores=1,threads=1"]
    command += ["-m", f"{options.memory}M", *_memory(options, start), "-no-reboot", "-display", "none"]
    command += ["-nodefaults", "-no-user-config", "-kernel", str(options.kernel.image), "-append", append]
    command += ["-initrd", str(start.initramfs)]
    exports = [(JOB_TAG, folder / "job")]
    exports += [(tag(number), share) for number, share in enumerate(root.shares)]
    exports += [(tag(number), folder / "job") for number in range(len(root.shares), SHARES)]
    for name, path in exports:
        shared = f"path={_escaped(path)},security_model=none,readonly=on,multidevs=remap"
        command += ["-fsdev", f"local,id={name},{shared}"]
        command += ["-device", f"virtio-9p-pci,fsdev={name},mount_tag={name}"]
    if interactive:
        # Ctrl-C goes to the shell inside.
        command += ["-chardev", "stdio,id=console,signal=off"]
    else:
        command += ["-chardev", f"file,id=console,path={_escaped(folder / 'console')},append=on"]
    command += ["-serial", "chardev:console", "-device", "virtio-serial-pci"]
    for name in ("journal",) if interactive else ("journal", "output"):
        command += ["-chardev", f"file,id={name},path={_escaped(folder / name)}"]
        command += ["-device", f"virtserialport,chardev={name},name=kvmpy.{name}"]
    if start.memory is not None:
        command += ["-chardev", f"pipe,id=wake,path={_escaped(folder / 'wake')}"]
        command += ["-device", "virtserialport,chardev=wake,name=kvmpy.wake"]
    return [*command, "-incoming", "defer"] if start.resumes else command


def prepare(folder: Path, job: Job) -> None:
    """Write the job into *folder* for a boot, and remove what an earlier boot left."""
    (folder / "job").mkdir(parents=True, exist_ok=True)
    shares = {tag(number): str(share) for number, share in enumerate(job.root.shares)}
    (folder / "job" / places.SHARES_FILE).write_text(json.dumps(shares), encoding="utf-8")
    (folder / "job" / "job.env").write_text(job.text(), encoding="utf-8")
    if job.pack is not None:
        shutil.copyfile(job.pack, folder / "job" / places.PACK)
    for name in ("console", "journal", "output", "qemu"):
        (folder / name).write_bytes(b"")


def excerpt(console: str) -> str:
    """Return what the console says about the trouble it shows: from its first line on, or the last lines."""
    lines = [line.rstrip() for line in console.splitlines() if line.strip()]
    for index, line in enumerate(lines):
        if TROUBLE.search(line):
            return "\n".join(lines[index : index + EXCERPT_LINES])
    return "\n".join(lines[-EXCERPT_LINES // 3 :])


class Machine:
    """A running QEMU. A context manager: leaving it ends the process."""

    def __init__(self, options: Options, folder: Path, root: Root, start: Start) -> None:
        self._folder = folder
        self._read = 0
        self._seen = 0
        self._trouble = ""
        self._start = start
        self._wake = -1
        command = command_line(options, folder, root, start)
        self._monitor, other = socket.socketpair()
        if start.memory is not None:
            wake = folder / "wake"
            wake.unlink(missing_ok=True)
            os.mkfifo(wake, 0o600)
            self._wake = os.open(wake, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            command += ["-chardev", f"socket,id=monitor,fd={other.fileno()}"]
            command += ["-mon", "chardev=monitor,mode=control"]
        self._errors = (folder / "qemu").open("wb")
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(other.fileno(),),
                preexec_fn=dies_with_parent(),  # noqa: PLW1509 - no other thread is there
            )
        except OSError as error:
            self._close()
            tools.need(tools.RUN, "the lab")
            raise LabError(f"{tools.QEMU} cannot be started: {error}") from error
        finally:
            other.close()
        if start.resumes and start.memory is not None:
            try:
                snapshots.resume(self._monitor, start.memory / snapshots.STATE)
            except LabError as error:
                self.stop()
                raise LabError(f"{error}; {self.complaints()}") from error
            os.write(self._wake, b"\n")

    def save(self) -> None:
        """Stop the machine, which has its memory in files, and write down the rest of its state.

        LabError when QEMU cannot.
        """
        if self._start.memory is not None:
            snapshots.save(self._monitor, self._start.memory / snapshots.STATE)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def status(self) -> int | None:
        """QEMU's exit status, None while it runs."""
        return self._process.poll()

    def wait(self, seconds: float) -> bool:
        """Wait for QEMU's end; whether it came within *seconds*."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        """End QEMU, if it still runs."""
        if self._process.poll() is None:
            end_group(self._process)
        self._close()

    def _close(self) -> None:
        self._errors.close()
        self._monitor.close()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def events(self) -> Iterator[Event]:
        """Yield the journal's events since the last call; BadEventError for one that is none."""
        with (self._folder / "journal").open("rb") as stream:
            stream.seek(self._read)
            while (line := stream.readline(MAX_LINE)).endswith(b"\n"):
                self._read += len(line)
                if (event := parse(line)) is not None:
                    yield event
        if len(line) == MAX_LINE:
            raise BadEventError(f"a line of more than {MAX_LINE >> 20} MiB")

    def _text(self, name: str) -> str:
        return (self._folder / name).read_text(encoding="utf-8", errors="replace")

    def console(self) -> str:
        """Return what the kernel has printed."""
        return self._text("console")

    def output(self) -> str:
        """Return what the command inside has printed."""
        return self._text("output")

    def complaints(self) -> str:
        """Return what QEMU itself has printed."""
        return self._text("qemu").strip()

    def flood(self) -> str:
        """Return which stream has become longer than anybody reads; empty while all is well."""
        sizes = {name: (self._folder / name).stat().st_size for name in ("console", "output")}
        name = max(sizes, key=sizes.__getitem__)
        return f"more than {_MAX_TEXT >> 20} MiB of {name}" if sizes[name] > _MAX_TEXT else ""

    def trouble(self) -> str:
        """Return the first line of the console that tells of a panic, oops or warning; empty without one."""
        size = (self._folder / "console").stat().st_size
        if not self._trouble and size != self._seen:
            self._seen = size
            lines = self.console().splitlines()
            self._trouble = next((line.strip() for line in lines if TROUBLE.search(line)), "")
        return self._trouble
