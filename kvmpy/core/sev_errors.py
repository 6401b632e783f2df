# SPDX-License-Identifier: Apache-2.0
"""What a SEV command that failed has to say: errno, the firmware's status by name and meaning, and where."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kvmpy.core.errors import KvmError, errno_name
from kvmpy.uapi.commands import Command
from kvmpy.uapi.constants import SevRet, SnpPageType
from kvmpy.uapi.error_hints import hint
from kvmpy.uapi.ioctl_type import Ioctl
from kvmpy.uapi.structs import Struct

# Status codes of the SEV API and of the SNP firmware ABI, in words.
_MEANINGS: dict[int, str] = {
    SevRet.SEV_RET_SUCCESS: "the firmware reports no error",
    SevRet.SEV_RET_INVALID_PLATFORM_STATE: "the platform is not in a state that allows the command",
    SevRet.SEV_RET_INVALID_GUEST_STATE: "the guest is not in a state that allows the command",
    SevRet.SEV_RET_INVALID_CONFIG: "the platform's configuration is not valid",
    SevRet.SEV_RET_INVALID_LEN: "a buffer is too small or its length is not a legal one",
    SevRet.SEV_RET_ALREADY_OWNED: "the platform has an owner already",
    SevRet.SEV_RET_INVALID_CERTIFICATE: "a certificate is not valid",
    SevRet.SEV_RET_POLICY_FAILURE: "the guest's policy forbids it, or the platform does not meet the policy",
    SevRet.SEV_RET_INACTIVE: "the guest is not bound to an ASID",
    SevRet.SEV_RET_INVALID_ADDRESS: "an address is not valid",
    SevRet.SEV_RET_BAD_SIGNATURE: "a signature does not verify",
    SevRet.SEV_RET_BAD_MEASUREMENT: "the measurement is not the expected one",
    SevRet.SEV_RET_ASID_OWNED: "the ASID belongs to another guest",
    SevRet.SEV_RET_INVALID_ASID: "the ASID is out of range",
    SevRet.SEV_RET_WBINVD_REQUIRED: "WBINVD has to run on all CPUs first",
    SevRet.SEV_RET_DFFLUSH_REQUIRED: "DF_FLUSH has to run first",
    SevRet.SEV_RET_INVALID_GUEST: "the guest handle is not valid",
    SevRet.SEV_RET_INVALID_COMMAND: "the firmware does not know the command",
    SevRet.SEV_RET_ACTIVE: "the guest is bound to an ASID",
    SevRet.SEV_RET_HWSEV_RET_PLATFORM: "a hardware condition affects the platform; retry",
    SevRet.SEV_RET_HWSEV_RET_UNSAFE: "a hardware condition affects the platform; it is not safe to go on",
    SevRet.SEV_RET_UNSUPPORTED: "the platform does not support the feature",
    SevRet.SEV_RET_INVALID_PARAM: "a parameter is not valid",
    SevRet.SEV_RET_RESOURCE_LIMIT: "the firmware is out of resources",
    SevRet.SEV_RET_SECURE_DATA_INVALID: "the firmware's stored state does not verify",
    SevRet.SEV_RET_INVALID_PAGE_SIZE: "the RMP entry has another page size",
    SevRet.SEV_RET_INVALID_PAGE_STATE: "the RMP entry is in another state than the command needs",
    SevRet.SEV_RET_INVALID_MDATA_ENTRY: "the metadata entry is not valid",
    SevRet.SEV_RET_INVALID_PAGE_OWNER: "the page belongs to another guest",
    SevRet.SEV_RET_AEAD_OFLOW: "the message sequence number would overflow",
    SevRet.SEV_RET_EXIT_RING_BUFFER: "the command ring was left",
    SevRet.SEV_RET_RMP_INIT_REQUIRED: "the RMP has to be initialised first",
    SevRet.SEV_RET_BAD_SVN: "the security version is lower than the committed one",
    SevRet.SEV_RET_BAD_VERSION: "the version is lower than the committed one",
    SevRet.SEV_RET_SHUTDOWN_REQUIRED: "the platform has to be shut down first",
    SevRet.SEV_RET_UPDATE_FAILED: "the firmware update failed",
    SevRet.SEV_RET_RESTORE_REQUIRED: "the firmware has to be restored",
    SevRet.SEV_RET_RMP_INITIALIZATION_FAILED: "the RMP could not be initialised",
    SevRet.SEV_RET_INVALID_KEY: "the key is not there or not valid",
    SevRet.SEV_RET_SHUTDOWN_INCOMPLETE: "the shutdown did not finish",
}


def firmware_name(code: int) -> str:
    """Return the name of a firmware status, such as ``INVALID_PARAM``; hexadecimal for unknown ones."""
    signed = code - (1 << 32) if code >= 1 << 31 else code
    try:
        return SevRet(signed).name.removeprefix("SEV_RET_")
    except ValueError:
        return f"{code:#x}"


def firmware_meaning(code: int) -> str:
    """Return what a firmware status means, "" for one that the specifications do not have."""
    return _MEANINGS.get(code, "")


def page_type_name(page_type: int) -> str:
    """Return the name of an SNP page type, such as ``CPUID``; the number for unknown ones."""
    try:
        return SnpPageType(page_type).name.removeprefix("KVM_SEV_SNP_PAGE_TYPE_")
    except ValueError:
        return str(page_type)


@dataclass(frozen=True)
class SevResult:
    """How a SEV command came back: the ioctl's *result* and *errno*, and the *firmware* status beside it."""

    result: int
    errno: int
    firmware: int

    @property
    def ok(self) -> bool:
        """Whether neither the ioctl nor the firmware reports an error."""
        return self.result >= 0 and self.firmware == 0

    def __str__(self) -> str:
        code = errno_name(self.errno) if self.errno else "ok"
        return f"{code}, firmware {firmware_name(self.firmware)}"


