# SPDX-License-Identifier: Apache-2.0
"""Interrupt controllers and the ways into them: lines, irqfd, ioeventfd, MSI, routing, PIT."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

from kvmpy.core.eventfd import EventFd, fd_number
from kvmpy.core.topic import Topic
from kvmpy.uapi import ioctls
from kvmpy.uapi.constants import (
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_IRQ_ROUTING_HV_SINT,
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI,
    KVM_IRQ_ROUTING_XEN_EVTCHN,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQFD_FLAG_DEASSIGN,
    KVM_IRQFD_FLAG_RESAMPLE,
    KVM_MSI_VALID_DEVID,
)
from kvmpy.uapi.structs import (
    kvm_ioapic_state,
    kvm_irq_level,
    kvm_irq_routing,
    kvm_irq_routing_entry,
    kvm_irqchip,
    kvm_irqfd,
    kvm_msi,
    kvm_pic_state,
    kvm_pit_config,
    kvm_pit_state,
    kvm_pit_state2,
    kvm_reinject_control,
)

if TYPE_CHECKING:
    from kvmpy.core.vm import Vm

IOAPIC_PINS = 24
PIC_PINS = 8
MSI_BASE = 0xFEE0_0000


@dataclass(frozen=True)
class Msi:
    """A message-signalled interrupt: what a device writes where (Intel SDM 3A section 12.11)."""

    address: int
    data: int

    @classmethod
    def to(
        cls,
        dest: int,
        vector: int,
        *,
        delivery_mode: int = 0,
        logical: bool = False,
        redirection_hint: bool = False,
        level: bool = False,
    ) -> Msi:
        """Return the message that raises *vector* at APIC id *dest*.

        Ids above 255 use bits 63:40 of the address (KVM_CAP_X2APIC_API). Delivery modes: 0 fixed, 1 lowest
        priority, 2 SMI, 4 NMI, 5 INIT, 7 ExtINT.
        """
        if not 0 <= vector <= 255 or not 0 <= delivery_mode <= 7 or not 0 <= dest < 1 << 32:
            raise ValueError(
                f"MSI to {dest:#x}, vector {vector:#x}, delivery mode {delivery_mode}: out of range"
            )
        address = MSI_BASE | (dest & 0xFF) << 12 | int(redirection_hint) << 3 | int(logical) << 2
        address |= (dest >> 8) << 40
        return cls(address, vector | delivery_mode << 8 | (0xC000 if level else 0))


@dataclass(frozen=True)
class IrqchipRoute:
    """GSI *gsi* is *pin* of an interrupt controller (KVM_IRQCHIP_PIC_MASTER, _SLAVE or _IOAPIC)."""

    gsi: int
    irqchip: int
    pin: int

    def entry(self) -> kvm_irq_routing_entry:
        """Return the kernel's form."""
        routing_entry = kvm_irq_routing_entry(gsi=self.gsi, type=KVM_IRQ_ROUTING_IRQCHIP)
        routing_entry.u.irqchip.irqchip = self.irqchip
        routing_entry.u.irqchip.pin = self.pin
        return routing_entry


@dataclass(frozen=True)
class MsiRoute:
    """GSI *gsi* sends the message *msi*; *devid* is the device's id where the platform wants one."""

    gsi: int
    msi: Msi
    devid: int | None = None

    def entry(self) -> kvm_irq_routing_entry:
        """Return the kernel's form."""
        flags = 0 if self.devid is None else KVM_MSI_VALID_DEVID
        routing_entry = kvm_irq_routing_entry(gsi=self.gsi, type=KVM_IRQ_ROUTING_MSI, flags=flags)
        routing_entry.u.msi.address_lo = self.msi.address & 0xFFFF_FFFF
        routing_entry.u.msi.address_hi = self.msi.address >> 32
        routing_entry.u.msi.data = self.msi.data
        routing_entry.u.msi.devid = self.devid or 0
        return routing_entry


@dataclass(frozen=True)
class HvSintRoute:
    """GSI *gsi* is synthetic interrupt source *sint* of a vCPU's Hyper-V SynIC (*vcpu* is its VP index)."""

    gsi: int
    vcpu: int
    sint: int

    def entry(self) -> kvm_irq_routing_entry:
        """Return the kernel's form."""
        routing_entry = kvm_irq_routing_entry(gsi=self.gsi, type=KVM_IRQ_ROUTING_HV_SINT)
        routing_entry.u.hv_sint.vcpu = self.vcpu
        routing_entry.u.hv_sint.sint = self.sint
        return routing_entry


@dataclass(frozen=True)
class XenEvtchnRoute:
    """GSI *gsi* is Xen event channel *port* of vCPU *vcpu*."""

    gsi: int
    port: int
    vcpu: int
    priority: int = 0xFFFF_FFFF

    def entry(self) -> kvm_irq_routing_entry:
        """Return the kernel's form."""
        routing_entry = kvm_irq_routing_entry(gsi=self.gsi, type=KVM_IRQ_ROUTING_XEN_EVTCHN)
        routing_entry.u.xen_evtchn.port = self.port
        routing_entry.u.xen_evtchn.vcpu = self.vcpu
        routing_entry.u.xen_evtchn.priority = self.priority
        return routing_entry


