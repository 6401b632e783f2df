# SPDX-License-Identifier: Apache-2.0
"""Guests that convert their own pages: page state changes, PVALIDATE and the encryption bit, together."""

from __future__ import annotations

import pytest

from kvmpy import PAGE_SIZE, GuestExceptionError, MakeVm

with_ghcb = pytest.mark.protections("all", has_ghcb=True)
with_snp = pytest.mark.protections("all", must_validate=True)

CONVERT = """
#include <kvmpy/guest.h>

void guest_main(u64 *page, u64 size, u64 private)
{
	u64 rounds = 0;

	for (int i = 0; i < 3; i++) {
		GUEST_ASSERT_EQ(guest_set_private(page, size, false), 0);
		for (u64 at = 0; at < size / 8; at += 512)
			page[at] = 0x1000 + at + i;
		GUEST_SYNC(i);
		for (u64 at = 0; at < size / 8; at += 512)
			GUEST_ASSERT_EQ(page[at], 0x2000 + at + i);
		GUEST_ASSERT_EQ(guest_set_private(page, size, true), 0);
		for (u64 at = 0; at < size / 8; at += 512)
			page[at] = at;
		for (u64 at = 0; at < size / 8; at += 512)
			GUEST_ASSERT_EQ(page[at], at);
		rounds++;
	}
	GUEST_SYNC(rounds);
}
"""


@with_ghcb
@pytest.mark.parametrize("pages", [1, 3])
def test_there_and_back(make_vm: MakeVm, pages: int) -> None:
    """A page that the guest makes shared is seen by the host both ways, and is private again afterwards."""
    vm = make_vm(CONVERT)
    size = pages * PAGE_SIZE
    gva = vm.alloc(size)
    gpa = vm.gva_to_gpa(gva)
    vm.vcpus[0].set_entry("guest_main", int(gva), size)
    vm.launch()
    assert vm.memory.is_private(gpa)
    for number in range(3):
        assert vm.vcpus[0].sync().args == (number,)
        assert not vm.memory.is_private(gpa)
        for offset in range(pages):
            view = vm.memory.shared_view(gpa + offset * PAGE_SIZE, 8)
            assert int.from_bytes(view, "little") == 0x1000 + offset * 512 + number
            view[:] = (0x2000 + offset * 512 + number).to_bytes(8, "little")
    assert vm.vcpus[0].sync().args == (3,)
    assert vm.memory.is_private(gpa)
    vm.vcpus[0].run_to_done()


VALIDATE = """
#include <kvmpy/guest.h>

void guest_main(void *page)
{
	struct pvalidate_result again = pvalidate(page, false, true);
	struct pvalidate_result off = pvalidate(page, false, false);
	struct pvalidate_result on = pvalidate(page, false, true);

	GUEST_SYNC(again.code, again.unchanged, off.code, off.unchanged, on.code, on.unchanged);
	GUEST_SYNC(pvalidate(page, true, true).code);
}
"""


@with_snp
def test_pvalidate(make_vm: MakeVm) -> None:
    """Launched pages are validated: once more changes nothing (CF), taking it back and giving it does."""
    vm = make_vm(VALIDATE)
    gva = vm.alloc(PAGE_SIZE)
    vm.vcpus[0].set_entry("guest_main", int(gva))
    vm.launch()
    assert vm.vcpus[0].sync().args == (0, 1, 0, 0, 0, 0)


@with_snp
def test_pvalidate_of_a_size_that_is_not_there(make_vm: MakeVm) -> None:
    """A 2 MiB validation of a 4 KiB page fails: FAIL_SIZEMISMATCH, or FAIL_INPUT where it is unaligned."""
    vm = make_vm(VALIDATE)
    gva = vm.alloc(PAGE_SIZE)
    vm.vcpus[0].set_entry("guest_main", int(gva))
    vm.launch()
    vm.vcpus[0].sync()
    assert vm.vcpus[0].sync().args[0] in (1, 6)


