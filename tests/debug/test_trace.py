# SPDX-License-Identifier: Apache-2.0
"""`kvmpy trace` on real programs: what they asked of KVM is what the trace says."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from kvmpy.core.kvm import Kvm
from kvmpy.debug.record.events import Object
from kvmpy.debug.record.format import ObjectKind
from kvmpy.debug.watch.unseen import Unseen
from tests.debug.tracing import ROOT, TIMEOUT, Trace, compile_program, kvmpy, kvmpy_command, need_kvm

BASIC = [
    ("KVM_CREATE_VM", "kvm", ""),
    ("KVM_SET_USER_MEMORY_REGION", "vm0", ""),
    ("KVM_CREATE_VCPU", "vm0", ""),
    ("KVM_GET_SREGS", "vm0/vcpu0", ""),
    ("KVM_SET_SREGS", "vm0/vcpu0", ""),
    ("KVM_SET_REGS", "vm0/vcpu0", ""),
    ("KVM_RUN", "vm0/vcpu0", ""),
    ("KVM_RUN", "vm0/vcpu0", ""),
    ("KVM_RUN", "vm0/vcpu0", ""),
    ("KVM_GET_REGS", "vm0/vcpu0", ""),
    ("KVM_GET_MSRS", "vm0/vcpu0", ""),
    ("KVM_GET_DIRTY_LOG", "vm0", ""),
    ("KVM_SET_USER_MEMORY_REGION", "vm0", "EINVAL"),
    ("KVM_SET_REGS", "vm0/vcpu0", "EFAULT"),
    ("0xc018aefe", "vm0", "ENOTTY"),
    ("KVM_MEMORY_ENCRYPT_OP", "vm0", "ENOTTY"),
    ("KVM_GET_REGS", "vm0/vcpu0", ""),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, dynamically linked."""
    need_kvm()
    return compile_program(tmp_path_factory.mktemp("dynamic"))


@pytest.fixture(scope="module")
def static_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, statically linked."""
    need_kvm()
    return compile_program(tmp_path_factory.mktemp("static"), "-static")


@pytest.fixture(scope="module")
def basic(program: Path) -> Trace:
    """A trace of the mode basic."""
    return Trace("--", program, "basic")


def simple(trace: Trace) -> list[tuple[str, str, str]]:
    return [(name, target, error) for name, target, _, error in trace.calls()]


def test_every_ioctl_is_there_in_order(basic: Trace) -> None:
    assert simple(basic) == BASIC
    assert basic.status == 0


def test_arguments_are_decoded_with_names(basic: Trace) -> None:
    slot = basic.named("KVM_SET_USER_MEMORY_REGION")[0]
    assert "{slot=0x3, flags=KVM_MEM_LOG_DIRTY_PAGES, memory_size=0x108000, userspace_addr=0x" in slot["text"]
    assert slot["chunks"][0]["fields"]["memory_size"] == 0x108000
    assert "KVM_CREATE_VM KVM_X86_DEFAULT_VM = " in basic.rows[0]["text"]
    assert "[{index=0xc0000080 (MSR_EFER)}]" in basic.named("KVM_GET_MSRS")[0]["text"]


def test_output_is_apart_from_input(basic: Trace) -> None:
    first, second = basic.named("KVM_GET_REGS")
    for row in (first, second):
        assert row["text"].startswith("KVM_GET_REGS -> {rax=0x99, rip=0x1007, rflags=0x2} = 0")
        assert [chunk["when"] for chunk in row["chunks"]] == ["out"]


def test_exits_carry_their_payload(basic: Trace) -> None:
    out, into, halt = basic.named("KVM_RUN")
    assert (out["exit"], into["exit"], halt["exit"]) == ("KVM_EXIT_IO", "KVM_EXIT_IO", "KVM_EXIT_HLT")
    assert "direction=KVM_EXIT_IO_OUT, size=0x1, port=0x10, count=0x1" in out["text"]
    assert out["text"].endswith("data=<42>")
    assert "direction=KVM_EXIT_IO_IN, size=0x1, port=0x11" in into["text"]
    # The host's answer goes in with the next run.
    assert "[data in <99>]" in halt["text"]


def test_errors_carry_their_meaning(basic: Trace) -> None:
    bad = basic.named("KVM_SET_USER_MEMORY_REGION")[1]
    assert (bad["result"], bad["errno"]) == (-1, "EINVAL")
    assert bad["meaning"] == "guest_phys_addr 0x1 is not page aligned"


def test_bad_pointers_and_unknown_ioctls_are_shown_raw(basic: Trace) -> None:
    assert "arg=0x8 (not readable)" in basic.named("KVM_SET_REGS")[1]["text"]
    (unknown,) = basic.named("0xc018aefe")
    assert unknown["known"] is False
    assert "_IOWR(0xae, 0xfe, 24) <887766554433221102000000000000000300000000000000>" in unknown["text"]


def test_pointers_are_followed(basic: Trace) -> None:
    (log,) = basic.named("KVM_GET_DIRTY_LOG")
    assert "*dirty_bitmap=" in log["text"]
    # 264 pages: five quadwords.
    assert [len(chunk["bytes"]) // 2 for chunk in log["chunks"]] == [16, 40]
    (command,) = basic.named("KVM_MEMORY_ENCRYPT_OP")
    assert "{id=KVM_SEV_SNP_LAUNCH_START," in command["text"]
    assert "*data={policy=0x30000 (smt)}" in command["text"]
    assert command["chunks"][1]["struct"] == "kvm_sev_snp_launch_start"


def test_copies_of_a_descriptor_are_the_same_object(basic: Trace) -> None:
    assert [row["target"] for row in basic.named("KVM_GET_REGS")] == ["vm0/vcpu0", "vm0/vcpu0"]
    closed = [row["target"] for row in basic.notes if row["note"] == "closed"]
    assert closed == ["kvm", "vm0/vcpu0", "vm0"]


def test_threads(program: Path) -> None:
    """Every thread's ioctls are there, under its own number."""
    trace = Trace("--", program, "threads", "4", "50")
    assert trace.status == 0
    count = Counter(row["target"] for row in trace.named("KVM_GET_REGS"))
    assert count == {f"vm0/vcpu{number}": 50 for number in range(4)}
    owners = {
        target: {row["tid"] for row in trace.named("KVM_GET_REGS") if row["target"] == target}
        for target in count
    }
    assert all(len(each) == 1 for each in owners.values())
    assert len(set.union(*owners.values())) == 4