Route = Union[IrqchipRoute, MsiRoute, HvSintRoute, XenEvtchnRoute]


def default_routes() -> list[IrqchipRoute]:
    """Return the routing of KVM_CREATE_IRQCHIP: GSI 0 to 15 to a PIC and the IOAPIC, the rest to that."""
    routes = []
    for gsi in range(IOAPIC_PINS):
        routes.append(IrqchipRoute(gsi, KVM_IRQCHIP_IOAPIC, gsi))
        if gsi < 2 * PIC_PINS:
            chip = KVM_IRQCHIP_PIC_MASTER if gsi < PIC_PINS else KVM_IRQCHIP_PIC_SLAVE
            routes.append(IrqchipRoute(gsi, chip, gsi % PIC_PINS))
    return routes


@dataclass(frozen=True)
class RedirectionEntry:
    """An entry of the IOAPIC's redirection table in its fields (82093AA data sheet, section 3.2.4)."""

    vector: int = 0
    delivery_mode: int = 0
    logical: bool = False
    delivery_status: bool = False
    active_low: bool = False
    remote_irr: bool = False
    level: bool = False
    masked: bool = False
    dest_id: int = 0

    @classmethod
    def from_bits(cls, bits: int) -> RedirectionEntry:
        """Take the 64-bit register apart; reserved bits are dropped."""
        return cls(
            vector=bits & 0xFF,
            delivery_mode=bits >> 8 & 7,
            logical=bool(bits >> 11 & 1),
            delivery_status=bool(bits >> 12 & 1),
            active_low=bool(bits >> 13 & 1),
            remote_irr=bool(bits >> 14 & 1),
            level=bool(bits >> 15 & 1),
            masked=bool(bits >> 16 & 1),
            dest_id=bits >> 56 & 0xFF,
        )

    @property
    def bits(self) -> int:
        """The 64-bit register; ValueError where a number does not fit its field."""
        if self.vector >> 8 or self.delivery_mode >> 3 or self.dest_id >> 8:
            raise ValueError(f"{self}: a field is out of range")
        flags = (
            self.logical,
            self.delivery_status,
            self.active_low,
            self.remote_irr,
            self.level,
            self.masked,
        )
        low = self.vector | self.delivery_mode << 8
        low |= sum(int(flag) << 11 + position for position, flag in enumerate(flags))
        return low | self.dest_id << 56


