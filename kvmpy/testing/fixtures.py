# SPDX-License-Identifier: Apache-2.0
"""The fixtures: ``kvm``, ``vm``, ``make_vm``, ``protection``, ``deadline``, ``seed`` and ``rng``."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, SupportsInt

import pytest

from kvmpy.testing.gate import refuse
from kvmpy.testing.options import SETTINGS
from kvmpy.testing.protections import FIXTURE
from kvmpy.testing.requirements import Requirements
from kvmpy.testing.verdicts import suite_id

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kvmpy.coco.kvm import Kvm
    from kvmpy.core.vm import Vm
    from kvmpy.guest.options import VmOptions
    from kvmpy.guest.program import GuestProgram
    from kvmpy.guest.protection import Traits
    from kvmpy.guest.vm import GuestVm

REQUIREMENTS = pytest.StashKey[Requirements]()
VMS = pytest.StashKey["list[GuestVm]"]()


class MakeVm:
    """What the fixture ``make_vm`` gives: call it with a guest program to get a VM."""

    def __init__(self, node: pytest.Item, kvm: Kvm, protection: str, deadline: float, strict: bool) -> None:
        self.kvm = kvm
        self.protection = protection
        self._deadline = deadline
        self._strict = strict
        self.made: list[GuestVm] = []
        node.stash[VMS] = self.made

    def __call__(self, program: GuestProgram | str, **options: Unpack[VmOptions]) -> GuestVm:
        """Create a VM with *program* (or C source) in it; closed when the test ends.

        The keywords are those of :class:`~kvmpy.guest.options.VmOptions`; protection, deadline and
        strict_private default to the test's own.
        """
        from kvmpy.guest.program import GuestProgram

        guest = GuestProgram.from_c(program) if isinstance(program, str) else program
        options["protection"] = options.get("protection") or self.protection
        options.setdefault("deadline", self._deadline)
        options.setdefault("strict_private", self._strict)
        vm = self.kvm.create_vm(guest, **options)
        self.made.append(vm)
        return vm

    def start(
        self,
        program: GuestProgram | str,
        entry: str | None = None,
        *args: SupportsInt,
        **options: Unpack[VmOptions],
    ) -> GuestVm:
        """Create a VM and launch it: every vCPU starts in *entry* with *args* (default: ``guest_main()``).

        The keywords are those of ``make_vm()``.
        """
        vm = self(program, **options)
        if entry is not None:
            for vcpu in vm.vcpus:
                vcpu.set_entry(entry, *map(int, args))
        vm.launch()
        return vm

    def run(
        self,
        program: GuestProgram | str,
        entry: str | None = None,
        *args: SupportsInt,
        **options: Unpack[VmOptions],
    ) -> GuestVm:
        """Create and launch a VM as :meth:`start` does, and run every vCPU until DONE."""
        vm = self.start(program, entry, *args, **options)
        if len(vm.vcpus) == 1:
            vm.vcpus[0].run_to_done()
        else:
            vm.run_all()
        return vm

    @property
    def traits(self) -> Traits:
        """What the test's protection can and cannot do."""
        from kvmpy.coco import ladder

        return ladder.get(self.protection).traits

    def close(self) -> None:
        """Close every VM, the youngest first; vCPUs that a failed test left running are stopped."""
        while self.made:
            vm = self.made.pop()
            if not vm.closed:
                vm.stop()
            vm.close()


@pytest.fixture
def kvm(request: pytest.FixtureRequest) -> Iterator[Kvm]:
    """An open ``kvmpy.Kvm``; without a usable KVM the test is skipped with the reason."""
    missing = request.config.stash[REQUIREMENTS].missing(["kvm"])
    if missing:
        refuse(request.node, missing)
    from kvmpy.coco.kvm import Kvm

    with Kvm() as device:
        yield device


@pytest.fixture
def vm(kvm: Kvm) -> Iterator[Vm]:
    """A bare VM of the default type, with no memory and no vCPU."""
    with kvm.create_vm() as bare:
        yield bare


@pytest.fixture(name=FIXTURE)
def _protection(request: pytest.FixtureRequest) -> str:
    """The name of the protection that the test runs under: ``none`` without a protections marker."""
    name = str(getattr(request, "param", "none"))
    missing = request.config.stash[REQUIREMENTS].missing([f"protection:{name}"])
    if missing:
        refuse(request.node, missing)
    return name


@pytest.fixture
def deadline(request: pytest.FixtureRequest) -> float:
    """How long a guest of this test may run without a wanted exit, in seconds."""
    marker = request.node.get_closest_marker("deadline")
    if marker is not None:
        return float(marker.args[0])
    return request.config.stash[SETTINGS].deadline


@pytest.fixture
def make_vm(request: pytest.FixtureRequest, kvm: Kvm, protection: str, deadline: float) -> Iterator[MakeVm]:
    """Make VMs with guest programs, under the test's protection; all are closed when the test ends."""
    strict = request.config.stash[SETTINGS].strict_private
    factory = MakeVm(request.node, kvm, protection, deadline, strict)
    try:
        yield factory
    finally:
        factory.close()


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """This test's own seed, from the session's seed and the test's name: one test alone can be repeated."""
    session = request.config.stash[SETTINGS].seed
    return random.Random(f"{session}:{suite_id(request.node.nodeid)}").getrandbits(64)


@pytest.fixture
def rng(seed: int) -> random.Random:
    """A random generator that starts from this test's seed."""
    return random.Random(seed)
