# SPDX-License-Identifier: Apache-2.0
"""KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS on a vCPU that does not run: flags, refusals, what is kept."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    KVM_CAP_EXCEPTION_PAYLOAD,
    KVM_CAP_X86_TRIPLE_FAULT_EVENT,
    KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_PAYLOAD,
    KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SMM,
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
    Vcpu,
    Vector,
    Vm,
    kvm_vcpu_events,
    refused,
)

pytestmark = pytest.mark.requires("KVM_CAP_VCPU_EVENTS")
payload = pytest.mark.requires("KVM_CAP_EXCEPTION_PAYLOAD")

ALWAYS = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM


@pytest.fixture
def vcpu(vm: Vm) -> Vcpu:
    """The vCPU of a bare VM."""
    return vm.create_vcpu()


@pytest.fixture
def payload_vcpu(vm: Vm) -> Vcpu:
    """A vCPU whose VM has KVM_CAP_EXCEPTION_PAYLOAD enabled."""
    vm.enable_cap(KVM_CAP_EXCEPTION_PAYLOAD, 1)
    return vm.create_vcpu()


def test_new_vcpu(vcpu: Vcpu) -> None:
    """A new vCPU has no event, and the flags say which optional fields are valid.

    Documentation/virt/kvm/api.rst, 4.31 KVM_GET_VCPU_EVENTS.
    """
    assert vcpu.events.get() == kvm_vcpu_events(flags=int(ALWAYS))


@pytest.mark.parametrize(
    ("cap", "flag"),
    [
        pytest.param(KVM_CAP_EXCEPTION_PAYLOAD, KVM_VCPUEVENT_VALID_PAYLOAD, id="payload", marks=payload),
        pytest.param(
            KVM_CAP_X86_TRIPLE_FAULT_EVENT,
            KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
            id="triple-fault",
            marks=pytest.mark.requires("KVM_CAP_X86_TRIPLE_FAULT_EVENT"),
        ),
    ],
)
def test_flags_of_capabilities(vm: Vm, cap: int, flag: int) -> None:
    """The flags for exception payloads and triple faults are set exactly while their capability is on.

    Documentation/virt/kvm/api.rst, 4.31 KVM_GET_VCPU_EVENTS ("This bit will be set whenever").
    """
    vcpu = vm.create_vcpu()
    assert vcpu.events.get().flags == ALWAYS
    vm.enable_cap(cap, 1)
    assert vcpu.events.get().flags == ALWAYS | flag
    vm.enable_cap(cap, 0)
    assert vcpu.events.get().flags == ALWAYS


@pytest.mark.parametrize("bit", [6, 31])
def test_unknown_flag(vcpu: Vcpu, bit: int) -> None:
    """Flags that KVM does not know are refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.32 KVM_SET_VCPU_EVENTS; arch/x86/kvm/x86.c.
    """
    with refused(errno.EINVAL):
        vcpu.events.set(kvm_vcpu_events(flags=1 << bit))


@pytest.mark.parametrize(
    "flag",
    [
        pytest.param(KVM_VCPUEVENT_VALID_PAYLOAD, id="payload", marks=payload),
        pytest.param(
            KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
            id="triple-fault",
            marks=pytest.mark.requires("KVM_CAP_X86_TRIPLE_FAULT_EVENT"),
        ),
    ],
)
def test_flag_without_its_capability(vcpu: Vcpu, flag: int) -> None:
    """The flags for exception payloads and triple faults are refused with EINVAL without their capability.

    Documentation/virt/kvm/api.rst, 4.32 KVM_SET_VCPU_EVENTS ("If KVM_CAP_... is enabled").
    """
    with refused(errno.EINVAL):
        vcpu.events.set(kvm_vcpu_events(flags=int(flag)))


@pytest.mark.parametrize("number", [int(Vector.NMI), 32, 255])
def test_no_exception(vcpu: Vcpu, number: int) -> None:
    """Injecting what is no exception, an NMI or a vector above 31, is refused with EINVAL.

    arch/x86/kvm/x86.c, kvm_vcpu_ioctl_x86_set_vcpu_events().
    """
    events = vcpu.events.get()
    events.exception.injected, events.exception.nr = 1, number
    with refused(errno.EINVAL):
        vcpu.events.set(events)
    events.exception.injected = 0
    vcpu.events.set(events)


@payload
@pytest.mark.parametrize("number", [int(Vector.NMI), 32, 255])
def test_no_pending_exception(payload_vcpu: Vcpu, number: int) -> None:
    """The same goes for a pending exception.

    Documentation/virt/kvm/api.rst, 7.17 KVM_CAP_EXCEPTION_PAYLOAD; arch/x86/kvm/x86.c.
    """
    events = payload_vcpu.events.get()
    events.exception.pending, events.exception.nr = 1, number
    with refused(errno.EINVAL):
        payload_vcpu.events.set(events)


def test_injected_is_kept(vcpu: Vcpu) -> None:
    """An injected exception, interrupt and NMI are there in KVM_GET_VCPU_EVENTS until the vCPU runs.

    Documentation/virt/kvm/api.rst, 4.31 KVM_GET_VCPU_EVENTS and 4.32 KVM_SET_VCPU_EVENTS.
    """
    events = vcpu.events.get()
    events.exception.injected, events.exception.nr = 1, int(Vector.GP)
    events.exception.has_error_code, events.exception.error_code = 1, 0x1234
    events.interrupt.injected, events.interrupt.nr = 1, 0x40
    events.nmi.injected = 1
    vcpu.events.set(events)
    assert vcpu.events.get() == events


@payload
def test_pending_and_injected(payload_vcpu: Vcpu) -> None:
    """With KVM_CAP_EXCEPTION_PAYLOAD pending and injected exceptions are told apart.

    Documentation/virt/kvm/api.rst, 7.17 KVM_CAP_EXCEPTION_PAYLOAD ("to distinguish between pending and
    injected").
    """
    events = payload_vcpu.events.get()
    events.exception.nr, events.exception.pending = int(Vector.PF), 1
    events.exception_has_payload, events.exception_payload = 1, 0x1234_5000
    payload_vcpu.events.set(events)
    known = payload_vcpu.events.get()
    assert (known.exception.pending, known.exception.injected) == (1, 0)
    assert (known.exception_has_payload, known.exception_payload) == (1, 0x1234_5000)
    events.exception.pending, events.exception.injected = 0, 1
    payload_vcpu.events.set(events)
    known = payload_vcpu.events.get()
    assert (known.exception.pending, known.exception.injected, known.exception_has_payload) == (0, 1, 0)


@payload
def test_pending_wins(payload_vcpu: Vcpu) -> None:
    """An exception given as both pending and injected is pending.

    Documentation/virt/kvm/api.rst, 7.17 KVM_CAP_EXCEPTION_PAYLOAD; arch/x86/kvm/x86.c.
    """
    events = payload_vcpu.events.get()
    events.exception.nr = int(Vector.UD)
    events.exception.pending = events.exception.injected = 1
    payload_vcpu.events.set(events)
    entry = payload_vcpu.events.get()
    assert (entry.exception.pending, entry.exception.injected) == (1, 0)


def test_pending_without_capability(vcpu: Vcpu) -> None:
    """Without the flag for payloads exception.pending is not looked at.

    Documentation/virt/kvm/api.rst, 4.32 KVM_SET_VCPU_EVENTS (exception.pending is valid with VALID_PAYLOAD).
    """
    events = vcpu.events.get()
    events.exception.pending, events.exception.nr = 1, int(Vector.UD)
    vcpu.events.set(events)
    known = vcpu.events.get()
    assert (known.exception.pending, known.exception.injected) == (0, 0)


@payload
def test_payload_is_not_delivered_early(payload_vcpu: Vcpu) -> None:
    """Before its delivery a pending page fault's address is not in CR2, nor a pending #DB's bits in DR6.

    Documentation/virt/kvm/api.rst, 7.17 KVM_CAP_EXCEPTION_PAYLOAD ("CR2 will not be modified prior").
    """
    for vector, value in ((Vector.PF, 0x1234_5000), (Vector.DB, 0x4001)):
        events = payload_vcpu.events.get()
        events.exception.nr, events.exception.pending = int(vector), 1
        events.exception_has_payload, events.exception_payload = 1, value
        payload_vcpu.events.set(events)
        assert payload_vcpu.regs.get_sregs().cr2 == 0
        assert payload_vcpu.debug.get_regs().dr6 == 0xFFFF_0FF0
        assert payload_vcpu.events.get().exception_payload == value


@payload
def test_set_regs_drops_pending(payload_vcpu: Vcpu) -> None:
    """KVM_SET_REGS drops a pending exception, as it belonged to the old RIP.

    arch/x86/kvm/regs.c, __set_regs().
    """
    events = payload_vcpu.events.get()
    events.exception.nr, events.exception.pending = int(Vector.UD), 1
    payload_vcpu.events.set(events)
    payload_vcpu.regs.set(payload_vcpu.regs.get())
    assert payload_vcpu.events.get().exception.pending == 0


def test_fields_without_their_flags(vcpu: Vcpu) -> None:
    """nmi.pending and smi.pending are taken over only with their flags.

    Documentation/virt/kvm/api.rst, 4.32 KVM_SET_VCPU_EVENTS ("suppress overwriting the current in-kernel
    state").
    """
    vcpu.events.nmi()
    assert vcpu.events.get().nmi.pending == 1
    events = kvm_vcpu_events(flags=0)
    vcpu.events.set(events)
    assert vcpu.events.get().nmi.pending == 1
    events.flags = int(KVM_VCPUEVENT_VALID_NMI_PENDING)
    vcpu.events.set(events)
    assert vcpu.events.get().nmi.pending == 0


def test_interrupt_shadow(vcpu: Vcpu) -> None:
    """interrupt.shadow is taken over with KVM_VCPUEVENT_VALID_SHADOW and kept without it.

    Documentation/virt/kvm/api.rst, 4.32 KVM_SET_VCPU_EVENTS, KVM_CAP_INTR_SHADOW.
    """
    events = vcpu.events.get()
    events.interrupt.shadow = 2
    vcpu.events.set(events)
    assert vcpu.events.get().interrupt.shadow != 0
    events.interrupt.shadow = 0
    events.flags = 0
    vcpu.events.set(events)
    assert vcpu.events.get().interrupt.shadow != 0
    events.flags = int(KVM_VCPUEVENT_VALID_SHADOW)
    vcpu.events.set(events)
    assert vcpu.events.get().interrupt.shadow == 0
