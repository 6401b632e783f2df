# SPDX-License-Identifier: Apache-2.0
"""Every option of the commands that run tests and of the pytest plugin, once.

``kvmpy run``, ``lab run``, ``lab shell``, ``fleet run``, ``results`` and ``hardware`` make theirs from it
(kvmpy/cli/options.py), the plugin its own (kvmpy/testing/options.py), and whoever starts one of them makes
the arguments from it.  Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Union

from kvmpy.guest.defaults import DEFAULT_DEADLINE

RECORD_FOLDER = "kvmpy-records"
RECORD_MODES = ("failures", "all")
SEED_BITS = 32
LOAD_SECONDS = 0.15
# Seconds of each step of `kvmpy hardware`; a command of the secure processor alone may take 100.
STEP_LIMITS = {"platform": 300.0, "doctor": 600.0, "suite": 6 * 3600.0, "bench": 1800.0}


@dataclass(frozen=True)
class Between:
    """A number from *low* to *high*, with a fraction unless *whole*."""

    low: int
    high: int | None = None
    whole: bool = True


Kind = Union[Literal["text", "flag", "path"], tuple[str, ...], Between, Callable[[str], object]]
Side = Literal["inside", "host"]


@dataclass(frozen=True)
class Option:
    """One option, by the *name* of its value.

    *on* are the commands that have it, as *flags* (``--on/--off`` for a flag with a negative).  *kind* is
    what it takes; a function returns the value or raises ValueError.  *pytest* is the option of pytest that
    it becomes: the plugin's own where *own*.  *side* tells whether `kvmpy lab run` gives that to pytest in
    the VM or to the one on the host; *lab_help* is added there.  *each* options go to every kernel of a
    matrix.
    """

    name: str
    on: tuple[str, ...]
    flags: str
    help: str
    metavar: str | None = None
    kind: Kind = "text"
    default: object = None
    pytest: str = ""
    own: bool = True
    side: Side | None = None
    lab_help: str = ""
    each: bool = False
    repeated: bool = False
    hidden: bool = False
    show_default: bool = False
    variable: str | None = None


def positive_seconds(text: str) -> float:
    """Return a positive number."""
    value = float(text)
    if not value > 0:
        raise ValueError(f"{text} is not a positive number of seconds")
    return value


def seed(text: str) -> int:
    """Return the seed of a session, decimal or with 0x."""
    value = int(text, 0)
    if not 0 <= value < 1 << SEED_BITS:
        raise ValueError(f"a seed is a number from 0 to 2**{SEED_BITS} - 1")
    return value


def times(text: str) -> int:
    """Return how often something is done: 1 or more."""
    value = int(text)
    if value < 1:
        raise ValueError(f"{text} times are none")
    return value


def mebibytes(text: str) -> int:
    """Return a size such as ``512M`` or ``4G`` in MiB; a plain number is MiB."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "M")
    if not number.isdigit() or unit not in ("M", "G") or int(number) == 0:
        raise ValueError(f"{text!r} is no size such as 512M or 4G")
    return int(number) * (1024 if unit == "G" else 1)


def module_parameter(text: str) -> str:
    """Return *text*, which sets a parameter of a kernel module."""
    if not re.fullmatch(r"\w+\.\w+=[\w.,:-]+", text):
        raise ValueError(f"{text!r} is not like kvm_amd.npt=0")
    return text


def kernel_parameter(text: str) -> str:
    """Return *text*, a word of the kernel's command line: ``kvm_amd.npt=0`` or ``no5lvl``."""
    if not re.fullmatch(r"\w[\w.-]*(=[\w.,:;@/+-]+)?", text):
        raise ValueError(f"{text!r} is no kernel parameter such as kvm_amd.npt=0 or no5lvl")
    if "." in text.partition("=")[0]:
        return module_parameter(text)
    return text


def bug_numbers(text: str) -> str:
    """Return *text*, numbers of the bug catalogue."""
    if not re.fullmatch(r"\d{1,3}(,\d{1,3})*", text):
        raise ValueError(f"{text!r} is not like 3 or 3,17")
    return text


def cpu_flag(text: str) -> str:
    """Return *text*, which switches a flag of the CPU on or off."""
    if not re.fullmatch(r"[+-][a-z0-9][a-z0-9._-]*", text):
        raise ValueError(f"{text!r} is not like +la57 or -vgif")
    return text


_RUN, _LAB, _HARDWARE = ("run",), ("lab run",), ("hardware",)
_BOTH, _BOOTS = ("run", "lab run"), ("lab run", "lab shell", "fleet join")
_FLEET = ("fleet run",)
_RUNS = (*_BOTH, *_FLEET)
_REPORTS = (*_BOTH, "results")
_FLEET_REPORTS = (*_REPORTS, *_FLEET)
# The options that name a report's file, or ``-`` for standard output.
REPORTS = ("json", "ktap", "junit", "html")
_STEPS = ", ".join(f"{step} {seconds:g}" for step, seconds in STEP_LIMITS.items())
_NOT_MATRIX = "; not with --matrix"

