# SPDX-License-Identifier: Apache-2.0
"""SEV commands of a VM (KVM_MEMORY_ENCRYPT_OP), raw, and the registered regions of SEV guests."""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar

from kvmpy.core.errors import MissingError, errno_name
from kvmpy.core.fd import KvmFd
from kvmpy.core.sev_device import SevDevice, check_processor
from kvmpy.core.sev_errors import SevError, SevResult
from kvmpy.core.topic import Topic
from kvmpy.uapi import ffi, ioctls
from kvmpy.uapi.commands import SEV_COMMANDS, SevCommand
from kvmpy.uapi.constants import KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, SevCmd
from kvmpy.uapi.structs import Struct, kvm_enable_cap, kvm_enc_region, kvm_sev_cmd

if TYPE_CHECKING:
    from kvmpy.core.vm import Vm

_INITS = (SevCmd.KVM_SEV_INIT, SevCmd.KVM_SEV_ES_INIT, SevCmd.KVM_SEV_INIT2)
_BY_ID = {command.id: command for command in SEV_COMMANDS.values()}


def find_command(command: SevCommand | str | int) -> SevCommand:
    """Return the SEV command of this name (with or without ``KVM_SEV_``) or number.

    ValueError for a name that there is none of; an unknown number is a command without a name.
    """
    if isinstance(command, SevCommand):
        return command
    if isinstance(command, str):
        name = command if command.startswith("KVM_SEV_") else f"KVM_SEV_{command}"
        if name not in SEV_COMMANDS:
            raise ValueError(f"no SEV command named {command!r}")
        return SEV_COMMANDS[name]
    number = int(command)
    unknown = SevCommand(f"SEV command {number}", number, None, "none", (), "Unknown to KVM.", False)
    return _BY_ID.get(number, unknown)


class VmSev(Topic):
    """SEV commands of a VM, and the regions it registers."""

    _owner: Vm

    _device: SevDevice | None = None
    # Those of this process that hold an ASID, by id().
    _guests: ClassVar[set[int]] = set()

    @property
    def device(self) -> SevDevice:
        """The /dev/sev that this VM's commands go through, opened at first use and closed with the VM.

        KVM keeps its number, not the file: it stays open as long as the VM.
        """
        if self._device is None:
            self._device = SevDevice()
        return self._device

    def _sev_fd(self) -> int:
        # Some commands need none; those that do answer EBADF.
        with suppress(MissingError):
            return self.device.fd
        return (1 << 32) - 1

    def command_raw(
        self,
        command: SevCommand | str | int,
        arg: Struct | int | None = None,
        *,
        sev_fd: int | None = None,
    ) -> SevResult:
        """Issue a SEV command and return how it came back, failed or not (KVM_MEMORY_ENCRYPT_OP).

        *arg* is the command's struct, or a number to pass as the pointer (negative tests).  *sev_fd* takes
        the place of the VM's own /dev/sev.  DeadProcessorError when the secure processor answers no more.
        """
        op = find_command(command)
        data = 0
        if isinstance(arg, Struct):
            # lifetime: the caller's struct lives until the ioctl is done.
            data = int(ffi.cast("uintptr_t", arg.cdata))
        elif arg is not None:
            data = int(arg)
        call = kvm_sev_cmd(id=op.id, data=data, sev_fd=self._sev_fd() if sev_fd is None else sev_fd)
        result, number = self._owner.ioctl_raw(ioctls.KVM_MEMORY_ENCRYPT_OP, call)
        if self._doubtful(op, number):
            check_processor(f"{op} on {self._owner.name} came back with {errno_name(number)}")
        if op.id in _INITS and number == 0:
            self._guests.add(id(self))
        return SevResult(result, number, int(call.error))

    def _doubtful(self, command: SevCommand, number: int) -> bool:
        # EBUSY of INIT2 is that of no free ASID while guests live.  A context that the firmware does not
        # create is ENOTTY, whatever it said: snp_launch_start() in Linux.
        if number == errno.EBUSY:
            return command.id not in _INITS or not self._guests - {id(self)}
        return number == errno.ETIMEDOUT or (
            number == errno.ENOTTY and command.id == SevCmd.KVM_SEV_SNP_LAUNCH_START
        )

    def command(
        self,
        command: SevCommand | str | int,
        arg: Struct | int | None = None,
        *,
        sev_fd: int | None = None,
        gpa: int | None = None,
        page_type: int | None = None,
    ) -> None:
        """Issue a SEV command; SevError when the ioctl or the firmware reports an error.

        *gpa* and *page_type* only tell the error what the command was about.
        """
        known = find_command(command)
        result = self.command_raw(known, arg, sev_fd=sev_fd)
        if not result.ok:
            raise self.error(
                known, result, arg if isinstance(arg, Struct) else None, gpa=gpa, page_type=page_type
            )

    def error(
        self,
        command: SevCommand | str | int,
        result: SevResult,
        arg: Struct | None = None,
        *,
        gpa: int | None = None,
        page_type: int | None = None,
        done: int | None = None,
        size: int | None = None,
    ) -> SevError:
        """Return the exception for a command that came back with *result*."""
        return SevError(
            ioctls.KVM_MEMORY_ENCRYPT_OP,
            find_command(command),
            result,
            self._owner.name,
            arg,
            gpa=gpa,
            page_type=page_type,
            done=done,
            size=size,
        )

    def reg_region(self, hva: int, size: int) -> None:
        """Pin a range of host memory that holds encrypted pages (KVM_MEMORY_ENCRYPT_REG_REGION).

        What is encrypted depends on the physical address, so the pages must not move.
        """
        self._owner.ioctl(ioctls.KVM_MEMORY_ENCRYPT_REG_REGION, kvm_enc_region(addr=hva, size=size))

    def unreg_region(self, hva: int, size: int) -> None:
        """Let a range go that was registered with the same bounds (KVM_MEMORY_ENCRYPT_UNREG_REGION)."""
        self._owner.ioctl(ioctls.KVM_MEMORY_ENCRYPT_UNREG_REGION, kvm_enc_region(addr=hva, size=size))

    def copy_enc_context_from(self, source: KvmFd) -> None:
        """Make this VM a mirror of *source*: it shares ASID and key (KVM_CAP_VM_COPY_ENC_CONTEXT_FROM)."""
        self._enc_context(KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, source)

    def move_enc_context_from(self, source: KvmFd) -> None:
        """Take over the SEV guest of *source*, which is dead then (KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM)."""
        self._enc_context(KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM, source)

    def _enc_context(self, cap: int, source: KvmFd) -> None:
        arg = kvm_enable_cap(cap=int(cap))
        arg.args[0] = source.fd
        self._owner.ioctl(ioctls.KVM_ENABLE_CAP, arg)

    def close(self) -> None:
        """Close the VM's /dev/sev."""
        self._guests.discard(id(self))
        device, self._device = self._device, None
        if device is not None:
            device.close()
