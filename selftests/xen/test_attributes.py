# SPDX-License-Identifier: Apache-2.0
"""The attributes of Xen's interface: what was set is what is read; what is refused has changed nothing."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    KVM_CAP_MAX_VCPUS,
    KVM_XEN_ATTR_TYPE_EVTCHN,
    KVM_XEN_ATTR_TYPE_LONG_MODE,
    KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG,
    KVM_XEN_ATTR_TYPE_SHARED_INFO,
    KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA,
    KVM_XEN_ATTR_TYPE_UPCALL_VECTOR,
    KVM_XEN_ATTR_TYPE_XEN_VERSION,
    KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR,
    KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST,
    KVM_XEN_VCPU_ATTR_TYPE_TIMER,
    KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR,
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID,
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO,
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA,
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO,
    PAGE_SIZE,
    EventFd,
    Gpa,
    Vcpu,
    Vm,
    kvm_xen_hvm_attr,
    kvm_xen_vcpu_attr,
    refused,
)
from kvmpy.x86.xen import XenEvtchnType

from .conftest import FLAGS, INVALID, MSR, get, put

pytestmark = pytest.mark.requires("KVM_CAP_XEN_HVM")

MEMORY = Gpa(0x10_0000)
IPI, INTERDOMAIN = int(XenEvtchnType.XEN_EVTCHNSTAT_IPI), int(XenEvtchnType.XEN_EVTCHNSTAT_INTERDOMAIN)
TWO_LEVEL = 0xFFFF_FFFF
DEASSIGN, UPDATE, RESET = 1, 2, 4


@pytest.fixture
def xen_vm(vm: Vm) -> Vm:
    """A bare VM with 1 MiB of memory that is one of Xen's."""
    vm.irq.create_split_chip()
    vm.add_slot(MEMORY, 1 << 20)
    vm.xen.config(FLAGS, MSR)
    return vm


def test_configuration_refused(vm: Vm) -> None:
    """Features that KVM always has, an MSR outside the synthetic range, and pages beside KVM's own: EINVAL.

    Documentation/virt/kvm/api.rst, 4.28 KVM_XEN_HVM_CONFIG.
    """
    permitted = 1 << 1 | 1 << 5 | 1 << 7
    for bit in range(32):
        if not permitted >> bit & 1:
            with refused(errno.EINVAL, about=f"flag {bit}"):
                vm.xen.config(1 << bit, MSR)
    for msr in (0xC000_0080, 1, 0x3FFF_FFFF, 0x5000_0000, 0xFFFF_FFFF):
        with refused(errno.EINVAL, about=f"MSR {msr:#x}"):
            vm.xen.config(FLAGS, msr)
    for blob in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):
        with refused(errno.EINVAL, about=f"blob {blob}"):
            vm.xen.config(FLAGS, MSR, blob=blob)
    for msr in (0x4000_0000, 0x4FFF_FFFF, 0):
        vm.xen.config(permitted, msr)
    vm.xen.config(0, MSR, blob=(4096, 1, 8192, 1))
    vm.xen.config(0, 0)


def check(target: Vm | Vcpu, kind: int, first: int, good: list[int], bad: list[int], error: int) -> None:
    """See that an attribute begins as *first*, keeps good values, and refuses bad ones with *error*."""
    assert (kind, get(target, kind)) == (kind, first)
    for value in good:
        put(target, kind, value)
        assert (kind, get(target, kind)) == (kind, value)
    for value in bad:
        with refused(error, about=f"{kind!r} {value:#x}"):
            put(target, kind, value)
        assert (kind, get(target, kind)) == (kind, good[-1])


