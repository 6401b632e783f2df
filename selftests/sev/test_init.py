# SPDX-License-Identifier: Apache-2.0
"""INIT2 and its older forms: what makes a VM an SEV, SEV-ES or SNP guest, and what KVM refuses."""

from __future__ import annotations

import errno
import os

import pytest

from kvmpy import (
    KVM_CAP_VM_TYPES,
    Cpuid,
    Kvm,
    MissingError,
    VmType,
    ioctls,
    kvm_sev_init,
    kvm_sev_launch_start,
    kvm_sev_snp_launch_start,
)
from kvmpy.coco import sev_platform
from kvmpy.uapi.commands import SEV_COMMANDS
from selftests.sev.asids import BOUND, Asids
from selftests.sev.conftest import IN_PLACE, KINDS, TYPES, BareMaker

EINVAL = (errno.EINVAL, 0)
DEBUG_SWAP = 1 << 5
needs_sev = pytest.mark.requires("protection:sev")
needs_es = pytest.mark.requires("protection:sev-es")
needs_snp = pytest.mark.requires("protection:snp")


@pytest.mark.parametrize("kind", KINDS)
def test_init2(bare: BareMaker, kind: str) -> None:
    """KVM_SEV_INIT2 succeeds once on a VM of an SEV type; the second gives EINVAL, on an SNP VM EPERM."""
    guest = bare(kind, init=False)
    assert guest.raw("INIT2", kvm_sev_init()) == (0, 0)
    assert guest.raw("INIT2", kvm_sev_init()) == ((errno.EPERM, 0) if kind == "snp" else EINVAL)


def test_types_and_cpuid(kvm: Kvm) -> None:
    """Each VM type that KVM offers is a feature in KVM_GET_SUPPORTED_CPUID.

    Documentation/virt/kvm/api.rst, 4.2 KVM_CREATE_VM (KVM_CAP_VM_TYPES); AMD APM volume 3, CPUID Fn8000_001F.
    """
    offered = kvm.check_extension(KVM_CAP_VM_TYPES)
    eax = Cpuid.from_struct(kvm.supported_cpuid).register(0x8000_001F, 0, "eax")
    told = {kind: offered >> TYPES[kind] & 1 for kind in ("sev", "sev-es", "snp")}
    shown = {kind: eax >> bit & 1 for kind, bit in (("sev", 1), ("sev-es", 3), ("snp", 4))}
    assert all(shown[kind] or not there for kind, there in told.items()), (told, shown)


@pytest.mark.parametrize("kind", KINDS)
def test_init2_after_a_vcpu(bare: BareMaker, kind: str) -> None:
    """KVM_SEV_INIT2 comes before the first vCPU: EINVAL afterwards."""
    guest_vm = bare(kind, init=False, vcpus=1)
    assert guest_vm.raw("INIT2", kvm_sev_init()) == EINVAL


@pytest.mark.parametrize("kind", KINDS)
def test_init2_flags(bare: BareMaker, kind: str) -> None:
    """KVM_SEV_INIT2 has no flags: EINVAL, and the VM can still be initialised."""
    guest = bare(kind, init=False)
    for flag in (1 << bit for bit in range(32)):
        assert guest.raw("INIT2", kvm_sev_init(flags=flag)) == EINVAL
    assert guest.raw("INIT2", kvm_sev_init()) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_vmsa_features(kvm: Kvm, bare: BareMaker, kind: str) -> None:
    """VMSA features that KVM_X86_SEV_VMSA_FEATURES lacks give EINVAL, and all do so without ES."""
    offered = sev_platform.vmsa_features(kvm) if kind != "sev" else 0
    for bit in (bit for bit in range(64) if not offered >> bit & 1):
        assert (
            bare(kind, init=False, memory=False).raw("INIT2", kvm_sev_init(vmsa_features=1 << bit)) == EINVAL
        ), f"bit {bit}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_vmsa_feature_that_is_offered(kvm: Kvm, bare: BareMaker, kind: str) -> None:
    """DebugSwap is accepted with SEV-ES and SNP where it is offered, and refused everywhere else."""
    good = kind != "sev" and sev_platform.vmsa_features(kvm) & DEBUG_SWAP
    guest = bare(kind, init=False)
    assert guest.raw("INIT2", kvm_sev_init(vmsa_features=DEBUG_SWAP)) == ((0, 0) if good else EINVAL)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [1, 2, 3, 0xFFFF])
