# SPDX-License-Identifier: Apache-2.0
"""KVM_CAP_HYPERV_ENFORCE_CPUID: each synthetic MSR and each hypercall is denied without its CPUID bit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from kvmpy import KVM_CAP_HYPERV_ENFORCE_CPUID, Cpuid, GuestVm, Msr, ioctls, kvm_msr_entry, kvm_msrs
from kvmpy.x86 import msrs
from kvmpy.x86.hyperv import HvCall, HvLeaf, HvStatus, HvStimer, control

from .conftest import FAULT, Access, Call, MakeHyperV, accesses, calls

pytestmark = [
    pytest.mark.requires(
        "KVM_CAP_HYPERV_ENFORCE_CPUID", "KVM_CAP_SYS_HYPERV_CPUID", "KVM_CAP_HYPERV_SYNIC2",
        "param:kvm.ignore_msrs=N",
    ),
    pytest.mark.protections("none", "cbit"),
]  # fmt: skip

GP, UD = "#13", FAULT | 6
SYNDBG = "HV_X64_SYNDBG_CAP_ALLOW_KERNEL_DEBUGGING"
DIRECT = "HV_STIMER_DIRECT_MODE_AVAILABLE"


@dataclass(frozen=True)
class Rule:
    """An MSR: its feature, whether it can be read, values that may be written, and those that may not."""

    feature: str
    read: bool = True
    good: tuple[int, ...] = ()
    bad: tuple[int, ...] = ()


def _rules() -> dict[int, Rule]:
    hypercall, synic = "HV_MSR_HYPERCALL_AVAILABLE", "HV_MSR_SYNIC_AVAILABLE"
    timer, apic = "HV_MSR_SYNTIMER_AVAILABLE", "HV_MSR_APIC_ACCESS_AVAILABLE"
    frequencies, crash = "HV_ACCESS_FREQUENCY_MSRS", "HV_FEATURE_GUEST_CRASH_MSR_AVAILABLE"
    again, debug = "HV_ACCESS_REENLIGHTENMENT", "HV_FEATURE_DEBUG_MSRS_AVAILABLE"
    rules = {
        Msr.HV_X64_MSR_GUEST_OS_ID: Rule(hypercall, good=(1,)),
        Msr.HV_X64_MSR_HYPERCALL: Rule(hypercall, good=(0,)),
        Msr.HV_X64_MSR_VP_RUNTIME: Rule("HV_MSR_VP_RUNTIME_AVAILABLE", bad=(0, 1)),
        Msr.HV_X64_MSR_TIME_REF_COUNT: Rule("HV_MSR_TIME_REF_COUNT_AVAILABLE", bad=(0, 1)),
        Msr.HV_X64_MSR_VP_INDEX: Rule("HV_MSR_VP_INDEX_AVAILABLE", bad=(0, 1)),
        Msr.HV_X64_MSR_RESET: Rule("HV_MSR_RESET_AVAILABLE", good=(0,)),
        Msr.HV_X64_MSR_REFERENCE_TSC: Rule("HV_MSR_REFERENCE_TSC_AVAILABLE", good=(0,)),
        Msr.HV_X64_MSR_TSC_FREQUENCY: Rule(frequencies, bad=(1,)),
        Msr.HV_X64_MSR_APIC_FREQUENCY: Rule(frequencies, bad=(1,)),
        Msr.HV_X64_MSR_EOI: Rule(apic, read=False, good=(0,)),
        # To an APIC that is not there.
        Msr.HV_X64_MSR_ICR: Rule(apic, good=(7 << 56 | 0x51,)),
        Msr.HV_X64_MSR_TPR: Rule(apic, good=(0,)),
        Msr.HV_X64_MSR_VP_ASSIST_PAGE: Rule(apic, good=(0,), bad=(1 << 45 | 1,)),
        # Values that are an exit to user space where they may be written: see test_synic.py.
        Msr.HV_X64_MSR_SCONTROL: Rule(synic),
        Msr.HV_X64_MSR_SIEFP: Rule(synic),
        Msr.HV_X64_MSR_SIMP: Rule(synic),
        Msr.HV_X64_MSR_SVERSION: Rule(synic, bad=(1,)),
        Msr.HV_X64_MSR_EOM: Rule(synic, good=(0,)),
        Msr.HV_X64_MSR_REENLIGHTENMENT_CONTROL: Rule(again, good=(0, 1)),
        Msr.HV_X64_MSR_TSC_EMULATION_CONTROL: Rule(again, good=(0,)),
        Msr.HV_X64_MSR_TSC_EMULATION_STATUS: Rule(again, good=(0,), bad=(1,)),
        Msr.HV_X64_MSR_TSC_INVARIANT_CONTROL: Rule("HV_ACCESS_TSC_INVARIANT", good=(0, 1), bad=(3, 0)),
        Msr.HV_X64_MSR_SYNDBG_CONTROL: Rule(debug),
        Msr.HV_X64_MSR_SYNDBG_STATUS: Rule(debug, good=(1,)),
        Msr.HV_X64_MSR_SYNDBG_SEND_BUFFER: Rule(debug, good=(1,)),
        Msr.HV_X64_MSR_SYNDBG_RECV_BUFFER: Rule(debug, good=(1,)),
        Msr.HV_X64_MSR_SYNDBG_PENDING_BUFFER: Rule(debug),
        Msr.HV_X64_MSR_SYNDBG_OPTIONS: Rule(debug, good=(0,)),
        Msr.HV_X64_MSR_CRASH_CTL: Rule(crash, good=(0,)),
    }  # fmt: skip
    table = {int(msr): rule for msr, rule in rules.items()}
    table |= {Msr.HV_X64_MSR_SINT0 + n: Rule(synic, good=(0x10000, 0x51), bad=(0, 15)) for n in range(16)}
    for n in range(4):
        table[Msr.HV_X64_MSR_STIMER0_CONFIG + 2 * n] = Rule(timer, good=(0,))
        table[Msr.HV_X64_MSR_STIMER0_COUNT + 2 * n] = Rule(timer, good=(0,))
    table |= {Msr.HV_X64_MSR_CRASH_P0 + n: Rule(crash, good=(1,)) for n in range(5)}
    return table


RULES = _rules()
FEATURES = sorted({rule.feature for rule in RULES.values()})


def walk(vm: GuestVm, allowed: set[str]) -> tuple[dict[str, bool], dict[str, bool]]:
    """Return which accesses went well, and which should, by the MSR's name and what was done."""
    rows, expected = {}, {}

    def add(text: str, access: Access, well: bool) -> None:
        rows[text] = access
        expected[text] = well

    # The order of the table is that of the guest: a VM's tables have 96 rows.
    parts: list[tuple[dict[str, bool], dict[str, bool]]] = []
    for index, rule in RULES.items():
        name, there = msrs.name(index), rule.feature in allowed
        if len(rows) > 80:
            parts.append((_well(vm, rows), dict(expected)))
            rows.clear()
            expected.clear()
        add(f"read {name}", Access(index), there and rule.read)
        for value in rule.good:
            add(f"write {value:#x} to {name}", Access(index, value), there)
        for value in rule.bad:
            add(f"write a bad {value:#x} to {name}", Access(index, value), False)
    parts.append((_well(vm, rows), dict(expected)))
    return {k: v for got, _ in parts for k, v in got.items()}, {k: v for _, e in parts for k, v in e.items()}