def test_of_the_vm(xen_vm: Vm) -> None:
    """Each attribute of the VM is read as it was set; a value that is refused leaves it.

    api.rst, 4.126 KVM_XEN_HVM_SET_ATTR and 4.127 KVM_XEN_HVM_GET_ATTR.
    """
    gfn = int(MEMORY) // PAGE_SIZE
    rows = {
        KVM_XEN_ATTR_TYPE_LONG_MODE: (0, [1, 0, 1], [], 0),
        KVM_XEN_ATTR_TYPE_UPCALL_VECTOR: (0, [0x10, 0xFF, 0, 0x51], [1, 0xF], errno.EINVAL),
        KVM_XEN_ATTR_TYPE_XEN_VERSION: (0, [0x4000D, 0, 0xFFFF_FFFF], [], 0),
        KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG: (0, [1, 0, 1], [], 0),
        KVM_XEN_ATTR_TYPE_SHARED_INFO: (INVALID, [gfn, gfn + 255, INVALID, gfn], [], 0),
    }
    for kind, row in rows.items():
        check(xen_vm, kind, *row)
    # What is a flag keeps one bit.
    put(xen_vm, KVM_XEN_ATTR_TYPE_LONG_MODE, 0x80)
    assert get(xen_vm, KVM_XEN_ATTR_TYPE_LONG_MODE) == 1


def test_of_a_vcpu(xen_vm: Vm) -> None:
    """Each attribute of a vCPU is read as it was set, of that vCPU; a value that is refused leaves it.

    api.rst, 4.128 KVM_XEN_VCPU_SET_ATTR and 4.129 KVM_XEN_VCPU_GET_ATTR.
    """
    vcpu, other = xen_vm.create_vcpu(), xen_vm.create_vcpu()
    limit = xen_vm.check_extension(KVM_CAP_MAX_VCPUS)
    where = int(MEMORY)
    rows = {
        KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO: (INVALID, [where, where + 64, INVALID, where + 4032], [], 0),
        KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO: (INVALID, [where + 8, INVALID, where + 128], [], 0),
        KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID: (0, [5, limit - 1, 7], [limit, (1 << 32) - 1], errno.EINVAL),
        KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR: (0, [0x10, 0xFF, 0, 0x51], [1, 0xF], errno.EINVAL),
    }
    for kind, row in rows.items():
        others = get(other, kind)
        check(vcpu, kind, *row)
        assert (kind, get(other, kind)) == (kind, others)


def test_by_host_address(xen_vm: Vm) -> None:
    """Shared info and vcpu_info may be given by their host address; then they have no guest address.

    api.rst, 4.126 KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA, 4.128 KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA.
    """
    vcpu = xen_vm.create_vcpu()
    hva = xen_vm.slots[0].hva
    put(xen_vm, KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA, hva)
    assert get(xen_vm, KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA) == hva
    assert get(xen_vm, KVM_XEN_ATTR_TYPE_SHARED_INFO) == INVALID
    for unaligned in (hva + 1, hva + 2048):
        with refused(errno.EINVAL):
            put(xen_vm, KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA, unaligned)
    assert get(xen_vm, KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA) == hva
    put(vcpu, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA, hva + 64)
    assert get(vcpu, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA) == hva + 64
    assert get(vcpu, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO) == INVALID
    put(vcpu, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA, 0)
    put(xen_vm, KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA, 0)
    assert get(vcpu, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA) == 0
    assert get(xen_vm, KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA) == 0


def test_unknown(xen_vm: Vm) -> None:
    """A type that there is not is ENOENT; one that can only be set, EINVAL; an area that is not set, ENOENT.

    api.rst, 4.126 to 4.129.
    """
    vcpu = xen_vm.create_vcpu()
    for kind in (7, 100, 0xFFFF):
        with refused(errno.ENOENT, about=f"get {kind}"):
            xen_vm.xen.get_attr(kind)
        with refused(errno.ENOENT, about=f"set {kind}"):
            xen_vm.xen.set_attr(kvm_xen_hvm_attr(type=kind))
    for kind in (10, 100, 0xFFFF):
        with refused(errno.ENOENT, about=f"get {kind} of a vCPU"):
            vcpu.xen.get_attr(kind)
        with refused(errno.ENOENT, about=f"set {kind} of a vCPU"):
            vcpu.xen.set_attr(kvm_xen_vcpu_attr(type=kind))
    with refused(errno.ENOENT):
        xen_vm.xen.get_attr(KVM_XEN_ATTR_TYPE_EVTCHN)
    with refused(errno.EINVAL):
        vcpu.xen.get_attr(KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST)
    with refused(errno.ENOENT):
        vcpu.xen.get_attr(KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR)


