# SPDX-License-Identifier: Apache-2.0
"""Records that are given away: what names the machine or somebody is taken out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kvmpy.debug.record.command import command_of
from kvmpy.debug.record.events import Chunk, Ioctl, Payload
from kvmpy.debug.record.format import What
from kvmpy.debug.record.model import Record

# What the firmware answers to these names its chip: an id, or a certificate that is this chip's alone.
_NAMING = {"SEV_GET_ID", "SEV_GET_ID2", "SEV_PDH_CERT_EXPORT", "SEV_PEK_CSR", "SEV_PEK_CERT_IMPORT"}


def _blank(chunk: Chunk) -> Chunk:
    return replace(chunk, data=bytes(len(chunk.data))) if chunk.what == What.NESTED else chunk


def _without_chip(payload: Payload) -> Payload:
    command = command_of(payload)
    if not isinstance(payload, Ioctl) or command is None or command.name not in _NAMING:
        return payload
    return replace(payload, chunks=tuple(map(_blank, payload.chunks)))


def anonymous(source: Path, target: Path, scrub: Callable[[str], str]) -> None:
    """Write the record *source* to *target* without what names the chip, its texts as *scrub* returns them.

    RecordError where nothing of it can be read; a damaged record keeps what can be.
    """
    record = Record.load(source)
    record.host = {key: scrub(value) for key, value in record.host.items()}
    record.with_entries([entry.but(_without_chip(entry.what)) for entry in record.entries]).save(target)
