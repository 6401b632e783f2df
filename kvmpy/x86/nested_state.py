# SPDX-License-Identifier: Apache-2.0
"""KVM_GET_NESTED_STATE and KVM_SET_NESTED_STATE of SVM as a value (api.rst, 4.113 and 4.114)."""

from __future__ import annotations

from dataclasses import dataclass

from kvmpy.uapi.constants import (
    KVM_STATE_NESTED_FORMAT_SVM,
    KVM_STATE_NESTED_GIF_SET,
    KVM_STATE_NESTED_GUEST_MODE,
    KVM_STATE_NESTED_RUN_PENDING,
)
from kvmpy.uapi.structs import kvm_nested_state
from kvmpy.x86.vmcb import VMCB_SIZE, Vmcb


@dataclass
class SvmNestedState:
    """The nested state of a vCPU with SVM.

    *guest_mode*: L2 runs; the vCPU's registers are L2's then.  *run_pending*: VMRUN was executed, but
    nothing of L2 yet.  *gif* is the global interrupt flag.  *vmcb_pa* is where L1 has the VMCB.  *gpat* is
    L2's PAT where it has its own.  *vmcb*, only in guest mode: the control area of L1's VMCB as VMRUN read
    it, and the save area with L1's own state, which the exit brings back.
    """

    guest_mode: bool = False
    run_pending: bool = False
    gif: bool = True
    vmcb_pa: int = 0
    gpat: int = 0
    vmcb: Vmcb | None = None

    @classmethod
    def of(cls, state: kvm_nested_state) -> SvmNestedState:
        """Take what KVM_GET_NESTED_STATE returned; ValueError for another format than SVM's."""
        if state.format != KVM_STATE_NESTED_FORMAT_SVM:
            raise ValueError(f"nested state of format {state.format}, which is not SVM's")
        guest_mode = bool(state.flags & KVM_STATE_NESTED_GUEST_MODE)
        page = bytes(state.to_bytes()[kvm_nested_state.SIZE :][:VMCB_SIZE])
        return cls(
            guest_mode=guest_mode,
            run_pending=bool(state.flags & KVM_STATE_NESTED_RUN_PENDING),
            gif=bool(state.flags & KVM_STATE_NESTED_GIF_SET),
            vmcb_pa=int(state.hdr.svm.vmcb_pa) if guest_mode else 0,
            gpat=int(state.hdr.svm.gpat) if guest_mode else 0,
            vmcb=Vmcb(bytearray(page.ljust(VMCB_SIZE, b"\0"))) if guest_mode else None,
        )

    def to_struct(self) -> kvm_nested_state:
        """Return what KVM_SET_NESTED_STATE takes; the page follows the header where there is one."""
        page = b"" if self.vmcb is None else bytes(self.vmcb.page)
        state = kvm_nested_state.from_bytes(bytes(kvm_nested_state.SIZE) + page)
        state.format = KVM_STATE_NESTED_FORMAT_SVM
        state.size = kvm_nested_state.SIZE + len(page)
        for flag, on in (
            (KVM_STATE_NESTED_GUEST_MODE, self.guest_mode),
            (KVM_STATE_NESTED_RUN_PENDING, self.run_pending),
            (KVM_STATE_NESTED_GIF_SET, self.gif),
        ):
            state.flags |= flag if on else 0
        state.hdr.svm.vmcb_pa, state.hdr.svm.gpat = self.vmcb_pa, self.gpat
        return state