def test_forked_children(program: Path) -> None:
    trace = Trace("--", program, "fork")
    assert trace.status == 0
    created = trace.named("KVM_CREATE_VCPU")
    assert [(row["target"], row.get("errno", "")) for row in created] == [
        ("vm0", "EIO"),
        ("vm1", ""),
        ("vm0", ""),
    ]
    assert len({row["pid"] for row in trace.rows}) == 2
    assert [row["target"] for row in trace.named("KVM_RUN")] == ["vm1/vcpu0"] * 3 + ["vm0/vcpu5"] * 3


def test_exec_with_an_empty_environment_is_followed(program: Path) -> None:
    assert simple(Trace("--", program, "exec", "basic")) == BASIC


def test_an_exec_by_number_is_followed(program: Path) -> None:
    assert simple(Trace("--", program, "rawexec", "basic")) == BASIC


def test_system_calls_past_the_c_library_are_hinted_at(program: Path) -> None:
    """The recorder sees that the program opened /dev/kvm and nothing more; ptrace sees what it asked."""
    unseen = Trace("--", program, "rawioctl")
    assert unseen.rows == []
    assert "traced with --ptrace" in unseen.notes[-1]["note"]
    assert simple(Trace("--ptrace", "--", program, "rawioctl")) == [("KVM_GET_API_VERSION", "kvm", "")]


@pytest.mark.parametrize("options", [(), ("-q",), ("-s",)], ids=" ".join)
def test_one_ioctl_of_the_c_library_hides_no_others(program: Path, options: tuple[str, ...]) -> None:
    """While the program lives, and however little else is printed."""
    command = [*kvmpy_command(), "trace", *options, "--", str(program), "rawvm"]
    streams = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **streams) as tracer:  # type: ignore[call-overload]
        line = next(line for line in tracer.stderr if "--ptrace" in line or not line)
        tracer.stdin.close()
        rest = tracer.stderr.read()
        assert tracer.wait(TIMEOUT) == 0
    assert "holds vm, vcpu0, which the recorder did not see made" in line
    assert "--ptrace" not in rest


