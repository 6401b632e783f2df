# SPDX-License-Identifier: Apache-2.0
"""SEV guests that share or hand over their encryption context: mirrors and moves within the host.

KVM_CAP_VM_COPY_ENC_CONTEXT_FROM and KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM (Documentation/virt/kvm/api.rst).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from kvmpy import (
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_VM_COPY_ENC_CONTEXT_FROM,
    KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM,
    KVM_SYSTEM_EVENT_SEV_TERM,
    PAGE_SIZE,
    IoExit,
    Kvm,
    KvmError,
    SystemEventExit,
    Vcpu,
    Vm,
    ioctls,
    kvm_enable_cap,
    kvm_regs,
    kvm_sev_guest_status,
    kvm_sev_launch_start,
    kvm_userspace_memory_region,
)
from selftests.sev.conftest import IN_PLACE, MEMORY, PAGES, TYPES, Bare, BareMaker, start_sev

needs_sev = pytest.mark.requires("protection:sev")
needs_es = pytest.mark.requires("protection:sev-es")
needs_snp = pytest.mark.requires("protection:snp")

CAPS = [
    pytest.param(KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, id="copy"),
    pytest.param(KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, id="move"),
]


def error_of(attempt: Callable[[], object]) -> int | None:
    """Return the errno of an attempt, 0 when it succeeds."""
    try:
        attempt()
    except KvmError as error:
        return error.errno
    return 0


def launched(bare: BareMaker, kind: str, vcpus: int = 1) -> Bare:
    """Return a bare guest whose launch is complete."""
    guest = bare(kind, vcpus=vcpus)
    launching = start_sev(guest).update_data(MEMORY, PAGE_SIZE)
    if kind == "sev-es":
        launching.update_vmsa()
    launching.measure().finish()
    return guest


# Without paging every access of an SEV guest is private. SEV: mov $0x2a, %al; out %al, $0x10; hlt.
# SEV-ES: a termination request in the GHCB MSR (0xc0010130), which needs no GHCB and no stack; VMGEXIT; hlt.
PROGRAMS = {
    "sev": bytes.fromhex("b02a e610 f4"),
    "sev-es": bytes.fromhex("66b9300101c0 66b800010000 6631d2 0f30 f30f01d9 f4"),
}
INITS = pytest.mark.parametrize("legacy", [False, True], ids=["INIT2", "INIT"])


def at_program(vcpu: Vcpu) -> None:
    """Point a vCPU, which is in real mode after its creation, at the program."""
    sregs = vcpu.regs.get_sregs()
    sregs.cs.base, sregs.cs.selector = int(MEMORY), 0
    vcpu.regs.set_sregs(sregs)
    vcpu.regs.set(kvm_regs(rip=0, rflags=2))


def with_program(bare: BareMaker, kind: str, legacy: bool) -> Bare:
    """Return a launched bare guest that has one vCPU, at its program, which has not run."""
    guest_vm = bare(kind, vcpus=1, legacy=legacy)
    guest_vm.vm.memory.write(MEMORY, PROGRAMS[kind])
    at_program(guest_vm.vm.vcpus[0])
    launching = start_sev(guest_vm).update_data(MEMORY, PAGE_SIZE)
    if kind == "sev-es":
        launching.update_vmsa()
    launching.measure().finish()
    return guest_vm


def share_memory(vm: Vm, source: Bare) -> None:
    """Give *vm* the source's memory, at the same place: it is encrypted for that place."""
    slot = kvm_userspace_memory_region(
        guest_phys_addr=int(MEMORY), memory_size=PAGES * PAGE_SIZE, userspace_addr=source.hva
    )
    vm.ioctl(ioctls.KVM_SET_USER_MEMORY_REGION, slot)


def check_run(vcpu: Vcpu, kind: str) -> None:
    """Run the program to its end."""
    ended = vcpu.run(timeout=10)
    if kind == "sev":
        assert isinstance(ended, IoExit)
        assert (ended.port, bytes(ended.data)) == (0x10, b"\x2a")
    else:
        assert isinstance(ended, SystemEventExit)
        assert (ended.type, ended.data) == (KVM_SYSTEM_EVENT_SEV_TERM, (0x100,))


def by_number(vm: Vm, cap: int, fd: int) -> int | None:
    """Enable a capability with any number as the source's file descriptor."""
    arg = kvm_enable_cap(cap=int(cap))
    arg.args[0] = fd
    return vm.ioctl_raw(ioctls.KVM_ENABLE_CAP, arg)[1]


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_mirror(kvm: Kvm, bare: BareMaker, kind: str) -> None:
    """A mirror is the same guest for the firmware: handle, policy and state agree."""
    owner = launched(bare, kind)
    status = kvm_sev_guest_status()
    owner.vm.sev.command("GUEST_STATUS", status)
    with kvm.create_vm() as mirror:
        mirror.sev.copy_enc_context_from(owner.vm)
        again = kvm_sev_guest_status()
        mirror.sev.command("GUEST_STATUS", again)
        assert again == status


