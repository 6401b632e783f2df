# SPDX-License-Identifier: Apache-2.0
"""Hyper-V's synthetic interrupt controller: sources, their vectors and EOI, its pages, and exits."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    KVM_CAP_HYPERV_SYNIC,
    KVM_CAP_HYPERV_SYNIC2,
    PAGE_SIZE,
    Agent,
    EventFd,
    Fault,
    GuestVm,
    HvSintRoute,
    HypervSynicExit,
    Msr,
    Vector,
    Vm,
    default_routes,
    refused,
)
from kvmpy.x86.hyperv import HvSint

from .conftest import MakeHyperV

pytestmark = pytest.mark.requires("KVM_CAP_HYPERV_SYNIC2", "KVM_CAP_SYS_HYPERV_CPUID", "KVM_CAP_IRQ_ROUTING")
GUEST = pytest.mark.protections("none", "cbit")

SINT0, FIRST_GSI = int(Msr.HV_X64_MSR_SINT0), 32
MASKED, AUTO_EOI = int(HvSint.HV_SYNIC_SINT_MASKED), int(HvSint.HV_SYNIC_SINT_AUTO_EOI)
VECTOR = 0x51
DELIVERED_NOWHERE = -1
PAGES = (Msr.HV_X64_MSR_SIEFP, Msr.HV_X64_MSR_SIMP)


class Synic:
    """A vCPU whose 16 sources can be raised by interrupt lines."""

    def __init__(self, vm: GuestVm) -> None:
        self.vm = vm
        self.agent = Agent(vm.vcpus[0])
        vm.irq.set_gsi_routing([*default_routes(), *(HvSintRoute(FIRST_GSI + n, 0, n) for n in range(16))])
        self.agent.start()

    def install(self, vector: int, *, eoi: bool = True) -> None:
        """Count interrupts of a vector."""
        self.agent.begin_call("hv_install", vector, int(eoi))
        self.agent.value()

    def set(self, sint: int, value: int) -> None:
        """Write a source's register, which must go well."""
        assert self.agent.wrmsr(SINT0 + sint, value) is None

    def do(self, function: str, *arguments: int) -> int:
        """Call a function of the guest."""
        self.agent.begin_call(function, *arguments)
        return self.agent.value()

    def raise_(self, sint: int) -> int:
        """Raise a source; return how many processors got it, or -1."""
        return self.vm.irq.line_status(FIRST_GSI + sint, 1)


@pytest.fixture
def synic(make_hyperv: MakeHyperV) -> Synic:
    """One vCPU with the full irqchip."""
    return Synic(make_hyperv(synic=True, irqchip="full"))


@GUEST
def test_sources(synic: Synic) -> None:
    """Each source is masked at first; unmasked it brings its vector once for each time that it is raised.

    TLFS, synthetic interrupt controller.
    """
    for sint in range(16):
        synic.install(0x40 + sint)
    wrong = {}
    for sint in range(16):
        vector, seen = 0x40 + sint, []
        seen += [synic.agent.rdmsr(SINT0 + sint), synic.raise_(sint), synic.do("hv_counted", vector)]
        synic.set(sint, vector)
        seen += [synic.raise_(sint), synic.do("hv_counted", vector)]
        seen += [synic.raise_(sint), synic.do("hv_counted", vector)]
        synic.set(sint, vector | MASKED)
        seen += [synic.raise_(sint), synic.do("hv_counted", vector)]
        expected = [MASKED, DELIVERED_NOWHERE, 0, 1, 1, 1, 2, DELIVERED_NOWHERE, 2]
        if seen != expected:
            wrong[sint] = (seen, expected)
    assert not wrong
    assert [synic.do("hv_counted", 0x40 + sint) for sint in range(16)] == [2] * 16


@GUEST
def test_one_vector_for_two(synic: Synic) -> None:
    """Two sources may have one vector; masking one leaves the other.

    TLFS, synthetic interrupt controller.
    """
    synic.install(VECTOR)
    synic.set(2, VECTOR)
    synic.set(9, VECTOR)
    counts = []
    for sint in (2, 9):
        synic.raise_(sint)
        counts.append(synic.do("hv_counted", VECTOR))
    synic.set(2, MASKED)
    for sint in (2, 9):
        synic.raise_(sint)
        counts.append(synic.do("hv_counted", VECTOR))
    assert counts == [1, 2, 2, 3]


