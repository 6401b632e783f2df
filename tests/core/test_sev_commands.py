# SPDX-License-Identifier: Apache-2.0
"""SEV commands and /dev/sev without a secure processor: names, errors, what is missing."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from kvmpy.core.errors import KvmError, MissingError
from kvmpy.core.sev import find_command
from kvmpy.core.sev_device import SevDevice, explain_sev_open_failure
from kvmpy.core.sev_errors import SevError, SevResult, firmware_meaning, firmware_name, page_type_name
from kvmpy.uapi import ioctls
from kvmpy.uapi.commands import SEV_COMMANDS, SEV_PLATFORM_COMMANDS
from kvmpy.uapi.constants import SevRet
from kvmpy.uapi.structs import kvm_sev_launch_start


def test_commands_by_name_and_number() -> None:
    """A command is found by its kernel name, without the prefix, and by number."""
    assert find_command("KVM_SEV_INIT2") is find_command("INIT2") is find_command(22)
    assert find_command(find_command("SNP_LAUNCH_START")).id == 100


def test_unknown_commands() -> None:
    """An unknown name is a mistake, an unknown number a negative test."""
    with pytest.raises(ValueError, match="NO_SUCH"):
        find_command("NO_SUCH")
    assert find_command(99).id == 99
    assert str(find_command(99)) == "SEV command 99"


@pytest.mark.parametrize("code", [code for code in SevRet if 0 < code < SevRet.SEV_RET_IN_USE])
def test_every_firmware_status_has_a_name(code: SevRet) -> None:
    """Statuses are known by the kernel's names."""
    assert firmware_name(int(code)) == SevRet(code).name.removeprefix("SEV_RET_")


def test_statuses_of_the_sev_api_have_meanings() -> None:
    """The statuses of the SEV API and the SNP ABI say what they mean."""
    silent = [code for code in range(0x29) if code != 0x1E and not firmware_meaning(code)]
    assert silent == []
    assert firmware_name(0x7777) == "0x7777"
    assert firmware_name(0xFFFFFFFF) == "NO_FW_CALL"
    assert firmware_meaning(0x7777) == ""


def test_page_types() -> None:
    """Page types have the kernel's names."""
    assert [page_type_name(n) for n in (1, 3, 6, 2)] == ["NORMAL", "ZERO", "CPUID", "2"]


def test_an_error_says_everything() -> None:
    """Both errno and firmware status, the argument and what to do are in the message."""
    error = SevError(
        ioctls.KVM_MEMORY_ENCRYPT_OP,
        find_command("LAUNCH_START"),
        SevResult(-1, errno.EIO, int(SevRet.SEV_RET_POLICY_FAILURE)),
        "vm0",
        kvm_sev_launch_start(policy=5),
    )
    assert isinstance(error, KvmError)
    assert error.errno == errno.EIO
    assert str(error).splitlines()[0] == (
        "KVM_SEV_LAUNCH_START on vm0 failed: EIO (Input/output error), firmware status 0x7 POLICY_FAILURE: "
        "the guest's policy forbids it, or the platform does not meet the policy"
    )
    assert "policy=0x5" in str(error)
    assert "hint: SMT" in str(error)


def test_an_error_of_the_firmware_alone() -> None:
    """A command can fail with errno 0 and a firmware status."""
    result = SevResult(0, 0, int(SevRet.SEV_RET_INVALID_LEN))
    assert not result.ok
    error = SevError(ioctls.KVM_MEMORY_ENCRYPT_OP, find_command("LAUNCH_MEASURE"), result, "vm0")
    assert error.errno == 0
    assert "the ioctl succeeded, firmware status 0x4 INVALID_LEN" in str(error)


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    """Without /dev/sev the error says what brings it."""
    with pytest.raises(MissingError, match="does not exist") as caught:
        SevDevice(str(tmp_path / "sev"))
    assert "CRYPTO_DEV_SP_PSP" in caught.value.how


def test_a_device_that_may_not_be_opened() -> None:
    """No permission is told apart, with the udev rule that helps."""
    missing = explain_sev_open_failure("/dev/sev", OSError(errno.EACCES, "denied"))
    assert missing.missing == "no permission to open /dev/sev for reading and writing"
    assert "65-sev.rules" in missing.how


def test_a_file_that_is_no_device(tmp_path: Path) -> None:
    """Commands to something else fail as ioctls, with the command's name."""
    path = tmp_path / "sev"
    path.touch()
    with SevDevice(str(path)) as device, pytest.raises(SevError, match="SEV_PLATFORM_STATUS") as caught:
        device.platform_status()
    assert caught.value.errno == errno.ENOTTY


@pytest.mark.parametrize(
    ("command", "number", "hint"),
    [
        ("KVM_SEV_SNP_LAUNCH_START", errno.ENOTTY, "made no context for the guest (SNP_GCTX_CREATE"),
        ("KVM_SEV_INIT2", errno.EBUSY, "misc.max of this process's cgroup"),
        ("KVM_SEV_INIT2", errno.ENOTTY, "no ASID is for guests of this kind"),
        ("KVM_SEV_LAUNCH_START", errno.ENOTTY, "kvm_amd runs without SEV"),
        ("KVM_SEV_LAUNCH_START", errno.EPERM, "an SNP VM takes the SNP commands only"),
        ("KVM_SEV_LAUNCH_FINISH", errno.ETIMEDOUT, "the secure processor does not answer; reboot"),
        ("SNP_SET_CONFIG", errno.EPERM, "open for writing, and no other right"),
        ("SNP_SET_CONFIG", errno.ENODEV, "SNP for a command of SNP, is not initialised"),
        ("SNP_COMMIT", errno.EBUSY, "the secure processor does not answer; reboot"),
        ("SEV_FACTORY_RESET", errno.EBUSY, "guests are active"),
        ("SEV_PDH_CERT_EXPORT", errno.EIO, "with ccp.psp_init_on_probe=0 and no guest"),
        ("SEV_PDH_CERT_EXPORT", errno.EBUSY, "the secure processor does not answer; reboot"),
    ],
)
def test_hints(command: str, number: int, hint: str) -> None:
    """What an errno means depends on the command, and on whether a VM or /dev/sev was asked."""
    op = {**SEV_COMMANDS, **SEV_PLATFORM_COMMANDS}[command]
    error = SevError(ioctls.SEV_ISSUE_CMD, op, SevResult(-1, number, 0), "it")
    assert hint in str(error)
