# SPDX-License-Identifier: Apache-2.0
"""MSRs bit by bit: the bits that a write changes, those that it leaves alone, and those that raise #GP."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest

from kvmpy import Cpuid, Kvm, MakeVm, Msr, Vm
from kvmpy.x86.msrs import name

pytestmark = pytest.mark.requires("param:kvm.ignore_msrs=N")

GUEST = """
#include <kvmpy/guest.h>

struct row {
	u64 msr, base, as_is, walked;	/* the host's question */
	u64 before, refused, kept;	/* before: what the MSR held at the start */
	u64 damaged;			/* a write that faulted changed it */
	u64 odd;			/* neither kept nor ignored, or a fault that is not #GP(0) */
	u64 unusable;			/* base or the value before could not be read or written */
};

struct row rows[64] GUEST_SHARED;

static void walk(struct row *row)
{
	u64 after;

	row->unusable = rdmsr_safe(row->msr, &row->before).faulted;
	if (row->as_is)
		row->base = row->before;
	row->unusable |= wrmsr_safe(row->msr, row->base).faulted;
	for (int bit = 0; bit < 64 && !row->unusable; bit++) {
		u64 mask = 1ull << bit, value = row->base ^ mask;
		struct guest_fault fault;

		if (!(row->walked & mask))
			continue;
		fault = wrmsr_safe(row->msr, value);
		rdmsr_safe(row->msr, &after);
		if (fault.faulted) {
			row->refused |= mask;
			if (after != row->base)
				row->damaged |= mask;
			if (fault.vector != 13 || fault.error_code)
				row->odd |= mask;
		} else if (after == value) {
			row->kept |= mask;
		} else if (after != row->base) {
			row->odd |= mask;
		}
		wrmsr_safe(row->msr, row->base);
	}
	wrmsr_safe(row->msr, row->before);
}