def test_no_memory(xen_vm: Vm) -> None:
    """Areas where there is no memory are refused with EFAULT; so is a runstate area of which half is there.

    api.rst, 4.128: the guest physical address of memory.
    """
    vcpu = xen_vm.create_vcpu()
    with refused(errno.EFAULT):
        put(xen_vm, KVM_XEN_ATTR_TYPE_SHARED_INFO, 1 << 26)
    for kind in (
        KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO,
        KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO,
        KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR,
    ):
        with refused(errno.EFAULT, about=repr(kind)):
            put(vcpu, kind, 1 << 38)
    with refused(errno.EFAULT):
        put(vcpu, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, int(MEMORY) + (1 << 20) - 8)
    with refused(errno.ENOENT):
        vcpu.xen.get_attr(KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR)


def test_areas_within_a_page(xen_vm: Vm) -> None:
    """vcpu_info and time info do not cross a page: EINVAL.

    KVM keeps one mapping of each (virt/kvm/pfncache.c).
    """
    vcpu = xen_vm.create_vcpu()
    for kind, size in (
        (KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, 64),
        (KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, 32),
    ):
        put(vcpu, kind, int(MEMORY) + PAGE_SIZE - size)
        for too_far in (1, 8, size - 1):
            with refused(errno.EINVAL, about=f"{kind!r}, {too_far} bytes"):
                put(vcpu, kind, int(MEMORY) + PAGE_SIZE - size + too_far)


def test_timer_refused(xen_vm: Vm) -> None:
    """A timer's event has the priority of 2-level event channels; without a port nothing is looked at.

    api.rst, 4.128 KVM_XEN_VCPU_ATTR_TYPE_TIMER.
    """
    vcpu = xen_vm.create_vcpu()

    def timer(port: int, priority: int, expires: int) -> None:
        attr = kvm_xen_vcpu_attr(type=KVM_XEN_VCPU_ATTR_TYPE_TIMER)
        attr.u.timer.port, attr.u.timer.priority, attr.u.timer.expires_ns = port, priority, expires
        vcpu.xen.set_attr(attr)

    def held() -> tuple[int, int, int]:
        got = vcpu.xen.get_attr(KVM_XEN_VCPU_ATTR_TYPE_TIMER).u.timer
        return got.port, got.priority, got.expires_ns

    assert held() == (0, TWO_LEVEL, 0)
    later = xen_vm.clock.get().clock + 3600 * 1_000_000_000
    timer(9, TWO_LEVEL, later)
    assert held() == (9, TWO_LEVEL, later)
    with refused(errno.EINVAL):
        timer(10, 0, later)
    assert held() == (9, TWO_LEVEL, later)
    timer(0, 0, 0)
    assert held() == (0, TWO_LEVEL, 0)


