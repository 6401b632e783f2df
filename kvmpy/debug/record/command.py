# SPDX-License-Identifier: Apache-2.0
"""Commands of the AMD secure processor within ioctls: which one was issued, and the firmware's status."""

from __future__ import annotations

from kvmpy.debug.record.events import Ioctl, Payload
from kvmpy.uapi.buffers import BUFFERS, field_place
from kvmpy.uapi.commands import SEV_COMMANDS, SEV_PLATFORM_COMMANDS, Command
from kvmpy.uapi.constants import SevRet

_COMMANDS: dict[str | None, dict[int, Command]] = {
    "kvm_sev_cmd": {each.id: each for each in SEV_COMMANDS.values()},
    "sev_issue_cmd": {each.id: each for each in SEV_PLATFORM_COMMANDS.values()},
}
# Request number -> the struct of its argument, the field with the command's number, and the commands.
_CARRIERS = {
    nr: (buffer.struct, buffer.select, _COMMANDS[buffer.struct])
    for nr, buffer in BUFFERS.items()
    if buffer.struct is not None and buffer.struct in _COMMANDS
}


def command_of(payload: Payload) -> Command | None:
    """Return the SEV command that an ioctl carries, None where it carries none that kvmpy knows."""
    if not isinstance(payload, Ioctl) or payload.request not in _CARRIERS or not payload.argument_in:
        return None
    struct, name, commands = _CARRIERS[payload.request]
    return commands.get(_number(payload.argument_in, struct, name))


def status_of(request: int, after: bytes | None) -> int | None:
    """Return the firmware's status in the argument behind an ioctl, None where it has none."""
    if after is None or request not in _CARRIERS:
        return None
    return _number(after, _CARRIERS[request][0], "error")


def status_words(status: int) -> str:
    """Return a firmware status by the kernel's name, or as a number."""
    signed = status - (1 << 32) if status >= 1 << 31 else status
    return SevRet(signed).name if signed in set(SevRet) else f"{status:#x}"


def _number(data: bytes, struct: str, name: str) -> int:
    offset, size = field_place(struct, name)
    return int.from_bytes(data[offset : offset + size], "little")
