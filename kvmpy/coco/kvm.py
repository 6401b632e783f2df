# SPDX-License-Identifier: Apache-2.0
"""The KVM device as most users want it: create_vm() makes a complete VM with a guest program in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

from kvmpy.coco import ladder
from kvmpy.core import kvm as core_kvm
from kvmpy.core.backing import Backing
from kvmpy.core.vm import Vm
from kvmpy.guest.program import GuestProgram
from kvmpy.guest.protection import Availability, Protection
from kvmpy.guest.vm import DEFAULT_DEADLINE, DEFAULT_MEMORY, GuestVm
from kvmpy.uapi.structs import kvm_cpuid2


class Kvm(core_kvm.Kvm):
    """The KVM device; MissingError when it is absent or may not be opened."""

    @overload
    def create_vm(self, vm_type: int = 0) -> Vm: ...
    @overload
    def create_vm(
        self,
        vm_type: GuestProgram,
        *,
        vcpus: int = 1,
        protection: str | Protection = "auto",
        memory: int = DEFAULT_MEMORY,
        backing: Backing | None = None,
        levels: int = 4,
        irqchip: str | None = "split",
        deadline: float = DEFAULT_DEADLINE,
        private: str | None = None,
        strict_private: bool = False,
        cpuid: Callable[[kvm_cpuid2], kvm_cpuid2] | None = None,
        vcpu_ids: Sequence[int] | None = None,
        before_vcpus: Callable[[GuestVm], None] | None = None,
    ) -> GuestVm: ...
    def create_vm(
        self,
        vm_type: int | GuestProgram = 0,
        *,
        vcpus: int = 1,
        protection: str | Protection = "auto",
        memory: int = DEFAULT_MEMORY,
        backing: Backing | None = None,
        levels: int = 4,
        irqchip: str | None = "split",
        deadline: float = DEFAULT_DEADLINE,
        private: str | None = None,
        strict_private: bool = False,
        cpuid: Callable[[kvm_cpuid2], kvm_cpuid2] | None = None,
        vcpu_ids: Sequence[int] | None = None,
        before_vcpus: Callable[[GuestVm], None] | None = None,
    ) -> Vm:
        """Create a bare VM of a type (a number, KVM_CREATE_VM), or a complete one with a guest program in it.

        With a program: *vcpus* vCPUs (ids 0, 1, ... unless *vcpu_ids* lists them), *memory* bytes of guest
        memory made by *backing*, page tables of *levels* levels, an in-kernel *irqchip* ("split": local
        APICs only, "full": with PIC, IOAPIC and their I/O bus, or None), *protection* by name ("auto" takes
        the strongest on this host), *private* what of the VM is private where that can be chosen ("all" or
        "data", see :class:`~kvmpy.guest.vm.GuestVm`).  *deadline* (seconds) ends every run that does not say
        otherwise.  *cpuid* may change the vCPUs' CPUID; *before_vcpus* is called between memory and vCPUs,
        for capabilities that must be enabled then.  *strict_private* keeps private pages from the host after
        launch even where the protection could show them.
        """
        if not isinstance(vm_type, GuestProgram):
            return super().create_vm(vm_type)
        return GuestVm(
            self,
            vm_type,
            protection=ladder.resolve(protection, self) if isinstance(protection, str) else protection,
            vcpus=vcpus,
            memory=memory,
            backing=backing,
            levels=levels,
            irqchip=irqchip,
            deadline=deadline,
            private=private,
            strict_private=strict_private,
            cpuid=cpuid,
            vcpu_ids=vcpu_ids,
            before_vcpus=before_vcpus,
        )

    def protections(self) -> dict[str, Availability]:
        """Tell for every protection whether this host offers it, strongest first, and what is missing."""
        return ladder.availability(self)