def _well(vm: GuestVm, rows: dict[str, Access]) -> dict[str, bool]:
    answers = accesses(vm, rows)
    assert {answer for answer in answers.values() if isinstance(answer, str)} <= {GP}
    return {name: isinstance(answer, int) for name, answer in answers.items()}


@pytest.mark.parametrize("feature", [None, *FEATURES])
def test_msrs(make_hyperv: MakeHyperV, feature: str | None) -> None:
    """With one feature the guest reaches the MSRs of that feature; the others, and bad values, raise #GP.

    Documentation/virt/kvm/api.rst, 6.79 KVM_CAP_HYPERV_ENFORCE_CPUID; TLFS, partition privileges.
    """
    allowed = {feature} if feature else set()
    vm = make_hyperv(features=allowed | {SYNDBG}, enforce=True, synic=True, os_id=0)
    got, expected = walk(vm, allowed)
    assert got == expected


def test_msrs_not_enforced(make_hyperv: MakeHyperV) -> None:
    """Without the capability the guest reaches every MSR, whatever the feature bits say.

    api.rst, 6.79: features are denied where it is enabled.
    """
    vm = make_hyperv(features={SYNDBG}, synic=True, os_id=0)
    got, expected = walk(vm, set(FEATURES))
    assert got == expected


def test_no_interface(make_hyperv: MakeHyperV) -> None:
    """Without Hyper-V's signature in CPUID no MSR of it is there, even with all features set.

    api.rst, 4.118: the leaves are what makes a guest one of Hyper-V.
    """

    def unsigned(cpuid: Cpuid) -> None:
        cpuid.ensure(HvLeaf.HYPERV_CPUID_INTERFACE).eax = 0

    got, expected = walk(make_hyperv(synic=True, os_id=0, edit=unsigned), set())
    assert got == expected