void guest_main(void)
{
	for (struct row *row = rows; row->msr; row++)
		walk(row);
	GUEST_DONE();
}
"""

ALL = (1 << 64) - 1
LOW32 = (1 << 32) - 1
# The first and the last of KVM's eight variable ranges; the mask of each is behind its base.
MTRR_BASES = (0x200, 0x20E)
MC0_STATUS = 0x401
PAT_AT_RESET = 0x0007_0406_0007_0406
PAT_TYPES = {0, 1, 4, 5, 6, 7}
MTRR_TYPES = {0, 1, 4, 5, 6}


def beyond(cpuid: Cpuid) -> int:
    """Return the bits above those of a guest-physical address."""
    return bits(range(cpuid.register(0x8000_0008, 0, "eax") & 0xFF, 64))


def bits(*ranges: int | range) -> int:
    """Return a mask of single bits and of ranges of them."""
    return sum(1 << bit for entry in ranges for bit in ([entry] if isinstance(entry, int) else entry))


def wrong_types(base: int, types: set[int], entries: Iterable[int]) -> int:
    """Return the bits whose change makes a memory type in the bytes *entries* of *base* a bad one."""
    return sum(
        1 << 8 * entry + bit
        for entry in entries
        for bit in range(8)
        if (base >> 8 * entry & 0xFF) ^ 1 << bit not in types
    )


@dataclass(frozen=True)
class Row:
    """What becomes of *base* (None: what is there) when one bit is changed: *refused* and *kept*, the rest is
    ignored.

    *walked* are the bits that are tried; a change of the others would end the guest, or means more than a
    bit.  KVM_SET_MSRS does the same, unless *guest_only*.
    """

    msr: int
    base: int | None
    refused: int = 0
    kept: int = 0
    walked: int = ALL
    guest_only: bool = False


Group = Callable[[Cpuid], list[Row]]


def types_row(msr: int, base: int, types: set[int]) -> Row:
    """Return the row of an MSR with a memory type in each byte."""
    bad = wrong_types(base, types, range(8))
    return Row(msr, base, refused=bad, kept=ALL & ~bad)


def addresses(cpuid: Cpuid) -> list[Row]:
    """MSRs with linear addresses: those that are not canonical are refused (Intel SDM volume 2, WRMSR)."""
    high = bits(range((57 if cpuid.has("la57") else 48) - 1, 64))
    there = (Msr.MSR_LSTAR, Msr.MSR_CSTAR, Msr.MSR_FS_BASE, Msr.MSR_KERNEL_GS_BASE)
    return [Row(msr, 0x1234_5678_9000, refused=high, kept=ALL & ~high) for msr in there]


def system_calls(cpuid: Cpuid) -> list[Row]:
    """Nothing is reserved in STAR, and nothing in the lower halves of the others (AMD APM volume 2, 6.1)."""
    low = (Msr.MSR_SYSCALL_MASK, Msr.MSR_IA32_SYSENTER_ESP, Msr.MSR_IA32_SYSENTER_EIP)
    rows = [Row(Msr.MSR_STAR, 0x0023_0010_0000_0000, kept=ALL)]
    rows.append(Row(Msr.MSR_IA32_SYSENTER_CS, 0x10, kept=0xFFFF, walked=0xFFFF))
    rows += [Row(msr, 0x4_7700, kept=LOW32, walked=LOW32) for msr in low]
    if cpuid.has("rdtscp") or cpuid.has("rdpid"):
        # Intel reserves the upper half, AMD's CPUs ignore it: arch/x86/kvm/x86.c, __kvm_set_msr().
        amd = cpuid.is_amd_compatible
        rows.append(Row(Msr.MSR_TSC_AUX, 5, refused=0 if amd else ALL & ~LOW32, kept=LOW32))
    return rows


def memory_types(cpuid: Cpuid) -> list[Row]:
    """The MTRRs (Intel SDM volume 3, 13.11.2)."""
    default = bits(0, 2, 10, 11)
    rows = [
        Row(Msr.MSR_MTRRdefType, 0, refused=ALL & ~default, kept=default),
        types_row(Msr.MSR_MTRRfix64K_00000, 0, MTRR_TYPES),
        types_row(Msr.MSR_MTRRfix4K_F8000, 0x0606_0606_0606_0606, MTRR_TYPES),
    ]
    for msr in MTRR_BASES:
        bad = wrong_types(0, MTRR_TYPES, [0]) | bits(range(8, 12)) | beyond(cpuid)
        rows.append(Row(msr, 0, refused=bad, kept=ALL & ~bad))
        bad = bits(range(11)) | beyond(cpuid)
        rows.append(Row(msr + 1, 0, refused=bad, kept=ALL & ~bad))
    return rows


def page_attributes(_: Cpuid) -> list[Row]:
    """The PAT (Intel SDM volume 3, table 13-11)."""
    return [types_row(Msr.MSR_IA32_CR_PAT, base, PAT_TYPES) for base in (PAT_AT_RESET, 0x0101_0101_0505_0505)]


def modes(cpuid: Cpuid) -> list[Row]:
    """Registers whose other bits are modes and features: EFER, the base of the APIC (Intel SDM volume 3,
    12.4.4), and the host save area (AMD APM volume 2, 15.30.4).
    """
    efer = ALL & ~bits(0, 8, range(10, 16), 21)
    base = bits(range(8), 9) | beyond(cpuid)
    rows = [
        Row(Msr.MSR_EFER, None, refused=efer, walked=efer),
        Row(Msr.MSR_IA32_APICBASE, 0xFEE0_0900, refused=base, walked=base),
    ]
    if cpuid.has("svm"):
        bad = bits(range(12)) | beyond(cpuid)
        rows.append(Row(Msr.MSR_VM_HSAVE_PA, 0, refused=bad, kept=ALL & ~bad, guest_only=True))
    return rows


def machine_checks(_: Cpuid) -> list[Row]:
    """A bank takes all ones or zeros, its status zeros alone (Intel SDM volume 3, 16.3.2.1 and 16.3.2.2)."""
    return [Row(Msr.MSR_IA32_MC0_CTL, 0, refused=ALL), Row(MC0_STATUS, 0, refused=ALL, guest_only=True)]


def paravirtual(cpuid: Cpuid) -> list[Row]:
    """KVM's own (Documentation/virt/kvm/x86/msr.rst)."""
    reserved = {
        Msr.MSR_KVM_ASYNC_PF_EN: ("KVM_ASYNC_PF", bits(4, 5)),
        Msr.MSR_KVM_ASYNC_PF_INT: ("KVM_ASYNC_PF_INT", bits(range(8, 64))),
        Msr.MSR_KVM_STEAL_TIME: ("KVM_STEAL_TIME", bits(range(1, 6))),
        Msr.MSR_KVM_PV_EOI_EN: ("KVM_PV_EOI", bits(1)),
        Msr.MSR_KVM_POLL_CONTROL: ("KVM_POLL_CONTROL", bits(range(1, 64))),
    }
    return [
        Row(msr, 0, refused=bad, walked=bad) for msr, (feature, bad) in reserved.items() if cpuid.has(feature)
    ]


