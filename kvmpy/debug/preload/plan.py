# SPDX-License-Identifier: Apache-2.0
"""The table of :mod:`kvmpy.uapi.buffers` as the recorder in C reads it (struct kvmpy_plan in ring.h)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from kvmpy.uapi.buffers import BUFFERS, TDX_BUFFER, Buffer

MAGIC = 0x6E616C705652564B
HEAD = struct.Struct("<QIIII")
ROOT = struct.Struct("<II")
NODE = struct.Struct("<18I")
CASE = struct.Struct("<4I")
NO_FIELD = 0xFFFFFFFF
EVERYTHING = 0xFFFFFFFF

_DIRECTIONS = {"in": 1, "out": 2, "inout": 3, "none": 0}
_SPECIALS = {None: 0, "slot-bitmap": 1, "xsave": 2, "one-reg": 3}


class _Tables:
    def __init__(self) -> None:
        self.nodes: list[bytes] = []
        self.cases: list[bytes] = []

    def add(self, buffers: Sequence[Buffer], parent: Buffer | None) -> int:
        """Put *buffers* behind one another and return the index of the first."""
        first = len(self.nodes)
        self.nodes += [b""] * len(buffers)
        for number, buffer in enumerate(buffers):
            self.nodes[first + number] = self._node(buffer, parent)
        return first

    def _node(self, buffer: Buffer, parent: Buffer | None) -> bytes:
        size = buffer.size
        holder = buffer if size.own else parent
        count, width = holder.place(size.count) if size.count and holder is not None else (NO_FIELD, 0)
        children = self.add(buffer.children, buffer)
        rows = [
            CASE.pack(value, self.add(below, buffer), len(below), 0) for value, below in buffer.cases.items()
        ]
        cases = len(self.cases)
        self.cases += rows
        return NODE.pack(
            parent.place(buffer.pointer)[0] if parent is not None else 0,
            _DIRECTIONS[buffer.arg],
            (1 if size.own else 0) | (2 if buffer.guest else 0),
            _SPECIALS[size.special],
            size.base,
            count,
            width,
            size.unit,
            size.per,
            size.least,
            size.round,
            EVERYTHING if buffer.reads is None else buffer.reads,
            parent.place(buffer.when)[0] if parent is not None and buffer.when else NO_FIELD,
            buffer.place(buffer.select)[0] if buffer.select else NO_FIELD,
            children,
            len(buffer.children),
            cases,
            len(rows),
        )


def compile_plan() -> bytes:
    """Return the plan of every ioctl that takes an address."""
    tables = _Tables()
    roots = [ROOT.pack(nr, tables.add([buffer], None)) for nr, buffer in sorted(BUFFERS.items())]
    tdx = tables.add([TDX_BUFFER], None)
    head = HEAD.pack(MAGIC, len(roots), len(tables.nodes), len(tables.cases), tdx)
    return b"".join([head, *roots, *tables.nodes, *tables.cases])