@GUEST
@pytest.mark.parametrize("auto", [False, True], ids=["eoi", "auto-eoi"])
def test_eoi(synic: Synic, auto: bool) -> None:
    """Until its EOI a source's vector is in service and blocks the next; with auto-EOI it never is.

    TLFS, synthetic interrupt controller: the AutoEOI flag.
    """
    synic.install(VECTOR, eoi=False)
    synic.set(3, VECTOR | (AUTO_EOI if auto else 0))
    synic.raise_(3)
    assert synic.do("hv_counted", VECTOR) == 1
    assert bool(synic.do("hv_in_service", VECTOR)) is not auto
    synic.raise_(3)
    assert synic.do("hv_counted", VECTOR) == (2 if auto else 1)
    if not auto:
        synic.do("hv_eoi")
        assert synic.do("hv_counted", VECTOR) == 2


@GUEST
def test_auto_eoi_taken_back(synic: Synic) -> None:
    """Without auto-EOI a source needs its EOI again, also where another one with it has another vector.

    TLFS, synthetic interrupt controller.
    """
    synic.install(VECTOR, eoi=False)
    synic.install(VECTOR + 1, eoi=False)
    synic.set(3, VECTOR | AUTO_EOI)
    synic.set(4, (VECTOR + 1) | AUTO_EOI)
    synic.set(3, VECTOR)
    for sint in (3, 4):
        synic.raise_(sint)
    in_service = {}
    for vector in (VECTOR + 1, VECTOR):
        synic.do("hv_counted", vector)
        in_service[vector] = bool(synic.do("hv_in_service", vector))
    assert in_service == {VECTOR: True, VECTOR + 1: False}


@GUEST
@pytest.mark.requires("KVM_CAP_IRQFD_RESAMPLE")
@pytest.mark.parametrize("by", ["eoi", "eom"])
def test_ends_are_told(synic: Synic, by: str) -> None:
    """An EOI of the source's vector, or an end of message, tells the irqfd of that source, and no other.

    Documentation/virt/kvm/api.rst, 4.75 KVM_IRQFD: the resample eventfd is signalled at the end of interrupt.
    """
    with EventFd() as fd, EventFd() as told, EventFd() as other, EventFd() as other_told:
        synic.vm.irq.irqfd(fd, FIRST_GSI + 5, resample=told)
        synic.vm.irq.irqfd(other, FIRST_GSI + 6, resample=other_told)
        synic.install(VECTOR, eoi=False)
        synic.set(5, VECTOR)
        fd.signal()
        # The irqfd's work is done when the guest has the interrupt.
        assert synic.do("hv_await", VECTOR, 1) == 1
        assert (told.read(), other_told.read()) == (0, 0)
        if by == "eoi":
            synic.do("hv_eoi")
            assert (told.read(), other_told.read()) == (1, 0)
        else:
            # Of all sources: there is one message page.
            assert synic.agent.wrmsr(Msr.HV_X64_MSR_EOM, 0) is None
            assert (told.read(), other_told.read()) == (1, 1)


@GUEST
@pytest.mark.requires("KVM_CAP_HYPERV_VP_INDEX")
def test_other_vcpus(make_hyperv: MakeHyperV) -> None:
    """A route names a vCPU by its VP index; that one is interrupted, by its own source.

    Documentation/virt/kvm/api.rst, 4.52 KVM_SET_GSI_ROUTING, kvm_irq_routing_hv_sint.
    """
    vm = make_hyperv(synic=True, vcpus=3)
    for vcpu, index in zip(vm.vcpus, (2, 0, 77), strict=True):
        vcpu.msrs.set(Msr.HV_X64_MSR_VP_INDEX, index)
    agents = [Agent(vcpu) for vcpu in vm.vcpus]
    for agent in agents:
        agent.start()
        agent.call("hv_install", VECTOR, 1)
        assert agent.wrmsr(SINT0 + 1, VECTOR) is None
    indices = (0, 77, 2, 1, 4095)
    vm.irq.set_gsi_routing([HvSintRoute(FIRST_GSI + n, index, 1) for n, index in enumerate(indices)])
    results = []
    for n in range(len(indices)):
        status = vm.irq.line_status(FIRST_GSI + n, 1)
        results.append((status, [agent.call("hv_counted", VECTOR) for agent in agents]))
    assert results == [
        (1, [0, 1, 0]), (1, [0, 1, 1]), (1, [1, 1, 1]), (-1, [1, 1, 1]), (-1, [1, 1, 1]),
    ]  # fmt: skip


