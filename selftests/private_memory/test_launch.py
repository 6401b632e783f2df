# SPDX-License-Identifier: Apache-2.0
"""vm.launch() where the host cannot write private memory: the image is there all the same."""

from __future__ import annotations

import pytest

from kvmpy import (
    KVM_MEM_GUEST_MEMFD,
    PAGE_SIZE,
    SIZE_1G,
    Anonymous,
    Gpa,
    GuestVm,
    Gva,
    LaunchError,
    MakeVm,
    MemoryFaultExit,
    MmioExit,
    PrivateMemoryError,
)

pytestmark = pytest.mark.protections("all", private_is_fd_backed=True)
# Elsewhere the firmware brings the image in.
guest_copies = pytest.mark.requires("trait:host_sees_tables")

POISON = 0xCC
MARK = 0x5EC2E7

GUEST = """
#include <kvmpy/guest.h>

#define PAGES 8

/* Page by page: initialised by the compiler, by nobody, and by the host before launch. */
u64 given[PAGES * 512] __aligned(4096) = { 0x5ec2e7, [PAGES * 512 - 1] = 0x5ec2e7 };
u64 empty[PAGES * 512] __aligned(4096);
u64 written[PAGES * 512] __aligned(4096);

void guest_main(void)
{
	u64 on_stack[512];
	u64 sum = 0;

	for (u64 i = 0; i < ARRAY_SIZE(on_stack); i++)
		on_stack[i] = i;
	for (u64 round = 0; round < 2; round++) {
		sum = 0;
		for (u64 i = 0; i < PAGES * 512; i++) {
			GUEST_ASSERT_EQ(empty[i], 0);
			GUEST_ASSERT_EQ(written[i], i + 1);
			sum += given[i];
		}
		for (u64 i = 0; i < ARRAY_SIZE(on_stack); i++)
			GUEST_ASSERT_EQ(*(volatile u64 *)&on_stack[i], i);
		GUEST_SYNC(sum, guest_cpu_index());
	}
}
"""

READER = """
#include <kvmpy/guest.h>

void guest_main(u64 first, u64 pages, u64 step)
{
	u64 bad = 0;

	for (u64 i = 0; i < pages; i++)
		bad += *(volatile u64 *)(first + i * step) != i + 1;
	GUEST_SYNC(bad);
}
"""


@pytest.fixture(params=["data", "all"])
def policy(request: pytest.FixtureRequest, protection: str) -> str:
    """What of the VM is private; skipped where the protection does not offer it."""
    from kvmpy.coco import ladder

    wanted = str(request.param)
    if wanted not in ladder.get(protection).traits.policies:
        pytest.skip(f"protection {protection} has no policy {wanted}")
    return wanted


