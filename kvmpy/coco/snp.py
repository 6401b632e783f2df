# SPDX-License-Identifier: Apache-2.0
"""Protection ``snp``: SEV-SNP, encrypted memory and registers, private pages in a guest_memfd."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kvmpy.coco import ghcb, sev, sev_platform
from kvmpy.coco.fd_backed import FdBackedProtection
from kvmpy.coco.policy import SnpPolicy
from kvmpy.coco.snp_launch import HOST_DATA_SIZE, IdBlockPair, SnpInitialised, SnpRunning, cpuid_page
from kvmpy.coco.snp_prediction import predicted_id_block
from kvmpy.core.address import PAGE_SIZE, EncryptionBit, Gpa, Gva
from kvmpy.core.errors import PrivateMemoryError
from kvmpy.core.exits import Exit, SnpReqCertsExit
from kvmpy.core.kvm import Kvm
from kvmpy.guest import layout
from kvmpy.guest.errors import LaunchError
from kvmpy.guest.protection import Availability, Traits
from kvmpy.guest.vcpu import GuestVcpu
from kvmpy.guest.vm import GuestVm
from kvmpy.uapi import ffi
from kvmpy.uapi.constants import (
    KVM_SEV_SNP_PAGE_TYPE_CPUID,
    KVM_SEV_SNP_PAGE_TYPE_NORMAL,
    KVM_SEV_SNP_PAGE_TYPE_SECRETS,
    KVM_SEV_SNP_PAGE_TYPE_ZERO,
    SnpPageType,
    VmType,
)

_SOFTWARE = sev_platform.software_platform()
_ZERO_PAGE = bytes(PAGE_SIZE)


@dataclass(frozen=True)
class PlannedPages:
    """A part of a launch: *size* bytes at *gpa* of one page type.

    *source* is what they hold, a view of the host's copy; None where the type needs none.
    """

    gpa: Gpa
    size: int
    page_type: SnpPageType
    source: memoryview | None = field(repr=False)


@dataclass(frozen=True)
class SnpPlan:
    """What a launch is going to do, in order: the input of a predicted digest.

    *vmsa_features* as KVM puts them into each VMSA; the vCPUs follow the pages, in the order of creation.
    """

    policy: int
    pages: tuple[PlannedPages, ...]
    vmsa_features: int
    vcpus: int


IdBlockMaker = Callable[[GuestVm, SnpPlan], "IdBlockPair | None"]


class Snp(FdBackedProtection):
    """SEV-SNP.

    *policy*, *gosvw* go into LAUNCH_START, *host_data*, *vcek_disabled* and *id_block* into LAUNCH_FINISH.
    *id_block* may be a function that makes one from the launch's plan: by default one with the predicted
    digest, so that the firmware refuses a launch that measures anything else.  *req_certs* lets extended
    guest requests exit to user space, where the test answers them; with *certificates*, a table that
    ``cert_table.pack()`` makes, the VM answers by itself.
    """

    name = "snp"
    vm_type = int(VmType.KVM_X86_SNP_VM)
    label = sev_platform.SOFTWARE if _SOFTWARE else ""
    guest_sev = layout.SEV_ES | layout.SEV_SNP
    traits = Traits(
        has_encryption_bit=True,
        has_private_memory=True,
        can_read_registers=False,
        host_sees_private=False,
        private_is_fd_backed=True,
        emulator_reads_private=False,
        has_ghcb=True,
        must_validate=True,
        readonly_slots=False,
        really_encrypts=not _SOFTWARE,
        policies=("all",),
        emulated=_SOFTWARE,
    )

    def __init__(
        self,
        policy: SnpPolicy | int | None = None,
        *,
        vmsa_features: int = 0,
        ghcb_version: int = 0,
        gosvw: bytes = bytes(16),
        host_data: bytes = bytes(HOST_DATA_SIZE),
        vcek_disabled: bool = False,
        id_block: IdBlockPair | IdBlockMaker | None = predicted_id_block,
        req_certs: bool = False,
        certificates: bytes | None = None,
    ) -> None:
        self.policy = SnpPolicy() if policy is None else policy
        self.vmsa_features = vmsa_features
        self.ghcb_version = ghcb_version
        self.gosvw = gosvw
        self.host_data = host_data
        self.vcek_disabled = vcek_disabled
        self.id_block = id_block
        self.req_certs = req_certs or certificates is not None
        self.certificates = certificates

    @classmethod
    def availability(cls, kvm: Kvm) -> Availability:
        """Needs the VM type, guest_memfd, /dev/sev and a firmware that answers."""
        answer = sev.availability(kvm, VmType.KVM_X86_SNP_VM)
        missing = [
            *answer.missing,
            *cls.missing_capabilities(kvm, "a kernel with KVM_AMD_SEV, 6.11 or newer"),
        ]
        return Availability(not missing, tuple(missing), note=answer.note)

    def about_vcpu(self, vm: GuestVm, vcpu: GuestVcpu) -> Iterator[str]:
        """What the vCPU's GHCB holds."""
        return ghcb.about(vm, vcpu)

    def encryption_bit(self, kvm: Kvm) -> EncryptionBit:
        """The C-bit."""
        return sev.encryption_bit(kvm)

    def created(self, vm: GuestVm) -> None:
        """Make it an SNP guest (KVM_SEV_INIT2)."""
        super().created(vm)
        state = SnpInitialised.init2(vm, vmsa_features=self.vmsa_features, ghcb_version=self.ghcb_version)
        if self.req_certs:
            state.enable_req_certs()
        vm.launch_state = state

    def launch(self, vm: GuestVm) -> None:
        """Copy, encrypt and measure the private pages, then the vCPUs, and let the guest run."""
        state = vm.launch_state
        if not isinstance(state, SnpInitialised):
            raise LaunchError(f"{vm.name} is in state {type(state).__name__}, not ready to launch")
        plan = self.plan(vm)
        launching = state.start(self.policy, gosvw=self.gosvw)
        vm.launch_state = launching
        self.make_private(vm)
        for part in plan.pages:
            if part.page_type == KVM_SEV_SNP_PAGE_TYPE_CPUID and part.source is not None:
                launching.update_cpuid(part.gpa, bytes(part.source))
            elif part.source is None:
                launching.update(part.gpa, part.size, part.page_type)
            else:
                # lifetime: the staging memory lives until drop_staging().
                source = int(ffi.cast("uintptr_t", ffi.from_buffer(part.source)))
                launching.update(part.gpa, part.size, part.page_type, source)
        id_block = self.id_block(vm, plan) if callable(self.id_block) else self.id_block
        vm.launch_state = launching.finish(
            id_block=id_block, host_data=self.host_data, vcek_disabled=self.vcek_disabled
        )
        self.drop_staging(vm)

    def answer_exit(self, vm: GuestVm, exit_: Exit) -> bool:
        """Put the certificates where an extended guest request wants them (KVM_EXIT_SNP_REQ_CERTS).

        The guest is told how many pages it takes where it offers fewer, and of an error where its pages are
        no shared memory.
        """
        if self.certificates is None or not isinstance(exit_, SnpReqCertsExit):
            return False
        needed = -(-len(self.certificates) // PAGE_SIZE)
        if exit_.npages < needed:
            exit_.respond(errno.ENOSPC, needed)
            return True
        try:
            vm.memory.write(Gpa(exit_.gpa), self.certificates)
        except (ValueError, PrivateMemoryError):
            exit_.respond(errno.EIO)
        else:
            exit_.respond(0)
        return True

    def plan(self, vm: GuestVm) -> SnpPlan:
        """Return what launch() is going to do; adds the secrets and the CPUID page to the guest."""
        secrets, table = vm.allocator.alloc(1), vm.allocator.alloc(1)
        vm.map(Gva(layout.SNP_SECRETS_GVA), secrets, PAGE_SIZE, page_size=PAGE_SIZE, nx=True)
        vm.map(Gva(layout.SNP_CPUID_GVA), table, PAGE_SIZE, page_size=PAGE_SIZE, nx=True)
        vm.memory.write(table, cpuid_page(vm))
        special = {
            secrets.gfn: KVM_SEV_SNP_PAGE_TYPE_SECRETS,
            table.gfn: KVM_SEV_SNP_PAGE_TYPE_CPUID,
        }
        pages = [part for gpa, size in vm.private.image() for part in _split(vm, gpa, size, special)]
        return SnpPlan(
            policy=int(self.policy),
            pages=tuple(pages),
            vmsa_features=self.vmsa_features | 1,
            vcpus=len(vm.vcpus),
        )


def _split(vm: GuestVm, gpa: Gpa, size: int, special: dict[int, SnpPageType]) -> Iterator[PlannedPages]:
    """Split a run of private pages into runs of one page type."""
    view = vm.memory.private_view(gpa, size)
    start, kind = 0, None
    for offset in range(0, size, PAGE_SIZE):
        page = special.get((int(gpa) + offset) // PAGE_SIZE)
        if page is None:
            empty = view[offset : offset + PAGE_SIZE] == _ZERO_PAGE
            page = KVM_SEV_SNP_PAGE_TYPE_ZERO if empty else KVM_SEV_SNP_PAGE_TYPE_NORMAL
        if page is not kind and kind is not None:
            yield _part(gpa, view, start, offset, kind)
            start = offset
        kind = page
    if kind is not None:
        yield _part(gpa, view, start, size, kind)


def _part(gpa: Gpa, view: memoryview, start: int, end: int, kind: SnpPageType) -> PlannedPages:
    source = None if kind == KVM_SEV_SNP_PAGE_TYPE_ZERO else view[start:end]
    return PlannedPages(gpa + start, end - start, kind, source)


def running(vm: GuestVm) -> SnpRunning:
    """Return the launched SNP guest of *vm*."""
    state = vm.launch_state
    if not isinstance(state, SnpRunning):
        raise LaunchError(f"{vm.name} is not a launched SNP guest: {type(state).__name__}")
    return state


__all__ = ["IdBlockMaker", "PlannedPages", "Snp", "SnpPlan", "running"]
