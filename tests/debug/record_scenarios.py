# SPDX-License-Identifier: Apache-2.0
"""What the tests of records record: small programs on KVM, each with one ioctl that it is about."""

from __future__ import annotations

import contextlib
import mmap
import threading

from kvmpy import Kvm
from kvmpy.core.address import Gpa
from kvmpy.core.backing import MappedGuestMemfd
from kvmpy.core.errors import KvmError
from kvmpy.core.eventfd import EventFd
from kvmpy.core.exits import IoExit, MemoryFaultExit, MmioExit, ShutdownExit
from kvmpy.core.irq import Msi, MsiRoute
from kvmpy.core.msr_filter import MsrFilter
from kvmpy.core.vcpu import Vcpu, VcpuKickedError, VcpuTimeoutError
from kvmpy.core.vm import Vm
from kvmpy.debug.record.tracker import address_of
from kvmpy.guest.program import GuestProgram
from kvmpy.uapi import ioctls
from kvmpy.uapi.constants import (
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_X86_USER_SPACE_MSR,
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_MSR_EXIT_REASON_UNKNOWN,
    VmType,
)
from kvmpy.uapi.structs import kvm_msr_entry, kvm_msr_filter, kvm_msrs, kvm_userspace_memory_region2
from tests.debug.scenario import fails, scenario

CODE = Gpa(0x1000)
PAGE = 4096


def machine(kvm: Kvm, code: bytes, *, size: int = 16 * PAGE, flags: int = 0, vcpus: int = 1) -> Vm:
    """Return a VM whose vCPUs start in real mode with *code* at 0x1000."""
    vm = kvm.create_vm()
    vm.add_slot(Gpa(0), size, flags=flags)
    vm.memory.write(CODE, code)
    for _ in range(vcpus):
        vcpu = vm.create_vcpu()
        sregs = vcpu.regs.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        vcpu.regs.set_sregs(sregs)
        regs = vcpu.regs.get()
        regs.rip, regs.rflags, regs.rsp = int(CODE), 2, 0x8000
        vcpu.regs.set(regs)
    return vm


# Errors.


@scenario("KVM_SET_SREGS on vcpu0 fails with EINVAL")
def set_sregs(kvm: Kvm) -> None:
    """System registers with a reserved bit in CR4."""
    with machine(kvm, b"\xf4") as vm:
        sregs = vm.vcpus[0].regs.get_sregs()
        sregs.cr4 |= 1 << 63
        fails(lambda: vm.vcpus[0].regs.set_sregs(sregs))


@scenario("KVM_CREATE_VCPU on vm fails with EEXIST")
def vcpu_twice(kvm: Kvm) -> None:
    """Two vCPUs with one id."""
    with kvm.create_vm() as vm:
        vm.create_vcpu(3)
        fails(lambda: vm.create_vcpu(3))


@scenario("KVM_SET_USER_MEMORY_REGION on vm fails with EEXIST")
def slots_overlap(kvm: Kvm) -> None:
    """Two slots for one page."""
    with kvm.create_vm() as vm:
        slot = vm.add_slot(Gpa(0), 4 * PAGE)
        fails(lambda: vm.set_user_memory_region(7, 3 * PAGE, 2 * PAGE, slot.hva))


@scenario("KVM_SET_USER_MEMORY_REGION on vm fails with EINVAL")
def slot_unaligned(kvm: Kvm) -> None:
    """A slot that does not begin at a page."""
    with kvm.create_vm() as vm:
        slot = vm.add_slot(Gpa(0), 4 * PAGE)
        fails(lambda: vm.set_user_memory_region(7, 0x10_0000, PAGE, slot.hva + 8))


@scenario("KVM_SET_USER_MEMORY_REGION2 on vm fails with EINVAL")
def slot_flags(kvm: Kvm) -> None:
    """A slot with a flag that does not exist."""
    with kvm.create_vm() as vm:
        fails(lambda: vm.set_user_memory_region2(0, 0, PAGE, 0x7000_0000, 1 << 20))


