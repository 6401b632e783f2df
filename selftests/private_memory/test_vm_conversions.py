# SPDX-License-Identifier: Apache-2.0
"""Conversions the way tests make them, by vm.memory.set_private(), vm.memory.set_shared() and the guest's
hypercall, and whether the bitmap, KVM and the guest agree.
"""

from __future__ import annotations

import errno
import threading

import pytest

from kvmpy import (
    AGENT,
    KVM_HC_MAP_GPA_RANGE,
    KVM_MAP_GPA_RANGE_ENCRYPTED,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    PAGE_SIZE,
    SIZE_1G,
    SIZE_2M,
    Agent,
    Anonymous,
    Backing,
    Gpa,
    GuestVcpu,
    GuestVm,
    Gva,
    HypercallExit,
    MakeVm,
    MemFd,
    VcpuBusyError,
    VcpuKickedError,
    ioctls,
    kvm_memory_attributes,
    refused,
)
from kvmpy.guest.private import PrivacyDifference

# Pages that the guest must validate, too, are those of sev/test_page_states.py.
fd_backed = pytest.mark.protections("all", private_is_fd_backed=True, must_validate=False)

GPA = Gpa(8 * SIZE_1G)
GVA = Gva(0x70_0000_0000)
GUEST_VALUE, HOST_VALUE = 0x1111, 0x2222

# Each vCPU converts pages of its own back and forth, and one page that all have in common.
CROWD = """
#include <kvmpy/guest.h>

#define ROUNDS 20

void guest_main(u64 common, u64 own, u64 pages)
{
	for (u64 i = 0; i < ROUNDS; i++) {
		GUEST_ASSERT_EQ(guest_map_gpa_range(own, pages * 4096, i % 2), 0);
		GUEST_ASSERT_EQ(guest_map_gpa_range(common, 4096, (i + guest_cpu_index()) % 2), 0);
	}
}
"""

SPIN = """
#include <kvmpy/guest.h>

void guest_main(void)
{
	GUEST_SYNC();
	for (;;)
		cpu_relax();
}
"""


class Range:
    """Some pages of a VM at GPA that the guest reads, writes and converts."""

    def __init__(self, vm: GuestVm, *slots: int, backing: Backing | None = None) -> None:
        self.vm = vm
        self.size = sum(slots)
        address = GPA
        for size in slots:
            vm.add_memory(address, size, backing=backing)
            address += size
        vm.map(GVA, GPA, self.size, page_size=PAGE_SIZE, private=False)
        self.agent = Agent(vm.vcpus[0])
        self.agent.start()

    def do(self, action: str, offset: int = 0, size: int = PAGE_SIZE, value: int = 0) -> int:
        """Let the guest do something to its end: 'r'ead, 'w'rite, make pages 's'hared or 'p'rivate."""
        if action in "sp":
            return self.agent.convert(GPA + offset, size, private=action == "p")
        if action == "r":
            self.agent.begin_read(GVA + offset)
        else:
            self.agent.begin_write(GVA + offset, value)
        return self.agent.value()

    def shown(self, offset: int) -> int:
        """What the shared memory holds."""
        return int.from_bytes(self.vm.memory.shared_view(GPA + offset, 8), "little")

    def show(self, offset: int, value: int) -> None:
        """Write the shared memory."""
        self.vm.memory.shared_view(GPA + offset, 8)[:] = value.to_bytes(8, "little")

    def agreed(self) -> bool:
        """Whether everybody agrees about the range."""
        return self.vm.private.compare(GPA, self.size) == []


