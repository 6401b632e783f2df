# SPDX-License-Identifier: Apache-2.0
"""One class for every kernel struct, by the kernel's name: ``kvm_regs(rax=1)``, ``kvm_msrs.with_entries(9)``.

Nested types that are nameless in the kernel are called by their path (``kvm_run__io``).  ``structs.pyi``,
which tells type checkers the fields, is generated (:mod:`kvmpy.uapi.gen`).
"""

from __future__ import annotations

from typing import Any

from kvmpy.uapi import ffi
from kvmpy.uapi.struct_arrays import ByteArray, IntArray, NestedArray, StructArray
from kvmpy.uapi.struct_base import Field, FlexStruct, Struct, make_class

# The field that says how many entries follow.
COUNTS = {
    "kvm_cpuid": "nent",
    "kvm_cpuid2": "nent",
    "kvm_irq_routing": "nr",
    "kvm_msr_list": "nmsrs",
    "kvm_msrs": "nmsrs",
    "kvm_pmu_event_filter": "nevents",
    "kvm_reg_list": "n",
    "kvm_signal_mask": "len",
}

_made: dict[str, type[Struct]] = {}


def _struct_of(ctype: Any) -> type[Struct]:
    tag = ctype.cname.split(" ", 1)[1]
    if tag not in _made:
        _made[tag] = make_class(ctype, COUNTS, _struct_of)
    return _made[tag]


def _make_all() -> None:
    _, structs, unions = ffi.list_types()
    for kind, tags in (("struct", structs), ("union", unions)):
        for tag in tags:
            if not tag.startswith("kvmpy_"):
                _struct_of(ffi.typeof(f"{kind} {tag}"))


_make_all()

STRUCTS: dict[str, type[Struct]] = {tag: kind for tag, kind in sorted(_made.items()) if "__" not in tag}
NESTED: dict[str, type[Struct]] = {tag: kind for tag, kind in sorted(_made.items()) if "__" in tag}

globals().update(_made)

__all__ = [  # noqa: PLE0604
    "COUNTS",
    "NESTED",
    "STRUCTS",
    "ByteArray",
    "Field",
    "FlexStruct",
    "IntArray",
    "NestedArray",
    "Struct",
    "StructArray",
    *_made,
]
