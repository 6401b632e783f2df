# SPDX-License-Identifier: Apache-2.0
"""As many SEV guests as the platform takes: ASIDs that run out, and how many are left.

A Genoa has 1006 ASIDs: their guests share one /dev/sev, the limit of descriptors is raised, and the test's
time-out grows with their number.  Where the misc cgroup controller counts them, a process of its own small
limit sees the same EBUSY after a few (sev_asid_new() and misc_cg_try_charge() in Linux).
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvmpy import Kvm, KvmError, MissingError, SevDevice, Vm, VmType, kvm_sev_init
from kvmpy.coco.sev_platform import SevCpuid, sev_cpuid

# How many guests of each kind the cgroup allows, and what KVM calls the two kinds of ASIDs there.
BOUND = 8
RESOURCES = ("sev", "sev_es")
# Descriptors that a test needs besides those of the guests.
SPARE = 64
# Seconds: of a guest that is made, and closed; of the rest of a test; and what pytest's watchdog leaves.
EACH, REST, MOST = 0.15, 60.0, 400.0


def count_of(vm_type: int, cpuid: SevCpuid) -> int:
    """Return how many ASIDs guests of a type can have at most."""
    others = cpuid.first_sev_asid - 1
    return max(cpuid.guests - others, 0) if vm_type == VmType.KVM_X86_SEV_VM else others


@contextmanager
def descriptors(count: int) -> Iterator[None]:
    """Let this process open *count* more file descriptors; MissingError where the hard limit forbids it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + count + SPARE
    if soft == resource.RLIM_INFINITY or soft >= needed:
        yield
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except ValueError:
        raise MissingError(
            f"{needed} file descriptors (the hard limit RLIMIT_NOFILE is {hard})",
            f"ulimit -Hn {needed} as root, or LimitNOFILE={needed} of the service",
        ) from None
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def cgroup_root(mounts: Path = Path("/proc/self/mountinfo")) -> Path | None:
    """Return where cgroup version 2 is mounted."""
    for line in mounts.read_text().splitlines():
        fields, _, tail = line.partition(" - ")
        if tail.startswith("cgroup2 "):
            return Path(fields.split()[4])
    return None


@contextmanager
def limited(root: Path | None, membership: Path = Path("/proc/self/cgroup")) -> Iterator[bool]:
    """Put this process into a cgroup that may have BOUND ASIDs of each kind; yield whether that was possible.

    Documentation/admin-guide/cgroup-v2.rst, "Misc"; it needs the controller and root.
    """
    with ExitStack() as stack:
        try:
            bound = root is not None and _limit(root, membership, stack)
        except OSError:
            stack.close()
            bound = False
        yield bound


def _limit(root: Path, membership: Path, stack: ExitStack) -> bool:
    if "misc" not in (root / "cgroup.controllers").read_text().split():
        return False
    enabled = root / "cgroup.subtree_control"
    if "misc" not in enabled.read_text().split():
        enabled.write_text("+misc")
        stack.callback(_try, enabled, "-misc")
    # The root has the controller's files from then on only.
    counted = (root / "misc.capacity").read_text().split()[::2]
    wanted = [name for name in RESOURCES if name in counted]
    if not wanted:
        stack.close()
        return False
    home = next(line[3:] for line in membership.read_text().splitlines() if line.startswith("0::"))
    folder = root / f"kvmpy-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    stack.callback(folder.rmdir)
    for name in wanted:
        (folder / "misc.max").write_text(f"{name} {BOUND}")
    (folder / "cgroup.procs").write_text(str(os.getpid()))
    stack.callback((root / home.lstrip("/") / "cgroup.procs").write_text, str(os.getpid()))
    return True


def _try(file: Path, text: str) -> None:
    # Somebody else may use the controller by now.
    with suppress(OSError):
        file.write_text(text)


@dataclass
class Asids:
    """The ASIDs of a host; *bound* tells whether this process may have BOUND of each kind only."""

    kvm: Kvm
    bound: bool = False

    def count(self, vm_type: int) -> int:
        """Return how many guests of a type there can be at most."""
        cpuid = sev_cpuid(self.kvm)
        assert cpuid is not None
        count = count_of(vm_type, cpuid)
        return min(count, BOUND) if self.bound else count

    @contextmanager
    def taken(self, vm_type: int) -> Iterator[tuple[list[Vm], Vm]]:
        """Make guests until KVM_SEV_INIT2 gives EBUSY; yield them, and the VM that was refused."""
        most = self.count(vm_type)
        with ExitStack() as stack:
            stack.enter_context(descriptors(most + 1))
            device = stack.enter_context(SevDevice())
            guests: list[Vm] = []
            while True:
                vm = stack.enter_context(self.kvm.create_vm(vm_type))
                result = vm.sev.command_raw("INIT2", kvm_sev_init(), sev_fd=device.fd)
                if not result.ok:
                    break
                guests.append(vm)
                assert len(guests) <= most, "ASIDs do not run out"
            assert (result.errno, result.firmware) == (errno.EBUSY, 0)
            yield guests, vm

    def left(self, vm_type: int) -> int:
        """Return how many guests of a type can still be made."""
        with self.taken(vm_type) as (guests, _):
            return len(guests)


@pytest.fixture
def asids(kvm: Kvm) -> Iterator[Asids]:
    """The host's ASIDs, for a test that compares how many are left: a few where that can be arranged.

    Whatever the test takes counts, so that it comes before what makes its guests.
    """
    with limited(cgroup_root()) as bound:
        yield Asids(kvm, bound)


@pytest.fixture
def all_asids(kvm: Kvm) -> Asids:
    """All the host's ASIDs."""
    return Asids(kvm)


def give_time(items: list[pytest.Item]) -> None:
    """Let tests that take all ASIDs, twice, have time by their number."""
    sweeps = [item for item in items if {"asids", "all_asids"} & set(getattr(item, "fixturenames", ()))]
    if not sweeps:
        return
    try:
        with Kvm() as kvm:
            cpuid = sev_cpuid(kvm)
    except (MissingError, KvmError):
        return
    seconds = min(REST + 2 * EACH * (cpuid.guests if cpuid else 0), MOST)
    for item in sweeps:
        if seconds > float(item.config.getini("timeout") or seconds):
            item.add_marker(pytest.mark.timeout(seconds))
