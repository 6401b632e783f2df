# SPDX-License-Identifier: Apache-2.0
"""Bare VMs of the SEV types: no guest program, a little memory, launched step by step."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from kvmpy import (
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    PAGE_SIZE,
    Gpa,
    Kvm,
    SevPolicy,
    SnpPolicy,
    Struct,
    Vm,
    VmType,
)
from kvmpy.coco.launch_state import LaunchState
from kvmpy.coco.sev_launch import SevInitialised, SevLaunching
from kvmpy.coco.snp_launch import SnpInitialised, SnpLaunching
from kvmpy.core.sev_errors import SevResult
from kvmpy.uapi import ffi
from selftests.sev.asids import all_asids, asids, give_time
from selftests.sev.transport import Argument

__all__ = ["all_asids", "asids"]

KINDS = tuple(
    pytest.param(kind, marks=pytest.mark.requires(f"protection:{kind}"), id=kind)
    for kind in ("sev", "sev-es", "snp")
)
IN_PLACE = KINDS[:2]
TYPES = {"sev": VmType.KVM_X86_SEV_VM, "sev-es": VmType.KVM_X86_SEV_ES_VM, "snp": VmType.KVM_X86_SNP_VM}
MEMORY = Gpa(0x10_0000)
PAGES = 16


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests that take all ASIDs time for them."""
    give_time(items)


class Answer(tuple[int, int]):  # noqa: SLOT001 - a tuple has no slots of its own
    """Errno and firmware status of a command; a failed comparison names the command and both."""

    command: str

    @classmethod
    def of(cls, command: str | int, result: SevResult) -> Answer:
        """Make one of what a command returned."""
        answer = cls((result.errno, result.firmware))
        answer.command = str(command)
        return answer

    def __repr__(self) -> str:
        number, status = self
        told = f"({number}, {status}), {errno.errorcode.get(number, number)}" if number else "(0, 0), taken"
        return f"<{self.command}: {told}>"


@dataclass
class Bare:
    """A VM of one SEV type with PAGES pages at MEMORY; *state* is where its launch stands."""

    vm: Vm
    kind: str
    state: LaunchState | None = None

    def raw(self, command: str | int, arg: Struct | Argument | int | None = None) -> tuple[int, int]:
        """Issue a command; return (errno, firmware status)."""
        # lifetime: what an argument of the owner's points to lives as long as the argument.
        plain = arg.arg if isinstance(arg, Argument) else arg
        result: SevResult = self.vm.sev.command_raw(command, plain)
        return Answer.of(command, result)

    @property
    def hva(self) -> int:
        """Where the host has MEMORY."""
        return self.vm.memory.hva(MEMORY, private=False)


@contextmanager
def read_only(content: bytes) -> Iterator[int]:
    """Yield the address of a mapping of *content*, whole pages, that this process can only read."""
    fd = os.memfd_create("read-only", os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
        with mmap.mmap(fd, len(content), mmap.MAP_SHARED, mmap.PROT_READ) as area:
            place = ffi.from_buffer(area)
            try:
                yield int(ffi.cast("uintptr_t", place))
            finally:
                ffi.release(place)
    finally:
        os.close(fd)


@dataclass
class BareMaker:
    """What the fixture ``bare`` gives."""

    kvm: Kvm
    stack: ExitStack

    def __call__(
        self, kind: str, *, init: bool = True, vcpus: int = 0, memory: bool = True, legacy: bool = False
    ) -> Bare:
        """Make a VM of *kind*, after INIT2 unless *init* is False; *legacy*: of the default type, after INIT
        or ES_INIT.
        """
        vm = self.stack.enter_context(self.kvm.create_vm(0 if legacy else int(TYPES[kind])))
        state: LaunchState | None = None
        if init and kind == "snp":
            state = SnpInitialised.init2(vm)
        elif init:
            state = (SevInitialised.legacy_init if legacy else SevInitialised.init2)(vm, es=kind == "sev-es")
        if memory:
            gmem = vm.create_guest_memfd(PAGES * PAGE_SIZE) if kind == "snp" else None
            vm.add_slot(MEMORY, PAGES * PAGE_SIZE, gmem=gmem)
        if vcpus:
            vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
            for _ in range(vcpus):
                vm.create_vcpu().cpuid.set(self.kvm.supported_cpuid)
        return Bare(vm, kind, state)


@pytest.fixture
def bare(kvm: Kvm) -> Iterator[BareMaker]:
    """Make bare VMs, closed when the test ends."""
    with ExitStack() as stack:
        yield BareMaker(kvm, stack)


def start_snp(guest: Bare, policy: SnpPolicy | int | None = None) -> SnpLaunching:
    """Go on to SNP_LAUNCH_START, with all pages private."""
    state = guest.state
    assert isinstance(state, SnpInitialised)
    launching = state.start(SnpPolicy() if policy is None else policy)
    guest.vm.set_memory_attributes(int(MEMORY), PAGES * PAGE_SIZE, KVM_MEMORY_ATTRIBUTE_PRIVATE)
    guest.state = launching
    return launching


def start_sev(guest_vm: Bare, policy: SevPolicy | int | None = None) -> SevLaunching:
    """Go on to LAUNCH_START, with the memory registered."""
    state = guest_vm.state
    assert isinstance(state, SevInitialised)
    launching = state.start(SevPolicy(es=state.es) if policy is None else policy)
    guest_vm.vm.sev.reg_region(guest_vm.hva, PAGES * PAGE_SIZE)
    guest_vm.state = launching
    return launching