def write_numbers(vm: GuestVm, name: str) -> None:
    """Fill an array of the guest with 1, 2, 3..., before launch."""
    size = vm.symbol(name).size
    vm.symbol(name).bytes = b"".join(number.to_bytes(8, "little") for number in range(1, size // 8 + 1))


def poison(vm: GuestVm) -> int:
    """Fill the shared view of every private page that is in use; return how many there are."""
    pages = 0
    for gpa, size in vm.private.image():
        view = vm.memory.shared_view(gpa, size)
        view[:] = bytes([POISON]) * size
        pages += size // PAGE_SIZE
    return pages


@pytest.mark.parametrize("vcpus", [1, 2, 7])
def test_image_arrives(make_vm: MakeVm, policy: str, vcpus: int) -> None:
    """Every vCPU finds the image that the host prepared: initialised data, zeroes, host writes, its stack.

    Documentation/virt/kvm/api.rst 4.142, KVM_CREATE_GUEST_MEMFD: private memory has no host mapping.
    """
    vm = make_vm(GUEST, vcpus=vcpus, private=policy)
    write_numbers(vm, "written")
    vm.launch()
    for vcpu in vm.vcpus:
        assert [call.args for call in vcpu.syncs()] == [(2 * MARK, vcpu.index)] * 2


@pytest.mark.parametrize("vcpus", [1, 2])
def test_shared_view_is_not_the_content(make_vm: MakeVm, policy: str, vcpus: int) -> None:
    """A private page has nothing to do with the host's memory at its address, which can be overwritten.

    Documentation/virt/kvm/api.rst 4.140, KVM_SET_USER_MEMORY_REGION2.
    """
    vm = make_vm(GUEST, vcpus=vcpus, private=policy)
    write_numbers(vm, "written")
    given = vm.symbol("given").gpa
    vm.launch()
    assert bytes(vm.memory.shared_view(given, 8)) == bytes(8)
    data_pages = vm.symbol("written").size // PAGE_SIZE
    pages = poison(vm)
    # All three arrays, a stack and a per-CPU area for each vCPU.
    assert pages > 3 * data_pages + 2 * vcpus
    for vcpu in vm.vcpus:
        assert vcpu.sync().args[0] == 2 * MARK
        poison(vm)
        vcpu.run_to_done()
    assert all(
        bytes(vm.memory.shared_view(gpa, size)) == bytes([POISON]) * size for gpa, size in vm.private.image()
    )


def test_shared_view_of_a_shared_page_is_the_content(make_vm: MakeVm, policy: str) -> None:
    """What the host overwrites in a shared page after launch, the guest sees.

    Documentation/virt/kvm/api.rst 4.140, KVM_SET_USER_MEMORY_REGION2.
    """
    vm = make_vm(READER, private=policy)
    gva = vm.alloc(4 * PAGE_SIZE, private=False)
    vm.vcpus[0].set_entry("guest_main", int(gva), 4, PAGE_SIZE)
    vm.launch()
    view = vm.memory.shared_view(vm.gva_to_gpa(gva), 4 * PAGE_SIZE)
    for page in range(4):
        view[page * PAGE_SIZE : page * PAGE_SIZE + 8] = (page + 1).to_bytes(8, "little")
    assert vm.vcpus[0].sync().args[0] == 0


def test_host_is_refused_after_launch(make_vm: MakeVm, policy: str) -> None:
    """Before launch the host reads and writes private pages, afterwards it is refused both.

    The promise of PrivateMemoryError (docs/protections.md).
    """
    vm = make_vm(GUEST, private=policy)
    write_numbers(vm, "written")
    assert vm.symbol("given").u64 == MARK
    vm.launch()
    for name in ("given", "written"):
        with pytest.raises(PrivateMemoryError, match=vm.protection.name):
            vm.read(vm.symbol(name).gva, 8)
        with pytest.raises(PrivateMemoryError, match=vm.protection.name):
            vm.write(vm.symbol(name).gva, b"x")


@pytest.mark.requires("trait:can_read_registers")
def test_registers_are_those_of_a_plain_vm(make_vm: MakeVm, policy: str) -> None:
    """Launching leaves no trace in the vCPUs' general and segment registers.

    Documentation/virt/kvm/api.rst 4.11 KVM_GET_REGS, 4.13 KVM_GET_SREGS.
    """
    results = []
    for protection, private in ((None, policy), ("none", None)):
        vm = make_vm.start(GUEST, vcpus=2, protection=protection, private=private)
        results.append([(vcpu.regs.get().as_dict(), vcpu.regs.get_sregs().as_dict()) for vcpu in vm.vcpus])
    assert results[0] == results[1]


def test_nothing_of_the_launch_stays(make_vm: MakeVm, policy: str) -> None:
    """After launch there is no memory but the guest's own: what the launch needed beside it is gone, in the
    guest as in the host.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_MMIO: an access where there is no memory slot.
    """
    vm = make_vm(READER, private=policy)
    slots = sorted(vm.slots)
    beside = Gva(0x70_0000_0000)
    vm.map(beside, Gpa(4 * SIZE_1G), PAGE_SIZE, private=False)
    vm.vcpus[0].set_entry("guest_main", int(beside), 1, 0)
    views = [(segment.private, segment.shared) for segment in vm.memory.segments()]
    staged = [private for private, shared in views if private is not None and private is not shared]
    assert staged
    assert not any(mapping.closed for mapping in staged)
    vm.launch()
    assert sorted(vm.slots) == slots
    assert all(mapping.closed for mapping in staged)
    # Where the code is private, KVM cannot decode the access; under "data" it is an exit.
    if policy == "data":
        assert vm.vcpus[0].expect(MmioExit).phys_addr == 4 * SIZE_1G


def test_slots_made_by_hand_stay(make_vm: MakeVm) -> None:
    """Slots that a test made with the bare ioctl are the same after a launch, which needs some itself.

    Documentation/virt/kvm/api.rst 4.35 KVM_SET_USER_MEMORY_REGION: a slot's number names it.
    """
    vm = make_vm(READER)
    count, place, gva = 16, Gpa(8 * SIZE_1G), Gva(0x70_0000_0000)
    memory = vm.own(Anonymous().map(count * PAGE_SIZE))
    for number in range(count):
        memory.view(number * PAGE_SIZE, 8)[:] = (number + 1).to_bytes(8, "little")
        gpa = place + number * PAGE_SIZE
        vm.set_user_memory_region(number + 1, int(gpa), PAGE_SIZE, memory.hva + number * PAGE_SIZE)
    vm.map(gva, place, count * PAGE_SIZE, private=False)
    vm.vcpus[0].set_entry("guest_main", int(gva), count, PAGE_SIZE)
    vm.launch()
    assert vm.vcpus[0].sync().args[0] == 0


@pytest.mark.parametrize("place", [4 * SIZE_1G, 5 * SIZE_1G, 4 * SIZE_1G + (16 << 20)], ids=hex)
def test_image_in_several_slots(make_vm: MakeVm, place: int) -> None:
    """An image that lies in two memory slots arrives, wherever the second one is.

    Documentation/virt/kvm/api.rst 4.140, KVM_SET_USER_MEMORY_REGION2.
    """
    vm = make_vm(READER)
    gpa, size, gva = Gpa(place), 4 << 20, Gva(0x70_0000_0000)
    vm.add_memory(gpa, size)
    vm.memory.set_private(gpa, size)
    vm.map(gva, gpa, size)
    for page in range(size // PAGE_SIZE):
        vm.memory.write(gpa + page * PAGE_SIZE, (page + 1).to_bytes(8, "little"))
    vm.vcpus[0].set_entry("guest_main", int(gva), size // PAGE_SIZE, PAGE_SIZE)
    vm.launch()
    vm.memory.shared_view(gpa, size)[:] = bytes([POISON]) * size
    assert vm.vcpus[0].sync().args[0] == 0
    assert vm.private.compare(gpa, size) == []


def test_image_over_a_slot_border(make_vm: MakeVm) -> None:
    """Private pages on both sides of the border of two slots arrive: what is one range for the guest is two
    guest_memfds for the host.

    Documentation/virt/kvm/api.rst 4.142, KVM_CREATE_GUEST_MEMFD: a slot has one of its own.
    """
    vm = make_vm(READER)
    place, half, gva = Gpa(5 * SIZE_1G), 8 * PAGE_SIZE, Gva(0x70_0000_0000)
    for gpa in (place, place + half):
        vm.add_memory(gpa, half)
    assert len({id(slot.gmem) for slot in vm.slots.values() if slot.gpa in (place, place + half)}) == 2
    vm.memory.set_private(place, 2 * half)
    vm.map(gva, place, 2 * half)
    for page in range(2 * half // PAGE_SIZE):
        vm.memory.write(place + page * PAGE_SIZE, (page + 1).to_bytes(8, "little"))
    vm.vcpus[0].set_entry("guest_main", int(gva), 2 * half // PAGE_SIZE, PAGE_SIZE)
    vm.launch()
    for gpa in (place, place + half):
        vm.memory.shared_view(gpa, half)[:] = bytes([POISON]) * half
    assert vm.vcpus[0].sync().args[0] == 0
    assert vm.private.compare(place, 2 * half) == []


def test_image_with_holes(make_vm: MakeVm) -> None:
    """Private pages that the host never wrote are zero, between others that it did.

    Documentation/virt/kvm/api.rst 4.142: a new guest_memfd is zero.
    """
    vm = make_vm("""
#include <kvmpy/guest.h>

void guest_main(u64 first, u64 pages)
{
	for (u64 i = 0; i < pages; i++)
		GUEST_ASSERT_EQ(*(volatile u64 *)(first + i * 4096), i % 3 ? 0 : i + 1);
}
""")
    pages = 64
    gva = vm.alloc(pages * PAGE_SIZE)
    for page in range(0, pages, 3):
        vm.variable(gva + page * PAGE_SIZE, 8).u64 = page + 1
    vm.vcpus[0].set_entry("guest_main", int(gva), pages)
    vm.launch()
    poison(vm)
    vm.vcpus[0].run_to_done()


def test_everybody_agrees_after_launch(make_vm: MakeVm, policy: str) -> None:
    """After launch KVM treats as private exactly the pages that the bitmap calls private.

    Documentation/virt/kvm/api.rst 4.141 KVM_SET_MEMORY_ATTRIBUTES, 4.143 KVM_PRE_FAULT_MEMORY.
    """
    vm = make_vm(GUEST, vcpus=2, private=policy)
    write_numbers(vm, "written")
    vm.launch()
    assert vm.private.compare() == []
    vm.run_all()
    assert vm.private.compare() == []


@guest_copies
def test_copy_that_stops_is_an_error(make_vm: MakeVm) -> None:
    """A launch whose image cannot be brought in says where it stopped, and leaves no memory slot behind.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_MEMORY_FAULT: a private page of a slot without guest_memfd.
    """
    vm = make_vm(GUEST)
    ram = vm.slots[0]
    assert ram.flags & KVM_MEM_GUEST_MEMFD
    vm.set_user_memory_region(ram.slot, ram.gpa, 0, 0)
    vm.set_user_memory_region(ram.slot, ram.gpa, ram.size, ram.hva)
    slots = sorted(vm.slots)
    with pytest.raises(LaunchError, match=rf"{MemoryFaultExit.__name__}.*destination 0x[0-9a-f]+"):
        vm.launch()
    assert not vm.launched
    assert sorted(vm.slots) == slots


@guest_copies
def test_no_vcpu_no_image(make_vm: MakeVm) -> None:
    """A VM without a vCPU cannot bring its image in, and says so.

    The promise of LaunchError (docs/protections.md).
    """
    vm = make_vm(GUEST, vcpus=0)
    with pytest.raises(LaunchError, match="vcpus=1"):
        vm.launch()
