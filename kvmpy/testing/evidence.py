# SPDX-License-Identifier: Apache-2.0
"""What a page about a test shows beside its verdict: the memory maps of its VMs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmpy.guest.vm import GuestVm

MAX_VMS = 8


def maps_of(vms: list[GuestVm]) -> list[dict[str, Any]]:
    """Return the memory maps, with the VMs' names, of the VMs that are still there, at most eight."""
    from kvmpy.guest.memorymap import memory_map

    maps = []
    for vm in [vm for vm in vms if not vm.closed][:MAX_VMS]:
        try:
            maps.append({"vm": vm.name, **memory_map(vm)})
        except Exception as error:  # noqa: BLE001 - evidence may not hide the failure it is about
            maps.append({"vm": vm.name, "hidden": f"{type(error).__name__}: {error}"})
    return maps
