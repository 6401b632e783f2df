# SPDX-License-Identifier: Apache-2.0
"""State of Hyper-V's interface: VP index and assist page, and all of it saved and taken into a new VM."""

from __future__ import annotations

import pytest

from kvmpy import KVM_CAP_MAX_VCPUS, PAGE_SIZE, Agent, Fault, Gpa, GuestVm, Msr, Vector
from kvmpy.x86.hyperv import HvBits, HvMessage, HvSint, HvStimer

from .conftest import MakeHyperV

pytestmark = [
    pytest.mark.requires("KVM_CAP_HYPERV_SYNIC2", "KVM_CAP_HYPERV_VP_INDEX", "KVM_CAP_SYS_HYPERV_CPUID"),
    pytest.mark.protections("none", "cbit"),
]

ASSIST, INDEX = Msr.HV_X64_MSR_VP_ASSIST_PAGE, Msr.HV_X64_MSR_VP_INDEX
VECTOR = 0x61


def test_vp_index(make_hyperv: MakeHyperV) -> None:
    """The VP index is the vCPU's place unless the host sets it: below the limit, and as 32 bits.

    Documentation/virt/kvm/api.rst, 8.12 KVM_CAP_HYPERV_VP_INDEX.
    """
    vm = make_hyperv(vcpus=3)
    agents = [Agent(vcpu) for vcpu in vm.vcpus]
    assert [agent.rdmsr(INDEX) for agent in agents] == [0, 1, 2]
    limit = vm.check_extension(KVM_CAP_MAX_VCPUS)
    msrs = vm.vcpus[1].msrs
    assert [msrs.takes(INDEX, value) for value in (limit, (1 << 32) - 1)] == [False, False]
    assert agents[1].rdmsr(INDEX) == 1
    assert [msrs.takes(INDEX, value) for value in (limit - 1, 1, 5)] == [True] * 3
    assert [agent.rdmsr(INDEX) for agent in agents] == [0, 5, 2]


def test_assist_page(make_hyperv: MakeHyperV) -> None:
    """Enabling the assist page clears its first word alone; disabling it leaves the page.

    TLFS, virtual processors: the VP assist page; what else is in it outlives a migration.
    """
    vm = make_hyperv()
    page = vm.alloc(PAGE_SIZE, private=False)
    gpa = int(vm.gva_to_gpa(page))
    vm.write(page, b"\xaa" * PAGE_SIZE)
    agent = Agent(vm.vcpus[0])
    cleared = bytes(4) + b"\xaa" * (PAGE_SIZE - 4)
    assert agent.wrmsr(ASSIST, gpa) is None
    assert (agent.rdmsr(ASSIST), vm.read(page, PAGE_SIZE)) == (gpa, b"\xaa" * PAGE_SIZE)
    assert agent.wrmsr(ASSIST, gpa | 1) is None
    assert (agent.rdmsr(ASSIST), vm.read(page, PAGE_SIZE)) == (gpa | 1, cleared)
    for nowhere in (1 << 38 | 1, (1 << 52) - PAGE_SIZE | 1):
        assert agent.wrmsr(ASSIST, nowhere) == Fault(Vector.GP, 0)
        assert agent.rdmsr(ASSIST) == gpa | 1
    assert agent.wrmsr(ASSIST, 0) is None
    assert (agent.rdmsr(ASSIST), vm.read(page, PAGE_SIZE)) == (0, cleared)


def with_pages(make_hyperv: MakeHyperV) -> tuple[GuestVm, list[int], Agent]:
    """Return a VM with four shared pages, their addresses, and its agent, which has started."""
    vm = make_hyperv(synic=True)
    pages = [vm.alloc(PAGE_SIZE, private=False) for _ in range(4)]
    agent = Agent(vm.vcpus[0])
    agent.start()
    return vm, [int(vm.gva_to_gpa(page)) for page in pages], agent


@pytest.mark.usefixtures("open_registers")
def test_all_of_it_moves(make_hyperv: MakeHyperV) -> None:
    """Every register of the interface that was saved is in a new VM what it was, and a timer fires there.

    api.rst, 4.18 KVM_GET_MSRS and 4.3 KVM_GET_MSR_INDEX_LIST: what of a vCPU must be saved.
    """
    old, pages, agent = with_pages(make_hyperv)
    host: dict[int, int] = {
        Msr.HV_X64_MSR_VP_INDEX: 3,
        Msr.HV_X64_MSR_SCONTROL: 1,
        Msr.HV_X64_MSR_SIEFP: pages[0] | 1,
        Msr.HV_X64_MSR_SIMP: pages[1] | 1,
    }
    old.vcpus[0].msrs.set_many(host)
    guest: dict[int, int] = {
        Msr.HV_X64_MSR_GUEST_OS_ID: 0x8100_0001,
        Msr.HV_X64_MSR_HYPERCALL: pages[2] | 1,
        Msr.HV_X64_MSR_VP_ASSIST_PAGE: pages[3] | 1,
        Msr.HV_X64_MSR_REENLIGHTENMENT_CONTROL: 1 << 16 | 0xEE,
        Msr.HV_X64_MSR_TSC_EMULATION_CONTROL: 1,
        Msr.HV_X64_MSR_TSC_INVARIANT_CONTROL: int(HvBits.HV_EXPOSE_INVARIANT_TSC),
    }
    guest |= {Msr.HV_X64_MSR_CRASH_P0 + n: 100 + n for n in range(5)}
    guest |= {Msr.HV_X64_MSR_SINT0 + n: 0x40 + n | int(HvSint.HV_SYNIC_SINT_AUTO_EOI) for n in range(16)}
    guest[Msr.HV_X64_MSR_SINT0 + 3] = VECTOR
    on_sint = 3 << 16
    count = agent.rdmsr(Msr.HV_X64_MSR_TIME_REF_COUNT)
    assert isinstance(count, int)
    # It must not be over before it is saved: two seconds ahead.
    count += 20_000_000
    guest[Msr.HV_X64_MSR_STIMER0_COUNT] = count
    guest[Msr.HV_X64_MSR_STIMER0_CONFIG] = int(HvStimer.HV_STIMER_ENABLE) | on_sint
    periodic = Msr.HV_X64_MSR_STIMER0_COUNT + 2
    guest[periodic] = 600_000_000
    guest[periodic - 1] = int(HvStimer.HV_STIMER_ENABLE | HvStimer.HV_STIMER_PERIODIC) | on_sint
    for index, value in guest.items():
        assert agent.wrmsr(index, value) is None, hex(index)
    expected = {int(index): value for index, value in (host | guest).items()}
    assert {index: agent.rdmsr(index) for index in expected} == expected

    state, clock = old.vcpus[0].save(), old.clock.get()
    old.close()
    missing = expected.keys() - dict(state.msrs).keys()
    assert {hex(index) for index in missing} == set()
    new, same_pages, agent = with_pages(make_hyperv)
    assert same_pages == pages
    clock.flags = 0
    new.clock.set(clock)
    new.vcpus[0].restore(state)
    # By now the first one may be over.
    del expected[Msr.HV_X64_MSR_STIMER0_CONFIG]
    assert {index: agent.rdmsr(index) for index in expected} == expected
    agent.call("hv_install", VECTOR, 1)
    agent.begin_call("hv_await", VECTOR, 1)
    assert agent.value() == 1
    slot = new.memory.read(Gpa(pages[1]), PAGE_SIZE)
    message = slot[3 * HvMessage.HV_MESSAGE_SIZE :]
    assert int.from_bytes(message[24:32], "little") == count
    delivered = int.from_bytes(message[32:40], "little")
    assert count <= delivered < count + 200_000_000
