# SPDX-License-Identifier: Apache-2.0
"""Interrupt controllers, routing, event file descriptors, timers, clock."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class IrqChip(IntEnum):
    """``chip_id`` of struct kvm_irqchip."""

    KVM_IRQCHIP_PIC_MASTER = 0
    KVM_IRQCHIP_PIC_SLAVE = 1
    KVM_IRQCHIP_IOAPIC = 2
    KVM_NR_IRQCHIPS = 3


class IrqLimit(IntEnum):
    """Sizes of interrupt controllers."""

    KVM_NR_INTERRUPTS = 256
    KVM_IOAPIC_NUM_PINS = 24
    KVM_APIC_REG_SIZE = 1024


class IrqRouting(IntEnum):
    """``type`` of struct kvm_irq_routing_entry."""

    KVM_IRQ_ROUTING_IRQCHIP = 1
    KVM_IRQ_ROUTING_MSI = 2
    KVM_IRQ_ROUTING_S390_ADAPTER = 3
    KVM_IRQ_ROUTING_HV_SINT = 4
    KVM_IRQ_ROUTING_XEN_EVTCHN = 5


class XenEvtchnPriority(IntEnum):
    """``priority`` of struct kvm_irq_routing_xen_evtchn."""

    KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL = 0xFFFFFFFF


class IrqfdFlag(IntFlag):
    """``flags`` of struct kvm_irqfd."""

    KVM_IRQFD_FLAG_DEASSIGN = 1
    KVM_IRQFD_FLAG_RESAMPLE = 2


class IoeventfdFlag(IntFlag):
    """``flags`` of struct kvm_ioeventfd."""

    KVM_IOEVENTFD_FLAG_DATAMATCH = 1
    KVM_IOEVENTFD_FLAG_PIO = 2
    KVM_IOEVENTFD_FLAG_DEASSIGN = 4
    KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY = 8
    KVM_IOEVENTFD_VALID_FLAG_MASK = 0x1F


class IoeventfdFlagNr(IntEnum):
    """Bit numbers of the flags of struct kvm_ioeventfd."""

    kvm_ioeventfd_flag_nr_datamatch = 0
    kvm_ioeventfd_flag_nr_pio = 1
    kvm_ioeventfd_flag_nr_deassign = 2
    kvm_ioeventfd_flag_nr_virtio_ccw_notify = 3
    kvm_ioeventfd_flag_nr_fast_mmio = 4
    kvm_ioeventfd_flag_nr_max = 5


class MsiFlag(IntFlag):
    """``flags`` of struct kvm_msi."""

    KVM_MSI_VALID_DEVID = 1


class PitFlag(IntFlag):
    """``flags`` of struct kvm_pit_state2."""

    KVM_PIT_FLAGS_HPET_LEGACY = 1
    KVM_PIT_FLAGS_SPEAKER_DATA_ON = 2


class PitConfigFlag(IntFlag):
    """``flags`` of struct kvm_pit_config."""

    KVM_PIT_SPEAKER_DUMMY = 1


class ClockFlag(IntFlag):
    """``flags`` of struct kvm_clock_data."""

    KVM_CLOCK_TSC_STABLE = 2
    KVM_CLOCK_REALTIME = 4
    KVM_CLOCK_HOST_TSC = 8