@fd_backed
@pytest.mark.parametrize("by", ["host", "guest"])
def test_two_memories(make_vm: MakeVm, by: str) -> None:
    """A converted page is another memory; converted back, what it held before is there again.

    Documentation/virt/kvm/api.rst 4.141; Documentation/virt/kvm/x86/hypercalls.rst, KVM_HC_MAP_GPA_RANGE.
    """
    pages = Range(make_vm(AGENT), 4 * PAGE_SIZE)

    def convert(private: bool) -> None:
        if by == "guest":
            assert pages.do("p" if private else "s", PAGE_SIZE, 2 * PAGE_SIZE) == 0
        elif private:
            pages.vm.memory.set_private(GPA + PAGE_SIZE, 2 * PAGE_SIZE)
        else:
            pages.vm.memory.set_shared(GPA + PAGE_SIZE, 2 * PAGE_SIZE)

    for page in range(4):
        pages.show(page * PAGE_SIZE, HOST_VALUE)
    convert(True)
    assert [pages.vm.memory.is_private(GPA + n * PAGE_SIZE) for n in range(4)] == [False, True, True, False]
    assert pages.agreed()
    assert [pages.do("r", n * PAGE_SIZE) for n in range(4)] == [HOST_VALUE, 0, 0, HOST_VALUE]
    pages.do("w", PAGE_SIZE, value=GUEST_VALUE)
    assert pages.shown(PAGE_SIZE) == HOST_VALUE
    convert(False)
    assert pages.agreed()
    assert pages.do("r", PAGE_SIZE) == HOST_VALUE
    convert(True)
    assert pages.agreed()
    assert pages.do("r", PAGE_SIZE) == GUEST_VALUE


@fd_backed
@pytest.mark.parametrize("backing", [Anonymous(), MemFd()], ids=["anonymous", "memfd"])
def test_discard(make_vm: MakeVm, backing: Backing) -> None:
    """A conversion with discard gives back what its pages held, up to the end of a slot and none beside
    them: zeroes when they are converted back.

    Documentation/virt/kvm/api.rst 4.142: PUNCH_HOLE on a guest_memfd; madvise(2), MADV_DONTNEED and
    MADV_REMOVE.
    """
    pages = Range(make_vm(AGENT), 5 * PAGE_SIZE, PAGE_SIZE, backing=backing)
    vm, places = pages.vm, range(0, 6 * PAGE_SIZE, PAGE_SIZE)
    vm.memory.set_private(GPA, pages.size)
    for offset in places:
        pages.do("w", offset, value=GUEST_VALUE)
        pages.show(offset, HOST_VALUE)
    vm.memory.set_shared(GPA + 2 * PAGE_SIZE, 3 * PAGE_SIZE, discard=True)
    vm.memory.set_shared(GPA, 2 * PAGE_SIZE)
    vm.memory.set_shared(GPA + 5 * PAGE_SIZE, PAGE_SIZE)
    assert [pages.do("r", offset) for offset in places] == [HOST_VALUE] * 6
    vm.memory.set_private(GPA, PAGE_SIZE)
    vm.memory.set_private(GPA + PAGE_SIZE, 4 * PAGE_SIZE, discard=True)
    vm.memory.set_private(GPA + 5 * PAGE_SIZE, PAGE_SIZE)
    assert [pages.do("r", offset) for offset in places] == [GUEST_VALUE, GUEST_VALUE, 0, 0, 0, GUEST_VALUE]
    assert [pages.shown(offset) for offset in places] == [HOST_VALUE, 0, 0, 0, 0, HOST_VALUE]


@fd_backed
def test_memory_added_after_launch(make_vm: MakeVm) -> None:
    """Memory that comes after the launch can be private, and the host has no view of that at any time.

    Documentation/virt/kvm/api.rst 4.142 KVM_CREATE_GUEST_MEMFD: not mappable unless asked for.
    """
    vm = Range(make_vm(AGENT), PAGE_SIZE).vm
    later = GPA + SIZE_1G
    vm.add_memory(later, 2 * PAGE_SIZE)
    assert vm.memory.find(later).private is None
    vm.memory.set_private(later + PAGE_SIZE, PAGE_SIZE)
    assert [vm.memory.is_private(later + offset) for offset in (0, PAGE_SIZE)] == [False, True]
    assert vm.private.compare(later, 2 * PAGE_SIZE) == []