def test_what_is_seen_once_is_judged_at_the_end() -> None:
    """Also of a process that went before its frames had time to come; what they tell of is no finding."""
    need_kvm()
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(3):
        for known, hints in (((), ["vm, vcpu3"]), (("vm7",), ["vcpu3"]), (("vm7", "vm7/vcpu3"), [])):
            unseen = Unseen()
            assert unseen.look([os.getpid()]) == []
            for name in known:
                kind = ObjectKind.VCPU if "/" in name else ObjectKind.VM
                unseen.known(Object(1, 0, 5, kind, name=name))
            assert [text.partition("holds ")[2].partition(", which")[0] for text in unseen.rest()] == hints
            assert unseen.rest() == []


REFUSALS = [
    ("KVM_SET_USER_MEMORY_REGION", "slot 3 exists with 0x108000 bytes: a live slot is not resized"),
    ("KVM_SET_USER_MEMORY_REGION", "a live slot keeps"),
    ("KVM_SET_USER_MEMORY_REGION", "there is no slot 9 to delete"),
    ("KVM_SET_USER_MEMORY_REGION", "0x0 to 0x107fff overlaps slot 3, 0x0 to 0x107fff"),
    ("KVM_SET_USER_MEMORY_REGION", "beyond the host's MAXPHYADDR"),
    ("KVM_SET_USER_MEMORY_REGION", "flags known are 0x3, not 0x100000"),
    ("KVM_SET_SREGS", "CR0.PG is set without CR0.PE"),
    ("KVM_SET_SREGS", "EFER.LMA is set without EFER.LME"),
    ("KVM_SET_SREGS", "segment: cs.l, 64-bit code, outside long mode"),
    ("KVM_SET_SREGS", "CR4 0x10000000000, EFER 0x0"),
    ("KVM_SET_MSRS", "= 1 of 4: 0x4b564dff was refused"),
    ("KVM_RUN", "EBADF (Bad file descriptor)"),
]


@pytest.mark.parametrize("options", [(), ("--ptrace",)], ids=["recorder", "ptrace"])
def test_refusals_name_the_broken_rule(program: Path, options: tuple[str, ...]) -> None:
    """What KVM really refuses, and -f errno=* shows nothing else, what was done in part included."""
    trace = Trace("-f", "errno=*", *options, "--", program, "refusals")
    assert trace.status == 0
    assert [row["ioctl"] for row in trace.rows] == [name for name, _ in REFUSALS]
    for row, (_, words) in zip(trace.rows, REFUSALS, strict=True):
        assert words in row["text"]
    assert trace.rows[-1]["target"] == "fd-1"


def test_an_exit_inside_a_slot_names_the_page(program: Path) -> None:
    (row,) = Trace("-f", "exit=mmio", "--", program, "refusals").rows
    assert "phys_addr=0x10, len=0x1, is_write=0x1} [inside slot 3: the host page at 0x" in row["text"]
    assert row["text"].endswith("cannot be written]")


def test_closed_standard_streams(program: Path) -> None:
    trace = Trace("--", program, "closed")
    assert simple(trace) == BASIC
    assert trace.status == 0


def test_signal_handlers_may_issue_ioctls(program: Path) -> None:
    """A handler that interrupts the recorder itself loses nothing and breaks nothing."""
    trace = Trace("--", program, "signals")
    assert trace.status == 0
    rounds, ticks = map(int, trace.stdout.split())
    asked = Counter((row["chunks"][0]["fields"]["nent"], row.get("errno", "")) for row in trace.rows)
    assert asked[1, "E2BIG"] >= ticks
    # A call that a signal cut short is issued again, and counts.
    assert asked[128, ""] + asked[128, "EINTR"] == rounds
    assert set(asked) <= {(1, "E2BIG"), (128, ""), (128, "EINTR")}


def test_what_a_killed_program_did_is_there(program: Path) -> None:
    trace = Trace("--", program, "crash")
    assert trace.status == 128 + 11
    assert simple(trace) == BASIC[:2]


def test_a_program_without_kvm(program: Path) -> None:
    trace = Trace("--", program, "nothing")
    assert trace.status == 7
    assert "issued an ioctl of KVM that the recorder saw" in trace.notes[0]["note"]


