# SPDX-License-Identifier: Apache-2.0
"""The device of the AMD secure processor, /dev/sev: status, versions, certificates, configuration."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass

from kvmpy.core.errors import DeadProcessorError, MissingError, errno_name
from kvmpy.core.fd import KvmFd
from kvmpy.core.sev_errors import SevError, SevResult
from kvmpy.uapi import ffi, ioctls
from kvmpy.uapi.commands import SEV_PLATFORM_COMMANDS, SevPlatformCommand
from kvmpy.uapi.constants import SEV_STATUS_FLAGS_CONFIG_ES, SevRet
from kvmpy.uapi.structs import (
    Struct,
    sev_issue_cmd,
    sev_user_data_get_id2,
    sev_user_data_pdh_cert_export,
    sev_user_data_snp_config,
    sev_user_data_snp_status,
    sev_user_data_status,
)

# What a command comes back with that timed out, and what every later one does: `psp_dead` in ccp's sev-dev.c.
_UNANSWERED = (errno.ETIMEDOUT, errno.EBUSY)
# States of the platform (SEV API, PLATFORM_STATUS).
_STATES = {0: "uninitialised", 1: "initialised", 2: "working"}


def sev_device_path() -> str:
    """Return the path of the secure processor's device: ``$KVMPY_DEV_SEV`` or /dev/sev."""
    return os.environ.get("KVMPY_DEV_SEV") or "/dev/sev"