UNVALIDATED = """
#include <kvmpy/guest.h>

void guest_main(volatile u64 *page)
{
	u64 value;
	struct guest_fault fault;

	pvalidate((void *)page, false, false);
	fault = GUEST_TRY("movq %1, %0", : "=r"(value) : "m"(*page));
	GUEST_SYNC(fault.faulted, fault.vector, fault.error_code);
	*page = 1;
}
"""


@with_snp
def test_a_page_that_is_not_validated(make_vm: MakeVm) -> None:
    """An access to a private page that is not validated raises #VC with error code 0x404."""
    vm = make_vm(UNVALIDATED)
    gva = vm.alloc(PAGE_SIZE)
    vm.vcpus[0].set_entry("guest_main", int(gva))
    vm.launch()
    assert vm.vcpus[0].sync().args == (1, 29, 0x404)
    with pytest.raises(GuestExceptionError) as caught:
        vm.vcpus[0].run_to_done()
    assert (caught.value.vector, caught.value.error_code) == (29, 0x404)


ADJUST = """
#include <kvmpy/guest.h>

void guest_main(void *page)
{
	GUEST_SYNC(rmpadjust(page, false, 1 | RMPADJUST_READ), rmpadjust(page, false, 0),
		   rmpadjust(page, false, 1 | RMPADJUST_VMSA), rmpadjust(page, false, 1));
}
"""


@with_snp
def test_rmpadjust(make_vm: MakeVm) -> None:
    """VMPL 0 gives VMPL 1 permissions and takes the VMSA bit back; its own level it may not adjust."""
    vm = make_vm(ADJUST)
    gva = vm.alloc(PAGE_SIZE)
    vm.vcpus[0].set_entry("guest_main", int(gva))
    vm.launch()
    given, own, vmsa, back = vm.vcpus[0].sync().args
    assert (given, vmsa, back) == (0, 0, 0)
    assert own == 2


AP = """
#include <kvmpy/guest.h>

u8 vmsa_pages[2][4096] __attribute__((aligned(4096)));
u64 seen GUEST_SHARED;

void ap_main(u64 value)
{
	GUEST_ASSERT_EQ(guest_cpu_index(), 1);
	WRITE_ONCE(seen, value);
	GUEST_SYNC(value);
	for (;;)
		cpu_relax();
}

extern void _start(void);

void guest_main(u64 cpu1, u64 stack, u64 features)
{
	/* Not at the start of a 2 MiB page, which hosts refuse. */
	u8 *vmsa = (guest_translate(vmsa_pages[0], NULL) & 0x1fffff) ? vmsa_pages[0] : vmsa_pages[1];

	snp_vmsa_init(vmsa, (u64)_start, stack, cpu1, cpu1, features);
	GUEST_ASSERT_EQ(rmpadjust(vmsa, false, 1 | RMPADJUST_VMSA), 0);
	GUEST_ASSERT_EQ(snp_ap_create(AP_CREATE, 1, guest_translate(vmsa, NULL), features), 0);
	GUEST_SYNC(1);
	while (!READ_ONCE(seen))
		cpu_relax();
	GUEST_ASSERT_EQ(snp_ap_create(AP_DESTROY, 1, 0, features), 0);
}
"""


@with_snp
def test_a_vcpu_that_the_guest_creates(make_vm: MakeVm) -> None:
    """A vCPU starts in the state of a VMSA page that the guest made, until the guest destroys it."""
    vm = make_vm(AP, vcpus=2)
    first, second = vm.vcpus
    first.set_entry("guest_main", int(second.percpu), int(second.stack_top), 1)
    second.set_entry("ap_main", 0x77)
    vm.launch()
    assert first.sync().args == (1,)
    assert second.sync().args == (0x77,)
    first.run_to_done()
    assert vm.symbol("seen").u64 == 0x77
