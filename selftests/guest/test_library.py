# SPDX-License-Identifier: Apache-2.0
"""Memory and string functions of guest code, and the helpers around instructions."""

from __future__ import annotations

from kvmpy import Gpa, GuestProgram, Gva, MakeVm, MmioExit

STRINGS = """
#include <kvmpy/guest.h>

static u8 a[80], b[80];

static void fill(void)
{
	for (u32 i = 0; i < sizeof(a); i++) {
		a[i] = i;
		b[i] = 0xee;
	}
}

/* True if b is 0xee but for @size bytes at @at, which continue from @first. */
static bool only(u32 at, u32 size, u8 first)
{
	for (u32 i = 0; i < sizeof(b); i++) {
		if (b[i] != (i >= at && i < at + size ? (u8)(first + i - at) : 0xee))
			return false;
	}
	return true;
}

void guest_main(void)
{
	static const u32 sizes[] = { 0, 1, 7, 8, 9, 16, 33 };

	for (u32 i = 0; i < ARRAY_SIZE(sizes); i++) {
		u32 n = sizes[i];

		fill();
		GUEST_ASSERT_EQ(memcpy(b + 5, a + 3, n), (void *)(b + 5));
		GUEST_ASSERT(only(5, n, 3));

		fill();
		memcpy(b, a, 40);
		memmove(b + 3, b, n);
		for (u32 j = 0; j < n; j++)
			GUEST_ASSERT_EQ(b[j + 3], j);
		GUEST_ASSERT_EQ(b[n + 3], (u8)(n + 3));

		fill();
		memcpy(b, a, 40);
		memmove(b, b + 3, n);
		for (u32 j = 0; j < n; j++)
			GUEST_ASSERT_EQ(b[j], j + 3);
		GUEST_ASSERT_EQ(b[n], (u8)n);

		fill();
		memset(b + 2, 0x5a, n);
		for (u32 j = 0; j < n; j++)
			GUEST_ASSERT_EQ(b[j + 2], 0x5a);
		GUEST_ASSERT_EQ(b[1], 0xee);
		GUEST_ASSERT_EQ(b[n + 2], 0xee);
	}

	GUEST_ASSERT_EQ(memcmp("abc", "abd", 3), -1);
	GUEST_ASSERT_EQ(memcmp("abc", "abd", 2), 0);
	GUEST_ASSERT_GT(memcmp("\\xff", "a", 1), 0);
	GUEST_ASSERT_EQ(strlen(""), 0u);
	GUEST_ASSERT_EQ(strlen("four"), 4u);
	GUEST_ASSERT_EQ(strnlen("four", 2), 2u);
	GUEST_ASSERT_EQ(strcmp("same", "same"), 0);
	GUEST_ASSERT_LT(strcmp("sam", "same"), 0);
	GUEST_ASSERT_GT(strcmp("samf", "same"), 0);
	/* Forwards again after memmove() went backwards. */
	GUEST_ASSERT_EQ(read_rflags() & BIT(10), 0u);
}
"""


def test_memory_and_string_functions(make_vm: MakeVm) -> None:
    """memcpy, memmove, memset and the string functions touch what they should and nothing beside it."""
    vm = make_vm.run(STRINGS)
    assert vm.vcpus[0].done