class SevError(KvmError):
    """A SEV command that failed: ``.command``, ``.errno`` (0 where the ioctl succeeded) and ``.firmware``.

    ``.gpa`` and ``.page_type`` name what it was about, ``.done`` says how many bytes of the range were
    processed before (None where the command has no range).
    """

    def __init__(
        self,
        op: Ioctl,
        command: Command,
        result: SevResult,
        target: str,
        arg: Struct | None = None,
        *,
        gpa: int | None = None,
        page_type: int | None = None,
        done: int | None = None,
        size: int | None = None,
    ) -> None:
        self.command = command
        self.firmware = result.firmware
        self.result = result
        self.gpa = gpa
        self.page_type = page_type
        self.done = done
        super().__init__(op, result.errno, target, None)
        number = result.errno
        outcome = f"{errno_name(number)} ({os.strerror(number)})" if number else "the ioctl succeeded"
        text = f"{command} on {target} failed: {outcome}"
        if result.firmware:
            text += f", firmware status {result.firmware:#x} {firmware_name(result.firmware)}"
            meaning = firmware_meaning(result.firmware)
            text += f": {meaning}" if meaning else ""
        about = []
        if gpa is not None:
            about.append(f"gpa {gpa:#x}")
        if page_type is not None:
            about.append(f"page type {page_type_name(page_type)}")
        if done is not None:
            of = "" if size is None else f" of {size:#x}"
            about.append(f"{done:#x}{of} bytes were done before")
        if about:
            text += f"\n  {', '.join(about)}"
        if arg is not None:
            self.arg = repr(arg)
            text += f"\n  argument: {arg!r}"
        self.hint = hint(command.name, number, status=result.firmware)
        if result.firmware == SevRet.SEV_RET_POLICY_FAILURE and "LAUNCH_START" in command.name:
            self.hint = "SMT (bit 16 of an SNP policy), the ABI version and debugging must suit this platform"
        if self.hint:
            text += f"\n  hint: {self.hint}"
        # OSError keeps errno and text apart; KvmError prints the text alone.
        self.strerror = text
        self.args = (number, text)
