# SPDX-License-Identifier: Apache-2.0
"""The keywords of ``make_vm`` and ``Kvm.create_vm``, and those of ``GuestVm.add_memory``, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from kvmpy.core.backing import Backing
    from kvmpy.guest.protection import Protection
    from kvmpy.guest.vm import GuestVm
    from kvmpy.uapi.structs import kvm_cpuid2


class VmOptions(TypedDict, total=False):
    """What a VM with a guest program is made of; every keyword may be left out.

    None stands for the default, but for *irqchip*.
    """

    vcpus: int
    """How many vCPUs, 1 by default, with the ids 0, 1, ..."""
    vcpu_ids: Sequence[int] | None
    """Their ids, in place of *vcpus*."""
    protection: str | Protection | None
    """By name; ``"auto"`` takes the strongest on this host.  ``make_vm`` takes the test's own by default."""
    private: str | None
    """What of the VM is private, where its protection offers a choice.

    ``"all"``: code, data, stacks, page and descriptor tables; ``"data"``: data, stacks and what ``vm.alloc``
    hands out; what KVM's instruction emulator would have to read stays shared.
    """
    strict_private: bool
    """Keep private pages from the host after launch even where the protection could show them."""
    memory: int | None
    """Bytes of guest memory, 64 MiB by default."""
    backing: Backing | None
    """How the host memory behind it is made, by default anonymous."""
    levels: int
    """Levels of the guest's page tables: 4 (the default) or 5; in legacy mode 3 (PAE), 2, or 0 (no paging).

    The program of a guest in legacy mode is a 32-bit one; a source is compiled as such.
    """
    irqchip: str | None
    """In the kernel: ``"split"`` (the default: local APICs only), ``"full"`` (with PICs, IOAPIC and their I/O
    bus) or None.
    """
    deadline: float
    """Seconds after which a run ends that does not say otherwise; 20, or the test's own."""
    cpuid: Callable[[kvm_cpuid2], kvm_cpuid2] | None
    """Returns the CPUID of a vCPU from the one that it would have."""
    before_vcpus: Callable[[GuestVm], object] | None
    """Called between memory and vCPUs, for capabilities that must be enabled then."""


class SlotOptions(TypedDict, total=False):
    """How memory is added to a VM."""

    backing: Backing | None
    """How the host memory is made, by default anonymous."""
    slot: int | None
    """Its number, by default the lowest that is free."""
    flags: int
    """KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY; a slot with a guest_memfd refuses both."""


def check_known(options: Mapping[str, object], kind: type) -> None:
    """Raise TypeError for a keyword that *kind* does not declare."""
    known = kind.__annotations__
    for name in options:
        if name not in known:
            raise TypeError(f"{name!r} is not one of the keywords {', '.join(known)}")
