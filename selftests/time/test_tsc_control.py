# SPDX-License-Identifier: Apache-2.0
"""What user space decides about a guest's TSC: its offset and its frequency."""

from __future__ import annotations

import errno
import time

import pytest

from kvmpy import (
    AGENT,
    KVM_CLOCK_HOST_TSC,
    KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET,
    Agent,
    MakeVm,
    Vm,
    ioctls,
    refused,
)

pytestmark = pytest.mark.requires("KVM_CAP_GET_TSC_KHZ")

OFFSET = (KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET)
WRAP = 1 << 64
ATTRIBUTES = pytest.mark.requires("KVM_CAP_VCPU_ATTRIBUTES")


@pytest.fixture
def agent(make_vm: MakeVm) -> Agent:
    return Agent(make_vm(AGENT).vcpus[0])


def reading(agent: Agent) -> int:
    """Return the guest's next reading."""
    return agent.must(b"\x0f\x31").edx_eax  # rdtsc


def measured_khz(agent: Agent) -> tuple[float, float]:
    """Return the least and the greatest frequency that agrees with the host's clock over at least 50 ms."""
    before = time.monotonic_ns()
    first = reading(agent)
    started = time.monotonic_ns()
    while True:
        last_seen = time.monotonic_ns()
        last = reading(agent)
        ended = time.monotonic_ns()
        if last_seen - started > 50_000_000:
            break
    ticks = last - first
    return ticks / (ended - before) * 1e6, ticks / (last_seen - started) * 1e6


@ATTRIBUTES
@pytest.mark.requires("stable-tsc", f"KVM_CAP_ADJUST_CLOCK&{int(KVM_CLOCK_HOST_TSC)}")
@pytest.mark.parametrize("seconds", [0, 180, -180])
def test_counter_is_the_hosts_and_the_offset(agent: Agent, seconds: int) -> None:
    """A guest that reads its counter between two readings of the host's reads the sum of that and its offset.

    Documentation/virt/kvm/devices/vcpu.rst, 4.1 KVM_VCPU_TSC_OFFSET (guest_tsc = host_tsc + offset); api.rst,
    4.29 KVM_GET_CLOCK (host_tsc).
    """
    vcpu = agent.vcpu
    agent.start()
    if vcpu.clock.get_tsc_khz() == 0 or not agent.vm.clock.get().flags & KVM_CLOCK_HOST_TSC:
        pytest.skip("KVM_GET_CLOCK gives no host_tsc here: the host's clock source is not the TSC")
    offset = (seconds * vcpu.clock.get_tsc_khz() * 1000) % WRAP
    vcpu.attrs.set(*OFFSET, offset)
    for _ in range(5):
        before = agent.vm.clock.get().host_tsc
        now = reading(agent)
        after = agent.vm.clock.get().host_tsc
        passed = (now - offset - before) % WRAP
        assert passed <= after - before, (before, now, after, offset)


@ATTRIBUTES
@pytest.mark.requires("stable-tsc")
@pytest.mark.parametrize("shift", [1 << 40, -(1 << 40)])
def test_offset_shifts_counter(agent: Agent, shift: int) -> None:
    """The guest's TSC is the host's plus the offset: changing the offset shifts it by as much.

    Documentation/virt/kvm/devices/vcpu.rst, 4.1 KVM_VCPU_TSC_OFFSET.
    """
    vcpu = agent.vcpu
    # Far enough from 0 that no shift wraps.
    vcpu.msrs.set(0x10, 1 << 50)
    offset = vcpu.attrs.get_int(*OFFSET)
    before = reading(agent)
    vcpu.attrs.set(*OFFSET, (offset + shift) % WRAP)
    after = reading(agent)
    assert vcpu.attrs.get_int(*OFFSET) == (offset + shift) % WRAP
    assert before + shift <= after < before + shift + vcpu.clock.get_tsc_khz() * 1000 * 20


@ATTRIBUTES
def test_offset_of_unscaled_counter(vm: Vm) -> None:
    """Writing the TSC by KVM_SET_MSRS changes the offset by the same difference.

    Documentation/virt/kvm/devices/vcpu.rst, 4.1: guest_tsc = host_tsc + offset.
    """
    vcpu = vm.create_vcpu()
    vcpu.msrs.set(0x10, 1 << 40)
    first = vcpu.attrs.get_int(*OFFSET)
    vcpu.msrs.set(0x10, 1 << 50)
    second = vcpu.attrs.get_int(*OFFSET)
    difference = (second - first) % WRAP
    expected = (1 << 50) - (1 << 40)
    # The host's counter went on between the two.
    assert expected - vcpu.clock.get_tsc_khz() * 1000 * 20 < difference <= expected


@ATTRIBUTES
def test_attributes_that_do_not_exist(vm: Vm) -> None:
    """The TSC offset exists; another attribute or group does not, and reading or writing it is ENXIO.

    Documentation/virt/kvm/devices/vcpu.rst, 4; api.rst, 4.80 and 4.81.
    """
    vcpu = vm.create_vcpu()
    assert vcpu.attrs.has(*OFFSET)
    for address in ((KVM_VCPU_TSC_CTRL, 99), (99, 0)):
        assert not vcpu.attrs.has(*address)
        with refused(errno.ENXIO):
            vcpu.attrs.get(*address)
        with refused(errno.ENXIO):
            vcpu.attrs.set(*address, 1)