class Ports:
    """Sets a VM's outbound event channels."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm

    def set(
        self,
        send: int,
        kind: int,
        *,
        port: int = 0,
        vcpu: int = 0,
        priority: int = TWO_LEVEL,
        flags: int = 0,
        fd: int | None = None,
    ) -> None:
        """Set one, or with flags change it or take it back."""
        attr = kvm_xen_hvm_attr(type=KVM_XEN_ATTR_TYPE_EVTCHN)
        event = attr.u.evtchn
        event.send_port, event.type, event.flags = send, kind, flags
        if fd is None:
            event.deliver.port.port, event.deliver.port.vcpu = port, vcpu
            event.deliver.port.priority = priority
        else:
            event.deliver.eventfd.port, event.deliver.eventfd.fd = 0, fd
        self.vm.xen.set_attr(attr)


def test_outbound_events_refused(xen_vm: Vm) -> None:
    """An outbound port has one target, of a kind that can be one; what is refused has changed nothing.

    api.rst, 4.126 KVM_XEN_ATTR_TYPE_EVTCHN.
    """
    put(xen_vm, KVM_XEN_ATTR_TYPE_LONG_MODE, 1)
    ports = Ports(xen_vm)
    with EventFd() as fd:
        bad: dict[str, tuple[int, dict[str, int]]] = {
            "port 0": (errno.EINVAL, {"send": 0, "kind": IPI, "port": 0}),
            "port beyond": (errno.EINVAL, {"send": 4096, "kind": IPI, "port": 4096}),
            "IPI to another port": (errno.EINVAL, {"send": 5, "kind": IPI, "port": 6}),
            "target beyond": (errno.EINVAL, {"send": 5, "kind": INTERDOMAIN, "port": 4096}),
            "FIFO priority": (errno.EINVAL, {"send": 5, "kind": IPI, "port": 5, "priority": 0}),
            "no descriptor": (errno.EBADF, {"send": 5, "kind": INTERDOMAIN, "fd": 1 << 20}),
            "no eventfd": (errno.EINVAL, {"send": 5, "kind": INTERDOMAIN, "fd": xen_vm.fd}),
            "VIRQ": (errno.EINVAL, {"send": 5, "kind": int(XenEvtchnType.XEN_EVTCHNSTAT_VIRQ), "port": 5}),
            "closed": (errno.EINVAL, {"send": 5, "kind": 0, "port": 5}),
            "two flags": (errno.EINVAL, {"send": 5, "kind": IPI, "port": 5, "flags": DEASSIGN | UPDATE}),
            "unknown flag": (errno.EINVAL, {"send": 5, "kind": IPI, "port": 5, "flags": 8}),
            "nothing to take back": (errno.ENOENT, {"send": 5, "kind": IPI, "flags": DEASSIGN}),
            "nothing to update": (errno.ENOENT, {"send": 5, "kind": IPI, "port": 5, "flags": UPDATE}),
        }
        for name, (error, row) in bad.items():
            with refused(error, about=name):
                ports.set(**row)
        ports.set(5, IPI, port=5)
        with refused(errno.EEXIST):
            ports.set(5, INTERDOMAIN, fd=fd.fd)
        ports.set(5, IPI, port=5, vcpu=1, flags=UPDATE)
        for name, row in {
            "another kind": {"kind": INTERDOMAIN, "port": 5},
            "another port": {"kind": IPI, "port": 6},
            "another priority": {"kind": IPI, "port": 5, "priority": 1},
        }.items():
            with refused(errno.EINVAL, about=name):
                ports.set(5, flags=UPDATE, **row)
        ports.set(6, INTERDOMAIN, fd=fd.fd)
        with refused(errno.EINVAL, about="update of an eventfd"):
            ports.set(6, INTERDOMAIN, flags=UPDATE)
        ports.set(5, IPI, flags=DEASSIGN)
        ports.set(5, IPI, port=5)
        ports.set(0, 0, flags=RESET)
        for port in (5, 6):
            with refused(errno.ENOENT, about=f"{port} after a reset"):
                ports.set(port, IPI, flags=DEASSIGN)


def test_ports_by_layout(xen_vm: Vm) -> None:
    """32-bit guests have 1024 event channels, 64-bit ones 4096.

    Xen, public/event_channel.h: the 2-level ABI has a word of words.
    """
    vcpu = xen_vm.create_vcpu()
    put(xen_vm, KVM_XEN_ATTR_TYPE_SHARED_INFO, int(MEMORY) // PAGE_SIZE)
    put(vcpu, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, int(MEMORY) + PAGE_SIZE)
    for long_mode, limit in ((0, 1024), (1, 4096)):
        put(xen_vm, KVM_XEN_ATTR_TYPE_LONG_MODE, long_mode)
        for port in (1, limit - 1):
            xen_vm.xen.evtchn_send(port, 0)
        for port, target, priority in (
            (0, 0, TWO_LEVEL),
            (limit, 0, TWO_LEVEL),
            (0xFFFF_FFFF, 0, TWO_LEVEL),
            (1, 9, TWO_LEVEL),
            (1, 0, 0),
        ):
            with refused(errno.EINVAL, about=f"port {port} to {target}, priority {priority}"):
                xen_vm.xen.evtchn_send(port, target, priority)