def explain_sev_open_failure(path: str, error: OSError) -> MissingError:
    """Return why *path* cannot be opened, and what helps."""
    if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return MissingError(
            f"{path} does not exist",
            "the driver ccp (CONFIG_CRYPTO_DEV_SP_PSP) finds no secure processor: enable SEV in the firmware "
            "setup (SMEE, SEV-SNP support) and look at `dmesg | grep -i ccp`",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return MissingError(
            f"no permission to open {path} for reading and writing",
            'run as root, or give it to a group: echo \'KERNEL=="sev", GROUP="kvm", MODE="0660"\' > '
            "/etc/udev/rules.d/65-sev.rules && udevadm trigger",
        )
    return MissingError(f"{path} cannot be opened: {error.strerror}", "see dmesg")


def check_processor(because: str) -> None:
    """Ask the secure processor for its status; DeadProcessorError when it answers no more.

    After a command that timed out (100 s) ccp refuses every other one with EBUSY until the next boot:
    __sev_do_cmd_locked() in drivers/crypto/ccp/sev-dev.c.  *because* says why somebody asks.
    """
    # Without a device, or a descriptor to open it with, there is no telling.
    with suppress(MissingError, OSError), SevDevice() as device:
        number = device.command_raw("SEV_PLATFORM_STATUS", sev_user_data_status()).errno
        if number in _UNANSWERED:
            raise DeadProcessorError(f"{because}, and SEV_PLATFORM_STATUS with {errno_name(number)}")


@dataclass(frozen=True)
class PlatformStatus:
    """What SEV_PLATFORM_STATUS says: API version, *build*, *state* in words, guests, SEV-ES set up or not."""

    api_major: int
    api_minor: int
    build: int
    state: str
    guests: int
    es: bool

    @property
    def version(self) -> str:
        """The firmware's version as ``1.55.40``."""
        return f"{self.api_major}.{self.api_minor}.{self.build}"


class SevDevice(KvmFd):
    """/dev/sev; MissingError when it is absent or may not be opened."""

    kind = "sev"

    def __init__(self, path: str | None = None) -> None:
        self.path = path or sev_device_path()
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            raise explain_sev_open_failure(self.path, error) from error
        super().__init__(fd, "sev")

    def command_raw(
        self, command: SevPlatformCommand | str | int, arg: Struct | int | None = None
    ) -> SevResult:
        """Issue a platform command and return how it came back, failed or not (SEV_ISSUE_CMD)."""
        number = self._find(command).id
        data = 0
        if isinstance(arg, Struct):
            # lifetime: the caller's struct lives until the ioctl is done.
            data = int(ffi.cast("uintptr_t", arg.cdata))
        elif arg is not None:
            data = int(arg)
        call = sev_issue_cmd(cmd=number, data=data)
        result, failure = self.ioctl_raw(ioctls.SEV_ISSUE_CMD, call)
        return SevResult(result, failure, int(call.error))

    def command(self, command: SevPlatformCommand | str | int, arg: Struct | int | None = None) -> None:
        """Issue a platform command; SevError when the ioctl or the firmware reports an error.

        DeadProcessorError where it came back as every command does after one that timed out.
        """
        op = self._find(command)
        result = self.command_raw(op, arg)
        if result.errno in _UNANSWERED:
            check_processor(f"{op} came back with {errno_name(result.errno)}")
        if not result.ok:
            raise SevError(
                ioctls.SEV_ISSUE_CMD, op, result, self.path, arg if isinstance(arg, Struct) else None
            )

    @staticmethod
    def _find(command: SevPlatformCommand | str | int) -> SevPlatformCommand:
        if isinstance(command, SevPlatformCommand):
            return command
        if isinstance(command, str):
            if command not in SEV_PLATFORM_COMMANDS:
                raise ValueError(f"no platform command named {command!r}")
            return SEV_PLATFORM_COMMANDS[command]
        for known in SEV_PLATFORM_COMMANDS.values():
            if known.id == command:
                return known
        return SevPlatformCommand(
            f"platform command {command}", int(command), None, "none", ("platform",), "Unknown.", False
        )

    def platform_status(self) -> PlatformStatus:
        """Return version, state and guest count of the platform (SEV_PLATFORM_STATUS)."""
        arg = sev_user_data_status()
        self.command("SEV_PLATFORM_STATUS", arg)
        return PlatformStatus(
            api_major=int(arg.api_major),
            api_minor=int(arg.api_minor),
            build=int(arg.build),
            state=_STATES.get(int(arg.state), f"state {arg.state}"),
            guests=int(arg.guest_count),
            es=bool(arg.flags & SEV_STATUS_FLAGS_CONFIG_ES),
        )

    def snp_platform_status(self) -> sev_user_data_snp_status:
        """Return SNP's versions, TCB and guest count (SNP_PLATFORM_STATUS; EINVAL/ENODEV without SNP)."""
        arg = sev_user_data_snp_status()
        self.command("SNP_PLATFORM_STATUS", arg)
        return arg

    def snp_set_config(self, config: sev_user_data_snp_config) -> None:
        """Set the TCB version to report and what attestation reports mask (SNP_SET_CONFIG).

        For whoever may write /dev/sev: sev_ioctl_do_snp_set_config() in Linux asks for nothing else.
        """
        self.command("SNP_SET_CONFIG", config)

    def snp_commit(self) -> None:
        """Commit the running firmware; there is no way back to an older one (SNP_COMMIT).

        For whoever may open /dev/sev, even for reading: sev_ioctl_do_snp_commit() in Linux.
        """
        self.command("SNP_COMMIT")

    def get_id(self) -> bytes:
        """Return the chip's unique id (SEV_GET_ID2)."""
        arg = sev_user_data_get_id2()
        # Asked without a buffer, the firmware tells the length.
        self.command_raw("SEV_GET_ID2", arg)
        place = ffi.new("uint8_t[]", int(arg.length) or 1)
        # lifetime: `place` lives until the bytes are copied out.
        arg.address = int(ffi.cast("uintptr_t", place))
        self.command("SEV_GET_ID2", arg)
        return bytes(ffi.buffer(place, int(arg.length)))

    def pdh_cert_export(self) -> tuple[bytes, bytes]:
        """Return the platform's Diffie-Hellman certificate and its chain (SEV_PDH_CERT_EXPORT).

        Sessions of SEV launches are made against this key.  With ccp.psp_init_on_probe=0 and no guest
        each of the two commands initialises the platform and shuts it down again, SNP too.
        """
        arg = sev_user_data_pdh_cert_export()
        asked = self.command_raw("SEV_PDH_CERT_EXPORT", arg)
        if asked.firmware not in (0, SevRet.SEV_RET_INVALID_LEN) or not arg.pdh_cert_len:
            raise SevError(ioctls.SEV_ISSUE_CMD, self._find("SEV_PDH_CERT_EXPORT"), asked, self.path, arg)
        pdh = ffi.new("uint8_t[]", int(arg.pdh_cert_len))
        chain = ffi.new("uint8_t[]", int(arg.cert_chain_len))
        # lifetime: both buffers live until the bytes are copied out.
        arg.pdh_cert_address = int(ffi.cast("uintptr_t", pdh))
        arg.cert_chain_address = int(ffi.cast("uintptr_t", chain))
        self.command("SEV_PDH_CERT_EXPORT", arg)
        return (
            bytes(ffi.buffer(pdh, int(arg.pdh_cert_len))),
            bytes(ffi.buffer(chain, int(arg.cert_chain_len))),
        )