@pytest.mark.parametrize("kind", IN_PLACE)
def test_what_a_mirror_may_not_do(kvm: Kvm, bare: BareMaker, kind: str) -> None:
    """A mirror launches nothing and takes no secret: EINVAL, whatever the owner could."""
    owner = launched(bare, kind)
    with kvm.create_vm() as mirror:
        mirror.sev.copy_enc_context_from(owner.vm)
        for command in (
            "INIT",
            "LAUNCH_START",
            "LAUNCH_UPDATE_DATA",
            "LAUNCH_MEASURE",
            "LAUNCH_SECRET",
            "LAUNCH_FINISH",
            "SEND_START",
            "RECEIVE_START",
        ):
            result = mirror.sev.command_raw(command, kvm_sev_launch_start())
            assert (result.errno, result.firmware) == (errno.EINVAL, 0), command


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_mirror_has_no_regions(kvm: Kvm, bare: BareMaker, kind: str) -> None:
    """Regions are registered with the owner alone: EINVAL on a mirror."""
    owner = launched(bare, kind)
    with kvm.create_vm() as mirror:
        mirror.sev.copy_enc_context_from(owner.vm)
        assert error_of(lambda: mirror.sev.reg_region(owner.hva, PAGE_SIZE)) == errno.EINVAL


@needs_sev
def test_mirrors_that_there_cannot_be(kvm: Kvm, bare: BareMaker) -> None:
    """No mirror of a plain VM, of a mirror, of itself, onto a guest, or onto a VM with a vCPU: EINVAL."""
    owner = launched(bare, "sev")
    with kvm.create_vm() as plain, kvm.create_vm() as mirror, kvm.create_vm() as other:
        assert error_of(lambda: mirror.sev.copy_enc_context_from(plain)) == errno.EINVAL
        assert error_of(lambda: mirror.sev.copy_enc_context_from(mirror)) == errno.EINVAL
        mirror.sev.copy_enc_context_from(owner.vm)
        assert error_of(lambda: other.sev.copy_enc_context_from(mirror)) == errno.EINVAL
        assert error_of(lambda: mirror.sev.copy_enc_context_from(owner.vm)) == errno.EINVAL
        assert error_of(lambda: bare("sev").vm.sev.copy_enc_context_from(owner.vm)) == errno.EINVAL
        other.create_vcpu()
        assert error_of(lambda: other.sev.copy_enc_context_from(owner.vm)) == errno.EINVAL


@needs_sev
def test_an_owner_closed_before_its_mirror(kvm: Kvm, bare: BareMaker) -> None:
    """A mirror keeps its owner's context: the guest is there when the owner's file descriptors are closed."""
    owner = launched(bare, "sev")
    with kvm.create_vm() as mirror:
        mirror.sev.copy_enc_context_from(owner.vm)
        device = owner.vm.sev.device
        status = kvm_sev_guest_status()
        # KVM keeps the number of the owner's /dev/sev, and looks it up in this process.
        number = os.dup(device.fd)
        try:
            kept = device.fd
            owner.vm.close()
            os.dup2(number, kept)
            try:
                mirror.sev.command("GUEST_STATUS", status)
            finally:
                os.close(kept)
        finally:
            os.close(number)
        assert status.state == 3


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_move(kvm: Kvm, bare: BareMaker, kind: str) -> None:
    """A guest moves to a VM of its type; the source is dead then: EIO."""
    source = launched(bare, kind, vcpus=2)
    target = bare(kind, init=False, vcpus=2)
    target.vm.sev.move_enc_context_from(source.vm)
    assert error_of(lambda: source.vm.create_vcpu(7)) == errno.EIO
    # What has moved moves on.
    third = bare(kind, init=False, vcpus=2)
    third.vm.sev.move_enc_context_from(target.vm)
    assert error_of(lambda: target.vm.create_vcpu(7)) == errno.EIO


@INITS
@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_guest_runs(bare: BareMaker, kind: str, legacy: bool) -> None:
    """What the tests below move and copy runs where it was launched."""
    check_run(with_program(bare, kind, legacy).vm.vcpus[0], kind)