GROUPS = pytest.mark.parametrize(
    "group",
    [addresses, system_calls, memory_types, page_attributes, modes, machine_checks, paravirtual],
    ids=lambda function: function.__name__,
)


def masks(mask: int) -> str:
    """Return the bits of a mask as ranges, such as ``0-7, 9``."""
    runs: list[list[int]] = []
    for bit in range(64):
        if mask >> bit & 1:
            if runs and runs[-1][1] == bit - 1:
                runs[-1][1] = bit
            else:
                runs.append([bit, bit])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def deviations(row: Row, found: dict[str, int]) -> list[str]:
    """Return a line for each way in which *found* is not what *row* says."""
    expected = {"refused": row.refused & row.walked, "kept": row.kept & row.walked}
    lines = []
    for kind, there in found.items():
        wanted = expected.get(kind, 0)
        if missing := wanted & ~there:
            lines.append(f"{name(row.msr)}: bits not {kind}: {masks(missing)}")
        if extra := there & ~wanted:
            lines.append(f"{name(row.msr)}: bits {kind}: {masks(extra)}")
    return lines


@GROUPS
def test_written_by_the_guest(make_vm: MakeVm, group: Group) -> None:
    """WRMSR keeps, ignores or refuses each bit as the architecture says; #GP(0) changes nothing.

    Intel SDM volume 4; AMD APM volume 2, appendix A; Documentation/virt/kvm/x86/msr.rst.  See the table.
    """
    vm = make_vm(GUEST)
    rows = group(Cpuid.from_struct(vm.vcpus[0].cpuid.get()))
    symbol = vm.symbol("rows")
    for index, row in enumerate(rows):
        symbol[index].set(msr=int(row.msr), base=row.base or 0, as_is=row.base is None, walked=row.walked)
    vm.launch()
    vm.vcpus[0].run_to_done()
    wrong = []
    for index, row in enumerate(rows):
        answer = symbol[index].value
        kinds = ("refused", "kept", "damaged", "odd", "unusable")
        wrong += deviations(row, {kind: getattr(answer, kind) for kind in kinds})
    assert not wrong, "\n".join(wrong)


@GROUPS
@pytest.mark.requires("KVM_CAP_SPLIT_IRQCHIP")
def test_written_by_the_host(kvm: Kvm, vm: Vm, group: Group) -> None:
    """KVM_SET_MSRS keeps, ignores or refuses each bit as WRMSR does, and a refused one changes nothing.

    Documentation/virt/kvm/api.rst, 4.19 KVM_SET_MSRS.
    """
    vm.irq.create_split_chip()
    vcpu = vm.create_vcpu()
    vcpu.cpuid.set(kvm.supported_cpuid)
    wrong = []
    for row in group(Cpuid.from_struct(kvm.supported_cpuid)):
        if row.guest_only:
            continue
        found = dict.fromkeys(("refused", "kept", "damaged", "odd"), 0)
        before = vcpu.msrs.get(row.msr)
        base = before if row.base is None else row.base
        vcpu.msrs.set(row.msr, base)
        for mask in (1 << bit for bit in range(64) if row.walked >> bit & 1):
            taken = vcpu.msrs.takes(row.msr, base ^ mask)
            after = vcpu.msrs.get(row.msr)
            if not taken:
                found["refused"] |= mask
                found["damaged"] |= mask if after != base else 0
            elif after != base:
                found["kept" if after == base ^ mask else "odd"] |= mask
            vcpu.msrs.set(row.msr, base)
        vcpu.msrs.set(row.msr, before)
        wrong += deviations(row, found)
    assert not wrong, "\n".join(wrong)
