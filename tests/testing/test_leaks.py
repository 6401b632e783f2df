# SPDX-License-Identifier: Apache-2.0
"""The leak check: what a test leaves behind fails it, whatever it is."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from kvmpy.testing import leaks
from kvmpy.testing.leaks import named_mappings, snapshot, steady_growth
from tests.testing.support import Suite

TESTS = """
import os, signal, subprocess, threading
import pytest

def test_fd():
    os.open("/dev/null", os.O_RDONLY)

def test_mapping():
    import mmap
    fd = os.memfd_create("guest")
    os.truncate(fd, 4096)
    kept.append(mmap.mmap(fd, 4096))
    os.close(fd)

kept = []

def test_thread():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, args=(60,), daemon=True)
    thread.start()

def test_child():
    kept.append(subprocess.Popen(["sleep", "60"]))

def test_reaps():
    kept[-1].kill()
    kept[-1].wait()

def test_clean():
    fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fd)
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    subprocess.run(["true"], check=True)

@pytest.fixture(scope="module")
def shared():
    fd = os.open("/dev/null", os.O_RDONLY)
    yield fd
    os.close(fd)

def test_uses_shared(shared):
    os.fstat(shared)

def test_uses_it_again(shared):
    os.fstat(shared)

def test_fails_and_leaks():
    os.open("/dev/zero", os.O_RDONLY)
    assert 1 == 2

def test_fails_and_leaves_a_thread():
    threading.Thread(target=threading.Event().wait, args=(60,), daemon=True).start()
    assert 1 == 2
"""


def test_everything_that_is_left_behind(suite: Suite) -> None:
    suite.add("test_a.py", TESTS)
    outcome = suite.run()
    assert outcome.verdicts() == {
        "test_fd": "fail",
        "test_mapping": "fail",
        "test_thread": "fail",
        "test_child": "fail",
        "test_reaps": "pass",
        "test_clean": "pass",
        "test_uses_shared": "pass",
        "test_uses_it_again": "pass",
        "test_fails_and_leaks": "fail",
        "test_fails_and_leaves_a_thread": "fail",
    }
    details = {name: outcome.test(name)["details"] for name in outcome.verdicts()}
    assert ": /dev/null" in details["test_fd"]
    assert "mapping of /memfd:guest (deleted) (1 more)" in details["test_mapping"]
    assert "thread " in details["test_thread"]
    assert ": sleep" in details["test_child"]
    assert "1 == 2" in outcome.reason("test_fails_and_leaks")
    assert "left behind by the test" not in details["test_fails_and_leaks"]
    assert "/dev/zero" in outcome.text
    # KVM's threads of a VM that a traceback holds do not go either: only one that passed is waited for.
    assert outcome.test("test_fails_and_leaves_a_thread")["duration"] < leaks.GRACE / 2
    assert outcome.test("test_thread")["duration"] >= leaks.GRACE


def test_the_look_at_the_end_of_a_test_serves_the_next(suite: Suite) -> None:
    """What came in between, such as a report's file or pytest's watchdog, is nobody's leak."""
    suite.add(
        "test_a.py",
        "import os\n"
        "def test_first(): pass\n"
        "def test_second(): pass\n"
        "def test_leaks(): os.open('/dev/null', os.O_RDONLY)\n"
        "def test_leaks_again(): os.open('/dev/null', os.O_RDONLY)\n"
        "def test_last(): pass\n",
    )
    outcome = suite.run("-o", "faulthandler_timeout=60")
    assert outcome.verdicts() == {
        "test_first": "pass",
        "test_second": "pass",
        "test_leaks": "fail",
        "test_leaks_again": "fail",
        "test_last": "pass",
    }