@scenario("KVM_CREATE_VM on kvm fails with EINVAL")
def vm_type(kvm: Kvm) -> None:
    """A VM type that does not exist."""
    fails(lambda: kvm.create_vm(77))


@scenario("KVM_GET_DIRTY_LOG on vm fails with ENOENT")
def dirty_log_of_nothing(kvm: Kvm) -> None:
    """The dirty log of a slot that keeps none."""
    with kvm.create_vm() as vm:
        vm.add_slot(Gpa(0), 4 * PAGE)
        fails(lambda: vm.dirty.get_log(0))


@scenario("KVM_IRQ_LINE on vm fails with ENXIO")
def line_without_chip(kvm: Kvm) -> None:
    """An interrupt line, and nothing at its end."""
    with kvm.create_vm() as vm:
        fails(lambda: vm.irq.line(4, True))


@scenario("KVM_GET_LAPIC on vcpu0 fails with EINVAL")
def no_lapic(kvm: Kvm) -> None:
    """A local APIC that is not in the kernel."""
    with kvm.create_vm() as vm:
        fails(vm.create_vcpu().lapic.get)


@scenario("KVM_CREATE_IRQCHIP on vm fails with EEXIST")
def irqchip_twice(kvm: Kvm) -> None:
    """Two interrupt controllers."""
    with kvm.create_vm() as vm:
        vm.irq.create_chip()
        fails(vm.irq.create_chip)


@scenario("KVM_SET_GSI_ROUTING on vm fails with EINVAL")
def routing(kvm: Kvm) -> None:
    """Routes with a flag that does not exist."""
    with kvm.create_vm() as vm:
        vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
        routes = [MsiRoute(gsi, Msi(0xFEE0_0000, 0x30 + gsi)) for gsi in range(3)]
        fails(lambda: vm.irq.set_gsi_routing(routes, flags=2))


@scenario("KVM_IRQFD on vm fails with EBUSY")
def irqfd_twice(kvm: Kvm) -> None:
    """One eventfd for two interrupts."""
    with kvm.create_vm() as vm, EventFd() as event:
        vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
        vm.irq.irqfd(event, 5)
        fails(lambda: vm.irq.irqfd(event, 6))


@scenario("KVM_IOEVENTFD on vm fails with EEXIST")
def ioeventfd_twice(kvm: Kvm) -> None:
    """Two eventfds for one port."""
    with kvm.create_vm() as vm, EventFd() as one, EventFd() as two:
        vm.io.ioeventfd(one, 0x500, 4, pio=True)
        fails(lambda: vm.io.ioeventfd(two, 0x500, 4, pio=True))


@scenario("KVM_ENABLE_CAP on vm fails with EINVAL")
def enable_cap(kvm: Kvm) -> None:
    """A capability with more pins than there can be."""
    with kvm.create_vm() as vm:
        fails(lambda: vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 1 << 20))


@scenario("KVM_SET_REGS on vcpu0 fails with EFAULT")
def bad_pointer(kvm: Kvm) -> None:
    """Registers at an address that nobody can read."""
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu()
        vcpu.ioctl_raw(ioctls.KVM_SET_REGS, 0x10_0000)


@scenario("KVM_X86_SET_MSR_FILTER on vm fails with EINVAL")
def msr_filter(kvm: Kvm) -> None:
    """A filter whose flags do not exist, with bitmaps behind pointers."""
    with kvm.create_vm() as vm:
        vm.msrs.set_filter(MsrFilter.denying(reads=[0x174, 0x175]))
        number = vm.ioctl_raw(ioctls.KVM_X86_SET_MSR_FILTER, kvm_msr_filter(flags=1 << 9))[1]
        assert number


@scenario("KVM_SET_MSRS on vcpu0 returns 1")
def msrs_half(kvm: Kvm) -> None:
    """Two MSRs, of which the second is refused: KVM says how many it took."""
    with kvm.create_vm() as vm:
        vcpu = vm.create_vcpu()
        entries = [kvm_msr_entry(index=0x174, data=8), kvm_msr_entry(index=0xDEAD_0000, data=1)]
        assert vcpu.ioctl(ioctls.KVM_SET_MSRS, kvm_msrs.of(entries)) == 1


