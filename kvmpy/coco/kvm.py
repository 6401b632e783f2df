# SPDX-License-Identifier: Apache-2.0
"""The KVM device as most users want it: create_vm() makes a complete VM with a guest program in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

from kvmpy.coco import ladder
from kvmpy.core import kvm as core_kvm
from kvmpy.core.vm import Vm
from kvmpy.guest.options import VmOptions
from kvmpy.guest.program import GuestProgram
from kvmpy.guest.protection import Availability
from kvmpy.guest.vm import GuestVm

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Kvm(core_kvm.Kvm):
    """The KVM device; MissingError when it is absent or may not be opened."""

    @overload
    def create_vm(self, vm_type: int = 0) -> Vm: ...
    @overload
    def create_vm(self, vm_type: GuestProgram, **options: Unpack[VmOptions]) -> GuestVm: ...
    def create_vm(self, vm_type: int | GuestProgram = 0, **options: Unpack[VmOptions]) -> Vm:
        """Create a bare VM of a type (a number, KVM_CREATE_VM), or a complete one with a guest program in it.

        The keywords of a complete one are those of :class:`~kvmpy.guest.options.VmOptions`.
        """
        if not isinstance(vm_type, GuestProgram):
            return super().create_vm(vm_type)
        protection = options.get("protection") or "auto"
        if isinstance(protection, str):
            protection = ladder.resolve(protection, self)
        return GuestVm(self, vm_type, protection, options)

    def protections(self) -> dict[str, Availability]:
        """Tell for every protection whether this host offers it, strongest first, and what is missing."""
        return ladder.availability(self)
