# SPDX-License-Identifier: Apache-2.0
"""The table of :mod:`kvmpy.uapi.buffers` for native/capture.c (struct kvmpy_plan_node in capture.h)."""

from __future__ import annotations

from collections.abc import Sequence

from kvmpy.uapi.buffers import BUFFERS, TDX_BUFFER, Buffer

NO_FIELD = 0xFFFFFFFF
IN = 1
OUT = 2
# Flags of a node: the count is a field of the buffer itself; it is guest memory.
OWN = 1
GUEST = 2
SLOT_BITMAP = 1
XSAVE = 2
ONE_REG = 3

_DIRECTIONS = {"in": IN, "out": OUT, "inout": IN | OUT, "none": 0}
_SPECIALS = {None: 0, "slot-bitmap": SLOT_BITMAP, "xsave": XSAVE, "one-reg": ONE_REG}


class Plan:
    """What every ioctl that takes an address reads and writes, as the initialisers of C arrays.

    A node's children lie behind one another, and so do its cases.  *roots* are sorted by request; *tdx* is
    the node of TDX VMs' KVM_MEMORY_ENCRYPT_OP.
    """

    def __init__(self) -> None:
        self.nodes: list[str] = []
        self.cases: list[str] = []
        self.roots = [f"{nr:#x}, {self._add([buffer], None)}" for nr, buffer in sorted(BUFFERS.items())]
        self.tdx = self._add([TDX_BUFFER], None)

    def _add(self, buffers: Sequence[Buffer], parent: Buffer | None) -> int:
        """Put *buffers* behind one another and return the index of the first."""
        first = len(self.nodes)
        self.nodes += [""] * len(buffers)
        for number, buffer in enumerate(buffers):
            self.nodes[first + number] = self._node(buffer, parent)
        return first

    def _node(self, buffer: Buffer, parent: Buffer | None) -> str:
        size = buffer.size
        holder = buffer if size.own else parent
        count, width = holder.place(size.count) if size.count and holder is not None else (NO_FIELD, 0)
        children = self._add(buffer.children, buffer)
        rows = [f"{value}, {self._add(below, buffer)}, {len(below)}" for value, below in buffer.cases.items()]
        cases = len(self.cases)
        self.cases += rows
        members = {
            "pointer": parent.place(buffer.pointer)[0] if parent is not None else 0,
            "direction": _DIRECTIONS[buffer.arg],
            "flags": (OWN if size.own else 0) | (GUEST if buffer.guest else 0),
            "special": _SPECIALS[size.special],
            "base": size.base,
            "count": count,
            "count_size": width,
            "unit": size.unit,
            "per": size.per,
            "least": size.least,
            "round": size.round,
            "reads": NO_FIELD if buffer.reads is None else buffer.reads,
            "when": parent.place(buffer.when)[0] if parent is not None and buffer.when else NO_FIELD,
            "select": buffer.place(buffer.select)[0] if buffer.select else NO_FIELD,
            "children": children if buffer.children else 0,
            "nr_children": len(buffer.children),
            "cases": cases if rows else 0,
            "nr_cases": len(rows),
        }
        return ", ".join(f".{name} = {value}" for name, value in members.items() if value)
