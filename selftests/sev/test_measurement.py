# SPDX-License-Identifier: Apache-2.0
"""What the firmware measures of an SNP launch is what is predicted, and anything else is refused by it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

import pytest

from kvmpy import (
    KVM_CAP_ONE_REG,
    KVM_SEV_SNP_PAGE_TYPE_NORMAL,
    PAGE_SIZE,
    GuestVcpu,
    GuestVm,
    IdBlock,
    MakeVm,
    MsrError,
    SevError,
    SevRet,
    Snp,
    kvm_xsave,
)
from kvmpy.coco import idblock
from kvmpy.coco.sev_platform import vmsa_features
from kvmpy.coco.snp import PlannedPages, SnpPlan, running
from kvmpy.coco.snp_launch import IdBlockPair
from kvmpy.coco.snp_prediction import predict_digest, predicted_id_block, process_key
from kvmpy.core.vcpu_state import GUEST_SSP_REG_ID

pytestmark = pytest.mark.protections("snp")

GUEST = """
#include <kvmpy/guest.h>

u64 data[1024] __aligned(4096) = { 1, [1023] = 2 };
u64 empty[1024] __aligned(4096);

void guest_main(void)
{
	GUEST_SYNC(data[0] + data[1023] + empty[5], guest_cpu_index());
}
"""


def launch_and_run(vm: GuestVm) -> None:
    vm.launch()
    for index, vcpu in enumerate(vm.vcpus):
        assert [call.args[:2] for call in vcpu.syncs()] == [(3, index)]


@pytest.mark.parametrize("vcpus", [1, 2, 8])
def test_prediction_with_several_vcpus(make_vm: MakeVm, vcpus: int) -> None:
    """The save area of every vCPU is measured as KVM builds it, in the order of creation.

    Linux: snp_launch_update_vmsa(); SNP Firmware ABI, 8.17 and 8.18 (the ID block's digest is compared).
    """
    launch_and_run(make_vm(GUEST, vcpus=vcpus, protection=Snp(id_block=predicted_id_block)))


def test_prediction_is_the_default(make_vm: MakeVm) -> None:
    """vm.launch() gives the firmware a predicted digest to compare, without being asked."""
    vm = make_vm(GUEST)
    launch_and_run(vm)
    given = running(vm).id_block
    assert given is not None
    assert any(IdBlock.from_bytes(given.block).launch_digest)


def set_fpu(vcpu: GuestVcpu, seed: int) -> None:
    """Give every byte of the x87, SSE and AVX registers a value of its own."""
    area = bytearray(vcpu.fpu.get_xsave2().to_bytes())
    struct.pack_into("<HHHHQQI", area, 0, 0x27F, 0x3800, 0x55, 0x123, 0x1122334455, 0x5544332211, 0x1FA0)
    for register in range(8):
        start = 32 + 16 * register
        area[start : start + 10] = bytes((register * 16 + byte + seed) & 0xFF for byte in range(10))
    area[160 : 160 + 256] = bytes((byte * 7 + seed) & 0xFF for byte in range(256))
    area[576 : 576 + 256] = bytes((byte * 3 + seed) & 0xFF for byte in range(256))
    struct.pack_into("<Q", area, 512, 7)
    vcpu.fpu.set_xsave(kvm_xsave.from_bytes(bytes(area)))


def set_fpu_alone(vcpu: GuestVcpu, seed: int) -> None:
    """Give the x87 and SSE registers values by KVM_SET_FPU, which leaves XSTATE_BV as it is."""
    fpu = vcpu.fpu.get()
    fpu.fcw, fpu.fsw, fpu.ftwx, fpu.last_opcode, fpu.last_ip, fpu.last_dp = 0x27F, 0x3800, 0x55, 0x123, 5, 6
    for register in range(8):
        fpu.fpr[register] = bytes((register * 16 + byte + seed) & 0xFF for byte in range(10)) + bytes(6)
    for register in range(16):
        fpu.xmm[register] = bytes((register + byte * 3 + seed) & 0xFF for byte in range(16))
    vcpu.fpu.set(fpu)


def set_registers(vcpu: GuestVcpu, seed: int) -> None:
    """Give the registers that the entry does not read values of their own."""
    regs = vcpu.regs.get()
    for number, name in enumerate(("rax", "rbx", "rcx", "rdx", "rbp", *(f"r{n}" for n in range(8, 16)))):
        setattr(regs, name, 0x0101_0101_0101_0101 * (number + 1) + seed)
    vcpu.regs.set(regs)


def set_msrs(vcpu: GuestVcpu, seed: int) -> None:
    """Give every MSR of the save area a value of its own."""
    canonical = 0xFFFF_8000_0000_1000 + seed
    for number, msr in enumerate((0xC0000082, 0xC0000083, 0xC0000102, 0x175, 0x176)):
        vcpu.msrs.set(msr, canonical + 0x1000 * number)
    for msr, value in ((0xC0000081, 0x0023_0010_0000_0000), (0xC0000084, 0x4_7700), (0x174, 0x10)):
        vcpu.msrs.set(msr, value)
    vcpu.msrs.set(0x277, 0x0007_0406_0001_0406)


@pytest.mark.parametrize(
    "change", [set_fpu, set_fpu_alone, set_registers, set_msrs], ids=lambda change: change.__name__
)
def test_prediction_of_state_that_is_no_reset_state(
    make_vm: MakeVm, change: Callable[[GuestVcpu, int], None]
) -> None:
    """FPU, general and model-specific registers are measured with the values that the vCPU has.

    Linux: sev_es_sync_vmsa(); APM volume 2, table B-4.
    """
    vm = make_vm(GUEST, vcpus=2)
    for index, vcpu in enumerate(vm.vcpus):
        change(vcpu, index)
    launch_and_run(vm)


def set_ssp(vcpu: GuestVcpu) -> bool:
    """Set the shadow stack pointer; False where the vCPU has none."""
    if not vcpu.vm.kvm.check_extension(KVM_CAP_ONE_REG) or GUEST_SSP_REG_ID not in vcpu.regs.get_list():
        return False
    vcpu.regs.set_one(GUEST_SSP_REG_ID, 0x7000)
    return vcpu.regs.get_one(GUEST_SSP_REG_ID) == 0x7000


def set_kept(index: int, value: int) -> Callable[[GuestVcpu], bool]:
    """Return what sets an MSR; False where KVM refuses it, or keeps nothing of it."""

    def change(vcpu: GuestVcpu) -> bool:
        try:
            vcpu.msrs.set(index, value)
        except MsrError:
            return False
        return vcpu.msrs.get_many([index])[index] == value

    return change


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(set_kept(0x48, 1), id="SPEC_CTRL"),
        pytest.param(set_kept(0x1D9, 1), id="DEBUGCTL"),
        pytest.param(set_kept(0x6A2, 1), id="S_CET"),
        pytest.param(set_kept(0x6A8, 0x7000), id="INT_SSP_TAB"),
        pytest.param(set_ssp, id="SSP"),
    ],
)
def test_prediction_of_what_few_processors_have(make_vm: MakeVm, change: Callable[[GuestVcpu], bool]) -> None:
    """Speculation control, branch records and kernel shadow stacks are measured where a vCPU has them.

    Linux: sev_es_sync_vmsa() copies the VMCB's save area whole; svm_set_msr(); APM volume 2, table B-4.
    """
    vm = make_vm(GUEST)
    if not change(vm.vcpus[0]):
        pytest.skip("no such register on this processor: a newer EPYC")
    launch_and_run(vm)


def test_prediction_with_every_vmsa_feature(make_vm: MakeVm) -> None:
    """Features of KVM_SEV_INIT2 are part of the save area, each one that the platform offers.

    Documentation/virt/kvm/x86/amd-memory-encryption.rst, KVM_SEV_INIT2; KVM_X86_SEV_VMSA_FEATURES.
    """
    features = vmsa_features(make_vm.kvm)
    if not features:
        pytest.skip("this platform offers no VMSA features (KVM_X86_SEV_VMSA_FEATURES is 0)")
    for bit in (1 << number for number in range(64) if features >> number & 1):
        launch_and_run(make_vm(GUEST, protection=Snp(vmsa_features=bit)))


def with_digest(change: Callable[[GuestVm, SnpPlan], SnpPlan]) -> Snp:
    """Return a protection whose ID block is that of a launch which differs."""

    def wrong(vm: GuestVm, plan: SnpPlan) -> IdBlockPair:
        return predicted_id_block(vm, change(vm, plan))

    return Snp(id_block=wrong)


def other_content(vm: GuestVm, plan: SnpPlan) -> SnpPlan:
    """One bit of one page."""
    pages = list(plan.pages)
    place = next(i for i, part in enumerate(pages) if part.page_type == KVM_SEV_SNP_PAGE_TYPE_NORMAL)
    data = bytearray(pages[place].source or b"")
    data[-1] ^= 1
    pages[place] = replace(pages[place], source=memoryview(data))
    return replace(plan, pages=tuple(pages))


def other_address(vm: GuestVm, plan: SnpPlan) -> SnpPlan:
    """The same pages, the last part one page further on."""
    *first, last = plan.pages
    return replace(plan, pages=(*first, replace(last, gpa=last.gpa + PAGE_SIZE)))


def other_order(vm: GuestVm, plan: SnpPlan) -> SnpPlan:
    """The same pages, the first part last."""
    return replace(plan, pages=(*plan.pages[1:], plan.pages[0]))


def one_page_less(vm: GuestVm, plan: SnpPlan) -> SnpPlan:
    """All pages but one."""
    *first, last = plan.pages
    kept = last.size - PAGE_SIZE
    source = last.source[:kept] if last.source is not None else None
    rest = [PlannedPages(last.gpa, kept, last.page_type, source)] if kept else []
    return replace(plan, pages=(*first, *rest))


def other_features(vm: GuestVm, plan: SnpPlan) -> SnpPlan:
    """A VMSA feature that the vCPUs do not have."""
    return replace(plan, vmsa_features=plan.vmsa_features ^ 1 << 5)


@pytest.mark.parametrize(
    "change",
    [other_content, other_address, other_order, one_page_less, other_features],
    ids=lambda change: change.__name__,
)
def test_another_launch_is_refused(make_vm: MakeVm, change: Callable[[GuestVm, SnpPlan], SnpPlan]) -> None:
    """A launch whose digest is not that of its ID block fails with EIO and BAD_MEASUREMENT.

    SNP Firmware ABI, 8.18 (SNP_LAUNCH_FINISH).
    """
    vm = make_vm(GUEST, protection=with_digest(change))
    with pytest.raises(SevError) as error:
        vm.launch()
    assert error.value.firmware == SevRet.SEV_RET_BAD_MEASUREMENT


def test_a_register_changed_after_the_prediction_is_refused(make_vm: MakeVm) -> None:
    """The vCPUs' state at LAUNCH_FINISH counts, not that of any time before.

    SNP Firmware ABI, 8.18; Linux: snp_launch_finish().
    """

    def late(vm: GuestVm, plan: SnpPlan) -> IdBlockPair:
        block = predicted_id_block(vm, plan)
        set_registers(vm.vcpus[0], 1)
        return block

    vm = make_vm(GUEST, protection=Snp(id_block=late))
    with pytest.raises(SevError) as error:
        vm.launch()
    assert error.value.firmware == SevRet.SEV_RET_BAD_MEASUREMENT


def test_an_id_block_of_another_policy_is_refused(make_vm: MakeVm) -> None:
    """The policy of the ID block must be that of LAUNCH_START: EIO and POLICY_FAILURE.

    SNP Firmware ABI, 8.18.
    """

    def other(vm: GuestVm, plan: SnpPlan) -> IdBlockPair:
        return predicted_id_block(vm, replace(plan, policy=plan.policy | 1 << 19))

    vm = make_vm(GUEST, protection=Snp(id_block=other))
    with pytest.raises(SevError) as error:
        vm.launch()
    assert error.value.firmware == SevRet.SEV_RET_POLICY_FAILURE


@pytest.mark.parametrize("signed_by_author", [False, True], ids=["id-key", "author-key"])
def test_a_wrong_signature_is_refused(make_vm: MakeVm, signed_by_author: bool) -> None:
    """A block not signed by its ID key, or an ID key not signed by its author key: EIO and BAD_SIGNATURE.

    SNP Firmware ABI, 8.18 and table of ID_AUTH_INFO.
    """

    def forged(vm: GuestVm, plan: SnpPlan) -> IdBlockPair:
        block = IdBlock(predict_digest(vm, plan).value, plan.policy)
        author = idblock.generate_key()
        auth = block.sign(process_key(), author)
        if signed_by_author:
            other = idblock.encode_public_key(idblock.generate_key().public_key())
            auth = replace(auth, author_key=other)
        else:
            auth = replace(auth, signature=block.sign(author).signature)
        return IdBlockPair(block.to_bytes(), auth.to_bytes(), author_key=signed_by_author)

    vm = make_vm(GUEST, protection=Snp(id_block=forged))
    with pytest.raises(SevError) as error:
        vm.launch()
    assert error.value.firmware == SevRet.SEV_RET_BAD_SIGNATURE


def test_an_author_key_is_accepted(make_vm: MakeVm) -> None:
    """An ID key that an author key has signed launches, with auth_key_en set.

    SNP Firmware ABI, 8.18; Documentation/virt/kvm/x86/amd-memory-encryption.rst, KVM_SEV_SNP_LAUNCH_FINISH.
    """

    def authored(vm: GuestVm, plan: SnpPlan) -> IdBlockPair:
        block = IdBlock(predict_digest(vm, plan).value, plan.policy, guest_svn=3)
        auth = block.sign(process_key(), idblock.generate_key())
        return IdBlockPair(block.to_bytes(), auth.to_bytes(), auth.author_key_enabled)

    launch_and_run(make_vm(GUEST, protection=Snp(id_block=authored)))


def test_a_refused_launch_leaves_the_vm_closable_and_the_asid_free(make_vm: MakeVm) -> None:
    """After BAD_MEASUREMENT the VM is torn down like any other: the next launch works, many times over.

    Linux: sev_vm_destroy(); ASIDs are limited (CPUID 0x8000001F, ECX and EDX).
    """
    for _ in range(3):
        vm = make_vm(GUEST, protection=with_digest(other_content))
        with pytest.raises(SevError):
            vm.launch()
        vm.close()
    launch_and_run(make_vm(GUEST))