def test_ghcb_versions(bare: BareMaker, kind: str, version: int) -> None:
    """GHCB versions 1 and 2 are SEV-ES's, 2 alone SNP's; SEV has none, and nobody has a later one."""
    good = {"sev": (), "sev-es": (1, 2), "snp": (2,)}[kind]
    guest = bare(kind, init=False)
    assert guest.raw("INIT2", kvm_sev_init(ghcb_version=version)) == ((0, 0) if version in good else EINVAL)


@pytest.mark.parametrize("kind", KINDS)
def test_old_init_on_a_new_type(bare: BareMaker, kind: str) -> None:
    """KVM_SEV_INIT and ES_INIT are for VMs of the default type: EINVAL on others."""
    guest = bare(kind, init=False)
    for command in ("INIT", "ES_INIT"):
        assert guest.raw(command) == EINVAL


@needs_sev
@pytest.mark.parametrize("vm_type", [VmType.KVM_X86_DEFAULT_VM, VmType.KVM_X86_SW_PROTECTED_VM])
def test_init2_on_another_type(kvm: Kvm, vm_type: VmType) -> None:
    """KVM_SEV_INIT2 is for the SEV types: EINVAL on a default VM and on a software-protected one."""
    if not kvm.check_extension(KVM_CAP_VM_TYPES) >> vm_type & 1:
        pytest.skip(f"{vm_type.name} is not in KVM_CAP_VM_TYPES")
    with kvm.create_vm(vm_type) as vm:
        result = vm.sev.command_raw("INIT2", kvm_sev_init())
        assert (result.errno, result.firmware) == EINVAL


@pytest.mark.parametrize(
    "command", [pytest.param("INIT", marks=needs_sev), pytest.param("ES_INIT", marks=needs_es)]
)
def test_old_init(kvm: Kvm, command: str) -> None:
    """KVM_SEV_INIT and ES_INIT make a default VM a guest that can be launched; a second one gives EINVAL."""
    with kvm.create_vm() as vm:
        assert vm.sev.command_raw(command).ok
        for again in ("INIT", "ES_INIT"):
            assert vm.sev.command_raw(again).errno == errno.EINVAL
        policy = 4 if command == "ES_INIT" else 0
        assert vm.sev.command_raw("LAUNCH_START", kvm_sev_launch_start(policy=policy)).ok


@needs_sev
def test_old_init_after_a_vcpu(kvm: Kvm) -> None:
    """KVM_SEV_INIT comes before the first vCPU: EINVAL afterwards."""
    with kvm.create_vm() as vm:
        vm.create_vcpu()
        assert vm.sev.command_raw("INIT").errno == errno.EINVAL


@pytest.mark.parametrize("kind", KINDS)
def test_no_argument(bare: BareMaker, kind: str) -> None:
    """KVM_MEMORY_ENCRYPT_OP with a null pointer succeeds where SEV is on: the way to ask for it."""
    vm = bare(kind, init=False).vm
    assert vm.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_OP, 0) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pointer_to_nowhere(bare: BareMaker, kind: str) -> None:
    """The command and its data are read from user space: EFAULT where there is nothing."""
    guest = bare(kind, init=False)
    assert guest.vm.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_OP, 8) == (-1, errno.EFAULT)
    assert guest.raw("INIT2", 8) == (errno.EFAULT, 0)


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("number", [104, 1000, (1 << 32) - 1])
def test_unknown_commands(bare: BareMaker, kind: str, number: int) -> None:
    """A command that KVM does not know gives EINVAL."""
    assert bare(kind).raw(number) == EINVAL


@needs_snp
@pytest.mark.parametrize("name", [name for name, command in SEV_COMMANDS.items() if command.id < 100])
def test_commands_of_sev_on_snp(bare: BareMaker, name: str) -> None:
    """After KVM_SEV_INIT2 an SNP VM takes none of the commands of SEV and SEV-ES: EPERM."""
    assert bare("snp").raw(name) == (errno.EPERM, 0)


