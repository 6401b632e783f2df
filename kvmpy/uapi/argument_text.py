# SPDX-License-Identifier: Apache-2.0
"""Arguments and exits in the kernel's words: one text for post-mortems, pages, traces and the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvmpy.uapi.constants import ExitReason
from kvmpy.uapi.field_words import CAP_ARGUMENTS, DEVICE_ATTRIBUTES, Words, number_words
from kvmpy.uapi.struct_base import Struct
from kvmpy.uapi.struct_text import Style, active_member, describe
from kvmpy.uapi.structs import kvm_run

_SHOWN_BYTES = 32
PLAIN_STYLE = Style(Words())


def bytes_text(data: bytes, *, full: bool = False) -> str:
    """Return bytes as hexadecimal digits, shortened unless *full*."""
    if not any(data):
        return f"<{len(data)} zero bytes>"
    if full or len(data) <= _SHOWN_BYTES:
        return f"<{data.hex()}>"
    return f"<{data[:_SHOWN_BYTES].hex()}... {len(data)} bytes>"


def struct_words(value: Struct, kind: str = "", style: Style = PLAIN_STYLE) -> str:
    """Return a struct as ``{field=value, ...}``; *kind* is that of the file descriptor it is for."""
    if value.NAME == "kvm_device_attr" and kind in DEVICE_ATTRIBUTES:
        return f"{{{describe(value, None, Style(_device_words(value, kind, style), full=style.full))}}}"
    text = describe(value, None, style)
    if value.NAME == "kvm_enable_cap":
        text += _cap_arguments(value)
    return f"{{{text}}}"


def _cap_arguments(value: Any) -> str:
    kind = CAP_ARGUMENTS.get(value.cap)
    return f", args[0]: {number_words(kind, value.args[0])}" if kind is not None and value.args[0] else ""


def _device_words(value: Any, kind: str, style: Style) -> Callable[[Struct, Any, int], str | None]:
    groups, attributes = DEVICE_ATTRIBUTES[kind]

    def words(struct: Struct, entry: Any, number: int) -> str | None:
        if struct.NAME == "kvm_device_attr" and entry.name == "group":
            return number_words(groups, number)
        if struct.NAME == "kvm_device_attr" and entry.name == "attr" and value.group in attributes:
            return number_words(attributes[value.group], number)
        return style.words(struct, entry, number) if style.words is not None else None

    return words


def run_of(data: bytes) -> kvm_run:
    """Return the begin of a run area as a struct kvm_run."""
    return kvm_run.from_bytes(data[: kvm_run.SIZE].ljust(kvm_run.SIZE, b"\0"))


def exit_words(run: kvm_run, data: bytes | None = None, style: Style = PLAIN_STYLE) -> str:
    """Return why KVM_RUN ended: the reason, its payload, and *data* of a port access."""
    text = number_words(ExitReason, run.exit_reason)
    member = active_member(run)
    if member and member in run.FIELDS:
        payload = getattr(run, member)
        text += f" {{{describe(payload, None, style)}}}" if isinstance(payload, Struct) else f" {payload:#x}"
    elif run.exit_reason not in ExitReason._value2member_map_:
        text += f" {bytes_text(bytes(run.padding[:256]), full=style.full)}"
    if run.flags and style.words is not None:
        text += f" flags={style.words(run, run.FIELDS['flags'], run.flags)}"
    if data is not None:
        text += f" data={bytes_text(data, full=style.full)}"
    return text