# Exits.


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_IO")
def pio_out(kvm: Kvm) -> None:
    """mov $0x42, %al; out %al, $0x10"""
    with machine(kvm, b"\xb0\x42\xe6\x10\xf4") as vm:
        assert isinstance(vm.vcpus[0].run(5), IoExit)


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_IO")
def pio_in(kvm: Kvm) -> None:
    """What the host answers to an in comes out of an out: in $0x20, %al; add $1, %al; out %al, $0x21"""
    with machine(kvm, b"\xe4\x20\x04\x01\xe6\x21\xf4") as vm:
        vcpu = vm.vcpus[0]
        first = vcpu.run(5)
        assert isinstance(first, IoExit)
        first.respond(b"\x37")
        second = vcpu.run(5)
        assert isinstance(second, IoExit)
        assert second.data == b"\x38"


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_MMIO")
def mmio_read(kvm: Kvm) -> None:
    """A read of no memory, whose answer is written to no memory: mov 0x9000 to %al and back, both outside."""
    code = b"\xb8\x00\xf0\x8e\xd8\xa0\x00\x10\x04\x02\xa2\x00\x20\xf4"
    with machine(kvm, code, size=8 * PAGE) as vm:
        vcpu = vm.vcpus[0]
        read = vcpu.run(5)
        assert isinstance(read, MmioExit)
        read.respond(b"\x50")
        wrote = vcpu.run(5)
        assert isinstance(wrote, MmioExit)
        assert wrote.data == b"\x52"


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_HLT")
def hlt(kvm: Kvm) -> None:
    """One hlt."""
    with machine(kvm, b"\x90\x90\xf4") as vm:
        vm.vcpus[0].run(5)


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_SHUTDOWN")
def shutdown(kvm: Kvm) -> None:
    """An exception with an IDT of no length."""
    source = (
        "#include <kvmpy/guest.h>\nvoid guest_main(void)\n{\n"
        "\tstruct { u16 limit; u64 base; } __attribute__((packed)) none = { 0, 0 };\n\n"
        '\tasm volatile("lidt %0; ud2" : : "m"(none));\n}\n'
    )
    with kvm.create_vm(GuestProgram.from_c(source), protection="none") as vm:
        vm.launch()
        vm.vcpus[0].expect(ShutdownExit)


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_DEBUG")
def single_step(kvm: Kvm) -> None:
    """The third of three instructions."""
    with machine(kvm, b"\xb0\x01\x04\x02\x04\x03\xf4") as vm:
        vm.vcpus[0].debug.set(KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP)
        for _ in range(3):
            vm.vcpus[0].run(5)


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_X86_WRMSR")
def msr_exit(kvm: Kvm) -> None:
    """mov $0xdead, %ecx (32 bits); wrmsr of an MSR that KVM does not have"""
    code = b"\x66\xb9\xad\xde\x00\x00\x66\xb8\x05\x00\x00\x00\x66\x31\xd2\x0f\x30\xf4"
    vm = kvm.create_vm()
    vm.enable_cap(KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_UNKNOWN)
    with vm:
        vm.add_slot(Gpa(0), 16 * PAGE)
        vm.memory.write(CODE, code)
        vcpu = vm.create_vcpu()
        _real(vcpu)
        vcpu.run(5)


