# SPDX-License-Identifier: Apache-2.0
"""What KVM's trace events, the exits and the attributes say about one access: they agree."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator

import pytest

from kvmpy import PAGE_SIZE, SIZE_2M, Gva, KvmError, MemoryFaultExit, MissingError, PfErr, VcpuThread
from kvmpy.debug.watch.faults import AttributesEvent, ExitEvent, FaultTracer, MappingEvent, PageFaultEvent
from kvmpy.debug.watch.tracefs import TracefsError
from selftests.private_memory.conftest import ADD_RETURN, PRIVATE, MakeRegion, Region

pytestmark = [pytest.mark.protections("sw-protected"), pytest.mark.requires("root")]

HUGE = SIZE_2M // PAGE_SIZE
VALUE = 0x7AACE000
SVM, NESTED_FAULT = 2, 0x400
MakeTracer = Callable[..., FaultTracer]


@pytest.fixture
def trace() -> Iterator[MakeTracer]:
    """Trace events of this thread, or of the threads given."""
    tracers: list[FaultTracer] = []

    def start(*kinds: str, tid: int | None = None) -> FaultTracer:
        try:
            tracer = FaultTracer(
                [threading.get_native_id() if tid is None else tid],
                kinds=kinds or ("faults",),
                buffer_kib=512,
            )
        except TracefsError as error:
            raise MissingError(error.missing, error.how) from error
        tracers.append(tracer)
        return tracer

    yield start
    for tracer in tracers:
        tracer.close()


def within(region: Region, address: int) -> bool:
    return int(region.gpa(0)) <= address < int(region.gpa(region.pages))


def faults(tracer: FaultTracer, region: Region) -> list[PageFaultEvent]:
    """The faults in the region; those of the guest's own code and data are not looked at."""
    assert tracer.lost == 0
    return [event for event in tracer.faults() if within(region, event.address)]


@pytest.mark.parametrize("access", ["read", "write", "fetch"])
def test_a_memory_fault_and_its_trace(make_region: MakeRegion, trace: MakeTracer, access: str) -> None:
    """The event before a memory fault has its page, the access and the vCPU; its error code does not
    contradict the exit's flags, and those are the page's attributes.

    Documentation/virt/kvm/api.rst 5, KVM_EXIT_MEMORY_FAULT; kvm_page_fault, arch/x86/kvm/trace.h.
    """
    region = make_region(gmem=False, vcpus=2)
    region.host(5)[:] = ADD_RETURN.ljust(PAGE_SIZE, b"\0")
    region.convert(5, 1, private=True)
    region.launch()
    tracer = trace()
    offset = 0 if access == "fetch" else 0x128
    got = region.fault(access, 5, VALUE, offset=offset, cpu=1)
    event = faults(tracer, region)[-1]
    assert event.address & -PAGE_SIZE == got.gpa
    assert event.address & PAGE_SIZE - 1 == offset
    assert (event.error.access, event.vcpu_id, event.tid) == (access, 1, threading.get_native_id())
    assert not event.error.present
    assert got.flags == PRIVATE
    claims = PfErr.PRIVATE_ACCESS | PfErr.ENC
    if event.error.flags & claims:
        assert got.private
    assert not event.error.flags & (PfErr.RSVD | PfErr.RMP)


def test_the_instruction_pointer(make_region: MakeRegion, trace: MakeTracer) -> None:
    """The event has the guest's RIP: that of the instruction which waits for the memory fault's cause to go.

    kvm_page_fault, arch/x86/kvm/trace.h; KVM_EXIT_MEMORY_FAULT completes no instruction.
    """
    region = make_region(gmem=False)
    region.convert(5, 1, private=True)
    region.launch()
    tracer = trace()
    region.agents[0].begin_call("check", int(region.gva(5)), PAGE_SIZE)
    region.vm.vcpus[0].expect(MemoryFaultExit)
    rip = region.vm.vcpus[0].regs.get().rip
    assert faults(tracer, region)[-1].rip == rip
    function = region.vm.program.function(Gva(rip))
    assert function is not None
    assert function[0] == "check"


def test_conversions_and_their_trace(region: Region, trace: MakeTracer) -> None:
    """Every conversion is one event with its range and attributes, in their order; a refused one is none.

    kvm_vm_set_mem_attributes, include/trace/events/kvm.h.
    """
    tracer = trace("attributes")
    wanted = [(3, 4, True), (0, 16, True), (5, 1, False), (5, 1, False), (0, 16, False)]
    for first, pages, private in wanted:
        region.convert(first, pages, private=private)
        with pytest.raises(KvmError):
            region.vm.set_memory_attributes(region.gpa(first), pages * PAGE_SIZE + 1, PRIVATE)
    events = [event for event in tracer.read() if isinstance(event, AttributesEvent)]
    assert [(event.gpa, event.size, event.attributes) for event in events] == [
        (int(region.gpa(first)), pages * PAGE_SIZE, PRIVATE if private else 0)
        for first, pages, private in wanted
    ]


def test_a_fault_for_every_page(region: Region, trace: MakeTracer) -> None:
    """The guest's first access of each page is one fault, in the order of its accesses, of either kind.

    kvm_page_fault, arch/x86/kvm/trace.h.
    """
    region.convert(0, 8, private=True)
    region.launch()
    tracer = trace()
    region.check_zero(0, 16)
    assert [event.address for event in faults(tracer, region)] == [
        int(region.gpa(page)) for page in range(16)
    ]
    region.check_zero(0, 16)
    assert faults(tracer, region) == []


