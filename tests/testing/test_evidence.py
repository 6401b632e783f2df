# SPDX-License-Identifier: Apache-2.0
"""What is kept of a failing test beside its verdict: its last ioctls and the memory maps of its VMs."""

from __future__ import annotations

import errno
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from kvmpy.core import observe
from kvmpy.testing.evidence import MAX_VMS, IoctlTail, maps_of
from kvmpy.uapi import ffi, ioctls
from kvmpy.uapi.constants import Cap, ExitReason
from kvmpy.uapi.structs import kvm_userspace_memory_region
from tests.testing.support import Suite

FD: Any = SimpleNamespace(name="vm0", kind="vm", vm_type=0)

VMS = '''
import pytest

GUEST = """
#include <kvmpy/guest.h>
u64 shared GUEST_SHARED;
void guest_main(void)
{
	GUEST_SYNC(1);
	GUEST_ASSERT_EQ(shared, 3);
}
"""

@pytest.mark.protections("cbit", "none")
@pytest.mark.parametrize("shared", [3, 4])
def test_shared(make_vm, shared):
    vm = make_vm(GUEST)
    vm.symbol("shared").u64 = shared
    vm.launch()
    assert len(list(vm.vcpus[0].syncs())) == 1
'''
WATCH = """
from kvmpy.core import observe

def test_nobody():
    assert observe.active == []
"""


def a_vcpu(reason: int) -> Any:
    run = ffi.new("struct kvm_run *")
    run.exit_reason = reason
    return SimpleNamespace(name="vm0/vcpu0", kind="vcpu", vm=FD, _run=run)


def test_an_ioctl_is_told() -> None:
    """Name, file descriptor, decoded argument and result of an ioctl; an error by its name."""
    tail = IoctlTail()
    region = kvm_userspace_memory_region(slot=7, memory_size=0x1000)
    tail.ioctl_exit(FD, ioctls.KVM_SET_USER_MEMORY_REGION, region, 0, 0)
    region.slot = 9  # the caller's struct goes on living
    tail.ioctl_exit(FD, ioctls.KVM_CHECK_EXTENSION, int(Cap.KVM_CAP_VM_TYPES), -1, errno.EINVAL)
    first, second = tail.lines()
    assert (first["fd"], first["ioctl"], first["result"], first["failed"]) == (
        "vm0",
        "KVM_SET_USER_MEMORY_REGION",
        "0",
        False,
    )
    assert "slot=0x7" in first["arg"]
    assert (second["result"], second["failed"]) == ("EINVAL", True)
    assert second["arg"] == "KVM_CAP_VM_TYPES"
    tail.ioctl_exit(FD, ioctls.KVM_CREATE_VCPU, 3, -1, errno.EEXIST)
    assert [bool(line["meaning"]) for line in tail.lines()] == [False, False, True]
    assert first["ms"] == 0
    assert second["ms"] >= 0


def test_runs_that_end_alike_are_one_line() -> None:
    """KVM_RUNs of one vCPU with the same exit are counted; another exit begins a line."""
    tail = IoctlTail()
    io, hlt = (a_vcpu(int(reason)) for reason in (ExitReason.KVM_EXIT_IO, ExitReason.KVM_EXIT_HLT))
    for vcpu in (io, io, io, hlt, io):
        tail.ioctl_exit(vcpu, ioctls.KVM_RUN, None, 0, 0)
    lines = [(line["arg"].partition(" ")[0], line["count"]) for line in tail.lines()]
    assert lines == [("KVM_EXIT_IO", 3), ("KVM_EXIT_HLT", 1), ("KVM_EXIT_IO", 1)]


def test_the_oldest_go() -> None:
    """Only the last ioctls are kept."""
    tail = IoctlTail(length=3)
    for number in range(10):
        tail.ioctl_exit(FD, ioctls.KVM_CREATE_VCPU, number, 0, 0)
    assert [line["arg"] for line in tail.lines()] == ["7", "8", "9"]


