# SPDX-License-Identifier: Apache-2.0
"""What is kept of a failing test beside its verdict: its last ioctls and the memory maps of its VMs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvmpy.core import recent
from kvmpy.testing.evidence import MAX_VMS, maps_of
from tests.testing.support import Suite

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
    # The page is made of this; the post-mortem says the same, and is there once.
    section = failed["postmortem"].partition("--- last ioctls of ")[2].partition("\n---")[0]
    told = [line.strip() for line in section.splitlines()[1:]]
    assert told
    own = [each for each in failed["ioctls"] if each["fd"].startswith("vm") and each["ioctl"] != "KVM_RUN"]
    assert told == [recent.line(entry) for entry in own][-12:]
    assert any("KVM_ENABLE_CAP {cap=KVM_CAP_" in line for line in map(recent.line, failed["ioctls"]))
    assert all(line in outcome.text for line in told)
    assert not any(line in failed["details"] for line in told)
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