def test_a_conversion_makes_the_next_access_fault(region: Region, trace: MakeTracer) -> None:
    """A page that was converted faults once more, its neighbours do not.

    Documentation/virt/kvm/api.rst 4.141.
    """
    region.check_zero(0, 16)
    region.convert(6, 2, private=True)
    tracer = trace()
    region.check_zero(0, 16)
    assert [event.address for event in faults(tracer, region)] == [int(region.gpa(page)) for page in (6, 7)]


def test_pre_faulted_pages_leave_no_trace(region: Region, trace: MakeTracer) -> None:
    """Neither KVM_PRE_FAULT_MEMORY nor the accesses after it are page faults.

    Documentation/virt/kvm/api.rst 4.143.
    """
    region.convert(0, 8, private=True)
    region.launch()
    tracer = trace()
    region.pre_fault(0, 16)
    region.check_zero(0, 16)
    assert faults(tracer, region) == []


def test_two_kinds_of_memory(region: Region, trace: MakeTracer) -> None:
    """A page is mapped from other memory when it is private, and from its own again when it is shared again.

    kvm_mmu_spte_requested, arch/x86/kvm/mmu/mmutrace.h; Documentation/virt/kvm/api.rst 4.140.
    """
    region.write(5, VALUE)
    tracer = trace("mappings")
    frames = []
    for private in (True, False, True, False):
        region.convert(5, 1, private=private)
        region.read(5)
        events = [event for event in tracer.read() if isinstance(event, MappingEvent)]
        mine = [event for event in events if event.gpa == int(region.gpa(5))]
        assert [event.size for event in mine] == [PAGE_SIZE]
        frames.append(mine[0].pfn)
    assert frames[0] == frames[2] != frames[1] == frames[3]


def test_sizes_of_mappings(make_region: MakeRegion, trace: MakeTracer) -> None:
    """Shared 2 MiB are mapped at once, with a private page in them by 4 KiB: the trace has the size.

    kvm_mmu_spte_requested, arch/x86/kvm/mmu/mmutrace.h.
    """
    region = make_region(HUGE, huge="thp")
    region.host_write(0, VALUE)
    region.launch()
    tracer = trace("mappings")

    def sizes() -> set[int]:
        events = [event for event in tracer.read() if isinstance(event, MappingEvent)]
        return {event.size for event in events if within(region, event.gpa)}

    region.read(9)
    whole = sizes()
    if whole == {PAGE_SIZE}:
        raise MissingError(
            "transparent huge pages", "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        )
    assert whole == {SIZE_2M}
    region.convert(300, 1, private=True)
    region.read(9)
    region.read(300)
    assert sizes() == {PAGE_SIZE}
    region.convert(300, 1, private=False)
    region.read(300)
    assert sizes() == {SIZE_2M}


def test_faults_of_another_vm_are_not_seen(make_region: MakeRegion, trace: MakeTracer) -> None:
    """A VM's events are those of the threads that run its vCPUs.

    kvmpy.debug.watch.faults; Linux: Documentation/trace/ftrace.rst, set_event_pid.
    """
    mine, other = make_region(), make_region()
    mine.launch()
    other.launch()
    tracer = trace()
    with VcpuThread(lambda: other.check_zero(0, 16), vcpu=other.vm.vcpus[0]) as thread:
        thread.join(30)
        mine.check_zero(3, 2)
    assert [event.address for event in faults(tracer, mine)] == [int(mine.gpa(3)), int(mine.gpa(4))]


def test_exits_and_faults(make_region: MakeRegion, trace: MakeTracer) -> None:
    """On AMD the exit for a nested page fault has the error code and the address of the fault that follows.

    AMD APM volume 2, 15.25.6: EXITINFO1 and EXITINFO2.
    """
    region = make_region(16)
    region.convert(0, 8, private=True)
    region.launch()
    tracer = trace("faults", "exits")
    region.check_zero(0, 16)
    events = tracer.read()
    exits = [event for event in events if isinstance(event, ExitEvent)]
    if exits and exits[0].isa != SVM:
        pytest.skip("this is about AMD's exits, this KVM has other hardware")
    pairs = [
        (first, second)
        for first, second in itertools.pairwise(events)
        if isinstance(second, PageFaultEvent) and within(region, second.address)
    ]
    assert len(pairs) == 16
    for before, fault in pairs:
        assert isinstance(before, ExitEvent)
        assert (before.reason, before.info1, before.info2) == (NESTED_FAULT, fault.error.value, fault.address)
        assert (before.rip, before.vcpu_id) == (fault.rip, fault.vcpu_id)


def test_faults_of_the_page_walk(make_region: MakeRegion, trace: MakeTracer) -> None:
    """A fault on a guest's page table says so where the hardware tells: GUEST_PAGE, not GUEST_FINAL.

    AMD APM volume 2, 15.25.6, EXITINFO1 bits 32 and 33.
    """
    region = make_region(gmem=False)
    vm = region.vm
    elsewhere = Gva(0x6000_0000_0000)
    root = vm.memory.view(vm.from_raw(vm.pages.cr3)[0], PAGE_SIZE)
    index = int(elsewhere) >> 39 & 511
    root[8 * index : 8 * index + 8] = (int(region.gpa(7)) | 3).to_bytes(8, "little")
    region.convert(7, 1, private=True)
    region.launch()
    tracer = trace()
    region.agents[0].begin_read(elsewhere)
    got = vm.vcpus[0].expect(MemoryFaultExit)
    event = faults(tracer, region)[-1]
    assert event.address & -PAGE_SIZE == got.gpa == int(region.gpa(7))
    stage = event.error.flags & (PfErr.GUEST_PAGE | PfErr.GUEST_FINAL)
    assert stage in (PfErr.GUEST_PAGE, PfErr(0))
