# SPDX-License-Identifier: Apache-2.0
"""The fixtures: ``kvm``, ``vm``, ``make_vm``, ``make_load``, ``protection``, ``deadline``, ``load_seconds``,
``seed`` and ``rng``.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsInt

import pytest

from kvmpy.core.address import PAGE_SIZE, Gpa, Gva
from kvmpy.core.errors import MissingError
from kvmpy.testing.gate import refuse
from kvmpy.testing.options import SETTINGS
from kvmpy.testing.protections import FIXTURE
from kvmpy.testing.requirements import Requirements
from kvmpy.testing.verdicts import suite_id

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kvmpy.coco.kvm import Kvm
    from kvmpy.core.backing import Backing, Mapping
    from kvmpy.core.exits import Exit
    from kvmpy.core.slots import MemorySlot
    from kvmpy.core.vm import Vm
    from kvmpy.guest.load import Load
    from kvmpy.guest.options import VmOptions
    from kvmpy.guest.program import GuestProgram
    from kvmpy.guest.protection import Traits
    from kvmpy.guest.vcpu import GuestVcpu
    from kvmpy.guest.vm import GuestVm

REQUIREMENTS = pytest.StashKey[Requirements]()
# Where a load's region lies: above default memory, on a boundary of any page size.
LOAD_GPA = 0x8000_0000
LOAD_GVA = 0x60_0000_0000
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

        if isinstance(program, str):
            # Page tables of legacy mode are for 32-bit programs.
            cflags = ("-m32",) if options.get("levels", 4) < 4 else ()
            guest = GuestProgram.from_c(program, cflags=cflags)
        else:
            guest = program
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


@dataclass
class LoadedRegion:
    """A load and what is below it: ``.vm``, ``.slots``, and the memory that the host maps, ``.mapping``."""

    vm: GuestVm
    slots: list[MemorySlot]
    mapping: Mapping
    load: Load

    @property
    def slot(self) -> MemorySlot:
        """The first slot."""
        return self.slots[0]

    def memory(self) -> memoryview:
        """Return the region's memory itself."""
        return self.mapping.view(0, self.mapping.size)

    def check(self) -> None:
        """Check the region as the host sees it now, also while the vCPUs run; see :meth:`Load.check`."""
        since = self.load.moment()
        with self.memory() as memory:
            copy = bytearray(memory)
        self.load.check(copy, since, self.load.moment())


class MakeLoad:
    """What the fixture ``make_load`` gives: call it for a VM whose vCPUs work on a region of its own."""

    def __init__(self, make_vm: MakeVm, seconds: float, rng: random.Random) -> None:
        self.make_vm = make_vm
        self.seconds = seconds
        self.rng = rng
        self.made: list[Load] = []

    def __call__(
        self,
        *,
        pages: int = 256,
        vcpus: int = 3,
        ring: int = 3,
        readers: int = 0,
        execute: bool = False,
        loss: str = "none",
        pace: int = 0,
        on_exit: Callable[[GuestVcpu, Exit], bool] | None = None,
        slots: Sequence[int] = (),
        guest_memfds: Collection[int] = (),
        backing: Backing | None = None,
        flags: int = 0,
        page_size: int = PAGE_SIZE,
        before_vcpus: Callable[[GuestVm], object] | None = None,
        deadline: float | None = None,
    ) -> LoadedRegion:
        """Create a VM, a region of *pages* of shared memory, and the load on it, not running yet.

        The first keywords are those of :class:`~kvmpy.guest.load.Load`.  The region is one slot, or *slots*
        of so many pages each, with *flags*, over host memory of one *backing*; those whose numbers are in
        *guest_memfds* have a guest_memfd beside it, and no flags, so that KVM can be told to make their pages
        private.  The guest maps the region in pages of *page_size*.  The others are those of ``make_vm()``.
        MissingError for *execute* under a protection whose guests execute private memory alone, and for the
        software AMD-SP's guests.
        """
        traits = self.make_vm.traits
        if traits.emulated and not traits.host_sees_private:
            # Measured: of 186 tests 2 of SEV-ES and SNP ended in a #PF that is not the guest's, or in the
            # kernel's warning, and in a whole suite one of SEV in a shutdown.
            raise MissingError(
                f"vCPUs of protection {self.make_vm.protection} that stand a load",
                "an EPYC: switches between the software AMD-SP's vCPUs and others fail now and then",
            )
        from kvmpy.guest.load import LOAD, Load

        if execute and not traits.emulator_reads_private:
            # AMD64 APM volume 2, 15.34.5: instruction fetches are private whatever the C-bit says.
            raise MissingError(
                f"shared memory that a guest of protection {self.make_vm.protection} may execute",
                "a protection that does not encrypt memory",
            )
        options: VmOptions = {"vcpus": vcpus, "before_vcpus": before_vcpus}
        if deadline is not None:
            options["deadline"] = deadline
        vm = self.make_vm(LOAD, **options)
        size = pages * PAGE_SIZE
        where, gpa = Gva(LOAD_GVA), Gpa(LOAD_GPA)
        mapping, gmem = vm.back(size, backing)
        vm.own(mapping)
        private = vm.create_guest_memfd(size) if guest_memfds else None
        made, offset = [], 0
        for number, part in enumerate(slots or (pages,)):
            at, part_size = int(gpa) + offset, part * PAGE_SIZE
            inside = number in guest_memfds
            file, part_flags = (private, 0) if inside else (gmem, flags)
            made.append(vm.add_alias(at, part_size, mapping, offset=offset, flags=part_flags, gmem=file))
            offset += part_size
        vm.map(where, gpa, size, page_size=page_size, user=True, nx=not execute, private=False)
        load = Load(
            vm,
            where,
            pages,
            ring=ring,
            readers=readers,
            execute=execute,
            loss=loss,
            pace=pace,
            rng=self.rng,
            seconds=self.seconds,
            on_exit=on_exit,
        )
        self.made.append(load)
        return LoadedRegion(vm, made, mapping, load)

    def close(self) -> None:
        """Stop the loads that still run; what they found is no news any more."""
        for load in self.made:
            with contextlib.suppress(Exception):
                load.stop()


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
def load_seconds(request: pytest.FixtureRequest) -> float:
    """How long this test keeps its vCPUs under load (``--load-seconds``)."""
    return request.config.stash[SETTINGS].load_seconds


@pytest.fixture
def make_load(make_vm: MakeVm, load_seconds: float, rng: random.Random) -> Iterator[MakeLoad]:
    """Make VMs whose vCPUs write, read and execute a region all the time; they are stopped at the end."""
    factory = MakeLoad(make_vm, load_seconds, rng)
    yield factory
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
