# SPDX-License-Identifier: Apache-2.0
"""KVM_CAP_DISABLE_QUIRKS2: instructions and control bits that KVM treats specially until told not to.

The other quirks are tested with what they change: the page of a disabled APIC and its LINT0, OUT to port
0x7e, feature MSRs, slots that are deleted.
"""

from __future__ import annotations

import pytest

from kvmpy import (
    AGENT,
    CR0,
    KVM_CAP_DISABLE_QUIRKS2,
    KVM_X86_QUIRK_CD_NW_CLEARED,
    KVM_X86_QUIRK_FIX_HYPERCALL_INSN,
    KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT,
    KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS,
    PAGE_SIZE,
    Agent,
    Cpuid,
    Fault,
    GuestVm,
    MakeVm,
    Msr,
    Registers,
    Vector,
    kvm_cpuid2,
)

VMCALL, VMMCALL = b"\x0f\x01\xc1", b"\x0f\x01\xd9"
MONITOR, MWAIT = b"\x0f\x01\xc8", b"\x0f\x01\xc9"
MISC_ENABLE_MWAIT = 1 << 18
ENOSYS = (1 << 64) - 1000


def can_disable(*quirks: int) -> pytest.MarkDecorator:
    """Require that each of *quirks* can be disabled."""
    return pytest.mark.requires(*(f"KVM_CAP_DISABLE_QUIRKS2&{int(quirk):#x}" for quirk in quirks))


@can_disable(KVM_X86_QUIRK_FIX_HYPERCALL_INSN)
@pytest.mark.requires("trait:kvm_emulates", "trait:host_sees_private")
@pytest.mark.deadline(2)
@pytest.mark.parametrize("disable", [False, True], ids=["rewritten", "kept"])
def test_the_other_vendors_hypercall(make_vm: MakeVm, disable: bool) -> None:
    """KVM turns the other vendor's hypercall instruction into this CPU's; with the quirk disabled it is #UD.

    The instruction in memory is rewritten and works from then on, or stays what it is; what lies around it
    stays.  Documentation/virt/kvm/api.rst, 7.31 KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_FIX_HYPERCALL_INSN.
    """

    def before(vm: GuestVm) -> None:
        if disable:
            vm.enable_cap(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_FIX_HYPERCALL_INSN)

    vm = make_vm(AGENT, before_vcpus=before)
    amd = Cpuid.from_struct(vm.kvm.supported_cpuid).is_amd_compatible
    own, other = (VMMCALL, VMCALL) if amd else (VMCALL, VMMCALL)
    gva = vm.alloc(PAGE_SIZE, nx=False)
    code = vm.view(gva, PAGE_SIZE)
    code[:5] = b"\x90" + other + b"\xc3"  # nop; the hypercall; ret
    agent = Agent(vm.vcpus[0])
    for _ in range(2):
        agent.begin(b"", where=gva, rax=0x7777)
        end = agent.end()
        if disable:
            assert isinstance(end, Fault)
            assert end.vector == Vector.UD
        else:
            assert isinstance(end, Registers)
            assert end.rax == ENOSYS
    assert bytes(code[:8]) == b"\x90" + (other if disable else own) + b"\xc3\0\0\0"


@can_disable(KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS, KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT)
@pytest.mark.requires("cpuid:xmm3", "trait:kvm_emulates")
@pytest.mark.parametrize("no_mwait", [False, True], ids=["misc-enable-quirk", "no-misc-enable-quirk"])
@pytest.mark.parametrize("never_ud", [True, False], ids=["never-ud-quirk", "no-never-ud-quirk"])
def test_mwait(make_vm: MakeVm, never_ud: bool, no_mwait: bool) -> None:
    """MONITOR and MWAIT are #UD exactly where CPUID does not show them and the quirk for that is disabled.

    CPUID shows them as the table says, or as MISC_ENABLE says where that quirk is disabled.
    Documentation/virt/kvm/api.rst, 7.31 KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS and
    KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT.
    """
    quirks = (0 if never_ud else int(KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS)) | (
        int(KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT) if no_mwait else 0
    )

    def before(vm: GuestVm) -> None:
        vm.enable_cap(KVM_CAP_DISABLE_QUIRKS2, quirks)

    wrong = []
    for in_table in (False, True):

        def edit(table: kvm_cpuid2, in_table: bool = in_table) -> kvm_cpuid2:
            cpuid = Cpuid.from_struct(table)
            (cpuid.set_feature if in_table else cpuid.clear_feature)("mwait")
            return cpuid.to_struct()

        vm = make_vm(AGENT, cpuid=edit, before_vcpus=before)
        place = vm.alloc(PAGE_SIZE)
        agent = Agent(vm.vcpus[0])
        value = agent.rdmsr(Msr.MSR_IA32_MISC_ENABLE)
        assert isinstance(value, int)
        for enabled in (False, True, False):
            put = MISC_ENABLE_MWAIT if enabled else 0
            assert agent.wrmsr(Msr.MSR_IA32_MISC_ENABLE, value & ~MISC_ENABLE_MWAIT | put) is None
            shown = enabled if no_mwait else in_table
            if bool(agent.cpuid(1)[2] >> 3 & 1) is not shown:
                wrong.append(f"table {in_table}, MISC_ENABLE {enabled}: CPUID does not show {shown}")
            for name, code in (("MONITOR", MONITOR), ("MWAIT", MWAIT)):
                end = agent.execute(code, rax=int(place))
                vector = end.vector if isinstance(end, Fault) else None
                if vector != (None if shown or never_ud else Vector.UD):
                    wrong.append(f"table {in_table}, MISC_ENABLE {enabled}: {name} raised {vector}")
    assert not wrong, "\n".join(wrong)


@can_disable(KVM_X86_QUIRK_CD_NW_CLEARED)
@pytest.mark.parametrize("disable", [False, True], ids=["quirk", "no-quirk"])
def test_cache_disable(make_vm: MakeVm, disable: bool) -> None:
    """The guest sees CR0.CD and CR0.NW as it wrote them, whether KVM clears them for the CPU or not.

    Documentation/virt/kvm/api.rst, 7.31 KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_CD_NW_CLEARED; Intel SDM
    volume 3, table 12-5 (NW without CD is #GP).
    """

    def before(vm: GuestVm) -> None:
        if disable:
            vm.enable_cap(KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_CD_NW_CLEARED)

    agent = Agent(make_vm(AGENT, before_vcpus=before).vcpus[0])
    both = int(CR0.CD | CR0.NW)
    value = agent.read_cr(0)
    assert isinstance(value, int)
    assert value & both == 0
    for bits in (int(CR0.CD), both, 0):
        assert agent.write_cr(0, value & ~both | bits) is None
        assert agent.read_cr(0) == value & ~both | bits
    fault = agent.write_cr(0, value | int(CR0.NW))
    assert fault is not None
    assert (fault.vector, fault.error_code) == (Vector.GP, 0)
    assert agent.read_cr(0) == value
