# SPDX-License-Identifier: Apache-2.0
"""The save area that is predicted of a vCPU: what the whole copy of the VMCB's save area brings along."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from kvmpy import Kvm
from kvmpy.coco import vmsa_prediction
from kvmpy.core.vcpu import Vcpu
from kvmpy.core.vcpu_state import GUEST_SSP_REG_ID
from kvmpy.x86.vmsa import VMSA

# AMD APM volume 2, table B-4, and the MSRs' numbers of the architecture.
FROM_MSRS = {
    "s_cet": (0x1E0, 0x6A2),
    "isst_addr": (0x1F0, 0x6A8),
    "dbgctl": (0x270, 0x1D9),
    "br_from": (0x278, 0x1DB),
    "br_to": (0x280, 0x1DC),
    "last_excp_from": (0x288, 0x1DD),
    "last_excp_to": (0x290, 0x1DE),
    "spec_ctrl": (0x2E0, 0x48),
}
VALUE = 0x1122_3344_5566_7788


@pytest.fixture
def vcpu(kvm: Kvm) -> Iterator[Vcpu]:
    """A vCPU of a plain VM."""
    with kvm.create_vm() as vm:
        new_vcpu = vm.create_vcpu()
        new_vcpu.cpuid.set(kvm.supported_cpuid)
        yield new_vcpu


def offering(vcpu: Vcpu, monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """Let the vCPU have VALUE in one more MSR, whatever this host offers."""

    def offered(indices: Iterable[int]) -> dict[int, int]:
        return {index: VALUE} if index in list(indices) else {}

    monkeypatch.setattr(vcpu.msrs, "get_offered", offered)


@pytest.mark.parametrize("name", FROM_MSRS)
def test_an_msr_lies_in_its_field(vcpu: Vcpu, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """svm_set_msr() writes it to the VMCB's save area, which sev_es_sync_vmsa() copies whole."""
    offset, index = FROM_MSRS[name]
    assert VMSA[name].offset == offset
    offering(vcpu, monkeypatch, index)
    page = vmsa_prediction.predict(vcpu, 0, spec_ctrl=True)
    assert int.from_bytes(page[offset : offset + 8], "little") == VALUE


def test_spec_ctrl_of_a_processor_that_does_not_virtualise_it(
    vcpu: Vcpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without V_SPEC_CTRL the vCPU's value is KVM's own: the field is zero."""
    offering(vcpu, monkeypatch, FROM_MSRS["spec_ctrl"][1])
    page = vmsa_prediction.predict(vcpu, 0, spec_ctrl=False)
    assert page[0x2E0:0x2E8] == bytes(8)


@pytest.mark.parametrize("there", [True, False])
def test_the_shadow_stack_pointer(vcpu: Vcpu, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """SSP comes by KVM_GET_ONE_REG where KVM_GET_REG_LIST has it: it is no MSR."""
    monkeypatch.setattr(vcpu.vm.kvm, "check_extension", lambda _: 1)
    monkeypatch.setattr(vcpu.fpu, "get_xcrs", lambda: type("Xcrs", (), {"xcrs": [], "nr_xcrs": 0}))
    monkeypatch.setattr(vcpu.regs, "get_list", lambda: [GUEST_SSP_REG_ID] if there else [])
    monkeypatch.setattr(vcpu.regs, "get_one", lambda reg: VALUE if reg == GUEST_SSP_REG_ID else 0)
    page = vmsa_prediction.predict(vcpu, 0)
    assert VMSA["ssp"].offset == 0x1E8
    assert int.from_bytes(page[0x1E8:0x1F0], "little") == (VALUE if there else 0)