@ATTRIBUTES
def test_offset_at_bad_address(vm: Vm) -> None:
    """An address that cannot be accessed is EFAULT, in both directions.

    Documentation/virt/kvm/devices/vcpu.rst, 4.1.
    """
    vcpu = vm.create_vcpu()
    with refused(errno.EFAULT):
        vcpu.attrs.get(*OFFSET, 0)
    with refused(errno.EFAULT):
        vcpu.attrs.set(*OFFSET, None)


def test_frequency_is_true(agent: Agent) -> None:
    """The guest's TSC runs at the frequency that KVM_GET_TSC_KHZ tells.

    Documentation/virt/kvm/api.rst, 4.56 KVM_GET_TSC_KHZ.
    """
    reading(agent)
    least, greatest = measured_khz(agent)
    assert least * 0.99 <= agent.vcpu.clock.get_tsc_khz() <= greatest * 1.01


@pytest.mark.requires("KVM_CAP_TSC_CONTROL")
def test_vcpu_starts_with_hosts_frequency(vm: Vm) -> None:
    """Frequency 0 stands for the host's, which is also what a new vCPU has.

    Documentation/virt/kvm/api.rst, 4.55 KVM_SET_TSC_KHZ; arch/x86/kvm/x86.c.
    """
    vcpu = vm.create_vcpu()
    native = vcpu.clock.get_tsc_khz()
    assert native > 0
    vcpu.clock.set_tsc_khz(native // 2)
    assert vcpu.clock.get_tsc_khz() == native // 2
    vcpu.clock.set_tsc_khz(0)
    assert vcpu.clock.get_tsc_khz() == native


@pytest.mark.requires("KVM_CAP_TSC_CONTROL")
@pytest.mark.parametrize("percent", [50, 200])
def test_scaled_frequency(agent: Agent, percent: int) -> None:
    """With KVM_CAP_TSC_CONTROL the guest's TSC runs at the frequency that KVM_SET_TSC_KHZ sets.

    Documentation/virt/kvm/api.rst, 4.55 KVM_SET_TSC_KHZ.
    """
    vcpu = agent.vcpu
    wanted = vcpu.clock.get_tsc_khz() * percent // 100
    vcpu.clock.set_tsc_khz(wanted)
    assert vcpu.clock.get_tsc_khz() == wanted
    reading(agent)
    least, greatest = measured_khz(agent)
    assert least * 0.99 <= wanted <= greatest * 1.01


@pytest.mark.requires("KVM_CAP_TSC_CONTROL")
def test_frequency_too_high(vm: Vm) -> None:
    """A frequency beyond what the hardware can scale to is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.55 KVM_SET_TSC_KHZ.
    """
    vcpu = vm.create_vcpu()
    native = vcpu.clock.get_tsc_khz()
    with refused(errno.EINVAL):
        vcpu.clock.set_tsc_khz(0xFFFF_FFFF)
    assert vcpu.clock.get_tsc_khz() == native


def test_hosts_frequency_is_always_legal(vm: Vm) -> None:
    """The frequency that a vCPU has can be set again, with scaling or without.

    Documentation/virt/kvm/api.rst, 4.55 KVM_SET_TSC_KHZ and 4.56 KVM_GET_TSC_KHZ.
    """
    vcpu = vm.create_vcpu()
    native = vcpu.clock.get_tsc_khz()
    vcpu.clock.set_tsc_khz(native)
    assert vcpu.clock.get_tsc_khz() == native


@pytest.mark.requires("KVM_CAP_VM_TSC_CONTROL")
def test_default_of_vm(vm: Vm) -> None:
    """The VM's frequency is that of vCPUs created later; once one exists it cannot be changed: EINVAL.

    Documentation/virt/kvm/api.rst, 4.55 KVM_SET_TSC_KHZ: "only allowed prior to creating vCPUs".
    """
    native = vm.clock.get_tsc_khz()
    vm.clock.set_tsc_khz(native // 2)
    assert vm.clock.get_tsc_khz() == native // 2
    assert vm.create_vcpu().clock.get_tsc_khz() == native // 2
    with refused(errno.EINVAL):
        vm.clock.set_tsc_khz(native)


def test_frequency_of_a_vm_is_chosen_before_its_vcpus(vm: Vm) -> None:
    """A VM's frequency is for vCPUs to come: with a vCPU it is refused with EINVAL, and no vCPU's changes.

    Documentation/virt/kvm/api.rst, 4.55 KVM_SET_TSC_KHZ: "used before creating any vCPU".
    """
    own, number = vm.ioctl_raw(ioctls.KVM_GET_TSC_KHZ)
    if number == errno.ENOTTY:
        pytest.skip("needs KVM_GET_TSC_KHZ of a VM: this KVM has it of vCPUs alone")
    vm.ioctl(ioctls.KVM_SET_TSC_KHZ, own)
    first = vm.create_vcpu(0)
    for khz in (own, own // 2, 0):
        _, number = vm.ioctl_raw(ioctls.KVM_SET_TSC_KHZ, khz)
        assert number == errno.EINVAL, f"{khz} kHz with a vCPU: errno {number}, expected EINVAL"
    second = vm.create_vcpu(1)
    got = [vm.ioctl(ioctls.KVM_GET_TSC_KHZ), first.clock.get_tsc_khz(), second.clock.get_tsc_khz()]
    assert got == [own] * 3
