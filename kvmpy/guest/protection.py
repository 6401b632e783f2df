# SPDX-License-Identifier: Apache-2.0
"""How a VM's memory and state are kept from the host: what every protection declares and does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from pyroaring import BitMap

from kvmpy.core.address import EncryptionBit, Gpa
from kvmpy.core.errors import MissingError
from kvmpy.core.slots import MemorySlot
from kvmpy.guest.options import SlotOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kvmpy.core.exits import Exit
    from kvmpy.core.kvm import Kvm
    from kvmpy.guest.vcpu import GuestVcpu
    from kvmpy.guest.vm import GuestVm


@dataclass(frozen=True)
class Traits:
    """What a protection can and cannot do; tests ask for these, never for a protection's name.

    *has_encryption_bit*: page-table entries tell private from shared.  *has_private_memory*: pages can be
    private at all. *can_read_registers*: the host may get and set vCPU registers after launch.
    *host_sees_private*: the host may read and write private pages after launch.  *private_is_fd_backed*:
    private pages live in a guest_memfd.  *really_encrypts*: host and guest see different bytes of a private
    page because of encryption.  *emulator_reads_private*: KVM's instruction emulator sees private pages, so
    that code, page tables and the operands of emulated instructions may lie there.  *has_ghcb*: what would be
    intercepted is a #VC in the guest, whose handler asks the hypervisor through a shared page.
    *must_validate*: the guest accepts each page that becomes private with PVALIDATE.  *readonly_slots*: KVM
    takes KVM_MEM_READONLY: not for guests whose state is protected.  *policies*: which parts
    of a VM can be private, the default first (see ``GuestVm.policy``).  *emulated*: a stand-in, said so
    wherever a result of it is shown.
    """

    has_encryption_bit: bool = False
    has_private_memory: bool = False
    can_read_registers: bool = True
    host_sees_private: bool = True
    private_is_fd_backed: bool = False
    really_encrypts: bool = False
    emulator_reads_private: bool = True
    has_ghcb: bool = False
    must_validate: bool = False
    readonly_slots: bool = True
    policies: tuple[str, ...] = ()
    emulated: bool = False

    @property
    def host_sees_tables(self) -> bool:
        """Whether the host may read and write code, page tables and descriptor tables after launch, under
        the default policy.
        """
        return self.host_sees_private or self.policies[:1] == ("data",)

    @property
    def kvm_emulates(self) -> bool:
        """Whether KVM's instruction emulator can carry out whatever the guest does, under the default policy:
        it reads the guest's code and page tables.
        """
        return self.emulator_reads_private or self.policies[:1] == ("data",)

    @property
    def kvm_decodes_mmio(self) -> bool:
        """Whether KVM decodes what accesses MMIO, and not the guest's own #VC handler, which knows less."""
        return not self.has_ghcb

    @property
    def exits_in_place(self) -> bool:
        """Whether the guest leaves at the instruction that exits, not at a VMGEXIT in its own #VC handler:
        with another interrupt flag, and less that KVM counts.
        """
        return not self.has_ghcb

    @property
    def has_string_io(self) -> bool:
        """Whether INS and OUTS work: KVM emulates them, or the guest's #VC handler carries them out."""
        return self.kvm_emulates or self.has_ghcb


@dataclass(frozen=True)
class Availability:
    """Whether a protection can be used on a host, and each missing piece with the way to get it."""

    available: bool
    missing: tuple[MissingError, ...] = field(default=())
    note: str = ""


class Protection(ABC):
    """One way to protect a VM; an object serves one VM or many and keeps no state of them."""

    name: ClassVar[str]
    vm_type: ClassVar[int] = 0
    traits: ClassVar[Traits]
    label: ClassVar[str] = ""
    guest_sev: ClassVar[int] = 0
    """What the guest's runtime is told: ``layout.SEV_*`` bits."""

    @classmethod
    @abstractmethod
    def availability(cls, kvm: Kvm) -> Availability:
        """Tell whether this host's KVM offers it."""

    def encryption_bit(self, kvm: Kvm) -> EncryptionBit | None:  # noqa: ARG002 - for subclasses
        """Return the encryption bit that page tables must carry, or None."""
        return None

    def created(self, vm: GuestVm) -> None:  # noqa: B027 - most have nothing to do here
        """Act right after KVM_CREATE_VM, before memory and vCPUs."""

    def add_memory(self, vm: GuestVm, gpa: Gpa, size: int, **options: Unpack[SlotOptions]) -> MemorySlot:
        """Give the VM *size* bytes of memory at *gpa*, with whatever private side it needs: here none."""
        return vm.add_slot(gpa, size, **options)

    def launch(self, vm: GuestVm) -> None:  # noqa: B027 - nothing to bring in without private memory
        """Bring the initial image (``vm.private.image()``) in and seal it; registers and shared memory are
        ready.
        """

    def convert(self, vm: GuestVm, gpa: Gpa, size: int, private: bool, discard: bool) -> None:
        """Carry a conversion of launched memory out in KVM; the caller notes it in the bitmap afterwards.

        Called only where :attr:`Traits.private_is_fd_backed`.
        """
        raise NotImplementedError(f"protection {self.name} has no conversions in KVM")

    def answer_exit(self, vm: GuestVm, exit_: Exit) -> bool:  # noqa: ARG002 - for subclasses
        """Answer an exit that only this protection has, and return whether the vCPU may go on."""
        return False

    def about_vcpu(self, vm: GuestVm, vcpu: GuestVcpu) -> Iterable[str]:  # noqa: ARG002 - for subclasses
        """Return what a post-mortem says of *vcpu* that only this protection knows."""
        return ()

    def private_in_kvm(self, vm: GuestVm, gpa: Gpa, size: int) -> BitMap | None:  # noqa: ARG002
        """Return the frames of a range that KVM itself treats as private now; None where it cannot be
        asked.
        """
        return None
