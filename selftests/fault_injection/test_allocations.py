# SPDX-License-Identifier: Apache-2.0
"""A kernel without memory: each allocation of an ioctl fails once, and nothing is left of the attempt.

Documentation/fault-injection/fault-injection.rst, fail-nth.  `kvmpy lab run --fail-allocations` asks the same
of any other test.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmpy import (
    AGENT,
    KVM_MEM_LOG_DIRTY_PAGES,
    PAGE_SIZE,
    SIZE_2M,
    Agent,
    Anonymous,
    EventFd,
    Kvm,
    MakeVm,
    Msi,
    MsiRoute,
    Msr,
    MsrFilter,
    SevCmd,
    Vm,
    kvm_sev_cmd,
)
from kvmpy.testing.fault_injection import FaultInjection, Spare, of_secure_processor
from kvmpy.uapi.ioctls import Ioctl
from kvmpy.uapi.structs import Struct

pytestmark = pytest.mark.requires("fault-injection")

LAUNCH = [
    SevCmd.KVM_SEV_INIT2,
    SevCmd.KVM_SEV_SNP_LAUNCH_START,
    SevCmd.KVM_SEV_SNP_LAUNCH_UPDATE,
    SevCmd.KVM_SEV_SNP_LAUNCH_FINISH,
]
# With Hyper-V's: how long the vCPU has run, and the reference time.
CLOCKS = {Msr.MSR_IA32_TSC, 0x4000_0010, 0x4000_0020}
KVM_DEBUGFS = Path("/sys/kernel/debug/kvm")
FIRST = 0x5EED_0000

# Writes each page of an area in both directions, and looks at all of it in between.
GUEST = """
#include <kvmpy/guest.h>

#define FIRST	0x5eed0000
#define STEP	512

void guest_main(void)
{
	GUEST_DONE();
}

void work(u64 *area, u64 pages, u64 vcpu)
{
	u64 page;

	for (page = 0; page < pages; page++)
		area[page * STEP] = FIRST + vcpu + page;
	for (page = pages; page-- > 0;)
		GUEST_ASSERT_EQ(area[page * STEP], FIRST + vcpu + page);
	GUEST_SYNC(page);
	for (page = 0; page < pages; page++)
		GUEST_ASSERT_EQ(area[page * STEP], FIRST + vcpu + page);
	GUEST_DONE();
}
"""

PAGES = SIZE_2M // PAGE_SIZE
CONVERTS = """
#include <kvmpy/guest.h>

static void set_private(u8 *area, u64 gpa, u64 size, u64 ghcb, bool private)
{
	if (ghcb)
		GUEST_ASSERT_EQ(guest_set_private(area, size, private), 0);
	else
		GUEST_ASSERT_EQ(guest_map_gpa_range(gpa, size, private), 0);
}

static void fill(u8 *area, u64 size, u64 tag)
{
	for (u64 at = 0; at < size; at += 4096)
		*(volatile u64 *)(area + at) = tag + at;
	for (u64 at = 0; at < size; at += 4096)
		GUEST_ASSERT_EQ(*(volatile u64 *)(area + at), tag + at);
}

/* All of the area, then pieces of it that lie in its middle. */
void convert(u8 *area, u64 gpa, u64 size, u64 ghcb)
{
	static const struct { u64 at, size; } parts[] = { { 0, 0 }, { 0x5000, 0x1000 }, { 0x9000, 0x14000 } };

	fill(area, size, 0x1000000);
	for (u64 part = 0; part < ARRAY_SIZE(parts); part++) {
		u64 at = parts[part].at, length = parts[part].size ?: size;

		set_private(area + at, gpa + at, length, ghcb, false);
		fill(area + at, length, 0x2000000);
		set_private(area + at, gpa + at, length, ghcb, true);
		fill(area + at, length, 0x3000000);
	}
	GUEST_DONE();
}

void guest_main(void)
{
	GUEST_DONE();
}
"""


def all_but(command: SevCmd) -> Spare:
    """Let no allocations fail but those of one SEV command."""

    def spare(_: Ioctl, arg: Struct | int | None) -> bool:
        return not isinstance(arg, kvm_sev_cmd) or arg.id != command

    return spare


def own_vms() -> list[str]:
    """Return what debugfs has of this process's VMs."""
    return sorted(each.name for each in KVM_DEBUGFS.iterdir() if each.name.startswith(f"{os.getpid()}-"))


def test_a_vm_is_made_and_runs(make_vm: MakeVm) -> None:
    """A VM that was made with every allocation failing once runs two vCPUs over fresh memory, and goes."""
    pages = 3 * SIZE_2M // PAGE_SIZE
    before = own_vms()
    with FaultInjection(spare=of_secure_processor) as faults:
        vm = make_vm(GUEST, vcpus=2, memory=64 << 20)
        areas = [vm.alloc(pages * PAGE_SIZE) for _ in vm.vcpus]
        for vcpu, area in zip(vm.vcpus, areas, strict=True):
            vcpu.set_entry("work", area, pages, vcpu.vcpu_id)
        vm.launch()
        for vcpu in vm.vcpus:
            vcpu.sync()
        for vcpu in vm.vcpus:
            vcpu.run_to_done()
        vm.close()
    assert own_vms() == before
    assert {"KVM_CREATE_VM", "KVM_CREATE_VCPU", "KVM_SET_CPUID2", "KVM_RUN"} <= faults.failed.keys()


