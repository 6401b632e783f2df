# SPDX-License-Identifier: Apache-2.0
"""Every combination of the bits of two page-table entries and of control registers, by every kind of access.

The guest works them out by itself and compares fault, error code, CR2, Accessed and Dirty with a model of
the architecture: about 600,000 accesses, of which each run does as many as fit into its time, in an order
that the seed decides.
"""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from kvmpy import CR0, CR4, PAGE_SIZE, SIZE_2M, Cpuid, GuestVm, Gva, MakeVm
from kvmpy.x86 import exceptions
from kvmpy.x86.bits import bit_words
from kvmpy.x86.entry import WalkStep, flag_words

GVA = Gva(0x6000_0000_0000)
# Where the guest finds the tables that it changes.
WINDOWS = Gva(0x5000_0000_0000)
SHOWN = 8
NO_VECTOR = 0xFF
LEVELS = {1: "PTE", 2: "PDE"}

GUEST = r"""
#include <kvmpy/guest.h>
#include <kvmpy/user.h>

#define CR0_WP		BIT(16)
#define CR4_SMEP	BIT(20)
#define CR4_SMAP	BIT(21)
#define P	BIT(0)
#define W	BIT(1)
#define U	BIT(2)
#define A	BIT(5)
#define D	BIT(6)
#define NX	BIT(63)
#define ALL	(P | W | U | A | D | NX)

enum { READ, WRITE, FETCH, KINDS };
enum { KERNEL, KERNEL_AC, USER, WHO };

struct question {
	u64 target, upper, leaf;	/* addresses of the page and of its entries; upper is 0 for a large page */
	u64 reserved;			/* a bit that must be zero in both entries, 0 where there is none */
	u64 cr0, cr4;			/* bits that are set beyond those that the guest runs with */
	u64 first, step, count;		/* combinations first, first + step, ..., each modulo their number */
};

struct answer {
	u64 cr0, cr4, upper, leaf, kind, who;
	u64 vector, error, address, upper_after, leaf_after;
	u64 expected_vector, expected_error, expected_leaf;
};

struct question question GUEST_SHARED;
struct answer wrong[8] GUEST_SHARED;
u64 wrong_count GUEST_SHARED, done GUEST_SHARED;

static GUEST_USER_DATA u8 user_stack[4096] __aligned(16);
static const u64 upper_bits[] = { P, W, U, A, NX, 0 };
static const u64 leaf_bits[] = { P, W, U, A, D, NX, 0 };

/* Flags for the low bits of @number, which is left with the rest; the place of 0 is the reserved bit's. */
static u64 flags_of(u64 *number, const u64 *bits, int size)
{
	u64 flags = 0;

	for (int i = 0; i < size; i++, *number >>= 1)
		if (*number & 1)
			flags |= bits[i] ?: question.reserved;
	return flags;
}

GUEST_USER static u64 user_read(u64 address)
{
	return *(volatile u8 *)address;
}

GUEST_USER static u64 user_write(u64 address)
{
	*(volatile u8 *)address = 0xc3;
	return 0;
}

GUEST_USER static u64 user_fetch(u64 address)
{
	((void (*)(void))address)();
	return 0;
}

static u64 kernel_fetch(u64 address)
{
	((void (*)(void))address)();
	return 0;
}

/* STAC and CLAC are not for every instruction emulator. */
static void set_ac(bool on)
{
	if (on)
		asm volatile("pushfq; orl $0x40000, (%%rsp); popfq" : : : "cc", "memory");
	else
		asm volatile("pushfq; andl $~0x40000, (%%rsp); popfq" : : : "cc", "memory");
}

static struct guest_fault act(int kind, int who, u64 address)
{
	static u64 (*const user[])(u64) = { user_read, user_write, user_fetch };
	u8 ret = 0xc3;

	if (who == USER)
		return guest_user_run(user[kind], address, user_stack + sizeof(user_stack)).fault;
	if (kind == FETCH)
		return guest_try_call(kernel_fetch, address).fault;
	if (kind == READ)
		return GUEST_TRY("movb (%1), %0", : "+q"(ret) : "r"(address) : "memory");
	return GUEST_TRY("movb %0, (%1)", : "+q"(ret) : "r"(address) : "memory");
}

/* The error code of the fault that the access must end in, or -1 for none. */
static int expected_error(u64 upper, u64 leaf, int kind, int who, u64 cr0, u64 cr4)
{
	u64 both = upper & leaf;
	bool nx = (upper | leaf) & NX, user = both & U, writable = both & W, denied;
	int code = (kind == WRITE ? 2 : 0) | (who == USER ? 4 : 0) | (kind == FETCH ? 16 : 0);

	if (!(upper & P))
		return code;
	if (upper & question.reserved)
		return code | 8 | 1;
	if (!(leaf & P))
		return code;
	if (leaf & question.reserved)
		return code | 8 | 1;
	if (who == USER)
		denied = !user || (kind == WRITE && !writable) || (kind == FETCH && nx);
	else if (kind == FETCH)
		denied = nx || (user && (cr4 & CR4_SMEP));
	else
		denied = kind == WRITE && !writable && (cr0 & CR0_WP);
	if (who == KERNEL && kind != FETCH)
		denied |= user && (cr4 & CR4_SMAP);
	return denied ? code | 1 : -1;
}

static void check(u64 number, u64 upper_base, u64 leaf_base, u64 cr0, u64 cr4, bool ac)
{
	u64 *upper_entry = (u64 *)question.upper, *leaf_entry = (u64 *)question.leaf;
	u64 rest = number, upper, leaf, upper_after, leaf_after, expected_leaf;
	struct guest_fault fault;
	int kind, who, error;
	bool bad;

	kind = rest % KINDS;
	rest /= KINDS;
	who = rest % WHO;
	rest /= WHO;
	leaf = leaf_base | flags_of(&rest, leaf_bits, ARRAY_SIZE(leaf_bits));
	upper = upper_entry ? upper_base | flags_of(&rest, upper_bits, ARRAY_SIZE(upper_bits)) : P | W | U | A;
	if (who == KERNEL_AC && !ac)
		who = KERNEL;
	error = expected_error(upper, leaf, kind, who, cr0, cr4);
	expected_leaf = leaf | (error < 0 ? A | (kind == WRITE ? D : 0) : 0);

	if (upper_entry)
		WRITE_ONCE(*upper_entry, upper);
	WRITE_ONCE(*leaf_entry, leaf);
	asm volatile("invlpg (%0)" : : "r"(question.target) : "memory");
	/* guest_user_run() writes to the stack of ring 3. */
	if (ac && who != KERNEL)
		set_ac(true);
	fault = act(kind, who, question.target);
	if (ac)
		set_ac(false);
	upper_after = upper_entry ? READ_ONCE(*upper_entry) : upper;
	leaf_after = READ_ONCE(*leaf_entry);

	bad = leaf_after != expected_leaf;
	/* A processor may have used the upper entry before the fault. */
	bad |= (upper_after | (error < 0 ? 0 : A)) != (upper | A);
	if (error < 0)
		bad |= fault.faulted;
	else
		bad |= !fault.faulted || fault.vector != PF_VECTOR || (int)fault.error_code != error;
	if (fault.faulted)
		bad |= fault.cr2 != question.target;
	done++;
	if (!bad)
		return;
	if (wrong_count < ARRAY_SIZE(wrong))
		wrong[wrong_count] = (struct answer){
			cr0, cr4, upper, leaf, kind, who,
			fault.faulted ? fault.vector : NO_VECTOR, fault.error_code, fault.cr2,
			upper_after, leaf_after, error < 0 ? NO_VECTOR : PF_VECTOR, error < 0 ? 0 : error, expected_leaf,
		};
	wrong_count++;
}

void guest_main(void)
{
	for (;;) {
		u64 cr0 = read_cr0(), cr4 = read_cr4(), upper_base, leaf_base, number, total;
		u64 *upper = (u64 *)question.upper, *leaf = (u64 *)question.leaf;

		GUEST_SYNC();
		upper = (u64 *)question.upper;
		leaf = (u64 *)question.leaf;
		upper_base = upper ? *upper & ~ALL : 0;
		leaf_base = *leaf & ~ALL;
		total = KINDS * WHO << (ARRAY_SIZE(leaf_bits) + (upper ? ARRAY_SIZE(upper_bits) : 0));
		write_cr0((cr0 & ~CR0_WP) | question.cr0);
		write_cr4((cr4 & ~(CR4_SMEP | CR4_SMAP)) | question.cr4);
		number = question.first % total;
		for (u64 i = 0; i < question.count; i++, number = (number + question.step) % total)
			check(number, upper_base, leaf_base, question.cr0, question.cr4, question.cr4 & CR4_SMAP);
		if (upper)
			*upper = upper_base | P | W | U;
		*leaf = leaf_base | P | W | U;
		asm volatile("invlpg (%0)" : : "r"(question.target) : "memory");
		write_cr4(cr4);
		write_cr0(cr0);
	}
}
"""


