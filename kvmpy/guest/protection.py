# SPDX-License-Identifier: Apache-2.0
"""How a VM's memory and state are kept from the host: what every protection declares and does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from kvmpy.core.address import EncryptionBit, Gpa
from kvmpy.core.backing import Backing
from kvmpy.core.errors import MissingError
from kvmpy.core.slots import MemorySlot

if TYPE_CHECKING:
    from kvmpy.core.kvm import Kvm
    from kvmpy.guest.vm import GuestVm


@dataclass(frozen=True)
class Traits:
    """What a protection can and cannot do; tests ask for these, never for a protection's name.

    *has_encryption_bit*: page-table entries tell private from shared.  *has_private_memory*: pages can be
    private at all. *can_read_registers*: the host may get and set vCPU registers after launch.
    *host_sees_private*: the host may read and write private pages after launch.  *private_is_fd_backed*:
    private pages live in a guest_memfd.  *really_encrypts*: host and guest see different bytes of a private
    page because of encryption.  *emulated*: a stand-in, said so wherever a result of it is shown.
    """

    has_encryption_bit: bool = False
    has_private_memory: bool = False
    can_read_registers: bool = True
    host_sees_private: bool = True
    private_is_fd_backed: bool = False
    really_encrypts: bool = False
    emulated: bool = False


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

    @classmethod
    @abstractmethod
    def availability(cls, kvm: Kvm) -> Availability:
        """Tell whether this host's KVM offers it."""

    def encryption_bit(self, kvm: Kvm) -> EncryptionBit | None:  # noqa: ARG002 - for subclasses
        """Return the encryption bit that page tables must carry, or None."""
        return None

    def created(self, vm: GuestVm) -> None:  # noqa: B027 - most have nothing to do here
        """Act right after KVM_CREATE_VM, before memory and vCPUs."""

    @abstractmethod
    def add_memory(
        self, vm: GuestVm, gpa: Gpa, size: int, *, backing: Backing | None, slot: int | None, flags: int
    ) -> MemorySlot:
        """Give the VM *size* bytes of memory at *gpa*, with whatever private side it needs."""

    def launch(self, vm: GuestVm) -> None:  # noqa: B027 - nothing to bring in without private memory
        """Bring the initial image in and seal it."""

    def set_private(self, vm: GuestVm, gpa: Gpa, size: int) -> None:
        """Make pages private; their content is undefined afterwards."""
        vm.memory.set_private(gpa, size)

    def set_shared(self, vm: GuestVm, gpa: Gpa, size: int) -> None:
        """Make pages shared; their content is undefined afterwards."""
        vm.memory.set_shared(gpa, size)