@fd_backed
def test_across_slots(make_vm: MakeVm) -> None:
    """A conversion, and a discard, go across the borders of memory slots.

    Documentation/virt/kvm/api.rst 4.141: the range need not lie in one slot.
    """
    sizes = (SIZE_2M, PAGE_SIZE, 3 * PAGE_SIZE)
    pages = Range(make_vm(AGENT), *sizes)
    borders = [SIZE_2M - PAGE_SIZE, SIZE_2M, SIZE_2M + PAGE_SIZE, SIZE_2M + 2 * PAGE_SIZE]
    length = borders[-1] - borders[0]
    assert pages.do("p", borders[0], length) == 0
    assert pages.agreed()
    for offset in borders:
        pages.do("w", offset, value=GUEST_VALUE)
    assert [pages.shown(offset) for offset in borders] == [0, 0, 0, GUEST_VALUE]
    pages.vm.memory.set_shared(GPA + borders[0], length, discard=True)
    pages.vm.memory.set_private(GPA + borders[0], length)
    assert [pages.do("r", offset) for offset in borders] == [0, 0, 0, GUEST_VALUE]
    assert pages.agreed()


@fd_backed
@pytest.mark.parametrize("what", ["p", "s"])
@pytest.mark.parametrize(
    ("offset", "size"),
    [(-PAGE_SIZE, PAGE_SIZE), (2 * PAGE_SIZE, PAGE_SIZE), (PAGE_SIZE, 2 * PAGE_SIZE), (8, PAGE_SIZE), (0, 0)],
    ids=["below", "above", "over the end", "unaligned", "no page"],
)
def test_hypercall_that_is_refused(make_vm: MakeVm, what: str, offset: int, size: int) -> None:
    """A range that is not whole pages of the guest's memory is EINVAL for the guest, and changes nothing.

    Documentation/virt/kvm/x86/hypercalls.rst, KVM_HC_MAP_GPA_RANGE.
    """
    pages = Range(make_vm(AGENT), 2 * PAGE_SIZE)
    pages.vm.memory.set_private(GPA + PAGE_SIZE, PAGE_SIZE)
    before = pages.vm.memory.private.copy()
    assert pages.do(what, offset, size) == -errno.EINVAL
    assert pages.vm.memory.private == before
    assert pages.agreed()


@fd_backed
def test_plain_slot_is_refused(make_vm: MakeVm) -> None:
    """A guest that asks for private pages in a plain slot gets EINVAL.

    Documentation/virt/kvm/x86/hypercalls.rst, KVM_HC_MAP_GPA_RANGE.
    """
    vm = make_vm(AGENT)
    vm.add_memory(GPA + PAGE_SIZE, PAGE_SIZE, private=False)
    pages = Range(vm, PAGE_SIZE)
    assert pages.do("p", PAGE_SIZE) == -errno.EINVAL
    assert pages.do("p", 0) == 0


@pytest.mark.protections("all", has_private_memory=True)
@pytest.mark.requires("KVM_CAP_EXIT_HYPERCALL&0x1000")
def test_hook_answers(make_vm: MakeVm) -> None:
    """A test that takes the hypercall itself sees number and arguments, and its answer is the guest's result.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_HYPERCALL.
    """
    vm = make_vm(AGENT)
    gva = vm.alloc(2 * PAGE_SIZE)
    gpa = vm.gva_to_gpa(gva)
    agent = Agent(vm.vcpus[0])
    agent.start()
    seen: list[tuple[int, tuple[int, ...]]] = []

    def hook(vcpu: GuestVcpu, call: HypercallExit) -> bool:
        assert vcpu is vm.vcpus[0]
        seen.append((call.nr, call.args[:3]))
        call.respond(-errno.EAGAIN)
        return True

    vm.on_hypercall = hook
    assert agent.convert(gpa, 2 * PAGE_SIZE, private=False) == -errno.EAGAIN
    assert seen == [(KVM_HC_MAP_GPA_RANGE, (gpa, 2, 0))]
    assert vm.memory.is_private(gpa)
    assert vm.private.compare(gpa, 2 * PAGE_SIZE) == []


@fd_backed
def test_hook_that_passes(make_vm: MakeVm) -> None:
    """What the test's hook does not answer, the harness carries out.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_HYPERCALL.
    """
    pages = Range(make_vm(AGENT), PAGE_SIZE)
    flags: list[int] = []

    def hook(_vcpu: GuestVcpu, call: HypercallExit) -> bool:
        flags.append(call.args[2])
        return False

    pages.vm.on_hypercall = hook
    assert pages.do("p") == 0
    assert pages.agreed()
    assert pages.vm.memory.is_private(GPA)
    assert flags == [KVM_MAP_GPA_RANGE_ENCRYPTED]