@INITS
@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_moved_guest_runs(bare: BareMaker, kind: str, legacy: bool) -> None:
    """A guest that has moved runs in its new VM, with memory and, SEV-ES, vCPU state of the old one.

    Documentation/virt/kvm/api.rst, KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM; Linux: sev_migrate_from().
    """
    source = with_program(bare, kind, legacy)
    target = bare(kind, init=False, vcpus=1, memory=False, legacy=legacy).vm
    share_memory(target, source)
    if kind == "sev":
        at_program(target.vcpus[0])
    target.sev.move_enc_context_from(source.vm)
    check_run(target.vcpus[0], kind)


@needs_sev
@INITS
@pytest.mark.parametrize("default", [False, True], ids=["sev-vm", "default-vm"])
def test_a_copied_guest_runs(kvm: Kvm, bare: BareMaker, legacy: bool, default: bool) -> None:
    """A mirror runs the owner's memory, whatever its own VM type, and so does the owner afterwards.

    Documentation/virt/kvm/api.rst, KVM_CAP_VM_COPY_ENC_CONTEXT_FROM; Linux: sev_vm_copy_enc_context_from().
    """
    owner = with_program(bare, "sev", legacy)
    with kvm.create_vm(0 if default else int(TYPES["sev"])) as mirror:
        mirror.sev.copy_enc_context_from(owner.vm)
        share_memory(mirror, owner)
        mirror.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
        vcpu = mirror.create_vcpu()
        vcpu.cpuid.set(kvm.supported_cpuid)
        at_program(vcpu)
        check_run(vcpu, "sev")
        check_run(owner.vm.vcpus[0], "sev")


@needs_sev
def test_moves_that_there_cannot_be(kvm: Kvm, bare: BareMaker) -> None:
    """No move from a plain VM, from itself, onto a guest: EINVAL, and the source lives on."""
    source = launched(bare, "sev")
    target = bare("sev", init=False)
    assert error_of(lambda: bare("sev").vm.sev.move_enc_context_from(source.vm)) == errno.EINVAL
    assert error_of(lambda: source.vm.sev.move_enc_context_from(source.vm)) == errno.EINVAL
    assert error_of(lambda: target.vm.sev.move_enc_context_from(bare("sev", init=False).vm)) == errno.EINVAL
    with kvm.create_vm() as plain:
        assert error_of(lambda: plain.sev.move_enc_context_from(source.vm)) == errno.EINVAL
    target.vm.sev.move_enc_context_from(source.vm)


@needs_es
def test_moves_between_types(bare: BareMaker) -> None:
    """A guest moves to its own type only: EINVAL from SEV-ES to SEV and the other way."""
    for kind, other in (("sev-es", "sev"), ("sev", "sev-es")):
        source, target = launched(bare, kind), bare(other, init=False, vcpus=1)
        assert error_of(lambda t=target, s=source: t.vm.sev.move_enc_context_from(s.vm)) == errno.EINVAL  # type: ignore[misc]


@needs_es
@pytest.mark.parametrize("vcpus", [0, 1, 3])
def test_a_move_needs_as_many_vcpus(bare: BareMaker, vcpus: int) -> None:
    """An SEV-ES guest brings its vCPUs' state: EINVAL unless the target has as many vCPUs."""
    source = launched(bare, "sev-es", vcpus=2)
    target = bare("sev-es", init=False, vcpus=vcpus)
    assert error_of(lambda: target.vm.sev.move_enc_context_from(source.vm)) == errno.EINVAL


@needs_es
def test_a_move_in_the_middle_of_a_launch(bare: BareMaker) -> None:
    """An SEV-ES guest whose vCPUs are not encrypted yet does not move: EINVAL."""
    source = bare("sev-es", vcpus=1)
    start_sev(source)
    target = bare("sev-es", init=False, vcpus=1)
    assert error_of(lambda: target.vm.sev.move_enc_context_from(source.vm)) == errno.EINVAL


@needs_snp
@pytest.mark.parametrize("cap", CAPS)
def test_snp_stays(kvm: Kvm, bare: BareMaker, cap: int) -> None:
    """SNP guests have neither mirrors nor moves: EINVAL."""
    source = bare("snp")
    target = bare("snp", init=False)
    assert by_number(target.vm, cap, source.vm.fd) == errno.EINVAL
    with kvm.create_vm() as plain:
        assert by_number(plain, cap, source.vm.fd) == errno.EINVAL


@needs_sev
@pytest.mark.parametrize("cap", CAPS)
def test_a_source_that_is_no_vm(bare: BareMaker, cap: int) -> None:
    """The source is the file descriptor of a VM: EBADF for another file and for none."""
    target = bare("sev", init=False).vm
    assert TYPES["sev"] == target.vm_type
    for number in (target.kvm.fd, 9999):
        assert by_number(target, cap, number) == errno.EBADF
    with open(os.devnull, "rb") as other:
        assert by_number(target, cap, other.fileno()) == errno.EBADF
