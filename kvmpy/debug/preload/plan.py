# SPDX-License-Identifier: Apache-2.0
"""The table of :mod:`kvmpy.uapi.buffers` as the recorder in C reads it (struct kvmpy_plan in ring.h)."""

from __future__ import annotations

from collections.abc import Sequence

from kvmpy.debug.layouts import layout
from kvmpy.uapi.buffers import BUFFERS, TDX_BUFFER, Buffer

MAGIC = 0x6E616C705652564B
NO_FIELD = 0xFFFFFFFF
IN = 1
OUT = 2
# Flags of a node: the count is a field of the buffer itself; it is guest memory.
OWN = 1
GUEST = 2
SLOT_BITMAP = 1
XSAVE = 2
ONE_REG = 3

# Roots, nodes and cases follow, the roots sorted by request; tdx_node is of TDX VMs' KVM_MEMORY_ENCRYPT_OP.
HEAD = layout(
    "plan", "uint64_t magic; uint32_t nr_roots; uint32_t nr_nodes; uint32_t nr_cases; uint32_t tdx_node;"
)
ROOT = layout("plan_root", "uint32_t request; uint32_t node;")
# pointer is an offset in the parent, count, when and select are offsets or NO_FIELD; children and cases are
# the index of the first, the others follow.
NODE = layout(
    "plan_node",
    "uint32_t pointer; uint32_t direction; uint32_t flags; uint32_t special; uint32_t base; uint32_t count; "
    "uint32_t count_size; uint32_t unit; uint32_t per; uint32_t least; uint32_t round; uint32_t reads; "
    "uint32_t when; uint32_t select; uint32_t children; uint32_t nr_children; uint32_t cases; "
    "uint32_t nr_cases;",
)
CASE = layout("plan_case", "uint32_t value; uint32_t children; uint32_t nr_children; uint32_t reserved;")

_DIRECTIONS = {"in": IN, "out": OUT, "inout": IN | OUT, "none": 0}
_SPECIALS = {None: 0, "slot-bitmap": SLOT_BITMAP, "xsave": XSAVE, "one-reg": ONE_REG}


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
            (OWN if size.own else 0) | (GUEST if buffer.guest else 0),
            _SPECIALS[size.special],
            size.base,
            count,
            width,
            size.unit,
            size.per,
            size.least,
            size.round,
            NO_FIELD if buffer.reads is None else buffer.reads,
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
