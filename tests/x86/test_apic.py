# SPDX-License-Identifier: Apache-2.0
"""Local APIC registers, commands and state."""

from __future__ import annotations

import struct

import pytest

from kvmpy.uapi.structs import kvm_lapic_state
from kvmpy.x86 import apic
from kvmpy.x86.apic import Delivery, LapicState, Shorthand


@pytest.mark.parametrize(
    ("offset", "name", "msr"),
    [
        (0x20, "ID", 0x802),
        (0x80, "TPR", 0x808),
        (0xB0, "EOI", 0x80B),
        (0xF0, "SPIV", 0x80F),
        (0x100, "ISR0", 0x810),
        (0x170, "ISR7", 0x817),
        (0x180, "TMR0", 0x818),
        (0x270, "IRR7", 0x827),
        (0x300, "ICR", 0x830),
        (0x320, "LVT_TIMER", 0x832),
        (0x390, "TIMER_CURRENT", 0x839),
        (0x3E0, "TIMER_DIVIDE", 0x83E),
        (0x3F0, "SELF_IPI", 0x83F),
    ],
)
def test_registers_in_both_modes(offset: int, name: str, msr: int) -> None:
    assert apic.register_name(offset) == name
    assert apic.x2apic_msr(offset) == msr


@pytest.mark.parametrize("offset", [0x90, 0xC0, 0xE0, 0x310, 0x21, 0x1000, -16])
def test_registers_that_x2apic_mode_lacks(offset: int) -> None:
    with pytest.raises(ValueError, match="x2APIC"):
        apic.x2apic_msr(offset)


@pytest.mark.parametrize(
    ("command", "value"),
    [
        (apic.icr(0x40, destination=3), 0x0300_0000_0000_4040),
        (apic.icr(0x40, destination=3, x2apic=True), 0x3_0000_4040),
        (apic.icr(0x40, destination=0x1_0203, x2apic=True, logical=True), 0x1_0203_0000_4840),
        (apic.icr(delivery=Delivery.INIT, shorthand=Shorthand.ALL_BUT_SELF), 0xC_4500),
        (apic.icr(8, delivery=Delivery.STARTUP, destination=1), 0x0100_0000_0000_4608),
        (apic.icr(0x31, shorthand=Shorthand.SELF), 0x4_4031),
        (apic.icr(delivery=Delivery.INIT, level=True, asserted=False), 0x8500),
    ],
)
def test_commands(command: int, value: int) -> None:
    assert command == value


def test_commands_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="vector 256"):
        apic.icr(256)
    with pytest.raises(ValueError, match=r"destination 0x100 .*xAPIC"):
        apic.icr(1, destination=256)
    with pytest.raises(ValueError, match="x2APIC"):
        apic.icr(1, destination=1 << 32, x2apic=True)


def test_command_words() -> None:
    assert apic.icr_words(0x0300_0000_0000_4040) == "vector 64 fixed physical 0x3 assert"
    assert apic.icr_words(0x1_0203_0000_4840, x2apic=True) == "vector 64 fixed logical 0x10203 assert"
    assert apic.icr_words(0xC_9500) == "vector 0 init all-but-self pending level"


@pytest.mark.parametrize(
    ("value", "timer", "words"),
    [
        (0x1_0000, False, "vector 0 fixed masked"),
        (0x700, False, "vector 0 extint"),
        (0x0_E4FE, False, "vector 254 nmi active-low remote-IRR level"),
        (0x2_0020, True, "vector 32 periodic"),
        (0x5_1020, True, "vector 32 tsc-deadline pending masked"),
        (0xEC, True, "vector 236 one-shot"),
    ],
)
def test_local_vector_table(value: int, timer: bool, words: str) -> None:
    assert apic.lvt_words(value, timer=timer) == words


@pytest.mark.parametrize(
    ("register", "divisor"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (0xA, 128), (0xB, 1)]
)
def test_divide_configuration(register: int, divisor: int) -> None:
    assert apic.divide_value(register) == divisor


def state(**registers: int) -> LapicState:
    """Return a state with some registers set, by ``r<offset>``."""
    data = bytearray(1024)
    for name, value in registers.items():
        struct.pack_into("<I", data, int(name[1:], 16), value)
    return LapicState(bytes(data))


def test_vectors() -> None:
    lapic = state(r100=1 << 16, r170=1 << 31, r200=3, r210=1 << 31)
    assert lapic.vectors(apic.ISR) == (16, 255)
    assert lapic.vectors(apic.IRR) == (0, 1, 63)
    assert lapic.vectors(apic.TMR) == ()


def test_apic_id_in_both_formats() -> None:
    lapic = state(r20=0x0500_0000)
    assert lapic.apic_id == 5
    assert LapicState(lapic.data, x2apic=True).apic_id == 0x0500_0000


def test_state_as_text() -> None:
    lapic = state(
        r20=0x0100_0000, r30=0x5_0014, r80=0x20, rF0=0x1FF, r200=0x6, r210=1, r280=0x40, r300=0x4_4031,
        r320=0x2_00EC, r350=0x700, r380=1000, r390=400, r3E0=0xB,
    )  # fmt: skip
    assert str(lapic).splitlines() == [
        "id 0x1  version 0x14, 6 LVT entries",
        "tpr 0x20  ppr 0x0  ldr 0x0  dfr 0x0",
        "spiv 0x1ff: vector 255, enabled",
        "in service: none",
        "requested: 1-2 32",
        "level-triggered: none",
        "errors: received-illegal-vector",
        "icr 0x44031: vector 49 fixed self assert",
        "lvt_timer   vector 236 periodic",
        "lvt_thermal vector 0 fixed",
        "lvt_pmc     vector 0 fixed",
        "lvt_lint0   vector 0 extint",
        "lvt_lint1   vector 0 fixed",
        "lvt_error   vector 0 fixed",
        "timer: initial 1000, current 400, divided by 1",
    ]


def test_replaced_registers_and_the_kernels_struct() -> None:
    lapic = LapicState(bytes(kvm_lapic_state().regs)).replaced({apic.TPR: 0x30, apic.ICR2: 0x0200_0000})
    assert (lapic.register(apic.TPR), lapic.icr) == (0x30, 0x0200_0000_0000_0000)
    assert kvm_lapic_state.from_bytes(lapic.data).to_bytes() == lapic.data
    assert not lapic.enabled


def test_short_states_are_refused() -> None:
    with pytest.raises(ValueError, match="1024 bytes, not 1023"):
        LapicState(bytes(1023))