@fd_backed
@pytest.mark.parametrize("vcpus", [2, 4])
def test_many_vcpus(make_vm: MakeVm, vcpus: int) -> None:
    """Many vCPUs that convert pages of their own, and one that they have in common, end in agreement.

    Documentation/virt/kvm/x86/hypercalls.rst, KVM_HC_MAP_GPA_RANGE.
    """
    pages = 4
    vm = make_vm(CROWD, vcpus=vcpus)
    vm.add_memory(GPA, (1 + pages * vcpus) * PAGE_SIZE)
    for vcpu in vm.vcpus:
        own = GPA + (1 + pages * vcpu.index) * PAGE_SIZE
        vcpu.set_entry("guest_main", int(GPA), int(own), pages)
    vm.launch()
    vm.run_all()
    # The last round makes every vCPU's own pages private; of the common one only agreement is certain.
    own_frames = range(GPA.gfn + 1, GPA.gfn + 1 + pages * vcpus)
    assert all(gfn in vm.memory.private for gfn in own_frames)
    assert vm.private.compare(GPA, (1 + pages * vcpus) * PAGE_SIZE) == []


# The comparison itself.


@fd_backed
@pytest.mark.parametrize("private", [True, False], ids=["private", "shared"])
def test_comparison_finds_what_went_past_the_bitmap(make_vm: MakeVm, private: bool) -> None:
    """Attributes that a test sets in KVM alone show as a difference, in the attributes and in KVM.

    The promise of compare_private() (docs/protections.md).
    """
    pages = Range(make_vm(AGENT), 8 * PAGE_SIZE)
    vm = pages.vm
    if not private:
        vm.memory.set_private(GPA, 8 * PAGE_SIZE)
    attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
    vm.set_memory_attributes(GPA + PAGE_SIZE, 2 * PAGE_SIZE, attributes)
    expected = [
        PrivacyDifference(who, GPA + PAGE_SIZE, 2 * PAGE_SIZE, not private) for who in ("attributes", "kvm")
    ]
    assert vm.private.compare(GPA, pages.size) == expected
    vm.set_memory_attributes(GPA + PAGE_SIZE, 2 * PAGE_SIZE, 0 if private else KVM_MEMORY_ATTRIBUTE_PRIVATE)
    assert pages.agreed()


@fd_backed
def test_comparison_asks_kvm_itself(make_vm: MakeVm) -> None:
    """A change that went past kvmpy altogether is found: KVM is asked, not kvmpy's notes.

    Documentation/virt/kvm/api.rst 4.143, KVM_PRE_FAULT_MEMORY.
    """
    pages = Range(make_vm(AGENT), 4 * PAGE_SIZE)
    vm = pages.vm
    pages.do("w", 0, value=GUEST_VALUE)
    arg = kvm_memory_attributes(
        address=int(GPA), size=PAGE_SIZE, attributes=KVM_MEMORY_ATTRIBUTE_PRIVATE, flags=0
    )
    vm.ioctl(ioctls.KVM_SET_MEMORY_ATTRIBUTES, arg)
    assert vm.private.compare(GPA, pages.size) == [PrivacyDifference("kvm", GPA, PAGE_SIZE, False)]
    # To ask is no change: the shared page holds what it held.
    vm.set_memory_attributes(GPA, PAGE_SIZE, 0)
    assert pages.do("r", 0) == GUEST_VALUE


@fd_backed
def test_comparison_keeps_private_content(make_vm: MakeVm) -> None:
    """Asking KVM leaves private and shared pages as they are, and the guest runs on.

    Documentation/virt/kvm/api.rst 4.143, KVM_PRE_FAULT_MEMORY.
    """
    pages = Range(make_vm(AGENT), 2 * PAGE_SIZE)
    pages.vm.memory.set_private(GPA, PAGE_SIZE)
    pages.do("w", 0, value=GUEST_VALUE)
    pages.do("w", PAGE_SIZE, value=GUEST_VALUE + 1)
    slots = {number: (slot.gpa, slot.size, slot.flags) for number, slot in pages.vm.slots.items()}
    assert pages.agreed()
    assert pages.vm.private.compare() == []
    assert {number: (slot.gpa, slot.size, slot.flags) for number, slot in pages.vm.slots.items()} == slots
    assert [pages.do("r", 0), pages.do("r", PAGE_SIZE)] == [GUEST_VALUE, GUEST_VALUE + 1]