def test_debugger_off(make_hyperv: MakeHyperV) -> None:
    """Without the debugger's own leaf its MSRs are denied, though the feature bit is set.

    TLFS, feature discovery: leaf 0x40000082 tells whether debugging is allowed.
    """
    debug = "HV_FEATURE_DEBUG_MSRS_AVAILABLE"
    got, expected = walk(make_hyperv(features={debug}, enforce=True, synic=True, os_id=0), set())
    assert got == expected


@pytest.mark.parametrize("features", [set(), {DIRECT}], ids=["denied", "allowed"])
def test_direct_mode(make_hyperv: MakeHyperV, features: set[str]) -> None:
    """A timer in direct mode needs a feature of its own; denied, the configuration stays as it was.

    TLFS, feature discovery: EDX bit 19 of leaf 0x40000003.
    """
    vm = make_hyperv(features={"HV_MSR_SYNTIMER_AVAILABLE", *features}, enforce=True, synic=True)
    config = int(HvStimer.HV_STIMER_DIRECT) | 0x51 << 4
    rows = {
        "message": Access(Msr.HV_X64_MSR_STIMER0_CONFIG, 2 << 16),
        "direct": Access(Msr.HV_X64_MSR_STIMER0_CONFIG, config),
        "after": Access(Msr.HV_X64_MSR_STIMER0_CONFIG),
    }
    denied: dict[str, int | str] = {"message": 0, "direct": GP, "after": 2 << 16}
    assert accesses(vm, rows) == ({"message": 0, "direct": 0, "after": config} if features else denied)


def test_msrs_outside(make_hyperv: MakeHyperV) -> None:
    """Numbers between the MSRs are no MSRs, for the guest and for the host.

    TLFS, appendix of synthetic MSRs.
    """
    vm = make_hyperv(synic=True)
    known = {*RULES, *range(0x4000_00F0, 0x4000_0100)}
    outside = [n for n in range(0x4000_0000, 0x4000_0120) if n not in known]
    vcpu = vm.vcpus[0]
    for begin in range(0, len(outside), 40):
        part = outside[begin : begin + 40]
        rows = {
            f"{verb} {n:#x}": Access(n, value) for n in part for verb, value in (("read", None), ("write", 0))
        }
        assert accesses(vm, rows) == dict.fromkeys(rows, GP)
    for index in outside:
        arg = kvm_msrs.of([kvm_msr_entry(index=index)])
        assert (index, vcpu.ioctl(ioctls.KVM_GET_MSRS, arg)) == (index, 0)