@pytest.mark.protections("sw-protected", "snp")
def test_conversions(make_vm: MakeVm) -> None:
    """A guest converts pages there and back, each allocation failing once, and finds what it wrote last.

    Private memory keeps its content beside the shared one's unless it is encrypted: both are written anew.
    """
    with FaultInjection(spare=of_secure_processor) as faults:
        vm = make_vm(CONVERTS)
        area = vm.alloc(PAGES * PAGE_SIZE)
        vcpu = vm.vcpus[0]
        vcpu.set_entry("convert", area, vm.gva_to_gpa(area), PAGES * PAGE_SIZE, make_vm.traits.has_ghcb)
        vm.launch()
        vcpu.run_to_done()
    assert faults.failed["KVM_RUN"]
    # The xarray behind it tries once more.
    assert faults.borne["KVM_SET_MEMORY_ATTRIBUTES"]


@pytest.mark.protections("snp")
@pytest.mark.parametrize("command", LAUNCH, ids=lambda command: command.name.removeprefix("KVM_SEV_SNP_"))
def test_an_snp_launch(make_vm: MakeVm, command: SevCmd) -> None:
    """A step of an SNP launch that had no memory can be taken again, and the guest runs."""
    with FaultInjection(spare=all_but(command)) as faults:
        vm = make_vm.start(GUEST, vcpus=2)
    assert (faults.failed + faults.borne)["KVM_MEMORY_ENCRYPT_OP"]
    for vcpu in vm.vcpus:
        vcpu.run_to_done()


def test_a_saved_vcpu(make_vm: MakeVm) -> None:
    """A vCPU's state that was saved and restored while allocations failed is the one that it had."""
    if not make_vm.traits.can_read_registers:
        pytest.skip("the registers of this protection are the guest's own")
    vm = make_vm(AGENT)
    agent = Agent(vm.vcpus[0])
    registers = {f"r{number}": 0x0123_4567_89AB_CDE0 + number for number in range(8, 16)}
    agent.must(b"\x90", **registers)
    with FaultInjection() as faults:
        state = vm.vcpus[0].save()
        vm.vcpus[0].restore(state)
        again = vm.vcpus[0].save()
    for name in type(state).__dataclass_fields__:
        if name != "msrs":
            assert getattr(state, name) == getattr(again, name), name
    assert {index for index, value in set(state.msrs) ^ set(again.msrs)} <= CLOCKS
    result = agent.must(b"\x90", **registers)
    assert {name: getattr(result, name) for name in registers} == registers
    assert faults.failed or faults.borne


Call = Callable[[Vm], object]


def _irqfds(vm: Vm) -> None:
    with EventFd() as event, EventFd() as resample:
        vm.irq.irqfd(event, 5)
        vm.irq.irqfd(event, 5, deassign=True)
        vm.irq.irqfd(event, 7, resample=resample)
        vm.irq.irqfd(event, 7, deassign=True)


def _ioeventfds(vm: Vm) -> None:
    with EventFd() as event:
        for pio in (False, True):
            vm.io.ioeventfd(event, 0x4000, 4, pio=pio, datamatch=7)
            vm.io.ioeventfd(event, 0x4000, 4, pio=pio, datamatch=7, deassign=True)
        vm.io.ioeventfd(event, 0x4000, 0)
        vm.io.ioeventfd(event, 0x4000, 0, deassign=True)


def _slots(vm: Vm) -> None:
    with Anonymous().map(4 * SIZE_2M) as mapping:
        size, gpa = 2 * SIZE_2M, 1 << 30
        vm.set_user_memory_region(5, gpa, size, mapping.hva)
        vm.set_user_memory_region(6, gpa + size, size, mapping.hva + size, KVM_MEM_LOG_DIRTY_PAGES)
        vm.set_user_memory_region(5, gpa, size, mapping.hva, KVM_MEM_LOG_DIRTY_PAGES)
        vm.set_user_memory_region(5, 4 * gpa, size, mapping.hva, KVM_MEM_LOG_DIRTY_PAGES)
        for slot in (5, 6):
            assert not vm.dirty.get_log(slot, size // PAGE_SIZE)
            vm.set_user_memory_region(slot, 0, 0, 0)


def _filters(vm: Vm) -> None:
    vm.msrs.set_filter(MsrFilter.denying(range(0x10, 0x20)))
    vm.msrs.set_filter(MsrFilter())


def _routes(vm: Vm) -> None:
    vm.irq.set_gsi_routing([MsiRoute(gsi, Msi.to(0, 0x40 + gsi)) for gsi in range(24, 90)])


def _coalesced(vm: Vm) -> None:
    vm.io.register_coalesced_mmio(0x8000, 0x100)
    vm.io.unregister_coalesced_mmio(0x8000, 0x100)


def _vcpus(vm: Vm) -> None:
    for _ in range(3):
        vcpu = vm.create_vcpu()
        vcpu.cpuid.set(vm.kvm.supported_cpuid)
        vcpu.restore(vcpu.save())


CALLS: dict[str, Call] = {
    "irqfd": _irqfds,
    "ioeventfd": _ioeventfds,
    "slots": _slots,
    "msr-filter": _filters,
    "routes": _routes,
    "coalesced": _coalesced,
    "vcpus": _vcpus,
    "statistics": lambda vm: vm.stats.get(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_bare_vm(kvm: Kvm, call: Call) -> None:
    """What KVM makes for a VM it also makes after a failed attempt, and all of it goes with the VM."""
    before = own_vms()
    with FaultInjection():
        with kvm.create_vm() as vm:
            vm.irq.create_chip()
            vm.pit.create2()
            call(vm)
            call(vm)
        with kvm.create_vm() as vm:
            vm.irq.create_split_chip()
    assert own_vms() == before