def test_threads_are_numbered() -> None:
    """The lines of two threads can be told apart."""
    tail = IoctlTail()
    tail.ioctl_exit(FD, ioctls.KVM_CREATE_VCPU, 0, 0, 0)
    other = threading.Thread(target=tail.ioctl_exit, args=(FD, ioctls.KVM_CREATE_VCPU, 1, 0, 0))
    other.start()
    other.join()
    assert [line["thread"] for line in tail.lines()] == [0, 1]


def test_a_look_at_the_vm_is_left_out() -> None:
    """What a post-mortem asks of the VM is no part of what led to the failure."""
    tail = IoctlTail()
    tail.ioctl_exit(FD, ioctls.KVM_CREATE_VCPU, 0, 0, 0)
    with observe.inspecting():
        tail.ioctl_exit(FD, ioctls.KVM_GET_REGS, None, 0, 0)
    tail.ioctl_exit(FD, ioctls.KVM_CREATE_VCPU, 1, 0, 0)
    assert [line["ioctl"] for line in tail.lines()] == ["KVM_CREATE_VCPU"] * 2


def test_no_map_of_what_cannot_be_seen() -> None:
    """A VM whose map fails says why, closed ones have none, and there is a limit."""
    broken: Any = SimpleNamespace(name="vm3", closed=False)
    closed: Any = SimpleNamespace(name="vm4", closed=True)
    (only,) = maps_of([closed, broken])
    assert only["vm"] == "vm3"
    assert "AttributeError" in only["hidden"]
    assert len(maps_of([broken] * 20)) == MAX_VMS


@pytest.mark.requires("kvm")
def test_evidence_of_a_run(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a page every VM has its map, and failures their ioctls up to the run that failed."""
    monkeypatch.delenv("KVMPY_DEV_KVM")
    suite.add("test_vms.py", VMS)
    outcome = suite.run("--kvmpy-html=out.html")
    assert outcome.verdicts() == {
        "test_shared[cbit-3]": "pass",
        "test_shared[none-3]": "pass",
        "test_shared[cbit-4]": "fail",
        "test_shared[none-4]": "fail",
    }
    failed = outcome.test("test_shared[cbit-4]")
    assert failed["ioctls"][-1]["ioctl"] == "KVM_RUN"
    assert failed["ioctls"][-1]["arg"].startswith("KVM_EXIT_IO {direction=KVM_EXIT_IO_OUT")
    assert "KVM_CREATE_VM" in [line["ioctl"] for line in failed["ioctls"]]
    assert outcome.test("test_shared[cbit-3]")["ioctls"] == []
    for name in ("test_shared[cbit-3]", "test_shared[cbit-4]"):
        (entry,) = outcome.test(name)["memory_maps"]
        shown = outcome.report["memory_maps"][entry["map"]]
        assert shown["segments"] == ["0x0 0x4000000"]
        assert shown["encryption"].startswith("C-bit ")
        assert shown["protection"] == "cbit"
        private = [line for line in shown["mappings"] if line.split()[4] == "private"]
        shared = [line for line in shown["mappings"] if line.split()[4] == "shared"]
        assert any(line.startswith("0x400000 ") for line in private)  # the program
        assert any(line.startswith("0xc000000 ") for line in shared)  # the ucall slots
        assert shown["private"]
    (entry,) = outcome.test("test_shared[none-3]")["memory_maps"]
    plain = outcome.report["memory_maps"][entry["map"]]
    assert (plain["encryption"], plain["private"]) == ("", [])
    assert {line.split()[4] for line in plain["mappings"]} == {"-"}


@pytest.mark.requires("kvm")
def test_without_a_page(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a page failures alone have a map, and nothing watches the ioctls."""
    monkeypatch.delenv("KVMPY_DEV_KVM")
    suite.add("test_vms.py", VMS)
    suite.add(
        "test_watch.py",
        "from kvmpy.core import observe\n\ndef test_nobody():\n    assert observe.active == []\n",
    )
    outcome = suite.run()
    assert len(outcome.test("test_shared[none-4]")["memory_maps"]) == 1
    assert outcome.test("test_shared[none-3]")["memory_maps"] == []
    assert outcome.test("test_shared[none-4]")["ioctls"] == []
    assert outcome.verdicts()["test_nobody"] == "pass"