@GUEST
def test_control_is_told(synic: Synic) -> None:
    """Writes to the SynIC's control and page registers exit with what it holds then, and are read back.

    api.rst, KVM_EXIT_HYPERV_SYNIC.
    """
    pages = [int(synic.vm.gva_to_gpa(synic.vm.alloc(PAGE_SIZE, private=False))) | 1 for _ in range(2)]
    held = {"control": 1, "evt_page": 0, "msg_page": 0}
    names = {
        Msr.HV_X64_MSR_SIEFP: "evt_page",
        Msr.HV_X64_MSR_SIMP: "msg_page",
        Msr.HV_X64_MSR_SCONTROL: "control",
    }
    writes = [*zip(PAGES, pages, strict=True), (Msr.HV_X64_MSR_SCONTROL, 0), (Msr.HV_X64_MSR_SIMP, 0)]
    for msr, value in writes:
        synic.agent.begin_wrmsr(msr, value)
        held[names[msr]] = value
        expected = HypervSynicExit(msr=msr, **held)
        assert synic.vm.vcpus[0].expect(HypervSynicExit) == expected
        synic.agent.end()
        assert synic.agent.rdmsr(msr) == value


@GUEST
@pytest.mark.parametrize("msr", PAGES, ids=["events", "messages"])
@pytest.mark.parametrize("cap", [KVM_CAP_HYPERV_SYNIC, KVM_CAP_HYPERV_SYNIC2], ids=["synic", "synic2"])
def test_pages(make_hyperv: MakeHyperV, cap: int, msr: int) -> None:
    """KVM_CAP_HYPERV_SYNIC clears a page that is enabled, and refuses one that is not there; SYNIC2 does not
    touch it.

    api.rst, 6.77 KVM_CAP_HYPERV_SYNIC2: it does not clear the pages, which belong to user space.
    """
    vm = make_hyperv(synic=cap)
    page = vm.alloc(PAGE_SIZE, private=False)
    vm.write(page, b"\xaa" * PAGE_SIZE)
    gpa = int(vm.gva_to_gpa(page))
    agent, vcpu = Agent(vm.vcpus[0]), vm.vcpus[0]

    def write(value: int) -> None:
        agent.begin_wrmsr(msr, value)
        vcpu.expect(HypervSynicExit)
        agent.end()

    write(gpa)
    assert vm.read(page, PAGE_SIZE) == b"\xaa" * PAGE_SIZE
    write(gpa | 1)
    clears = cap == KVM_CAP_HYPERV_SYNIC
    assert vm.read(page, PAGE_SIZE) == (b"\0" if clears else b"\xaa") * PAGE_SIZE
    nowhere = 1 << 38 | 1
    if clears:
        assert agent.wrmsr(msr, nowhere) == Fault(Vector.GP, 0)
        assert agent.rdmsr(msr) == gpa | 1
    else:
        write(nowhere)
        assert agent.rdmsr(msr) == nowhere


def test_needs_an_irqchip(vm: Vm) -> None:
    """A SynIC needs local APICs in the kernel: EINVAL without, and for an argument.

    api.rst, 6.76 KVM_CAP_HYPERV_SYNIC.
    """
    vcpu = vm.create_vcpu()
    for cap in (KVM_CAP_HYPERV_SYNIC, KVM_CAP_HYPERV_SYNIC2):
        with refused(errno.EINVAL, about=f"capability {cap}"):
            vcpu.enable_cap(cap)


@GUEST
def test_not_active(make_hyperv: MakeHyperV) -> None:
    """Without the capability the guest has no SynIC, and the host can set its registers to 0 alone.

    api.rst, 6.76 KVM_CAP_HYPERV_SYNIC.
    """
    vm = make_hyperv()
    with refused(errno.EINVAL):
        vm.vcpus[0].enable_cap(KVM_CAP_HYPERV_SYNIC2, 1)
    agent = Agent(vm.vcpus[0])
    registers = [
        Msr.HV_X64_MSR_SCONTROL, *PAGES, Msr.HV_X64_MSR_EOM, *(SINT0 + n for n in range(16)),
        *(Msr.HV_X64_MSR_STIMER0_CONFIG + n for n in range(8)),
    ]  # fmt: skip
    writes = {index: agent.wrmsr(index, 0) for index in registers}
    assert writes == dict.fromkeys(registers, Fault(Vector.GP, 0))
    taken = {
        index: (vm.vcpus[0].msrs.takes(index, 0), vm.vcpus[0].msrs.takes(index, 2)) for index in registers
    }
    assert taken == dict.fromkeys(registers, (True, False))
