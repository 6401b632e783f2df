# SPDX-License-Identifier: Apache-2.0
"""Interrupts and other events of a vCPU as text: what is pending, and why it may not be delivered."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvmpy.core.errors import KvmError
from kvmpy.uapi.constants import ShadowInt
from kvmpy.x86 import apic

if TYPE_CHECKING:
    from kvmpy.guest.vcpu import GuestVcpu
    from kvmpy.uapi.structs import kvm_vcpu_events

_SHADOWS = {ShadowInt.KVM_X86_SHADOW_INT_MOV_SS: "MOV SS", ShadowInt.KVM_X86_SHADOW_INT_STI: "STI"}


def interrupts(vcpu: GuestVcpu) -> Iterator[str]:
    """Yield the events of *vcpu* (KVM_GET_VCPU_EVENTS) and the state of its local APIC, where KVM has one."""
    yield from _events(vcpu.events.get())
    try:
        state = apic.LapicState(vcpu.lapic.get().to_bytes())
    except KvmError as error:
        if error.errno != errno.EINVAL:
            raise
        yield "no local APIC in KVM"
        return
    # A guest that left the APIC as reset has it is told nothing by 16 lines of zeroes.
    yield from str(state).splitlines() if state.enabled else ["local APIC disabled by software"]


def _events(events: kvm_vcpu_events) -> Iterator[str]:
    words = []
    for kind, event in (("exception", events.exception), ("interrupt", events.interrupt)):
        states = [name for name in ("injected", "pending") if getattr(event, name, 0)]
        if states:
            words.append(f"{kind} {event.nr} {' '.join(states)}")
    shadow = [name for bit, name in _SHADOWS.items() if events.interrupt.shadow & bit]
    if shadow:
        words.append(f"interrupts held back by {' and '.join(shadow)}")
    states = [name for name in ("injected", "pending", "masked") if getattr(events.nmi, name)]
    if states:
        words.append(f"NMI {' '.join(states)}")
    if events.smi.smm or events.smi.pending:
        words.append("in SMM" if events.smi.smm else "SMI pending")
    if events.smi.latched_init:
        words.append("INIT latched")
    if events.triple_fault.pending:
        words.append("triple fault pending")
    yield f"events: {', '.join(words) or 'none'}"