def test_a_listing_that_the_kernel_cut_short_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = os.listdir
    cut: list[str] = []

    def listdir(path: str | Path) -> list[str]:
        names = listed(path)
        if str(path) == "/proc/self/task" and len(cut) < 2:
            cut.append(names.pop())
        return names

    monkeypatch.setattr(os, "listdir", listdir)
    end = threading.Event()
    thread = threading.Thread(target=end.wait, args=(60,))
    thread.start()
    try:
        threads = snapshot().threads
    finally:
        end.set()
        thread.join(60)
    assert cut == [str(thread.native_id)] * 2
    assert thread.native_id in threads


@pytest.mark.requires("kvm")
def test_a_vm_left_open(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVMPY_DEV_KVM")
    suite.add("test_a.py", "kept = []\ndef test_vm(kvm):\n    kept.append(kvm.create_vm())\n")
    outcome = suite.run()
    assert outcome.verdicts() == {"test_vm": "fail"}
    assert "anon_inode:kvm-vm (a VM)" in outcome.test("test_vm")["details"]


@pytest.mark.requires("kvm", "KVM_CAP_GUEST_MEMFD_FLAGS")
def test_a_guest_memfd_left_mapped(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mapping outlives descriptor and VM."""
    monkeypatch.delenv("KVMPY_DEV_KVM")
    suite.add(
        "test_a.py",
        "import mmap\nkept = []\n"
        "def test_vm(kvm):\n"
        "    with kvm.create_vm() as vm:\n"
        "        kept.append(mmap.mmap(vm.create_guest_memfd(8192, 1).fd, 8192))\n",
    )
    outcome = suite.run()
    assert outcome.verdicts() == {"test_vm": "fail"}
    details = outcome.test("test_vm")["details"]
    assert "mapping of" in details
    assert "[kvm-gmem]" in details


@pytest.mark.parametrize("name", ["/[kvm-gmem] (deleted)", "anon_inode:[kvm-gmem]"])
def test_a_guest_memfd_is_a_named_mapping(name: str) -> None:
    """Before and since Linux 6.18, where guest_memfd got a file system of its own."""
    maps = f"7f0000000000-7f0000002000 rw-s 0 00:10 106 {name}\n7f0000002000-7f0000003000 rw-p 0 00:00 0\n"
    assert named_mappings(maps) == {name: 1}


def test_only_tests_that_use_kvmpy_are_checked_elsewhere(suite: Suite) -> None:
    suite.add(
        "test_a.py",
        "import os, pytest\n"
        "def test_other(): os.open('/dev/null', os.O_RDONLY)\n"
        "@pytest.mark.requires('tool:sh')\n"
        "def test_ours(): os.open('/dev/null', os.O_RDONLY)\n",
    )
    outcome = suite.run("-o", "kvmpy_leaks=kvm", "-o", "filterwarnings=ignore")
    assert outcome.verdicts()["test_other"] == "pass"


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([1000 + 10 * step for step in range(400)], 10),
        ([1000] * 400, 0),
        ([1000 + 500 * (step > 250) for step in range(400)], 0),
        ([1000 + min(step, 200) * 10 for step in range(400)], 0),
        ([10 * step for step in range(39)], 0),
        ([1000 - step for step in range(400)], 0),
    ],
    ids=["steady", "flat", "one jump", "a cache that fills", "too few", "shrinking"],
)
def test_steady_growth(samples: list[int], expected: float) -> None:
    assert steady_growth(samples) == pytest.approx(expected, rel=0.02)


def test_a_session_that_never_stops_growing_fails(suite: Suite) -> None:
    suite.add(
        "test_a.py",
        "import pytest\nkept = []\n"
        "@pytest.mark.parametrize('n', range(60))\n"
        "def test_grows(n):\n    kept.append(bytearray(b'x') * (2 << 20))\n",
    )
    outcome = suite.run()
    assert outcome.status == 1
    assert outcome.report["summary"]["pass"] == 60
    assert 1_900_000 < outcome.report["memory_growth_per_test"] < 2_400_000
    assert "the test process grew by" in outcome.text
