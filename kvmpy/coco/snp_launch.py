# SPDX-License-Identifier: Apache-2.0
"""The launch of SNP guests: INIT2, SNP_LAUNCH_START, UPDATE and FINISH.

Documentation/virt/kvm/x86/amd-memory-encryption.rst in Linux; SEV Secure Nested Paging Firmware ABI, chapter
8.  Firmware states: GSTATE_LAUNCH (:class:`SnpLaunching`), GSTATE_RUNNING (:class:`SnpRunning`).
"""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass

from kvmpy.coco import snp_cpuid
from kvmpy.coco.launch_state import LaunchState
from kvmpy.coco.policy import SnpPolicy
from kvmpy.core.address import PAGE_SIZE, Gpa
from kvmpy.core.vm import Vm
from kvmpy.uapi import ffi
from kvmpy.uapi.constants import (
    KVM_SEV_SNP_ID_AUTH_SIZE,
    KVM_SEV_SNP_ID_BLOCK_SIZE,
    KVM_SEV_SNP_PAGE_TYPE_CPUID,
    KVM_SEV_SNP_PAGE_TYPE_ZERO,
    SevRet,
    SnpPageType,
)
from kvmpy.uapi.structs import (
    kvm_sev_init,
    kvm_sev_snp_launch_finish,
    kvm_sev_snp_launch_start,
    kvm_sev_snp_launch_update,
)

RETRY_SECONDS = 5.0
SILENT_RETRIES = 3
HOST_DATA_SIZE = 32


def _address(buffer: bytearray) -> int:
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))


@dataclass(frozen=True)
class IdBlockPair:
    """A signed ID block for LAUNCH_FINISH: 96 bytes, and the 4096 bytes that authenticate it.

    *author_key* says that an author key is part of *auth*.
    """

    block: bytes
    auth: bytes
    author_key: bool = False

    def __post_init__(self) -> None:
        if len(self.block) != KVM_SEV_SNP_ID_BLOCK_SIZE or len(self.auth) != KVM_SEV_SNP_ID_AUTH_SIZE:
            raise ValueError(
                f"an ID block has {int(KVM_SEV_SNP_ID_BLOCK_SIZE)} bytes and its authentication "
                f"{int(KVM_SEV_SNP_ID_AUTH_SIZE)}, not {len(self.block)} and {len(self.auth)}"
            )


class SnpInitialised(LaunchState):
    """KVM_SEV_INIT2 is done: the VM has an ASID."""

    @classmethod
    def init2(
        cls, vm: Vm, *, vmsa_features: int = 0, ghcb_version: int = 0, flags: int = 0
    ) -> SnpInitialised:
        """Prepare a VM of type SNP; before its vCPUs (KVM_SEV_INIT2).

        *vmsa_features*: those that KVM_X86_SEV_VMSA_FEATURES offers.  *ghcb_version* 0 leaves it to KVM.
        """
        arg = kvm_sev_init(vmsa_features=vmsa_features, ghcb_version=ghcb_version, flags=flags)
        vm.sev.command("INIT2", arg)
        return cls(vm)

    def enable_req_certs(self) -> SnpInitialised:
        """Let extended guest requests exit with KVM_EXIT_SNP_REQ_CERTS; before vCPUs.

        KVM_SEV_SNP_ENABLE_REQ_CERTS; KVM_X86_SEV_SNP_REQ_CERTS offers it.
        """
        self._check("enable_req_certs()")
        self.vm.sev.command("SNP_ENABLE_REQ_CERTS")
        return self

    def start(self, policy: SnpPolicy | int, *, gosvw: bytes = bytes(16), flags: int = 0) -> SnpLaunching:
        """Begin the launch (KVM_SEV_SNP_LAUNCH_START); *gosvw*: guest OS visible workarounds, 16 bytes."""
        self._check("start()")
        if len(gosvw) != 16:
            raise ValueError(f"gosvw has 16 bytes, not {len(gosvw)}")
        arg = kvm_sev_snp_launch_start(policy=int(policy), gosvw=list(gosvw), flags=flags)
        self.vm.sev.command("SNP_LAUNCH_START", arg)
        self._leave("start()")
        return SnpLaunching(self.vm, int(policy))