@dataclass(frozen=True)
class CallRule:
    """A hypercall, the features that it needs, and its status then."""

    call: Call
    needs: frozenset[str]
    status: int


def _call_rules() -> dict[str, CallRule]:
    flush, ipi = "HV_X64_REMOTE_TLB_FLUSH_RECOMMENDED", "HV_X64_CLUSTER_IPI_RECOMMENDED"
    sets, debug = "HV_X64_EX_PROCESSOR_MASKS_RECOMMENDED", "HV_DEBUGGING"
    s = HvStatus
    rows: list[tuple[HvCall, int, set[str], HvStatus]] = [
        # A debugger that is there, but has not told that it wants hypercalls.
        (HvCall.HVCALL_RESET_DEBUG_SESSION, 0, {debug}, s.HV_STATUS_OPERATION_DENIED),
        (HvCall.HVCALL_POST_DEBUG_DATA, 0, {debug}, s.HV_STATUS_OPERATION_DENIED),
        (HvCall.HVCALL_RETRIEVE_DEBUG_DATA, 0, {debug}, s.HV_STATUS_OPERATION_DENIED),
        # Nobody is there to take them without a SynIC.
        (HvCall.HVCALL_POST_MESSAGE, 0, {"HV_POST_MESSAGES"}, s.HV_STATUS_INVALID_HYPERCALL_INPUT),
        (HvCall.HVCALL_SIGNAL_EVENT, 0, {"HV_SIGNAL_EVENTS"}, s.HV_STATUS_INVALID_HYPERCALL_INPUT),
        (HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, 0, {flush}, s.HV_STATUS_SUCCESS),
        (HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX, 0, {flush, sets}, s.HV_STATUS_SUCCESS),
        # A list without an element.
        (HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST, 0, {flush}, s.HV_STATUS_INVALID_HYPERCALL_INPUT),
        (HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX, 0, {flush, sets}, s.HV_STATUS_INVALID_HYPERCALL_INPUT),
        # To nobody, with vector 0.
        (HvCall.HVCALL_SEND_IPI, 0, {ipi}, s.HV_STATUS_INVALID_HYPERCALL_INPUT),
        (HvCall.HVCALL_SEND_IPI_EX, 0, {ipi, sets}, s.HV_STATUS_SUCCESS),
        (HvCall.HV_EXT_CALL_QUERY_CAPABILITIES, 1, {"HV_ENABLE_EXTENDED_HYPERCALLS"},
         s.HV_STATUS_INVALID_PARAMETER),
    ]  # fmt: skip
    rules = {
        code.name: CallRule(Call(control(code, fast=bool(fast))), frozenset(needs), status)
        for code, fast, needs, status in rows
    }
    for code in (0x8041, 0x8002):
        rules[f"extended call {code:#x}"] = CallRule(
            Call(control(code, fast=True)), frozenset({"HV_ENABLE_EXTENDED_HYPERCALLS"}), 5
        )
    for code in (0x1, 0x5B, 0x5E, 0x7FFF, 0x8000, 0x8042, 0xBEEF):
        rules[f"unknown call {code:#x}"] = CallRule(
            Call(control(code)), frozenset(), s.HV_STATUS_INVALID_HYPERCALL_CODE
        )
    return rules


CALLS = _call_rules()
EVERYTHING = frozenset().union(*(rule.needs for rule in CALLS.values()))
NEEDS = sorted({rule.needs for rule in CALLS.values()} | {EVERYTHING}, key=sorted)