@pytest.mark.parametrize("kind", IN_PLACE)
def test_commands_of_snp_on_sev(bare: BareMaker, kind: str) -> None:
    """SNP commands on SEV and SEV-ES VMs: ENOTTY for START and FINISH, EINVAL for the others."""
    guest = bare(kind)
    assert guest.raw("SNP_LAUNCH_START", kvm_sev_snp_launch_start(policy=0x30000)) == (errno.ENOTTY, 0)
    assert guest.raw("SNP_LAUNCH_UPDATE") == EINVAL
    assert guest.raw("SNP_LAUNCH_FINISH") == (errno.ENOTTY, 0)
    assert guest.raw("SNP_ENABLE_REQ_CERTS") == EINVAL


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize(
    "command",
    [
        "LAUNCH_START",
        "LAUNCH_UPDATE_DATA",
        "LAUNCH_MEASURE",
        "LAUNCH_SECRET",
        "LAUNCH_FINISH",
        "GUEST_STATUS",
        "DBG_DECRYPT",
        "DBG_ENCRYPT",
        "GET_ATTESTATION_REPORT",
        "SEND_START",
        "RECEIVE_START",
    ],
)
def test_commands_before_init(bare: BareMaker, kind: str, command: str) -> None:
    """Before KVM_SEV_INIT2 a VM is no SEV guest: every other command gives ENOTTY."""
    assert bare(kind, init=False).raw(command) == (errno.ENOTTY, 0)


@pytest.mark.parametrize("command", ["SEND_UPDATE_VMSA", "RECEIVE_UPDATE_VMSA", "CERT_EXPORT"])
@needs_es
def test_commands_that_kvm_does_not_implement(bare: BareMaker, command: str) -> None:
    """Commands that have a number and no code give EINVAL."""
    assert bare("sev-es").raw(command) == EINVAL


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_no_secure_processor(bare: BareMaker, kind: str) -> None:
    """Commands for the firmware need /dev/sev: EBADF with a file that is closed or another one."""
    guest = bare(kind)
    name, arg = (
        ("SNP_LAUNCH_START", kvm_sev_snp_launch_start(policy=0x30000))
        if kind == "snp"
        else ("LAUNCH_START", kvm_sev_launch_start(policy=4 if kind == "sev-es" else 0))
    )
    # The context is created first, and that is what fails for SNP.
    wanted = errno.ENOTTY if kind == "snp" else errno.EBADF
    with open(os.devnull, "rb") as other:
        for fd in (other.fileno(), (1 << 32) - 1):
            result = guest.vm.sev.command_raw(name, arg, sev_fd=fd)
            assert (result.errno, result.firmware) == (wanted, 0)
    assert guest.vm.sev.command_raw(name, arg).ok


@pytest.mark.parametrize("kind", KINDS)
def test_asids_run_out_and_come_back(all_asids: Asids, kind: str) -> None:
    """KVM_SEV_INIT2 gives EBUSY when all ASIDs of the kind are taken, and works again when a VM is closed."""
    with all_asids.taken(TYPES[kind]) as (guests, refused):
        assert len(guests) > 0
        guests[0].close()
        assert refused.sev.command_raw("INIT2", kvm_sev_init()).ok


@pytest.mark.parametrize("kind", KINDS)
def test_the_limit_of_a_cgroup(all_asids: Asids, asids: Asids, kind: str) -> None:
    """KVM_SEV_INIT2 gives the same EBUSY when the cgroup's ``misc.max`` is reached.

    Documentation/admin-guide/cgroup-v2.rst, "Misc"; sev_asid_new() in Linux.
    """
    if not asids.bound:
        raise MissingError(
            "a cgroup of version 2 with the misc controller, which counts ASIDs",
            "root, CONFIG_CGROUP_MISC=y, and no cgroup of version 1 that has the controller",
        )
    if all_asids.count(TYPES[kind]) <= BOUND:
        raise MissingError(
            f"more than {BOUND} ASIDs for {kind}", "another `SEV-ES ASID space limit` in the firmware setup"
        )
    with asids.taken(TYPES[kind]) as (guests, refused):
        assert len(guests) == BOUND
        guests[0].close()
        assert refused.sev.command_raw("INIT2", kvm_sev_init()).ok