def _real(vcpu: Vcpu) -> None:
    sregs = vcpu.regs.get_sregs()
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.regs.set_sregs(sregs)
    regs = vcpu.regs.get()
    regs.rip, regs.rflags = int(CODE), 2
    vcpu.regs.set(regs)


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_MMIO")
def readonly(kvm: Kvm) -> None:
    """A write to a read-only slot: mov %al, 0x3000"""
    with machine(kvm, b"\xb0\x07\xa2\x00\x30\xf4", flags=KVM_MEM_READONLY) as vm:
        vm.vcpus[0].run(5)


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_IO")
def host_writes(kvm: Kvm) -> None:
    """The guest says what lies at 0x3000, the host changes that between two runs."""
    code = b"\xa0\x00\x30\xe6\x10\xeb\xf9"
    with machine(kvm, code) as vm:
        vcpu = vm.vcpus[0]
        vcpu.run(5)
        vm.memory.write(Gpa(0x3000), b"\x5a")
        assert vcpu.run(5).data == b"\x5a"  # type: ignore[attr-defined]


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_IO")
def view_written(kvm: Kvm) -> None:
    """The same through a view that the host holds, and through the mapping of the slot itself."""
    code = b"\xa0\x00\x30\x02\x06\x08\x30\xe6\x10\xeb\xf5"
    with machine(kvm, code) as vm:
        vcpu = vm.vcpus[0]
        view = vm.memory.view(Gpa(0x3000), 8)
        vcpu.run(5)
        view[0] = 0x11
        vm.slots[0].mapping.view(0x3008, 1)[0] = 0x22
        assert vcpu.run(5).data == b"\x33"  # type: ignore[attr-defined]


@scenario("KVM_GET_REGS on vcpu0 returns 0")
def registers(kvm: Kvm) -> None:
    """Registers after code that changed them (--at names the ioctl)."""
    with machine(kvm, b"\xb8\x34\x12\x01\xc0\xf4") as vm:
        vm.vcpus[0].run(5)
        assert vm.vcpus[0].regs.get().rax == 0x2468


@scenario("KVM_RUN on vcpu0 fails with EINTR")
def deadline(kvm: Kvm) -> None:
    """A guest that goes on for ever."""
    with machine(kvm, b"\xeb\xfe") as vm, contextlib.suppress(VcpuTimeoutError):
        vm.vcpus[0].run(0.05)


@scenario("KVM_RUN on vcpu0 fails with EINTR")
def kicked(kvm: Kvm) -> None:
    """A guest that goes on until another thread kicks it."""
    with machine(kvm, b"\xeb\xfe") as vm:
        vcpu = vm.vcpus[0]

        def run() -> None:
            with contextlib.suppress(VcpuKickedError):
                vcpu.run(20)

        thread = threading.Thread(target=run)
        thread.start()
        while not vcpu.running:
            pass
        vcpu.kick()
        thread.join(20)


# Several vCPUs.


@scenario("KVM_RUN on vcpu1 ends with KVM_EXIT_IO")
def two_vcpus(kvm: Kvm) -> None:
    """One vCPU writes, then another, in a thread of its own, says what it reads."""
    code = b"\xc6\x06\x00\x30\x7b\xe6\x10\xf4".ljust(16, b"\x90") + b"\xa0\x00\x30\xe6\x11\xf4"
    with machine(kvm, code, vcpus=2) as vm:
        regs = vm.vcpus[1].regs.get()
        regs.rip = int(CODE) + 16
        vm.vcpus[1].regs.set(regs)
        vm.vcpus[0].run(5)
        said: list[bytes] = []
        thread = threading.Thread(target=lambda: said.append(vm.vcpus[1].run(5).data))  # type: ignore[attr-defined]
        thread.start()
        thread.join(20)
        assert said == [b"\x7b"]


PARTNERS = """
#include <kvmpy/guest.h>
u32 turn GUEST_SHARED;
void guest_main(void)
{
	u32 me = guest_cpu_index();

	for (u32 round = 0; round < 3; round++) {
		while (read_once(turn) != round * 2 + me)
			cpu_relax();
		GUEST_SYNC(round, me);
		write_once(turn, round * 2 + me + 1);
	}
	GUEST_DONE();
}
""".replace("read_once(turn)", "*(volatile u32 *)&turn").replace(
    "write_once(turn, round * 2 + me + 1)", "*(volatile u32 *)&turn = round * 2 + me + 1"
)


@scenario("ends with KVM_EXIT_IO")
def partners(kvm: Kvm) -> None:
    """Two vCPUs in two threads that wait for each other in guest memory."""
    with kvm.create_vm(GuestProgram.from_c(PARTNERS), vcpus=2, protection="none") as vm:
        vm.launch()
        vm.run_all(20)


