# SPDX-License-Identifier: Apache-2.0
"""The part of a post-mortem about nested virtualisation: whose state the registers are, L1's or L2's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvmpy.core.address import RawGpa
from kvmpy.guest.backtrace import describe
from kvmpy.uapi.constants import KVM_CAP_NESTED_STATE
from kvmpy.x86.nested_state import SvmNestedState
from kvmpy.x86.vmcb import VMCB_SIZE, MiscCtl, Vmcb, int_ctl_words, intercept_names

if TYPE_CHECKING:
    from kvmpy.guest.vcpu import GuestVcpu
    from kvmpy.guest.vm import GuestVm


def nested(vm: GuestVm, vcpu: GuestVcpu) -> Iterator[str]:
    """Yield which guest the registers belong to, and what the VMCB says; SVM only."""
    if not vm.check_extension(KVM_CAP_NESTED_STATE):
        yield "not available: KVM has no nested state"
        return
    state = SvmNestedState.of(vcpu.nested.get())
    gif = "" if state.gif else ", GIF clear"
    if not state.guest_mode or state.vmcb is None:
        yield f"the vCPU is in L1{gif}"
        yield from _left(vm, vcpu)
        return
    pending = ", VMRUN not completed" if state.run_pending else ""
    yield f"the vCPU is in L2: registers and code are L2's{pending}{gif}"
    yield f"L1 goes on at {state.vmcb['rip']:#x}  {describe(vm, state.vmcb['rip'])}"
    yield f"VMCB at {state.vmcb_pa:#x}: {_controls(state.vmcb)}"
    yield f"intercepts: {', '.join(intercept_names(state.vmcb.page))}"


def _controls(vmcb: Vmcb) -> str:
    npt = f"nested CR3 {vmcb['nested_cr3']:#x}" if vmcb["misc_ctl"] & MiscCtl.NP else "no nested paging"
    words = [npt, f"ASID {vmcb['asid']}", int_ctl_words(vmcb["int_ctl"])]
    words += [f"injects {vmcb.injected}"] if vmcb.injected else []
    return ", ".join(word for word in words if word)


def _left(vm: GuestVm, vcpu: GuestVcpu) -> Iterator[str]:
    """Yield how an L2 that the host made was left last."""
    if not vcpu.l2_gva:
        return
    raw = RawGpa(int.from_bytes(vm.read(vcpu.l2_gva + 8, 8), "little"))
    gpa, _ = vm.from_raw(raw)
    vmcb = Vmcb(bytes(vm.memory.read(gpa, VMCB_SIZE)))
    if vmcb["asid"]:
        yield f"VMCB at {raw}: last exit {vmcb.exit_text()}; L2 stands at {vmcb['rip']:#x}"
