# SPDX-License-Identifier: Apache-2.0
"""What selftests of several areas share."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

import pytest

from kvmpy import AGENT, PAGE_SIZE, Agent, Cpuid, Gpa, GuestVcpu, GuestVm, Gva, Kvm, MakeVm, MmioExit


class Accessor:
    """A VM whose guest reads and writes memory as it is told, one access at a time.

    The first access launches it: add memory and :meth:`map` before.
    """

    def __init__(self, vm: GuestVm, ring: int) -> None:
        self.vm = vm
        self.vcpu = vm.vcpus[0]
        self.ring = ring
        self.agent = Agent(self.vcpu, ring=ring)

    def order(self, gva: Gva, size: int, value: int | None = None) -> None:
        """Tell the guest its next access; it does it when the vCPU runs."""
        if value is None:
            self.agent.begin_read(gva, size)
        else:
            self.agent.begin_write(gva, value, size)

    def read(self, gva: Gva, size: int = 8) -> int:
        """Let the guest read memory and return what it saw."""
        self.order(gva, size)
        return self.result()

    def write(self, gva: Gva, value: int, size: int = 8) -> None:
        """Let the guest write memory."""
        self.order(gva, size, value)
        self.result()

    def exit_of(self, gva: Gva, size: int = 8, value: int | None = None) -> MmioExit:
        """Let the guest read (or write *value*) where nothing is, and return the exit."""
        self.order(gva, size, value)
        return self.vcpu.expect(MmioExit)

    def result(self) -> int:
        """Return the result of the access under way."""
        return self.agent.value()

    def map(self, gva: Gva, gpa: Gpa, size: int) -> None:
        """Map guest-physical addresses as shared memory, for both rings."""
        self.vm.map(gva, gpa, size, page_size=PAGE_SIZE, user=True, nx=True, private=False)


# A test under load takes its time: with shared memory KVM does under cbit what it does under none.
UNDER_LOAD = pytest.mark.protections("none", "sw-protected", "sev", "sev-es", "snp")


def turns(seconds: float) -> Iterator[int]:
    """Count turns from 0 until *seconds* have passed; there is one at least."""
    end, turn = time.monotonic() + seconds, 0
    while not turn or time.monotonic() < end:
        yield turn
        turn += 1


class Beside:
    """Calls *action* with the number of the call, again and again, in a thread, until the with block ends.

    What it raised is raised by the end of the block; TimeoutError if a call has not returned by *limit*
    seconds later.
    """

    def __init__(self, action: Callable[[int], object], limit: float = 20.0) -> None:
        self.action = action
        self.limit = limit
        self.count = 0
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def _repeat(self) -> None:
        try:
            while not self._stop.is_set():
                self.action(self.count)
                self.count += 1
        except BaseException as error:  # noqa: BLE001 - raised again by __exit__()
            self._error = error

    def __enter__(self) -> Beside:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(self.limit)
        if error is None and self._thread.is_alive():
            raise TimeoutError(f"what goes on beside the test did not return within {self.limit} s")
        if error is None and self._error is not None:
            raise self._error


def hypercall_instruction(kvm: Kvm) -> bytes:
    """Return VMMCALL or VMCALL, whichever this processor has."""
    amd = Cpuid.from_struct(kvm.supported_cpuid).is_amd_compatible
    return b"\x0f\x01\xd9" if amd else b"\x0f\x01\xc1"


def wait_until(condition: Callable[[], bool], what: str, *, seconds: float = 10.0) -> None:
    """Wait for something that another thread, or the kernel, brings about; *what* is told if it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        os.sched_yield()


def said(guest: GuestVm | GuestVcpu) -> tuple[str | int, ...]:
    """Run a vCPU (of a VM: the first) to its next SYNC; return its arguments, the first one as a letter."""
    vcpu = guest if isinstance(guest, GuestVcpu) else guest.vcpus[0]
    letter, *numbers = vcpu.sync().args
    return (chr(letter), *numbers)


def _skip_without(protection: str, trait: str, kept: str) -> None:
    from kvmpy.coco import ladder

    if not getattr(ladder.get(protection).traits, trait):
        pytest.skip(f"protection {protection} keeps {kept} from the host")


@pytest.fixture
def open_registers(protection: str) -> None:
    """Skip under protections that keep the vCPUs' registers from the host after launch."""
    _skip_without(protection, "can_read_registers", "vCPU registers")


@pytest.fixture(params=[0, 3], ids=["ring0", "ring3"])
def ring(request: pytest.FixtureRequest) -> int:
    """The ring that the guest's access comes from: hosts that emulate ring 0 run ring 3 on the CPU."""
    return int(request.param)


@pytest.fixture
def accessor(make_vm: MakeVm, ring: int) -> Accessor:
    """A guest with 64 MiB of memory at address 0 that does one access at a time."""
    return Accessor(make_vm(AGENT), ring)


@pytest.fixture
def open_tables(protection: str) -> None:
    """Skip under protections that keep code, page and descriptor tables from the host after launch."""
    _skip_without(protection, "host_sees_tables", "code and page tables")


Move = Callable[[GuestVm], GuestVm]


def _copy_memory(source: GuestVm, target: GuestVm) -> None:
    for old, new in zip(source.memory.segments(), target.memory.segments(), strict=True):
        target.memory.shared_view(new.gpa, new.size)[:] = source.memory.shared_view(old.gpa, old.size)
        if new.private is not None and new.private is not new.shared:
            target.memory.private_view(new.gpa, new.size)[:] = source.memory.private_view(old.gpa, old.size)


@pytest.fixture
def move(make_vm: MakeVm) -> Move:
    """Return a function that brings a guest into a new VM, closes the old one, and returns the new one.

    The vCPUs must have stopped. Tests are skipped where the host may not see what it would copy.
    """

    def moved(source: GuestVm) -> GuestVm:
        traits = source.protection.traits
        if not (traits.can_read_registers and traits.host_sees_private):
            pytest.skip("needs a host that reads registers and private memory; this protection hides them")
        target = make_vm(source.program, vcpu_ids=[vcpu.vcpu_id for vcpu in source.vcpus])
        for old, new in zip(source.vcpus, target.vcpus, strict=True):
            new.entry, new.args = old.entry, old.args
        target.launch()
        # What goes over the wire is a value, not an object of this process.
        snapshots = pickle.dumps([vcpu.save() for vcpu in source.vcpus])
        clock = source.clock.get()
        _copy_memory(source, target)
        source.close()
        clock.flags = 0
        target.clock.set(clock)
        for vcpu, snapshot in zip(target.vcpus, pickle.loads(snapshots), strict=True):  # noqa: S301
            vcpu.restore(snapshot)
        return target

    return moved