class Irq(Topic):
    """Interrupt controllers and the ways into them."""

    _owner: Vm

    def create_chip(self) -> None:
        """Create PICs, IOAPIC and, with each vCPU, a local APIC in the kernel (KVM_CREATE_IRQCHIP).

        EINVAL once a vCPU exists, EEXIST for a second one.
        """
        self._owner.ioctl(ioctls.KVM_CREATE_IRQCHIP)

    def create_split_chip(self, pins: int = IOAPIC_PINS) -> None:
        """Create only local APICs in the kernel, for an outer IOAPIC of *pins* (KVM_CAP_SPLIT_IRQCHIP)."""
        self._owner.enable_cap(KVM_CAP_SPLIT_IRQCHIP, pins)

    def get_chip(self, chip_id: int) -> kvm_irqchip:
        """Return the state of a PIC or the IOAPIC; ENXIO without an in-kernel irqchip (KVM_GET_IRQCHIP)."""
        arg = kvm_irqchip(chip_id=chip_id)
        self._owner.ioctl(ioctls.KVM_GET_IRQCHIP, arg)
        return arg

    def set_chip(self, chip: kvm_irqchip) -> None:
        """Set the state of the controller that ``chip.chip_id`` names (KVM_SET_IRQCHIP)."""
        self._owner.ioctl(ioctls.KVM_SET_IRQCHIP, chip)

    def get_pic(self, slave: bool = False) -> kvm_pic_state:
        """Return the state of a PIC."""
        return self.get_chip(KVM_IRQCHIP_PIC_SLAVE if slave else KVM_IRQCHIP_PIC_MASTER).chip.pic

    def set_pic(self, state: kvm_pic_state, slave: bool = False) -> None:
        """Set the state of a PIC."""
        chip = kvm_irqchip(chip_id=KVM_IRQCHIP_PIC_SLAVE if slave else KVM_IRQCHIP_PIC_MASTER)
        chip.chip.pic = state
        self.set_chip(chip)

    def get_ioapic(self) -> kvm_ioapic_state:
        """Return the state of the IOAPIC; :class:`RedirectionEntry` reads ``redirtbl[pin].bits``."""
        return self.get_chip(KVM_IRQCHIP_IOAPIC).chip.ioapic

    def set_ioapic(self, state: kvm_ioapic_state) -> None:
        """Set the state of the IOAPIC."""
        chip = kvm_irqchip(chip_id=KVM_IRQCHIP_IOAPIC)
        chip.chip.ioapic = state
        self.set_chip(chip)

    def line(self, gsi: int, level: bool | int) -> None:
        """Set the level of line *gsi*; ENXIO without an in-kernel irqchip (KVM_IRQ_LINE)."""
        self._owner.ioctl(ioctls.KVM_IRQ_LINE, kvm_irq_level(irq=gsi, level=int(level)))

    def line_status(self, gsi: int, level: bool | int) -> int:
        """Set the level of line *gsi* and return what became of it (KVM_IRQ_LINE_STATUS).

        Below 0: masked or not routed; 0: merged with one that is pending; above 0: delivered, to that many
        controllers.
        """
        arg = kvm_irq_level(irq=gsi, level=int(level))
        self._owner.ioctl(ioctls.KVM_IRQ_LINE_STATUS, arg)
        return int(arg.status)

    def pulse(self, gsi: int) -> int:
        """Raise and lower line *gsi*; return what :meth:`line_status` says of the rising edge."""
        status = self.line_status(gsi, 1)
        self.line(gsi, 0)
        return status

    def signal_msi(self, msi: Msi, *, flags: int = 0, devid: int = 0) -> int:
        """Deliver a message; above 0 it was delivered, 0: the guest blocked it (KVM_SIGNAL_MSI)."""
        arg = kvm_msi(
            address_lo=msi.address & 0xFFFF_FFFF,
            address_hi=msi.address >> 32,
            data=msi.data,
            flags=flags,
            devid=devid,
        )
        return self._owner.ioctl(ioctls.KVM_SIGNAL_MSI, arg)

    def set_gsi_routing(self, routes: Iterable[Route | kvm_irq_routing_entry], *, flags: int = 0) -> None:
        """Replace the whole routing table (KVM_SET_GSI_ROUTING).

        Start from :func:`default_routes` to keep the usual lines. One GSI may lead to several controllers, or
        to one message.
        """
        entries = [item if isinstance(item, kvm_irq_routing_entry) else item.entry() for item in routes]
        arg = kvm_irq_routing.of(entries)
        arg.flags = flags
        self._owner.ioctl(ioctls.KVM_SET_GSI_ROUTING, arg)

    def irqfd(
        self,
        fd: EventFd | int,
        gsi: int,
        *,
        resample: EventFd | int | None = None,
        deassign: bool = False,
        flags: int = 0,
    ) -> None:
        """Raise *gsi* whenever the eventfd is signalled (KVM_IRQFD, api.rst section 4.75).

        With *resample* the line is level-triggered: KVM lowers it at the guest's EOI and signals that
        eventfd. *deassign* takes the same pair of eventfd and GSI back. EBUSY: the eventfd serves another GSI
        of this VM already.
        """
        flags |= (KVM_IRQFD_FLAG_DEASSIGN if deassign else 0) | (
            0 if resample is None else KVM_IRQFD_FLAG_RESAMPLE
        )
        arg = kvm_irqfd(
            fd=fd_number(fd), gsi=gsi, flags=flags, resamplefd=0 if resample is None else fd_number(resample)
        )
        self._owner.ioctl(ioctls.KVM_IRQFD, arg)


class Pit(Topic):
    """The i8254 timer."""

    _owner: Vm

    def create2(self, flags: int = 0) -> None:
        """Create the i8254 timer.

        Needs the in-kernel irqchip (KVM_CREATE_PIT2). Flag 1 is KVM_PIT_SPEAKER_DUMMY.
        """
        self._owner.ioctl(ioctls.KVM_CREATE_PIT2, kvm_pit_config(flags=flags))

    def get2(self) -> kvm_pit_state2:
        """Return the state of the i8254 timer; ENXIO when there is none (KVM_GET_PIT2)."""
        arg = kvm_pit_state2()
        self._owner.ioctl(ioctls.KVM_GET_PIT2, arg)
        return arg

    def set2(self, state: kvm_pit_state2) -> None:
        """Set the state of the i8254 timer (KVM_SET_PIT2)."""
        self._owner.ioctl(ioctls.KVM_SET_PIT2, state)

    def get(self) -> kvm_pit_state:
        """Return the three channels of the i8254 timer (KVM_GET_PIT, the older form)."""
        arg = kvm_pit_state()
        self._owner.ioctl(ioctls.KVM_GET_PIT, arg)
        return arg

    def set(self, state: kvm_pit_state) -> None:
        """Set the three channels of the i8254 timer (KVM_SET_PIT, the older form)."""
        self._owner.ioctl(ioctls.KVM_SET_PIT, state)

    def reinject_control(self, reinject: bool) -> None:
        """Let the timer make up for ticks that the guest missed, or not (KVM_REINJECT_CONTROL)."""
        self._owner.ioctl(ioctls.KVM_REINJECT_CONTROL, kvm_reinject_control(pit_reinject=int(reinject)))