COUNTER = """
#include <kvmpy/guest.h>
u64 counter GUEST_SHARED;
void guest_main(void)
{
	while (counter < 3)
		GUEST_SYNC(counter++);
	GUEST_DONE();
}
"""


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_IO")
def counter(kvm: Kvm) -> None:
    """A guest program in long mode under the emulated encryption bit, up to DONE."""
    with kvm.create_vm(GuestProgram.from_c(COUNTER), protection="cbit") as vm:
        vm.launch()
        assert [call.args[0] for call in vm.vcpus[0].syncs()] == [0, 1, 2]


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_IO")
def reply(kvm: Kvm) -> None:
    """A guest that asks, and gives the answer back."""
    source = (
        "#include <kvmpy/guest.h>\n"
        "void guest_main(void)\n{\n\tu64 got = GUEST_ASK(0x100, 1);\n\tGUEST_SYNC(got + 1);\n}\n"
    )
    with kvm.create_vm(GuestProgram.from_c(source), protection="none") as vm:
        vm.launch()
        vm.vcpus[0].sync().reply(41)
        assert vm.vcpus[0].sync().args == (42,)


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_MMIO", "KVM_RUN on vcpu0 fails with EFAULT")
def no_access(kvm: Kvm) -> None:
    """A slot whose memory nobody may touch: mov 0x3000, %al"""
    with mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0) as nothing, kvm.create_vm() as vm:
        vm.add_slot(Gpa(0), 3 * PAGE)
        vm.memory.write(CODE, b"\xa0\x00\x30\xe6\x10\xf4")
        vm.set_user_memory_region(1, 3 * PAGE, PAGE, address_of(memoryview(nothing)))
        vcpu = vm.create_vcpu()
        _real(vcpu)
        with contextlib.suppress(KvmError):
            vcpu.run(5)


# guest_memfd and the dirty log.


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_IO")
def gmem(kvm: Kvm) -> None:
    """Code in a guest_memfd that the host has mapped."""
    with kvm.create_vm() as vm:
        vm.add_slot(Gpa(0), 16 * PAGE, backing=MappedGuestMemfd())
        vm.memory.write(CODE, b"\xb0\x77\xe6\x10\xf4")
        vcpu = vm.create_vcpu()
        _real(vcpu)
        vcpu.run(5)


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_IO")
def gmem_hole(kvm: Kvm) -> None:
    """A page of a guest_memfd that was given back reads as zero."""
    with kvm.create_vm() as vm:
        slot = vm.add_slot(Gpa(0), 16 * PAGE, backing=MappedGuestMemfd())
        vm.memory.write(CODE, b"\xa0\x00\x30\xe6\x10\xeb\xf9")
        vm.memory.write(Gpa(0x3000), b"\x66")
        vcpu = vm.create_vcpu()
        _real(vcpu)
        assert vcpu.run(5).data == b"\x66"  # type: ignore[attr-defined]
        assert slot.gmem is not None
        slot.gmem.punch_hole(0x3000, PAGE)
        assert vcpu.run(5).data == b"\0"  # type: ignore[attr-defined]


@scenario("KVM_CREATE_GUEST_MEMFD on vm fails with EINVAL")
def gmem_size(kvm: Kvm) -> None:
    """A guest_memfd of half a page."""
    with kvm.create_vm() as vm:
        fails(lambda: vm.create_guest_memfd(2048))


@scenario("KVM_SET_USER_MEMORY_REGION2 on vm fails with EINVAL")
def gmem_offset(kvm: Kvm) -> None:
    """A slot that begins behind the end of its guest_memfd."""
    with kvm.create_vm() as vm:
        memfd = vm.create_guest_memfd(4 * PAGE)
        slot = vm.add_slot(Gpa(0), 4 * PAGE)
        arg = kvm_userspace_memory_region2(
            slot=1, flags=4, guest_phys_addr=0x10_0000, memory_size=4 * PAGE, userspace_addr=slot.hva,
            guest_memfd=memfd.fd, guest_memfd_offset=8 * PAGE,
        )  # fmt: skip
        assert vm.ioctl_raw(ioctls.KVM_SET_USER_MEMORY_REGION2, arg)[1]