class SnpLaunching(LaunchState):
    """SNP_LAUNCH_START is done: pages go in."""

    def __init__(self, vm: Vm, policy: int) -> None:
        super().__init__(vm)
        self.policy = policy

    def update(self, gpa: Gpa, size: int, page_type: SnpPageType | int, source: int = 0) -> SnpLaunching:
        """Copy, encrypt and measure *size* bytes at *gpa* from the host address *source*.

        KVM_SEV_SNP_LAUNCH_UPDATE, again until the whole range is in, as KVM may do a part of it.  ZERO takes
        no source.  SevError names the page that failed and how far the range got.
        """
        self._check("update()")
        arg = kvm_sev_snp_launch_update(gfn_start=gpa.gfn, uaddr=source, len=size, type=int(page_type))
        until = time.monotonic() + RETRY_SECONDS
        silent = 0
        while True:
            before = int(arg.len)
            result = self.vm.sev.command_raw("SNP_LAUNCH_UPDATE", arg)
            retry = result.errno == errno.EAGAIN and time.monotonic() < until
            if result.errno == errno.EIO and not result.firmware and silent < SILENT_RETRIES:
                # A signal that waits for this thread ends in the same EIO as a page that is not ready.
                silent += 1
                retry = True
            if result.ok and not arg.len:
                return self
            if not retry and (not result.ok or int(arg.len) >= before):
                raise self.vm.sev.error(
                    "SNP_LAUNCH_UPDATE",
                    result,
                    arg,
                    gpa=int(arg.gfn_start) * PAGE_SIZE,
                    page_type=int(page_type),
                    done=size - int(arg.len),
                    size=size,
                )

    def update_bytes(self, gpa: Gpa, data: bytes, page_type: SnpPageType | int) -> SnpLaunching:
        """Copy, encrypt and measure *data* (whole pages) at *gpa*."""
        # An address inside, that begins a page: KVM takes no other.
        room = bytearray(len(data) + PAGE_SIZE)
        source = -(-_address(room) // PAGE_SIZE) * PAGE_SIZE
        # lifetime: `room` lives until the last command is done.
        ffi.memmove(ffi.cast("uint8_t *", source), data, len(data))
        self.update(gpa, len(data), page_type, source)
        del room
        return self

    def update_zero(self, gpa: Gpa, size: int) -> SnpLaunching:
        """Add zero pages, whose content is measured as such and needs no source."""
        return self.update(gpa, size, KVM_SEV_SNP_PAGE_TYPE_ZERO)

    def update_cpuid(self, gpa: Gpa, page: bytes) -> bytes:
        """Add the CPUID page; return it as the firmware accepted it.

        The firmware rejects values that the platform cannot vouch for and answers with its own: those are
        given back to it once.
        """
        self._check("update_cpuid()")
        room = bytearray(2 * PAGE_SIZE)
        source = -(-_address(room) // PAGE_SIZE) * PAGE_SIZE
        place = ffi.cast("uint8_t *", source)
        # lifetime: `room` lives until the last command is done.
        ffi.memmove(place, page, PAGE_SIZE)
        arg = kvm_sev_snp_launch_update(
            gfn_start=gpa.gfn, uaddr=source, len=PAGE_SIZE, type=int(KVM_SEV_SNP_PAGE_TYPE_CPUID)
        )
        result = self.vm.sev.command_raw("SNP_LAUNCH_UPDATE", arg)
        if result.firmware == SevRet.SEV_RET_INVALID_PARAM:
            self.update(gpa, PAGE_SIZE, KVM_SEV_SNP_PAGE_TYPE_CPUID, source)
        elif not result.ok or arg.len:
            raise self.vm.sev.error(
                "SNP_LAUNCH_UPDATE", result, arg, gpa=int(gpa), page_type=KVM_SEV_SNP_PAGE_TYPE_CPUID
            )
        accepted = bytes(ffi.buffer(place, PAGE_SIZE))
        del room
        return accepted

    def finish(
        self,
        *,
        id_block: IdBlockPair | None = None,
        host_data: bytes = bytes(HOST_DATA_SIZE),
        vcek_disabled: bool = False,
        flags: int = 0,
    ) -> SnpRunning:
        """Measure the vCPUs, check the ID block and end the launch (KVM_SEV_SNP_LAUNCH_FINISH).

        The firmware compares digest and policy with the *id_block* and refuses others.  *host_data*: 32 bytes
        that reports carry.  *vcek_disabled*: reports are signed with the VLEK alone.
        """
        self._check("finish()")
        if len(host_data) != HOST_DATA_SIZE:
            raise ValueError(f"host data has {HOST_DATA_SIZE} bytes, not {len(host_data)}")
        arg = kvm_sev_snp_launch_finish(host_data=list(host_data), vcek_disabled=vcek_disabled, flags=flags)
        # lifetime: both buffers live until the command is done.
        block = bytearray(id_block.block if id_block else b"")
        auth = bytearray(id_block.auth if id_block else b"")
        if id_block is not None:
            arg.id_block_en = 1
            arg.id_block_uaddr, arg.id_auth_uaddr = _address(block), _address(auth)
            arg.auth_key_en = id_block.author_key
        self.vm.sev.command("SNP_LAUNCH_FINISH", arg)
        self._leave("finish()")
        return SnpRunning(self.vm, self.policy, id_block)


class SnpRunning(LaunchState):
    """The guest may run."""

    def __init__(self, vm: Vm, policy: int, id_block: IdBlockPair | None) -> None:
        super().__init__(vm)
        self.policy = policy
        self.id_block = id_block


def cpuid_page(vm: Vm) -> bytes:
    """Return the CPUID page for *vm*, from the CPUID of its first vCPU, or of its KVM while it has none."""
    vcpus = vm.vcpus
    table = vcpus[0].cpuid.get() if vcpus else vm.kvm.supported_cpuid
    return snp_cpuid.pack(snp_cpuid.functions_of(table))
