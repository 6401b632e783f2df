# SPDX-License-Identifier: Apache-2.0
"""The memory of a VM as data for a picture: which pages are private, and which are mapped how by the guest's
tables.

What a protection hides is told as hidden, and a map never fails: it is made when something else already has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmpy.core.errors import PrivateMemoryError
from kvmpy.x86.paging_errors import TableAccessError

if TYPE_CHECKING:
    from kvmpy.guest.vm import GuestVm
    from kvmpy.x86.entry import Mapped

# Runs told for each VM, of private pages and of mappings each.
MAX_RUNS = 4096


def _private_runs(vm: GuestVm) -> tuple[list[str], bool]:
    runs: list[str] = []
    for segment in vm.memory.segments():
        for gpa, size, private in vm.memory.runs(segment.gpa, segment.size):
            if private:
                if len(runs) == MAX_RUNS:
                    return runs, True
                runs.append(f"{int(gpa):#x} {size:#x}")
    return runs, False


def _leaf(item: Mapped) -> str:
    kind = {None: "-", True: "private", False: "shared"}[item.private]
    return f"{int(item.gva):#x} {int(item.gpa):#x} {item.size:#x} {item.page_size:#x} {kind} {item.flags}"


def memory_map(vm: GuestVm) -> dict[str, Any]:
    """Return the map of *vm* as JSON-ready values, ranges as text: JSON has no numbers for all addresses.

    ``segments`` and ``private`` (what is private by the host's book) are lines "gpa size", ``mappings`` are
    lines "gva gpa size page-size private|shared|- flags..." of the guest's page tables, with "-" where there
    is no encryption bit.  ``hidden`` says why the tables cannot be read (else it is empty), ``cut`` that the
    map holds only the first 4096 runs of a kind.
    """
    private, cut = _private_runs(vm)
    bit = vm.encryption
    hidden = ""
    try:
        mappings = vm.pages.mappings()
    except (PrivateMemoryError, TableAccessError) as error:
        mappings, hidden = [], str(error)
    return {
        "type": vm.vm_type,
        "protection": vm.protection.name,
        "label": vm.protection.label,
        "vcpus": len(vm.vcpus),
        "launched": vm.launched,
        "encryption": "" if bit is None else f"{bit.name} {bit.bit}",
        "segments": [f"{int(segment.gpa):#x} {segment.size:#x}" for segment in vm.memory.segments()],
        "private": private,
        "mappings": [_leaf(item) for item in mappings[:MAX_RUNS]],
        "hidden": hidden,
        "cut": cut or len(mappings) > MAX_RUNS,
    }