def test_static_programs_go_through_ptrace(static_program: Path) -> None:
    trace = Trace("--", static_program, "basic")
    assert simple(trace) == BASIC
    assert "statically linked" in trace.notes[0]["note"]
    assert "traced through ptrace, which is much slower" in trace.notes[0]["note"]
    out, _, halt = trace.named("KVM_RUN")
    assert out["text"].endswith("data=<42>")
    assert "[data in <99>]" in halt["text"]


def test_a_static_child_is_named(program: Path, static_program: Path) -> None:
    trace = Trace("--", program, "exec", "nothing", static_program)
    assert trace.status == 7
    warnings = [row["note"] for row in trace.notes if row["warning"]]
    assert any("statically linked" in text and str(static_program) in text for text in warnings)


def test_both_ways_see_the_same(program: Path) -> None:
    recorded, stopped = Trace("--", program, "fork"), Trace("--ptrace", "--", program, "fork")
    assert simple(recorded) == simple(stopped)
    assert stopped.status == 0


def test_setuid_programs_are_refused(program: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to make a program setuid to another user")
    copy = Path(shutil.copy(program, tmp_path / "setuid"))
    os.chown(copy, 65534, -1)
    copy.chmod(0o755 | stat.S_ISUID)
    done = kvmpy("trace", "--", copy)
    assert done.returncode == 1
    assert "setuid to user 65534" in done.stderr
    # As a child it runs, and the trace says that it cannot follow.
    trace = Trace("--", program, "exec", "nothing", copy)
    assert any("setuid to user 65534" in row["note"] for row in trace.notes)


def test_programs_that_cannot_be_run(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("no program\n")
    for command, text in (
        ("/nonexistent/x", "/nonexistent/x: no such file"),
        ("no-such-program-anywhere", "no such program in PATH"),
        (str(tmp_path), "is a directory"),
        (str(plain), "no permission to execute it"),
    ):
        done = kvmpy("trace", "--", command)
        assert done.returncode == 1, command
        assert text in done.stderr
    plain.chmod(0o755)
    done = kvmpy("trace", "--", plain)
    assert done.returncode == 1
    assert "Exec format error" in done.stderr


def test_usage_errors() -> None:
    assert "give one of" in kvmpy("trace").stderr
    assert "give one of" in kvmpy("trace", "-p", "1", "--", "true").stderr
    assert "filter 'color=red': expected" in kvmpy("trace", "-f", "color=red", "--", "true").stderr
    assert "Is a directory" in kvmpy("trace", "-o", "/", "--", "true").stderr


def test_python_programs(tmp_path: Path) -> None:
    """kvmpy itself is a program like others; its ioctls go through its own native part."""
    need_kvm()
    script = tmp_path / "script.py"
    script.write_text(
        "from kvmpy.coco.kvm import Kvm\n"
        "from kvmpy.guest import GuestProgram\n"
        "source = '#include <kvmpy/guest.h>\\nvoid guest_main(void) { GUEST_SYNC(7); }'\n"
        "program = GuestProgram.from_c(source)\n"
        "with Kvm() as kvm, kvm.create_vm(program, protection='none') as vm:\n"
        "    vm.launch()\n"
        "    print([call.args[0] for call in vm.vcpus[0].syncs(timeout=20)])\n"
    )
    # An empty cache: the compiler is a child of vfork(), before the first ioctl.
    trace = Trace("--", sys.executable, script, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)})
    assert trace.stdout == "[7]\n", trace.other
    runs = trace.named("KVM_RUN")
    assert {row["target"] for row in runs} == {"vm0/vcpu0"}
    # Ucalls are writes to port 0xe6: SYNC and DONE.
    assert [row["exit"] for row in runs if "port=0xe6" in row["text"]] == ["KVM_EXIT_IO"] * 2


def test_qemu() -> None:
    """QEMU's first questions to KVM."""
    need_kvm()
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("qemu-system-x86_64 is not installed (apt-get install qemu-system-x86)")
    machine = ("-accel", "kvm", "-M", "microvm", "-m", "32M", "-nodefaults", "-display", "none", "-S")
    trace = Trace("--", "timeout", "5", qemu, *machine, timeout=50)
    assert trace.rows[0]["ioctl"] == "KVM_GET_API_VERSION"
    assert trace.rows[0]["result"] == 12
    assert trace.named("KVM_CREATE_VM")[0]["result"] >= 0
    assert {row["target"] for row in trace.named("KVM_SET_CPUID2")} == {"vm0/vcpu0"}
    assert all(row["known"] for row in trace.rows)