CONTROL = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	struct cpuid_regs leaf = cpuid(0, 0);
	u64 cr4 = read_cr4();
	u64 first = rdtsc();

	GUEST_ASSERT_GE(leaf.eax, 1u);
	GUEST_ASSERT_GT(rdtsc(), first);

	GUEST_ASSERT_EQ(read_cr0() & (BIT(0) | BIT(16) | BIT(31)), BIT(0) | BIT(16) | BIT(31));
	GUEST_ASSERT_EQ(cr4 & BIT(5), BIT(5));
	write_cr2(0x1234);
	GUEST_ASSERT_EQ(read_cr2(), 0x1234u);
	flush_tlb();
	invlpg(&cr4);
	write_cr8(5);
	GUEST_ASSERT_EQ(read_cr8(), 5u);
	write_cr8(0);
	/* Paging without protection is refused. */
	GUEST_ASSERT_EQ(write_cr0_safe(read_cr0() & ~BIT(0)).vector, GP_VECTOR);
	GUEST_ASSERT_EQ(read_cr0() & BIT(0), BIT(0));
	write_dr0(0x5000);
	GUEST_ASSERT_EQ(read_dr0(), 0x5000u);
	write_dr0(0);
	GUEST_ASSERT_EQ(read_dr7() & 0xff, 0u);

	write_rflags(read_rflags() | BIT(0));
	GUEST_ASSERT_EQ(GENMASK(7, 4), 0xf0u);
}
"""


def test_privileged_accessors(make_vm: MakeVm) -> None:
    """CPUID, TSC, control and debug registers are read and written by their names."""
    vm = make_vm.run(CONTROL)
    assert vm.vcpus[0].done


MMIO = """
#include <kvmpy/guest.h>

#define DEVICE	((void *)0x70000000ull)

void guest_main(void)
{
	mmio_write8(DEVICE, 0x11);
	mmio_write16(DEVICE + 2, 0x2222);
	mmio_write32(DEVICE + 4, 0x33333333);
	mmio_write64(DEVICE + 8, 0x4444444444444444);
	GUEST_ASSERT_EQ(mmio_read8(DEVICE + 1), 0x51);
	GUEST_ASSERT_EQ(mmio_read16(DEVICE + 2), 0x5252);
	GUEST_ASSERT_EQ(mmio_read32(DEVICE + 4), 0x53535353u);
	GUEST_ASSERT_EQ(mmio_read64(DEVICE + 8), 0x5454545454545454u);
}
"""


def test_mmio_accessors_are_one_access(make_vm: MakeVm) -> None:
    """Each MMIO accessor makes one access, of the size in its name, at its address."""
    device = Gpa(0xD000_0000)
    vm = make_vm(MMIO)
    vm.map(Gva(0x7000_0000), device, 0x1000, private=False)
    vm.launch()
    vcpu = vm.vcpus[0]
    writes = [vcpu.expect(MmioExit) for _ in range(4)]
    assert [(exit_.phys_addr - int(device), bytes(exit_.data)) for exit_ in writes] == [
        (0, b"\x11"),
        (2, b"\x22" * 2),
        (4, b"\x33" * 4),
        (8, b"\x44" * 8),
    ]
    for offset, size, fill in ((1, 1, b"\x51"), (2, 2, b"\x52"), (4, 4, b"\x53"), (8, 8, b"\x54")):
        read = vcpu.expect(MmioExit)
        assert (read.phys_addr - int(device), read.is_write) == (offset, False)
        read.respond(fill * size)
    vcpu.run_to_done()


ASSEMBLY = """
#include <kvmpy/layout.h>

	.text
	.globl	guest_main
	.type	guest_main, @function
guest_main:
	movq	%gs:KVMPY_CPU_UCALL_SLOT, %rdx
	movl	$(KVMPY_UCALL_CMD_SYNC | 1 << KVMPY_UCALL_NARGS_SHIFT), KVMPY_UCALL_CMD(%rdx)
	movq	$0x1234, KVMPY_UCALL_ARGS(%rdx)
	movl	KVMPY_UCALL_ID(%rdx), %eax
	outl	%eax, $KVMPY_UCALL_PORT
	ret
	.size	guest_main, . - guest_main
"""


def test_a_guest_in_assembly(make_vm: MakeVm) -> None:
    """A guest program written in assembly runs, and can make ucalls with what layout.h says."""
    vm = make_vm.start(GuestProgram.from_asm(ASSEMBLY))
    assert [call.args for call in vm.vcpus[0].syncs()] == [(0x1234,)]