@fd_backed
def test_comparison_needs_vcpus_at_rest(make_vm: MakeVm) -> None:
    """While a vCPU runs KVM cannot be asked, and the harness says so.

    The promise of compare_private() (docs/protections.md).
    """
    vm = make_vm.start(SPIN)
    vcpu = vm.vcpus[0]
    vcpu.sync()
    inside = threading.Event()

    def body() -> None:
        inside.set()
        with pytest.raises(VcpuKickedError):
            vcpu.next()

    thread = threading.Thread(target=body)
    thread.start()
    try:
        inside.wait(10)
        while not vcpu.running:
            pass
        with pytest.raises(VcpuBusyError, match=vcpu.name):
            vm.private.compare()
    finally:
        vcpu.kick()
        thread.join(10)
    assert vm.private.compare() == []


@pytest.mark.protections("all", has_encryption_bit=True, host_sees_private=True)
def test_comparison_reads_the_page_tables(make_vm: MakeVm) -> None:
    """With an encryption bit, a mapping whose bit is not what the bitmap says is a difference.

    The promise of compare_private() (docs/protections.md).
    """
    vm = make_vm(AGENT)
    gva = vm.alloc(2 * PAGE_SIZE, private=True)
    gpa = vm.gva_to_gpa(gva)
    vm.launch()
    assert vm.private.compare() == []
    vm.map(gva + 16 * PAGE_SIZE, gpa + PAGE_SIZE, PAGE_SIZE, private=False)
    assert vm.private.compare() == [PrivacyDifference("tables", gpa + PAGE_SIZE, PAGE_SIZE, True)]


# What is refused.


@pytest.mark.protections("all", has_private_memory=True)
@pytest.mark.parametrize(
    ("gpa", "size"),
    [(0x1000, 0x800), (0x1800, 0x1000), (0x1000, 0), (0x7FFF_F000, 0x1000), (0x3FF_F000, 0x2000)],
    ids=["part of a page", "unaligned", "nothing", "outside", "over the end"],
)
def test_bad_range(make_vm: MakeVm, gpa: int, size: int) -> None:
    """A range that is not whole pages of guest memory is a ValueError, and nothing changes.

    The promise of set_private() and set_shared() (kvmpy/core/memory.py).
    """
    vm = make_vm(AGENT)
    for launched in (False, True):
        if launched:
            vm.launch()  # which may make pages of its own private
        before = vm.memory.private.copy()
        with pytest.raises(ValueError, match="gpa 0x"):
            vm.memory.set_private(Gpa(gpa), size)
        with pytest.raises(ValueError, match="gpa 0x"):
            vm.memory.set_shared(Gpa(gpa), size)
        assert vm.memory.private == before


@fd_backed
def test_what_kvm_refuses_is_not_noted(make_vm: MakeVm) -> None:
    """Where KVM refuses a conversion, the bitmap stays as it was.

    Documentation/virt/kvm/api.rst 4.141: flags must be zero, EINVAL.
    """
    pages = Range(make_vm(AGENT), PAGE_SIZE)
    vm = pages.vm
    wrong = kvm_memory_attributes(
        address=int(GPA), size=PAGE_SIZE, attributes=KVM_MEMORY_ATTRIBUTE_PRIVATE, flags=1
    )

    def refuse(_gpa: Gpa, _size: int, _private: bool, _discard: bool) -> None:
        vm.ioctl(ioctls.KVM_SET_MEMORY_ATTRIBUTES, wrong)

    vm.memory.convert = refuse
    with refused(errno.EINVAL):
        vm.memory.set_private(GPA, PAGE_SIZE)
    assert not vm.memory.is_private(GPA)
    assert pages.agreed()