OPTIONS: tuple[Option, ...] = (
    Option("expression", _RUNS, "-k", "Run only tests whose names match, as in pytest -k.", "EXPR",
           pytest="-k", own=False, side="inside", each=True),
    Option("workers", _RUN, "-n", "Run in N processes at once (a number or auto).", "N", pytest="-n",
           own=False),
    Option("machines", _LAB, "-n --machines",
           "Number of VMs at once (default: one for each CPU, as memory allows).", kind=Between(1, 64)),
    Option("listing", _RUN, "--list", "List the tests without running them.", kind="flag"),
    Option("protection", _RUNS, "--protection",
           "Run only under these protections; auto is the strongest that KVM offers.", "P[,P]",
           pytest="--protection", side="inside", each=True),
    Option("quick", _BOTH, "--quick",
           "Run only the few tests that execute nine tenths of what all of them do.", kind="flag",
           each=True),
    Option("touching", _LAB, "--touching",
           "Run only tests that reach functions of KVM which change, by --coverage-map; of the repository in "
           "the current folder.", "REV..REV", each=True),
    Option("coverage_map", _LAB, "--coverage-map",
           "Which tests reach what: a folder of --coverage, or a file of coverage map.", "FILE", kind="path",
           each=True),
    Option("select", _LAB, "--select", "Run only the tests that FILE names, one a line.", "FILE",
           kind="path", pytest="--kvmpy-select", side="inside", each=True),
    Option("pack", (*_RUNS, "fleet join"), "--pack",
           "Take guest programs from a pack (`kvmpy pack build`), where there is no compiler.", "FILE",
           kind="path", pytest="--kvmpy-pack", variable="KVMPY_PACK"),
    Option("dangerous", _RUN, "--dangerous", "Also run tests that can crash an unfixed host.", kind="flag",
           pytest="--run-dangerous"),
    # How they run.
    Option("seed", _RUNS, "--seed", "Repeat the random choices of a run.", "N", kind=seed,
           pytest="--kvmpy-seed", each=True),
    Option("repeat", _RUNS, "--repeat", "Run each test N times, and tell the flaky ones.", "N", kind=times,
           pytest="--kvmpy-repeat", side="inside", each=True),
    Option("deadline", _RUNS, "--deadline",
           f"Time limit for a guest to run without an expected exit (default: {DEFAULT_DEADLINE:g}).",
           "SECONDS", kind=positive_seconds, pytest="--deadline", side="inside", each=True),
    Option("load_seconds", _RUNS, "--load-seconds",
           f"How long each test under load goes on (default: {LOAD_SECONDS:g}).", "N", kind=positive_seconds,
           pytest="--load-seconds", side="inside", each=True),
    Option("strict_private", _RUNS, "--strict-private",
           "Refuse host access to private pages under every protection, as SEV-SNP does.", kind="flag",
           pytest="--strict-private", side="inside", each=True),
    Option("fail_allocations", _RUNS, "--fail-allocations",
           "Let each allocation that an ioctl makes fail once: tests run as ever if KVM answers ENOMEM.",
           kind="flag", pytest="--fail-allocations", side="inside", each=True),
    # What is shown and written.
    Option("verbose", _REPORTS, "-v --verbose",
           "Show pytest's own progress, and every row, reason and name in the summary.", kind="flag",
           each=True),
    Option("json", _FLEET_REPORTS, "--json", "Write the verdicts as JSON; - is standard output.", "FILE",
           pytest="--kvmpy-json", side="host"),
    Option("ktap", _FLEET_REPORTS, "--ktap", "Write the verdicts as KTAP version 1; - is standard output.",
           "FILE", pytest="--ktap", side="host"),
    Option("junit", _REPORTS, "--junit", "Write the verdicts as JUnit XML.", "FILE", pytest="--junitxml",
           own=False, side="host"),
    Option("html", _FLEET_REPORTS, "--html",
           "Write one HTML page: verdicts, reasons, memory maps, ioctls.", "FILE", pytest="--kvmpy-html",
           side="host", lab_help=_NOT_MATRIX),
    Option("kselftest", _RUN, "--kselftest",
           "Behave as a selftest of the kernel: KTAP on standard output, exit status 0, 1, or 4 if all were "
           "skipped.", kind="flag"),
    Option("timeline", _RUN, "--timeline", "Write a timeline of threads and vCPUs for Perfetto.", "FILE",
           pytest="--kvmpy-timeline"),
    Option("record", _BOTH, "--record",
           "Record the ioctls of each test and keep the records of failed or of all tests.",
           kind=RECORD_MODES, pytest="--record", side="inside", lab_help=_NOT_MATRIX),
    Option("record_dir", _BOTH, "--record-dir", f"Folder for records (default: {RECORD_FOLDER}).", "DIR",
           pytest="--record-dir", side="inside"),
    Option("journal", (*_RUN, *_FLEET), "--journal",
           "Keep every report here as it comes, for --resume and kvmpy results (default: in the cache).",
           "FILE", kind="path", pytest="--kvmpy-journal"),
    Option("resume", (*_RUN, *_FLEET), "--resume",
           "Go on behind the last verdict of --journal, or of the last run that did not come to its end.",
           kind="flag"),
    # On which hosts.
    Option("local", _FLEET, "--local", "Start N hosts on this machine, with a fleet of their own.", "N",
           kind=Between(1, 64)),
    Option("hosts", _FLEET, "--hosts", "Start the hosts of this file.", "FILE", kind="path"),
    Option("matrix_of_hosts", _FLEET, "--matrix/--spread",
           "Run each test on each class of hosts, or each test once (the default).", kind="flag",
           default=False),
    Option("on", _FLEET, "--on",
           "Use only hosts that have this label: a requirement, a protection, a configuration or a name.",
           "LABEL", repeated=True, default=()),
    Option("in_lab", ("fleet join",), "--lab",
           "Run tests in a machine of the lab on this host; the options below say which.", kind="flag"),
    Option("at", _FLEET, "--at", "The fleet's address (default: that of this user's `fleet serve`).",
           "HOST:PORT"),
    Option("certificate", _FLEET, "--certificate", "The fleet's certificate (default: this user's).", "FILE",
           kind="path"),
    Option("wait", _FLEET, "--wait",
           "How long hosts may take to join, and to come back after they died, in seconds.", "SECONDS",
           kind=Between(1, whole=False), default=60.0, show_default=True),
    Option("margin", _FLEET, "--margin",
           "How long a host may say nothing beyond its test's time-out, in seconds; then it hangs.",
           "SECONDS", kind=Between(1, whole=False), default=60.0, show_default=True),
    # Pytest's alone.
    Option("evidence", (), "",
           "Keep memory maps of all tests' VMs and the last ioctls of failures (--kvmpy-html does so, too).",
           kind="flag", pytest="--kvmpy-evidence"),
    Option("brief", (), "", "Print a summary that fits on a screen, and no letter for each test.",
           kind="flag", pytest="--kvmpy-brief", side="host"),
    Option("table", (), "", "Print the verdict table at the end.", kind="flag", pytest="--kvmpy-table"),
    Option("errata", (), "", "Read one more errata file.", "FILE", pytest="--kvmpy-errata", repeated=True),
    Option("only_report", (), "", "Run nothing: report what the journal holds, and WHY.", "WHY",
           pytest="--kvmpy-only-report"),
    Option("ids_from", (), "", "Name own test files by their path below DIR, not the root's.", "DIR",
           pytest="--kvmpy-ids-from", side="inside"),
    Option("pack_to", (), "",
           "Run each test up to what it wants of the host, and put the guest programs into a pack.", "FILE",
           pytest="--kvmpy-pack-to", hidden=True),
    Option("record_to", (), "", "Where records go that somebody else takes to --record-dir.", "DIR",
           pytest="--kvmpy-record-to", hidden=True),
    # Where they run.
    Option("lab", _RUN, "--lab", "Run in a kernel under QEMU: if KVM cannot be used here, never, or always.",
           kind=("auto", "never", "always"), default="auto", show_default=True, variable="KVMPY_LAB"),
    Option("kernel", _BOOTS, "--kernel", "A cached kernel (name or release), or a bzImage.", "NAME"),
    Option("source", _LAB, "--source",
           "Build this kernel tree, only what changed, and run in it; exit as `git bisect run` expects.",
           "TREE", kind="path"),
    Option("configuration", _BOOTS, "--configuration",
           "Boot this configuration (see `kvmpy lab configurations`).", "NAME",
           lab_help="; several (A,B or all): one table with a column for each"),
    Option("configurations", _BOOTS, "--configurations", "Read one more file of configurations.", "FILE",
           pytest="--kvmpy-configurations", side="inside", repeated=True, default=(), each=True),
    Option("cpus", _BOOTS, "--cpus", "CPUs of each VM (default: 2).", kind=Between(1, 255), each=True),
    Option("memory", _BOOTS, "--memory", "Memory of each VM, such as 512M or 6G (default: 4G).", "SIZE",
           kind=mebibytes, each=True),
    Option("nodes", _BOOTS, "--nodes", "NUMA nodes of each VM (default: 2, or 1 for one CPU).",
           kind=Between(1, 64), each=True),
    Option("accel", _BOOTS, "--accel", "KVM or QEMU's emulation (tcg); auto takes KVM if guests can use it.",
           kind=("auto", "tcg", "kvm"), default="auto", show_default=True, each=True),
    Option("soft_sev", _BOOTS, "--soft-sev/--no-soft-sev",
           "Boot with or without the software AMD-SP (default: as the kernel has it).", kind="flag",
           each=True),
    Option("parameters", ("run", *_BOOTS), "--param",
           "Set a module parameter, such as kvm_amd.npt=0, for the run.", "MODULE.NAME=VALUE",
           kind=kernel_parameter, default=(), repeated=True, each=True,
           lab_help=", or another kernel parameter; another value inside stops the run"),
    Option("reload", _RUN, "--reload",
           "Load KVM's modules anew for a --param that only that sets, if nothing uses KVM.", kind="flag"),
    Option("cpu", _BOOTS, "--cpu",
           "Switch a CPU flag on or off, by QEMU's name, such as +la57; another CPU inside stops the run.",
           "+FLAG|-FLAG", kind=cpu_flag, default=(), repeated=True, each=True),
    Option("matrix", _LAB, "--matrix", "Run on several kernels; print one table with a column for each.",
           "A,B"),
    Option("fresh_boot", _LAB, "--fresh-boot",
           "Boot each VM, even where a snapshot of one that has booted could be resumed.", kind="flag",
           each=True),
    Option("timeout", _LAB, "--timeout", "Time limit for the whole run, in seconds.",
           kind=Between(1, whole=False), default=4 * 3600.0, each=True),
    Option("coverage", ("lab run", "lab shell"), "--coverage",
           "Keep which lines of KVM are executed in this folder; needs a kernel of lab build --coverage.",
           "DIR", kind="path"),
    Option("coverage_by", _LAB, "--coverage-by", "Keep that for each test file or for each test.",
           kind=("file", "test"), default="file", show_default=True),
    Option("bugs", _LAB, "--bugs",
           "Switch these bugs of the catalogue on (0: none); needs a kernel of lab build --bugs.", "N[,N]",
           kind=bug_numbers),
    Option("may_build", _LAB, "--build", "Build a kernel first if none is up to date.", kind="flag"),
    # `kvmpy hardware`.
    Option("output", _HARDWARE, "-o --output", "The archive to write, a .tar.gz.", "FILE", kind="path"),
    Option("require", _HARDWARE, "--require",
           "Fail where one of these is missing (KVMPY_REQUIRE); '' for none.", "NAMES",
           default="snp,sev-es,sev", show_default=True),
    Option("bench", _HARDWARE, "--bench/--no-bench", "Also run the benchmark.", kind="flag", default=True),
    Option("limit", _HARDWARE, "--limit",
           f"Time limit for each step (default: {_STEPS}).", "SECONDS", kind=Between(1, whole=False)),
    Option("pack_only", _HARDWARE, "--pack", "Run nothing; pack the results of runs that crashed.",
           kind="flag"),
)  # fmt: skip
OF_PYTEST = {option.name: option.pytest for option in OPTIONS if option.pytest}