@pytest.mark.parametrize("features", NEEDS, ids=lambda features: "+".join(sorted(features)) or "none")
def test_calls(make_hyperv: MakeHyperV, features: frozenset[str]) -> None:
    """A hypercall answers where the guest has all features that it needs, else access is denied.

    api.rst, 6.79 KVM_CAP_HYPERV_ENFORCE_CPUID; TLFS, partition privileges.
    """
    vm = make_hyperv(features=features | {SYNDBG}, enforce=True)
    # Inputs of zeros: shared memory that nobody writes.
    gpa = int(vm.gva_to_gpa(vm.alloc(4096, private=False)))
    rows = {name: Call(rule.call.control, gpa, gpa + 2048) for name, rule in CALLS.items()}
    expected = {
        name: int(rule.status if rule.needs <= features else HvStatus.HV_STATUS_ACCESS_DENIED)
        for name, rule in CALLS.items()
    }
    assert calls(vm, rows) == expected


@pytest.mark.parametrize("retries", [0, 1, 0xFFF, 0xFFFF_FFFF])
def test_long_spin_wait(make_hyperv: MakeHyperV, retries: int) -> None:
    """A guest may tell of a long spin wait where a number of retries is recommended: not 0, not "never".

    TLFS, feature discovery: EBX of leaf 0x40000004.
    """

    def recommend(cpuid: Cpuid) -> None:
        cpuid.ensure(HvLeaf.HYPERV_CPUID_ENLIGHTMENT_INFO).ebx = retries

    vm = make_hyperv(features=set(), enforce=True, edit=recommend)
    status = HvStatus.HV_STATUS_SUCCESS if retries in (1, 0xFFF) else HvStatus.HV_STATUS_ACCESS_DENIED
    call = Call(control(HvCall.HVCALL_NOTIFY_LONG_SPIN_WAIT, fast=True))
    assert calls(vm, {"wait": call}) == {"wait": int(status)}


def test_calls_not_enforced(make_hyperv: MakeHyperV) -> None:
    """Without the capability every hypercall answers, whatever the feature bits say.

    api.rst, 6.79.
    """
    vm = make_hyperv(features={SYNDBG})
    gpa = int(vm.gva_to_gpa(vm.alloc(4096, private=False)))
    rows = {name: Call(rule.call.control, gpa, gpa + 2048) for name, rule in CALLS.items()}
    assert calls(vm, rows) == {name: int(rule.status) for name, rule in CALLS.items()}


@pytest.mark.parametrize(
    "features", [set(), {"HV_X64_HYPERCALL_XMM_INPUT_AVAILABLE"}], ids=["denied", "allowed"]
)
def test_xmm_input(make_hyperv: MakeHyperV, features: set[str]) -> None:
    """Fast calls with input in XMM registers raise #UD without their feature; those without go on.

    TLFS, feature discovery: EDX bit 4 of leaf 0x40000003.
    """
    needs = {"HV_X64_REMOTE_TLB_FLUSH_RECOMMENDED", "HV_X64_CLUSTER_IPI_RECOMMENDED",
             "HV_X64_EX_PROCESSOR_MASKS_RECOMMENDED"}  # fmt: skip
    vm = make_hyperv(features=needs | features, enforce=True)
    xmm = {
        code.name: Call(control(code, fast=True), xmm=(0,) * 12)
        for code in (
            HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE,
            HvCall.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX,
            HvCall.HVCALL_SEND_IPI_EX,
        )
    }
    plain = {"HVCALL_SEND_IPI": Call(control(HvCall.HVCALL_SEND_IPI, fast=True), 0x51, 0)}
    expected = dict.fromkeys(xmm, 0 if features else UD) | {"HVCALL_SEND_IPI": 0}
    assert calls(vm, xmm | plain) == expected


def test_switched_off_again(make_hyperv: MakeHyperV) -> None:
    """Enforcement can be switched off, and on, while the guest runs.

    api.rst, 6.79.
    """
    vm = make_hyperv(features=set(), enforce=True)
    rows = {"read": Access(Msr.HV_X64_MSR_VP_INDEX)}
    seen = [accesses(vm, rows)["read"]]
    for enforce in (0, 1):
        vm.vcpus[0].enable_cap(KVM_CAP_HYPERV_ENFORCE_CPUID, enforce)
        seen.append(accesses(vm, rows)["read"])
    assert seen == [GP, 0, GP]