class Walk:
    """A guest with one small or large page, and where it finds the entries of that page."""

    def __init__(self, vm: GuestVm, *, large: bool) -> None:
        self.vm = vm
        size = SIZE_2M if large else PAGE_SIZE
        gpa = vm.allocator.alloc(size // PAGE_SIZE, align=size)
        vm.memory.write(gpa, b"\xc3")  # ret
        vm.map(GVA, gpa, size, page_size=size, user=True)
        steps = {step.level: step for step in vm.pages.walk(GVA).steps}
        self.upper = 0 if large else self._show(0, steps[2])
        self.leaf = self._show(1, steps[2 if large else 1])
        self.combinations = 9 << (7 if large else 13)

    def _show(self, place: int, step: WalkStep) -> int:
        gpa, private = self.vm.from_raw(step.table)
        gva = WINDOWS + place * PAGE_SIZE
        self.vm.map(gva, gpa, PAGE_SIZE, page_size=PAGE_SIZE, nx=True, private=private)
        return int(gva) + 8 * step.index


def reserved_bit(cpuid: Cpuid, vm: GuestVm) -> int:
    """Return an address bit that this CPU does not have and that is not the encryption bit, 0 for none."""
    taken = vm.encryption.bit if vm.encryption is not None else -1
    return next((1 << bit for bit in (51, 50) if bit >= cpuid.maxphyaddr and bit != taken), 0)


def ending(vector: int, error: int) -> str:
    """Name the fault of an access, or none."""
    return "no fault" if vector == NO_VECTOR else exceptions.describe(vector, error)


def deviation(answer: Any, *, large: bool) -> str:
    """Return in words which access ended how, and how it must end."""
    who = ("ring 0", "ring 0 with EFLAGS.AC", "ring 3")[answer.who]
    access = ("read", "write", "fetch")[answer.kind]
    control = " ".join([*bit_words(CR0, answer.cr0), *bit_words(CR4, answer.cr4)])
    level = 2 if large else 1
    tables = f"{LEVELS[level]} {answer.leaf:#x} {flag_words(answer.leaf, level)}"
    if not large:
        tables = f"PDE {answer.upper:#x} {flag_words(answer.upper, 2)}, {tables}"
    found = ending(answer.vector, answer.error)
    expected = ending(answer.expected_vector, answer.expected_error)
    words = f"{access} by {who}, {control or 'no WP, SMEP or SMAP'}, {tables}: "
    if found != expected:
        return f"{words}{found}, expected {expected}"
    after = f"then {answer.leaf_after:#x} (PDE {answer.upper_after:#x}), CR2 {answer.address:#x}"
    return f"{words}{found}, {after}, expected {answer.expected_leaf:#x}"


@pytest.mark.parametrize("reserved", [False, True], ids=["", "reserved"])
@pytest.mark.parametrize("large", [False, True], ids=["4K", "2M"])
def test_every_access(
    make_vm: MakeVm, load_seconds: float, rng: random.Random, large: bool, reserved: bool
) -> None:
    """Each access ends as the bits of its entries, CR0.WP, CR4.SMEP and CR4.SMAP say, with A and D to match.

    A fault leaves the leaf as it was; which of two reasons it names follows the order of the walk.
    *reserved*: a reserved bit comes and goes, too.  Intel SDM volume 3, 4.6 to 4.8; AMD APM volume 2, 5.4 to
    5.6.
    """
    vm = make_vm(GUEST)
    walk = Walk(vm, large=large)
    cpuid = Cpuid.from_struct(vm.vcpus[0].cpuid.get())
    bad_bit = reserved_bit(cpuid, vm) if reserved else 0
    if reserved and not bad_bit:
        pytest.skip("every address bit of an entry has a meaning here")
    cr4_bits = [int(bit) for bit, feature in ((CR4.SMEP, "smep"), (CR4.SMAP, "smap")) if cpuid.has(feature)]
    controls = [
        (cr0, sum(bit for index, bit in enumerate(cr4_bits) if chosen >> index & 1))
        for cr0 in (0, int(CR0.WP))
        for chosen in range(1 << len(cr4_bits))
    ]
    vm.launch()
    vcpu = vm.vcpus[0]
    step = next(number for number in iter(lambda: rng.randrange(1, walk.combinations) | 1, 0) if number % 3)
    first, each, total = rng.randrange(walk.combinations), load_seconds / len(controls), 0
    for cr0, cr4 in controls:
        until, left, count = time.monotonic() + each, walk.combinations, 16
        while left and (left == walk.combinations or time.monotonic() < until):
            count = min(2 * count, 4096, left)
            vcpu.sync()
            vm.symbol("question").set(
                target=int(GVA), upper=walk.upper, leaf=walk.leaf, reserved=bad_bit,
                cr0=cr0, cr4=cr4, first=first, step=step, count=count,
            )  # fmt: skip
            first = (first + step * count) % walk.combinations
            left -= count
        total += walk.combinations - left
    vcpu.sync()
    done, wrong = vm.symbol("done").u64, vm.symbol("wrong_count").u64
    print(f"{done:,} of {len(controls) * walk.combinations:,} accesses, step {step}")
    shown = [vm.symbol("wrong")[index].value for index in range(min(wrong, SHOWN))]
    lines = [deviation(answer, large=large) for answer in shown]
    assert not wrong, "\n".join([f"{wrong:,} of {done:,} accesses did not end as they must:", *lines])
    assert done == total