def of(command: str) -> list[Option]:
    """Return the options of *command*, such as ``run`` or ``lab run``."""
    return [option for option in OPTIONS if command in option.on]


def defaults(command: str) -> dict[str, object]:
    """Return the values of the options of *command* where none is given."""
    return {
        option.name: option.kind(option.default)
        if callable(option.kind) and isinstance(option.default, str)
        else option.default
        for option in of(command)
    }


def pytest_arguments(values: Mapping[str, object], side: Side | None = None) -> list[str]:
    """Return pytest's arguments for the options in *values* that it has, with *side* those of that side."""
    options = (option for option in OPTIONS if option.pytest and side in (None, option.side))
    return _arguments(((option.name, option.pytest) for option in options), values)


def command_arguments(command: str, values: Mapping[str, object]) -> list[str]:
    """Return the arguments of *command* for the options in *values* that it has."""
    return _arguments(((option.name, option.flags.split()[-1]) for option in of(command)), values)


def _arguments(flags: Iterable[tuple[str, str]], values: Mapping[str, object]) -> list[str]:
    words = []
    for name, flag in flags:
        value = values.get(name)
        if isinstance(value, bool):
            yes, _, no = flag.partition("/")
            words += [word for word in (yes if value else no,) if word]
        elif value is not None:
            for each in value if isinstance(value, (tuple, list)) else (value,):
                words += [flag, str(each)]
    return words
