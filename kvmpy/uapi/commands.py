# SPDX-License-Identifier: Apache-2.0
"""Commands that are told apart inside an ioctl's argument: KVM's SEV and TDX commands, those of /dev/sev."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from kvmpy.uapi.buffer_type import Buffer, DataKind, Size, bytes_at, fixed_at, struct_at
from kvmpy.uapi.constants.coco import SevCmd, SevPlatformCmd, SnpSize, TdxCmd

Family = Literal["sev", "es", "snp", "tdx", "platform"]


@dataclass(frozen=True, slots=True)
class Command:
    """One command: ``id`` goes into the command field, ``data`` points to ``struct``.

    ``arg`` says what the kernel does to that struct, ``families`` which guests take the command.  One that
    the kernel numbers but does not carry out has ``implemented`` False and ends in EINVAL.  ``asks``: without
    it guest and firmware would be in the same state.  ``pointers`` are what the struct's pointers lead to;
    ``fills``: of the struct the kernel reads no more than the count, and fills the entries.
    """

    name: str
    id: int
    struct: str | None
    arg: DataKind
    families: tuple[Family, ...]
    doc: str
    implemented: bool = True
    asks: bool = False
    pointers: tuple[Buffer, ...] = field(default=(), compare=False, repr=False)
    fills: bool = False

    def __str__(self) -> str:
        return self.name


class SevCommand(Command):
    """A command of KVM_MEMORY_ENCRYPT_OP (struct kvm_sev_cmd) on SEV, SEV-ES and SEV-SNP VMs."""

    __slots__ = ()


class SevPlatformCommand(Command):
    """A command of SEV_ISSUE_CMD (struct sev_issue_cmd) on /dev/sev."""

    __slots__ = ()


class TdxCommand(Command):
    """A command of KVM_MEMORY_ENCRYPT_OP (struct kvm_tdx_cmd) on TDX VMs and their vCPUs."""

    __slots__ = ()


_SEV: tuple[Family, ...] = ("sev", "es")
_ES: tuple[Family, ...] = ("es",)
_SNP: tuple[Family, ...] = ("snp",)
_ALL: tuple[Family, ...] = ("sev", "es", "snp")
_TDX: tuple[Family, ...] = ("tdx",)
_PLATFORM: tuple[Family, ...] = ("platform",)


def _sev(
    id: SevCmd,  # noqa: A002
    struct: str | None,
    arg: DataKind,
    families: tuple[Family, ...],
    doc: str,
    **more: Any,
) -> SevCommand:
    return SevCommand(id.name, int(id), struct, arg, families, doc, **more)


def _platform(
    id: SevPlatformCmd,  # noqa: A002
    struct: str | None,
    arg: DataKind,
    doc: str,
    **more: Any,
) -> SevPlatformCommand:
    return SevPlatformCommand(id.name, int(id), struct, arg, _PLATFORM, doc, **more)


def _tdx(id: TdxCmd, struct: str | None, arg: DataKind, doc: str, **more: Any) -> TdxCommand:  # noqa: A002
    return TdxCommand(id.name, int(id), struct, arg, _TDX, doc, **more)


# fmt: off
_SEV_ROWS: Iterable[SevCommand] = (
    _sev(SevCmd.KVM_SEV_INIT, None, "none", ("sev",), "Make the VM (type 0) an SEV guest."),
    _sev(SevCmd.KVM_SEV_ES_INIT, None, "none", _ES, "Make the VM (type 0) an SEV-ES guest."),
    _sev(SevCmd.KVM_SEV_LAUNCH_START, "kvm_sev_launch_start", "inout", _SEV,
        "Begin a launch; returns the handle.",
        pointers=(bytes_at("dh_uaddr", "dh_len", "in"), bytes_at("session_uaddr", "session_len", "in"))),
    _sev(SevCmd.KVM_SEV_LAUNCH_UPDATE_DATA, "kvm_sev_launch_update_data", "in", _SEV,
        "Encrypt and measure memory in place.", pointers=(bytes_at("uaddr", "len", "inout", guest=True),)),
    _sev(SevCmd.KVM_SEV_LAUNCH_UPDATE_VMSA, None, "none", _ES,
        "Encrypt and measure the state of all vCPUs."),
    _sev(SevCmd.KVM_SEV_LAUNCH_SECRET, "kvm_sev_launch_secret", "in", _SEV,
        "Inject a secret into guest memory.",
        pointers=(
            bytes_at("hdr_uaddr", "hdr_len", "in"),
            bytes_at("guest_uaddr", "guest_len", "inout", guest=True),
            bytes_at("trans_uaddr", "trans_len", "in"),
        )),
    _sev(SevCmd.KVM_SEV_LAUNCH_MEASURE, "kvm_sev_launch_measure", "inout", _SEV,
        "Read the launch measurement.", pointers=(bytes_at("uaddr", "len", "out"),)),
    _sev(SevCmd.KVM_SEV_LAUNCH_FINISH, None, "none", _SEV, "End the launch: the guest may run."),
    _sev(SevCmd.KVM_SEV_SEND_START, "kvm_sev_send_start", "inout", _SEV, "Begin to send the guest away.",
        pointers=(
            bytes_at("pdh_cert_uaddr", "pdh_cert_len", "in"),
            bytes_at("plat_certs_uaddr", "plat_certs_len", "in"),
            bytes_at("amd_certs_uaddr", "amd_certs_len", "in"),
            bytes_at("session_uaddr", "session_len", "out"),
        )),
    _sev(SevCmd.KVM_SEV_SEND_UPDATE_DATA, "kvm_sev_send_update_data", "inout", _SEV,
        "Encrypt guest memory for transport.",
        pointers=(
            bytes_at("hdr_uaddr", "hdr_len", "out"),
            bytes_at("guest_uaddr", "guest_len", "in", guest=True),
            bytes_at("trans_uaddr", "trans_len", "out"),
        )),
    _sev(SevCmd.KVM_SEV_SEND_UPDATE_VMSA, None, "none", _ES, "Encrypt vCPU state for transport.",
        implemented=False),
    _sev(SevCmd.KVM_SEV_SEND_FINISH, None, "none", _SEV, "End sending."),
    _sev(SevCmd.KVM_SEV_RECEIVE_START, "kvm_sev_receive_start", "inout", _SEV, "Begin to receive a guest.",
        pointers=(bytes_at("pdh_uaddr", "pdh_len", "in"), bytes_at("session_uaddr", "session_len", "in"))),
    _sev(SevCmd.KVM_SEV_RECEIVE_UPDATE_DATA, "kvm_sev_receive_update_data", "in", _SEV,
        "Decrypt transported memory into the guest.",
        pointers=(
            bytes_at("hdr_uaddr", "hdr_len", "in"),
            bytes_at("guest_uaddr", "guest_len", "inout", guest=True),
            bytes_at("trans_uaddr", "trans_len", "in"),
        )),
    _sev(SevCmd.KVM_SEV_RECEIVE_UPDATE_VMSA, None, "none", _ES, "Decrypt transported vCPU state.",
        implemented=False),
    _sev(SevCmd.KVM_SEV_RECEIVE_FINISH, None, "none", _SEV, "End receiving: the guest may run."),
    _sev(SevCmd.KVM_SEV_GUEST_STATUS, "kvm_sev_guest_status", "out", _SEV, "Read handle, policy and state.",
        asks=True),
    _sev(SevCmd.KVM_SEV_DBG_DECRYPT, "kvm_sev_dbg", "in", _SEV,
        "Decrypt guest memory, where the policy allows.",
        pointers=(
            bytes_at("src_uaddr", "len", "in", guest=True),
            bytes_at("dst_uaddr", "len", "out", placed=True),
        )),
    _sev(SevCmd.KVM_SEV_DBG_ENCRYPT, "kvm_sev_dbg", "in", _SEV,
        "Encrypt into guest memory, where the policy allows.",
        pointers=(
            bytes_at("src_uaddr", "len", "in", placed=True),
            bytes_at("dst_uaddr", "len", "inout", guest=True),
        )),
    _sev(SevCmd.KVM_SEV_CERT_EXPORT, None, "none", _SEV, "Export certificates.", implemented=False),
    _sev(SevCmd.KVM_SEV_GET_ATTESTATION_REPORT, "kvm_sev_attestation_report", "inout", _SEV,
        "Read an attestation report of the guest.", asks=True, pointers=(bytes_at("uaddr", "len", "out"),)),
    _sev(SevCmd.KVM_SEV_SEND_CANCEL, None, "none", _SEV, "Give up sending; the guest runs on here."),
    _sev(SevCmd.KVM_SEV_INIT2, "kvm_sev_init", "in", _ALL, "Prepare a VM of type SEV, SEV-ES or SNP."),
    _sev(SevCmd.KVM_SEV_SNP_LAUNCH_START, "kvm_sev_snp_launch_start", "in", _SNP, "Begin an SNP launch."),
    # The source may be written, too: a CPUID page that the firmware corrected.
    _sev(SevCmd.KVM_SEV_SNP_LAUNCH_UPDATE, "kvm_sev_snp_launch_update", "inout", _SNP,
        "Add pages to the guest and measure them; may do part of the range.",
        pointers=(bytes_at("uaddr", "len", "inout"),)),
    _sev(SevCmd.KVM_SEV_SNP_LAUNCH_FINISH, "kvm_sev_snp_launch_finish", "in", _SNP,
        "Measure the vCPUs, check the ID block and end the launch.",
        pointers=(
            fixed_at("id_block_uaddr", SnpSize.KVM_SEV_SNP_ID_BLOCK_SIZE, "in", "id_block_en"),
            fixed_at("id_auth_uaddr", SnpSize.KVM_SEV_SNP_ID_AUTH_SIZE, "in", "id_block_en"),
        )),
    _sev(SevCmd.KVM_SEV_SNP_ENABLE_REQ_CERTS, None, "none", _SNP,
        "Let extended guest requests exit with KVM_EXIT_SNP_REQ_CERTS."),
)

_PLATFORM_ROWS: Iterable[SevPlatformCommand] = (
    _platform(SevPlatformCmd.SEV_FACTORY_RESET, None, "none",
        "Reset the platform to its state of delivery."),
    _platform(SevPlatformCmd.SEV_PLATFORM_STATUS, "sev_user_data_status", "out", "Read version and state.",
        asks=True),
    _platform(SevPlatformCmd.SEV_PEK_GEN, None, "none", "Make a new platform endorsement key."),
    _platform(SevPlatformCmd.SEV_PEK_CSR, "sev_user_data_pek_csr", "inout",
        "Read a signing request for the key.", pointers=(bytes_at("address", "length", "out"),)),
    _platform(SevPlatformCmd.SEV_PDH_GEN, None, "none", "Make a new Diffie-Hellman key."),
    _platform(SevPlatformCmd.SEV_PDH_CERT_EXPORT, "sev_user_data_pdh_cert_export", "inout",
        "Read the Diffie-Hellman certificate and its chain.", asks=True,
        pointers=(
            bytes_at("pdh_cert_address", "pdh_cert_len", "out"),
            bytes_at("cert_chain_address", "cert_chain_len", "out"),
        )),
    _platform(SevPlatformCmd.SEV_PEK_CERT_IMPORT, "sev_user_data_pek_cert_import", "in",
        "Install a signed certificate.",
        pointers=(
            bytes_at("pek_cert_address", "pek_cert_len", "in"),
            bytes_at("oca_cert_address", "oca_cert_len", "in"),
        )),
    _platform(SevPlatformCmd.SEV_GET_ID, "sev_user_data_get_id", "out", "Read the chip ids (old form).",
        asks=True),
    _platform(SevPlatformCmd.SEV_GET_ID2, "sev_user_data_get_id2", "inout", "Read the chip id.", asks=True,
        pointers=(bytes_at("address", "length", "out"),)),
    _platform(SevPlatformCmd.SNP_PLATFORM_STATUS, "sev_user_data_snp_status", "out",
        "Read SNP version and state.", asks=True),
    _platform(SevPlatformCmd.SNP_COMMIT, None, "none",
        "Commit the running firmware: no way back to an older one."),
    _platform(SevPlatformCmd.SNP_SET_CONFIG, "sev_user_data_snp_config", "in",
        "Set the TCB version to report."),
    _platform(SevPlatformCmd.SNP_VLEK_LOAD, "sev_user_data_snp_vlek_load", "in", "Load a wrapped VLEK.",
        pointers=(
            struct_at("sev_user_data_snp_wrapped_vlek_hashstick", "in", pointer="vlek_wrapped_address"),
        )),
)

_TDX_ROWS: Iterable[TdxCommand] = (
    _tdx(TdxCmd.KVM_TDX_CAPABILITIES, "kvm_tdx_capabilities", "inout", "Read what the TDX module offers.",
        fills=True),
    _tdx(TdxCmd.KVM_TDX_INIT_VM, "kvm_tdx_init_vm", "in", "Make the VM a trust domain."),
    _tdx(TdxCmd.KVM_TDX_INIT_VCPU, None, "none",
        "Make the vCPU one of the trust domain; data is the initial RCX."),
    _tdx(TdxCmd.KVM_TDX_INIT_MEM_REGION, "kvm_tdx_init_mem_region", "inout",
        "Add and measure memory (vCPU).",
        pointers=(Buffer(None, "in", Size(count="nr_pages", unit=4096), "source_addr"),)),
    _tdx(TdxCmd.KVM_TDX_FINALIZE_VM, None, "none", "End the build: the trust domain may run."),
    _tdx(TdxCmd.KVM_TDX_GET_CPUID, "kvm_cpuid2", "inout", "Read the CPUID that the vCPU sees (vCPU).",
        fills=True),
)
# fmt: on

SEV_COMMANDS: dict[str, SevCommand] = {row.name: row for row in _SEV_ROWS}
SEV_PLATFORM_COMMANDS: dict[str, SevPlatformCommand] = {row.name: row for row in _PLATFORM_ROWS}
TDX_COMMANDS: dict[str, TdxCommand] = {row.name: row for row in _TDX_ROWS}