@scenario("KVM_GET_DIRTY_LOG on vm returns 0")
def dirty_log(kvm: Kvm) -> None:
    """Two pages that the guest wrote: mov %al, 0x3000; mov %al, 0x5000; hlt"""
    with machine(kvm, b"\xa2\x00\x30\xa2\x00\x50\xf4", flags=KVM_MEM_LOG_DIRTY_PAGES) as vm:
        vm.dirty.get_log(0)
        vm.vcpus[0].run(5)
        assert {3, 5} <= set(vm.dirty.get_log(0))


@scenario("KVM_RESET_DIRTY_RINGS on vm returns 2", "KVM_RESET_DIRTY_RINGS on vm returns 3")
def dirty_ring(kvm: Kvm) -> None:
    """The same through a dirty ring, whose entries are given back."""
    vm = kvm.create_vm()
    vm.dirty.enable_ring(1024)
    with vm:
        vm.add_slot(Gpa(0), 16 * PAGE, flags=KVM_MEM_LOG_DIRTY_PAGES)
        vm.memory.write(CODE, b"\xa2\x00\x30\xa2\x00\x50\xf4")
        vcpu = vm.create_vcpu()
        _real(vcpu)
        vcpu.run(5)
        harvested = vm.dirty.ring(vcpu).harvest()
        assert len(harvested) >= 2
        assert vm.dirty.reset_rings() == len(harvested)


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_IO")
def sync_regs(kvm: Kvm) -> None:
    """Registers that come and go with KVM_RUN itself: out %al, $0x10 twice."""
    with machine(kvm, b"\xe6\x10\xe6\x10\xf4") as vm:
        vcpu = vm.vcpus[0]
        vcpu.regs.set_sync(1)
        vcpu.run(5)
        vcpu.regs.sync.regs.rax = 0x99
        vcpu.regs.mark_sync_dirty(1)
        assert vcpu.run(5).data == b"\x99"  # type: ignore[attr-defined]


# Private memory: where the host has KVM_X86_SW_PROTECTED_VM.


@scenario("KVM_RUN on vcpu0 fails with EFAULT", needs="sw-protected")
def private_fault(kvm: Kvm) -> None:
    """A page is private and has nothing private behind it: mov 0x3000, %al"""
    with kvm.create_vm(int(VmType.KVM_X86_SW_PROTECTED_VM)) as vm:
        vm.add_slot(Gpa(0), 16 * PAGE)
        vm.memory.write(CODE, b"\xa0\x00\x30\xe6\x10\xf4")
        vm.set_memory_attributes(0x3000, PAGE, KVM_MEMORY_ATTRIBUTE_PRIVATE)
        vcpu = vm.create_vcpu()
        _real(vcpu)
        assert isinstance(vcpu.run(5), MemoryFaultExit)


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_IO", needs="sw-protected")
def private_read(kvm: Kvm) -> None:
    """What the guest writes to a private page is not what the host sees, and comes back to the guest."""
    code = b"\xc6\x06\x00\x30\x5d\xa0\x00\x30\xe6\x10\xf4"
    with kvm.create_vm(int(VmType.KVM_X86_SW_PROTECTED_VM)) as vm:
        vm.add_slot(Gpa(0), 16 * PAGE, gmem=vm.create_guest_memfd(16 * PAGE))
        vm.memory.write(CODE, code)
        vm.set_memory_attributes(0x3000, PAGE, KVM_MEMORY_ATTRIBUTE_PRIVATE)
        vcpu = vm.create_vcpu()
        _real(vcpu)
        assert vcpu.run(5).data == b"\x5d"  # type: ignore[attr-defined]


@scenario("KVM_RUN on vcpu0 ends with KVM_EXIT_IO", needs="sw-protected")
def private_program(kvm: Kvm) -> None:
    """A guest program that lies in private memory, from its launch to DONE."""
    with kvm.create_vm(GuestProgram.from_c(COUNTER), protection="sw-protected") as vm:
        vm.launch()
        assert [call.args[0] for call in vm.vcpus[0].syncs()] == [0, 1, 2]
