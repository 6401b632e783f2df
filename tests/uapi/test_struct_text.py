# SPDX-License-Identifier: Apache-2.0
"""What a struct prints: fields in hex, zeros left out, the member of a union that counts."""

from __future__ import annotations

import pytest

from kvmpy.uapi.constants import ExitReason
from kvmpy.uapi.struct_text import EXIT_MEMBERS
from kvmpy.uapi.structs import (
    Struct,
    kvm_coalesced_mmio_zone,
    kvm_cpuid2,
    kvm_dirty_log,
    kvm_enable_cap,
    kvm_hyperv_exit,
    kvm_ioeventfd,
    kvm_irq_routing,
    kvm_irqchip,
    kvm_lapic_state,
    kvm_msr_list,
    kvm_nested_state,
    kvm_pit_state,
    kvm_regs,
    kvm_run,
    kvm_sregs,
    kvm_xen_vcpu_attr,
    sev_user_data_snp_config,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (kvm_regs(), "kvm_regs()"),
        (kvm_regs(rax=1, rip=0xFFF0), "kvm_regs(rax=0x1, rip=0xfff0)"),
        (kvm_sregs(cs={"base": 5, "limit": 0xFFFF}), "kvm_sregs(cs={base=0x5, limit=0xffff})"),
        (kvm_enable_cap(cap=3, args=[0, 9]), "kvm_enable_cap(cap=0x3, args=[0x0, 0x9, 0x0, 0x0])"),
        (kvm_ioeventfd(fd=-1, len=4), "kvm_ioeventfd(len=0x4, fd=-1)"),
        (kvm_dirty_log(slot=1, dirty_bitmap=0x7F00), "kvm_dirty_log(slot=0x1, dirty_bitmap=0x7f00)"),
        (kvm_coalesced_mmio_zone(addr=0xE0, pio=1), "kvm_coalesced_mmio_zone(addr=0xe0, pio=0x1)"),
        (
            kvm_cpuid2.of([{"function": 1}, {"function": 2}]),
            "kvm_cpuid2(nent=0x2, entries=[{function=0x1}, {function=0x2}])",
        ),
        (kvm_msr_list.of(range(6)), "kvm_msr_list(nmsrs=0x6, indices=[0x0, 0x1, 0x2, 0x3, ... 6 entries])"),
        (kvm_lapic_state(regs=b"\1"), f"kvm_lapic_state(regs=<01{'00' * 31}... 1024 bytes>)"),
        (kvm_pit_state(channels=[{}, {"count": 2}]), "kvm_pit_state(channels=[1: {count=0x2}])"),
        (sev_user_data_snp_config(mask_chip_key=1), "sev_user_data_snp_config(mask_chip_key=0x1)"),
        (kvm_run(exit_reason=2, io={"port": 0xE6}), "kvm_run(exit_reason=0x2, io={port=0xe6})"),
        (kvm_run(exit_reason=6, mmio={"len": 8}), "kvm_run(exit_reason=0x6, mmio={len=0x8})"),
        (
            kvm_run(exit_reason=17, internal={"suberror": 3, "ndata": 1}),
            "kvm_run(exit_reason=0x11, internal={suberror=0x3, ndata=0x1})",
        ),
        (
            kvm_run(exit_reason=17, emulation_failure={"suberror": 1, "ndata": 3, "insn_size": 2}),
            "kvm_run(exit_reason=0x11, emulation_failure={suberror=0x1, ndata=0x3, insn_size=0x2})",
        ),
        (
            kvm_irqchip(chip_id=2, chip={"ioapic": {"id": 5}}),
            "kvm_irqchip(chip_id=0x2, chip={ioapic={id=0x5}})",
        ),
        (kvm_irqchip(chip_id=1, chip={"pic": {"imr": 5}}), "kvm_irqchip(chip_id=0x1, chip={pic={imr=0x5}})"),
        (
            kvm_irq_routing.of([{"gsi": 4, "type": 2, "u": {"msi": {"data": 0x31}}}]),
            "kvm_irq_routing(nr=0x1, entries=[{gsi=0x4, type=0x2, u={msi={data=0x31}}}])",
        ),
        (
            kvm_hyperv_exit(type=2, u={"hcall": {"input": 1}}),
            "kvm_hyperv_exit(type=0x2, u={hcall={input=0x1}})",
        ),
        (
            kvm_nested_state(format=1, hdr={"svm": {"vmcb_pa": 0x1000}}),
            "kvm_nested_state(format=0x1, hdr={svm={vmcb_pa=0x1000}})",
        ),
        (kvm_xen_vcpu_attr(type=6, u={"vcpu_id": 1}), "kvm_xen_vcpu_attr(type=0x6, u={vcpu_id=0x1})"),
    ],
    ids=lambda each: each.NAME if isinstance(each, Struct) else "",
)
def test_text(value: Struct, text: str) -> None:
    assert repr(value) == text


def test_an_unknown_exit_shows_no_payload() -> None:
    assert repr(kvm_run(exit_reason=999, io={"port": 1})) == "kvm_run(exit_reason=0x3e7)"


def test_every_payload_is_a_field_of_kvm_run() -> None:
    assert set(EXIT_MEMBERS.values()) <= set(kvm_run.FIELDS)


def test_exits_without_payload_are_known_ones() -> None:
    assert {reason.name.removeprefix("KVM_EXIT_") for reason in ExitReason if reason not in EXIT_MEMBERS} == {
        "HLT",
        "IRQ_WINDOW_OPEN",
        "SHUTDOWN",
        "INTR",
        "SET_TPR",
        "NMI",
        "WATCHDOG",
        "DIRTY_RING_FULL",
        "AP_RESET_HOLD",
        "X86_BUS_LOCK",
    }
