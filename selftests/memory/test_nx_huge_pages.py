# SPDX-License-Identifier: Apache-2.0
"""Large pages that are not executable: KVM splits those that the guest executes from, and joins them later.

Documentation/admin-guide/hw-vuln/multihit.rst; Documentation/virt/kvm/api.rst 7.38,
KVM_CAP_VM_DISABLE_NX_HUGE_PAGES.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvmpy import (
    AGENT,
    KVM_CAP_VM_DISABLE_NX_HUGE_PAGES,
    PAGE_SIZE,
    SIZE_2M,
    Agent,
    Anonymous,
    Gpa,
    GuestVm,
    Gva,
    Kvm,
    MakeVm,
    MissingError,
    Vm,
    refused,
)
from selftests.conftest import wait_until

pytestmark = pytest.mark.requires("KVM_CAP_VM_DISABLE_NX_HUGE_PAGES")
PARAMETERS = Path("/sys/module/kvm/parameters")
CAP = KVM_CAP_VM_DISABLE_NX_HUGE_PAGES
REGION, REGION_GVA = Gpa(0x1000_0000), Gva(0x6000_0000)
HUGE = SIZE_2M // PAGE_SIZE
BLOCKS, RET = 3, 0xC3
WAIT = 30.0
RECOVERY = {"nx_huge_pages_recovery_ratio": "1", "nx_huge_pages_recovery_period_ms": "100"}


class Region:
    """Memory in pages of 2 MiB, with a RET at the start of each page, and an agent in ring 3."""

    def __init__(self, vm: GuestVm) -> None:
        self.vm = vm
        slot = vm.add_memory(REGION, BLOCKS * SIZE_2M, backing=Anonymous("thp"), private=False)
        vm.map(REGION_GVA, REGION, BLOCKS * SIZE_2M, page_size=SIZE_2M, user=True, nx=False, private=False)
        memory = slot.mapping.view(0, BLOCKS * SIZE_2M)
        for at in range(0, BLOCKS * SIZE_2M, PAGE_SIZE):
            memory[at] = RET
        self.agent = Agent(vm.vcpus[0], ring=3)
        self.agent.start()
        self.before = self.counts()

    def counts(self) -> tuple[int, int]:
        """Return how many pages of 2 MiB are mapped, and how many were split."""
        stats = self.vm.stats.get()
        return stats["pages_2m"].value, stats["nx_lpage_splits"].value

    def change(self) -> tuple[int, ...]:
        """Return how the counts have changed since the start."""
        return tuple(now - before for now, before in zip(self.counts(), self.before, strict=True))

    def read(self, page: int) -> None:
        """Let the guest read a page."""
        assert self.agent.read(REGION_GVA + page * PAGE_SIZE, 1) == RET

    def run(self, page: int) -> None:
        """Let the guest execute a page."""
        assert self.agent.call(REGION_GVA + page * PAGE_SIZE) == 0


@pytest.fixture
def region(make_vm: MakeVm) -> Region:
    """A region, of whose first 2 MiB one page was read; MissingError unless that is mapped as 2 MiB."""
    new = Region(make_vm(AGENT))
    new.read(1)
    if new.change() != (1, 0):
        raise MissingError(
            "transparent huge pages for guest memory",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, and free memory in pieces of 2 MiB",
        )
    new.before = new.counts()
    return new


@pytest.fixture
def recovery() -> Iterator[None]:
    """Let KVM join all split pages ten times a second."""
    with ExitStack() as stack:
        for name, value in (
            ("nx_huge_pages_recovery_ratio", "1"),
            ("nx_huge_pages_recovery_period_ms", "100"),
        ):
            file = PARAMETERS / name
            stack.callback(file.write_text, file.read_text())
            file.write_text(value)
        yield


@pytest.mark.protections("none")
@pytest.mark.requires("param:kvm.nx_huge_pages=force")
def test_execution_splits(region: Region) -> None:
    """Reads map 2 MiB, an execution splits that; where nothing is mapped it maps 4 KiB. Others stay whole.

    What is split already is mapped as 512 pages, or page by page as it is used: KVM's MMUs differ.
    """
    region.read(HUGE)
    assert region.change() == (1, 0)
    region.run(3)
    assert region.change() == (0, 1)
    for access, page in (
        (region.run, 3),
        (region.read, 3),
        (region.read, 4),
        (region.run, 5),
        (region.run, 1),
    ):
        access(page)
        assert region.change() == (0, 1)
    region.run(2 * HUGE + 7)
    assert region.change() == (0, 2)
    region.read(2 * HUGE)
    region.read(HUGE + 1)
    assert region.change() == (0, 2)


@pytest.mark.protections("none")
@pytest.mark.requires("param:kvm.nx_huge_pages=force")
@pytest.mark.requires("root")
def test_they_are_joined(region: Region, recovery: None) -> None:
    """After a while split pages are zapped: a read maps 2 MiB again, and an execution splits it anew."""
    region.run(3)
    wait_until(lambda: region.change()[1] == 0, "the page is still split", seconds=WAIT)
    region.read(4)
    assert region.change() == (0, 0)
    region.run(4)
    assert region.change() == (-1, 1)


@pytest.mark.protections("none")
@pytest.mark.requires("param:kvm.nx_huge_pages=force")
@pytest.mark.requires("root")
def test_switched_off(make_vm: MakeVm) -> None:
    """In a VM that has it switched off, large pages are executable; another VM's are not."""
    free = Region(make_vm(AGENT, before_vcpus=lambda vm: vm.enable_cap(CAP)))
    other = Region(make_vm(AGENT))
    for region, large_and_split in ((free, (1, 0)), (other, (0, 1))):
        region.read(1)
        region.run(3)
        assert region.change() == large_and_split


@pytest.mark.requires("root")
def test_refusals(vm: Vm) -> None:
    """EINVAL with an argument, and once there is a vCPU; it may be switched off twice before.

    api.rst 7.38.
    """
    with refused(errno.EINVAL):
        vm.enable_cap(CAP, 1)
    vm.enable_cap(CAP)
    vm.enable_cap(CAP)
    vm.create_vcpu(0)
    with refused(errno.EINVAL):
        vm.enable_cap(CAP)


@pytest.mark.requires("root")
def test_the_right_to_reboot(kvm: Kvm) -> None:
    """Who may not reboot the machine gets EPERM, also for an argument that is wrong (api.rst 7.38)."""
    assert kvm.vcpu_mmap_size
    child = os.fork()
    if child == 0:
        answers = []
        try:
            with Kvm() as own, own.create_vm() as vm:
                os.setuid(65534)
                for argument in (0, 1):
                    try:
                        vm.enable_cap(CAP, argument)
                        answers.append(0)
                    except OSError as error:
                        answers.append(error.errno or -1)
        finally:
            os._exit(0 if answers == [errno.EPERM, errno.EPERM] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
