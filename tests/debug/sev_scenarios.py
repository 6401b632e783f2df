# SPDX-License-Identifier: Apache-2.0
"""What the tests of records record of SEV, SEV-ES and SNP guests: launches, refusals, mirrors and moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from kvmpy import Kvm
from kvmpy.coco.policy import SevPolicy, SnpPolicy
from kvmpy.coco.sev_launch import SevInitialised, SevLaunching
from kvmpy.coco.sev_session import GuestOwner
from kvmpy.coco.snp import Snp, SnpPlan
from kvmpy.coco.snp_launch import IdBlockPair, SnpInitialised, SnpLaunching
from kvmpy.coco.snp_prediction import predicted_id_block
from kvmpy.core.address import PAGE_SIZE, Gpa
from kvmpy.core.backing import Inaccessible
from kvmpy.core.sev_device import SevDevice
from kvmpy.core.vm import Vm
from kvmpy.debug.record.tracker import address_of
from kvmpy.guest.program import GuestProgram
from kvmpy.guest.vm import GuestVm
from kvmpy.uapi.constants import (
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_SEV_SNP_PAGE_TYPE_CPUID,
    KVM_SEV_SNP_PAGE_TYPE_NORMAL,
    VmType,
)
from kvmpy.uapi.structs import (
    kvm_sev_launch_start,
    kvm_sev_snp_launch_update,
    sev_user_data_pek_cert_import,
)
from tests.debug.record_scenarios import COUNTER
from tests.debug.scenario import fails, scenario

MEMORY = Gpa(0x10_0000)
PAGES = 4


@contextmanager
def in_place(kvm: Kvm, es: bool = False, vcpus: int = 0) -> Iterator[tuple[Vm, SevInitialised]]:
    """Give an SEV or SEV-ES VM behind INIT2, with a little memory that is registered."""
    with kvm.create_vm(int(VmType.KVM_X86_SEV_ES_VM if es else VmType.KVM_X86_SEV_VM)) as vm:
        state = SevInitialised.init2(vm, es=es)
        slot = vm.add_slot(MEMORY, PAGES * PAGE_SIZE)
        vm.sev.reg_region(slot.hva, PAGES * PAGE_SIZE)
        if vcpus:
            vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
        for _ in range(vcpus):
            vm.create_vcpu().cpuid.set(kvm.supported_cpuid)
        yield vm, state


def started(state: SevInitialised) -> SevLaunching:
    """Begin the launch."""
    return state.start(SevPolicy(es=state.es))


@contextmanager
def snp(kvm: Kvm) -> Iterator[tuple[Vm, SnpLaunching]]:
    """Give an SNP VM behind SNP_LAUNCH_START, with a little private memory."""
    with kvm.create_vm(int(VmType.KVM_X86_SNP_VM)) as vm:
        state = SnpInitialised.init2(vm)
        vm.add_slot(MEMORY, PAGES * PAGE_SIZE, gmem=vm.create_guest_memfd(PAGES * PAGE_SIZE))
        vm.set_memory_attributes(int(MEMORY), (PAGES - 1) * PAGE_SIZE, KVM_MEMORY_ATTRIBUTE_PRIVATE)
        yield vm, state.start(SnpPolicy())


def program(kvm: Kvm, protection: str | Snp) -> None:
    """Launch a guest and let it run to DONE."""
    with kvm.create_vm(GuestProgram.from_c(COUNTER), protection=protection) as vm:
        vm.launch()
        assert [call.args[0] for call in vm.vcpus[0].syncs()] == [0, 1, 2]


# Guests that run.


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_IO", needs="sev")
def sev_program(kvm: Kvm) -> None:
    """A guest program in memory that was encrypted in place, with a session and a measurement."""
    program(kvm, "sev")


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_IO", needs="sev-es")
def sev_es_program(kvm: Kvm) -> None:
    """The same with encrypted registers: the guest talks through its GHCB."""
    program(kvm, "sev-es")


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_IO", needs="snp")
def snp_program(kvm: Kvm) -> None:
    """A guest program in a guest_memfd, page by page measured against its ID block."""
    program(kvm, "snp")


@scenario("KVM_GET_SREGS on vcpu0 fails with EINVAL", needs="sev-es")
def sev_es_registers(kvm: Kvm) -> None:
    """Registers of a guest whose registers are its own."""
    with kvm.create_vm(GuestProgram.from_c(COUNTER), protection="sev-es") as vm:
        vm.launch()
        fails(vm.vcpus[0].regs.get_sregs)


# Launches that are refused.


@scenario("KVM_SEV_INIT on vm fails with EINVAL", needs="sev")
def sev_init_twice(kvm: Kvm) -> None:
    """A default VM that is made a guest twice."""
    with kvm.create_vm() as vm:
        SevInitialised.legacy_init(vm, es=False)
        fails(lambda: SevInitialised.legacy_init(vm, es=False))


@scenario("KVM_SEV_LAUNCH_START on vm fails with EIO, firmware status SEV_RET_INVALID_ASID", needs="sev")
def sev_policy(kvm: Kvm) -> None:
    """A policy of SEV-ES for a guest without."""
    with in_place(kvm) as (_, state):
        fails(lambda: state.start(SevPolicy(es=True)))


@scenario("KVM_SEV_LAUNCH_START on vm fails with EIO, firmware status SEV_RET_BAD_MEASUREMENT", needs="sev")
def sev_session(kvm: Kvm) -> None:
    """A session whose keys another owner wrapped, behind pointers of the argument."""
    with SevDevice() as device:
        pdh, _ = device.pdh_cert_export()
    policy = SevPolicy()
    session = GuestOwner().session(pdh, int(policy))
    with in_place(kvm) as (_, state):
        fails(lambda: state.start(policy, dh_certificate=GuestOwner().certificate(), session=session))


@scenario("KVM_SEV_LAUNCH_FINISH on vm fails with EIO, firmware status SEV_RET_INVALID_GUEST_STATE",
          needs="sev")  # fmt: skip
def sev_finish_early(kvm: Kvm) -> None:
    """The end of a launch that was not measured."""
    with in_place(kvm) as (vm, state):
        vm.memory.write(MEMORY, b"\x5a" * PAGE_SIZE)
        started(state).update_data(MEMORY, PAGE_SIZE)
        fails(lambda: vm.sev.command("LAUNCH_FINISH"))


@scenario("KVM_SEV_LAUNCH_UPDATE_VMSA on vm fails with ENOTTY", needs="sev")
def sev_vmsa(kvm: Kvm) -> None:
    """Encrypted registers of a guest that has none."""
    with in_place(kvm) as (vm, state):
        started(state)
        fails(lambda: vm.sev.command("LAUNCH_UPDATE_VMSA"))


@scenario("KVM_SEV_LAUNCH_SECRET on vm fails with EIO, firmware status SEV_RET_BAD_MEASUREMENT", needs="sev")
def sev_secret(kvm: Kvm) -> None:
    """A secret that its owner sealed for another launch."""
    with SevDevice() as device:
        pdh, _ = device.pdh_cert_export()
    owner, policy = GuestOwner(), SevPolicy()
    with in_place(kvm) as (_, state):
        launching = state.start(
            policy, dh_certificate=owner.certificate(), session=owner.session(pdh, int(policy))
        )
        measured = launching.update_data(MEMORY, PAGE_SIZE).measure()
        header, data = owner.secret(b"a secret of 32 bytes, no more...", bytes(48))
        fails(lambda: measured.secret(MEMORY, header, data))


@scenario("KVM_SEV_DBG_ENCRYPT on vm returns 0", needs="sev")
def sev_dbg(kvm: Kvm) -> None:
    """A debugger's write into a guest's memory."""
    with in_place(kvm) as (_, state):
        launching = started(state)
        launching.update_data(MEMORY, PAGE_SIZE)
        launching.dbg_encrypt(MEMORY + 0x20, b"debugger" * 4)


@scenario("KVM_SEV_SNP_LAUNCH_START on vm fails with EINVAL", needs="snp")
def snp_policy(kvm: Kvm) -> None:
    """A policy without the bit that must be one."""
    with kvm.create_vm(int(VmType.KVM_X86_SNP_VM)) as vm:
        state = SnpInitialised.init2(vm)
        fails(lambda: state.start(0))


@scenario("KVM_SEV_SNP_LAUNCH_UPDATE on vm fails with EINVAL", needs="snp")
def snp_page_type(kvm: Kvm) -> None:
    """A page of a type that user space has not."""
    with snp(kvm) as (_, launching):
        source = Inaccessible().map(PAGE_SIZE)
        fails(lambda: launching.update(MEMORY, PAGE_SIZE, 2, source.hva))
        source.close()


@scenario("KVM_SEV_SNP_LAUNCH_UPDATE on vm fails with EIO", needs="snp")
def snp_shared_page(kvm: Kvm) -> None:
    """Two pages that are private, and one that is not: KVM does what comes before."""
    with snp(kvm) as (_, launching):
        launching.update_bytes(MEMORY, bytes(PAGE_SIZE - 1) + b"\1", KVM_SEV_SNP_PAGE_TYPE_NORMAL)
        last = MEMORY + (PAGES - 1) * PAGE_SIZE
        fails(lambda: launching.update_bytes(last, b"\2" * PAGE_SIZE, KVM_SEV_SNP_PAGE_TYPE_NORMAL))


@scenario("KVM_SEV_SNP_LAUNCH_UPDATE on vm fails with EIO", needs="snp")
def snp_source(kvm: Kvm) -> None:
    """A source that nobody can read."""
    with snp(kvm) as (vm, _):
        source = Inaccessible().map(PAGE_SIZE)
        arg = kvm_sev_snp_launch_update(
            gfn_start=MEMORY.gfn, uaddr=source.hva, len=PAGE_SIZE, type=KVM_SEV_SNP_PAGE_TYPE_NORMAL
        )
        fails(lambda: vm.sev.command("SNP_LAUNCH_UPDATE", arg))
        source.close()


@scenario("KVM_SEV_SNP_LAUNCH_UPDATE on vm fails with EIO, firmware status SEV_RET_INVALID_PARAM",
          needs="snp")  # fmt: skip
def snp_cpuid(kvm: Kvm) -> None:
    """A CPUID page with more functions than there is room for."""
    with snp(kvm) as (_, launching):
        table = (65).to_bytes(4, "little").ljust(PAGE_SIZE, b"\0")
        fails(lambda: launching.update_bytes(MEMORY, table, KVM_SEV_SNP_PAGE_TYPE_CPUID))


@scenario("KVM_SEV_SNP_LAUNCH_FINISH on vm fails with EIO, firmware status SEV_RET_BAD_MEASUREMENT",
          needs="snp")  # fmt: skip
def snp_id_block(kvm: Kvm) -> None:
    """An ID block of another launch."""

    def another(vm: GuestVm, plan: SnpPlan) -> IdBlockPair | None:
        return predicted_id_block(vm, replace(plan, pages=plan.pages[1:]))

    with kvm.create_vm(GuestProgram.from_c(COUNTER), protection=Snp(id_block=another)) as vm:
        fails(vm.launch)


# Mirrors and moves.


@scenario("KVM_SEV_LAUNCH_START on vm1 fails with EINVAL", needs="sev")
def sev_mirror(kvm: Kvm) -> None:
    """A mirror that tries to launch."""
    with in_place(kvm) as (owner, state), kvm.create_vm(int(VmType.KVM_X86_SEV_VM)) as mirror:
        started(state)
        mirror.sev.copy_enc_context_from(owner)
        fails(lambda: mirror.sev.command("LAUNCH_START", kvm_sev_launch_start(policy=1)))


@scenario("KVM_ENABLE_CAP on vm1 returns 0", needs="sev-es")
def sev_es_move(kvm: Kvm) -> None:
    """A launched guest that moves to another VM with as many vCPUs."""
    with (
        in_place(kvm, es=True, vcpus=1) as (source, state),
        kvm.create_vm(int(VmType.KVM_X86_SEV_ES_VM)) as target,
    ):
        started(state).update_vmsa().measure().finish()
        target.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
        target.create_vcpu().cpuid.set(kvm.supported_cpuid)
        target.sev.move_enc_context_from(source)


# The platform.


@scenario("SEV_PEK_CERT_IMPORT on sev fails with EIO, firmware status SEV_RET_INVALID_CERTIFICATE",
          needs="sev")  # fmt: skip
def sev_certificates(kvm: Kvm) -> None:
    """Certificates that are none, behind pointers of a command of /dev/sev."""
    with SevDevice() as device:
        pek, oca = bytearray(b"\x50" * 0x824), bytearray(b"\x4f" * 0x824)
        # lifetime: both buffers live until the command is done.
        arg = sev_user_data_pek_cert_import(
            pek_cert_address=address_of(memoryview(pek)),
            pek_cert_len=len(pek),
            oca_cert_address=address_of(memoryview(oca)),
            oca_cert_len=len(oca),
        )
        fails(lambda: device.command("SEV_PEK_CERT_IMPORT", arg))
