# SPDX-License-Identifier: Apache-2.0
"""What L2 does itself: hypercalls, VMLOAD and VMSAVE, the time-stamp counter, its own page tables."""

from __future__ import annotations

import pytest

from kvmpy import CR4, L2, PAGE_SIZE, Fault, Gva, Msr, PageTables, SvmExit, Vector

pytestmark = [pytest.mark.protections("none", "cbit"), pytest.mark.requires("cpuid:svm")]

NOP = b"\x90"
VMLOAD, VMSAVE = b"\x0f\x01\xda", b"\x0f\x01\xdb"
RDTSC = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0"  # rdtsc; shl $32, %rdx; or %rdx, %rax
ADJUST = 0x3B


def test_other_vendors_hypercall(l2: L2) -> None:
    """VMCALL in L2 is KVM's to patch: it becomes VMMCALL and exits as such.

    KVM_X86_QUIRK_FIX_HYPERCALL_INSN (Documentation/virt/kvm/api.rst, 7.27).
    """
    l2.reset()
    l2.load(b"\x0f\x01\xc1")
    l2.vm.pages.protect(l2.code, PAGE_SIZE, writable=True)
    got = l2.resume()
    assert (got.code, l2.offset) == (SvmExit.VMMCALL, 0), str(got)
    assert l2.vm.read(l2.code, 3) == b"\x0f\x01\xd9"


def test_hypercall_of_l2(l2: L2) -> None:
    """A VMMCALL of L2 that L1 does not intercept is #UD: it is no hypercall to KVM.

    AMD APM volume 3, VMMCALL.
    """
    l2.reset()
    l2.intercept(SvmExit.VMMCALL, on=False)
    l2.intercept(SvmExit.EXCP_BASE + Vector.UD)
    got = l2.run(NOP)
    assert (got.code, l2.offset) == (SvmExit.EXCP_BASE + Vector.UD, 1), str(got)


def test_vmsave_of_l2(l2: L2) -> None:
    """VMSAVE of L2 that L1 does not intercept writes the state to the page that L2 names.

    AMD APM volume 2, 15.5.2 VMSAVE and VMLOAD Instructions.
    """
    page = l2.vm.alloc(PAGE_SIZE)
    l2.reset()
    l2.vmcb["kernel_gs_base"] = 0x1234_5678_9000
    assert l2.run(VMSAVE, rax=l2.pa(page)).code == SvmExit.VMMCALL
    saved = l2.vm.read(page, PAGE_SIZE)
    at = 0x620
    assert int.from_bytes(saved[at : at + 8], "little") == 0x1234_5678_9000


def test_vmload_of_l2(l2: L2) -> None:
    """VMLOAD of L2 that L1 does not intercept loads FS, the MSRs of SYSCALL and KernelGSBase.

    AMD APM volume 2, 15.5.2.
    """
    page = l2.vm.alloc(PAGE_SIZE)
    l2.reset()
    image = bytearray(l2.vmcb.page)
    image[0x620:0x628] = (0x1234_5678_9000).to_bytes(8, "little")
    image[0x448:0x450] = (0x4321_0000).to_bytes(8, "little")
    l2.vm.write(page, bytes(image))
    assert l2.run(VMLOAD, rax=l2.pa(page)).code == SvmExit.VMMCALL
    assert (l2.vmcb["kernel_gs_base"], l2.vmcb["fs.base"]) == (0x1234_5678_9000, 0x4321_0000)


@pytest.mark.parametrize("code", [VMLOAD, VMSAVE], ids=["VMLOAD", "VMSAVE"])
def test_bad_address_of_l2(l2: L2, code: bytes) -> None:
    """VMLOAD and VMSAVE of L2 check their address as those of L1 do: #GP(0).

    AMD APM volume 3, VMLOAD and VMSAVE.
    """
    l2.reset()
    for bad in (8, 1 << 60):
        move = b"\x48\xb8" + bad.to_bytes(8, "little")
        assert l2.attempt(move + code).code == SvmExit.VMMCALL
        assert l2.fault == Fault(Vector.GP, 0), hex(bad)


@pytest.mark.parametrize("offset", [0, 1 << 40, -(1 << 40) % (1 << 64)], ids=["none", "ahead", "behind"])
def test_counter_offset(l2: L2, offset: int) -> None:
    """L2's time-stamp counter is L1's plus the VMCB's offset.

    AMD APM volume 2, 15.5.1 (TSC_OFFSET).
    """
    l2.reset()
    before = l2.agent.must(RDTSC).rax
    l2.vmcb["tsc_offset"] = offset
    assert l2.run(RDTSC).code == SvmExit.VMMCALL
    after = l2.agent.must(RDTSC).rax
    seen = (l2.register("rax") - offset) & (1 << 64) - 1
    assert before < seen < after


@pytest.mark.requires("cpuid:tsc_adjust")
@pytest.mark.parametrize("intercepted", [False, True], ids=["passes", "intercepted"])
def test_counter_written(l2: L2, intercepted: bool) -> None:
    """A write of the counter by L2 that L1 lets pass sets L1's counter: TSC_ADJUST moves as far.

    Intel SDM volume 3, 18.17.3; AMD APM volume 2, 15.5.1: the VMCB's offset is for reads alone.
    """
    offset, back = 1 << 36, 1 << 32
    l2.reset()
    l2.vmcb["tsc_offset"] = offset
    if intercepted:
        l2.intercept_msr(Msr.MSR_IA32_TSC, write=True)
    start = l2.agent.rdmsr(ADJUST)
    assert isinstance(start, int)
    # rdmsr; shl $32, %rdx; or %rdx, %rax; sub %rsi, %rax; mov %rax, %rdx; shr $32, %rdx; wrmsr
    code = b"\x0f\x32\x48\xc1\xe2\x20\x48\x09\xd0\x48\x29\xf0\x48\x89\xc2\x48\xc1\xea\x20\x0f\x30"
    got = l2.run(code, rcx=Msr.MSR_IA32_TSC, rsi=back + offset)
    now = l2.agent.rdmsr(ADJUST)
    assert isinstance(now, int)
    moved = (start - now) & (1 << 64) - 1
    if intercepted:
        assert (got.code, got.info1, moved) == (SvmExit.MSR, 1, 0)
    else:
        assert got.code == SvmExit.VMMCALL
        # What passed between the reading and the writing is lost, too.
        assert back <= moved < back + (1 << 31)


def test_own_page_tables(l2: L2) -> None:
    """L2 may have page tables of its own, and change to them itself; its CR3 is not L1's.

    AMD APM volume 2, 15.25 Nested Paging.
    """
    vm = l2.vm
    tables = PageTables(
        vm.memory, vm.allocator, encryption=vm.encryption, private_tables=vm.pages.private_tables
    )
    for mapped in vm.pages.mappings():
        tables.map(mapped.gva, mapped.gpa, mapped.size, private=mapped.private, page_size=PAGE_SIZE)
    page = vm.alloc(PAGE_SIZE)
    vm.write(page, b"\x5a" * 8)
    elsewhere = Gva(0x7123_4567_0000)
    tables.map(elsewhere, vm.gva_to_gpa(page), PAGE_SIZE)
    l2.reset()
    l2.intercept(SvmExit.EXCP_BASE + Vector.PF)
    read = b"\x48\x8b\x07"  # mov (%rdi), %rax
    got = l2.run(read, rdi=int(elsewhere))
    assert (got.code, got.info2) == (SvmExit.EXCP_BASE + Vector.PF, elsewhere)
    l2.vmcb["cr3"] = int(tables.cr3)
    assert l2.resume().code == SvmExit.VMMCALL
    assert l2.register("rax") == 0x5A5A_5A5A_5A5A_5A5A
    # And by its own MOV to CR3, back and forth.
    l2.reset()
    own = l2.vmcb["cr3"]
    code = b"\x0f\x22\xde" + read + b"\x0f\x22\xda"  # mov %rsi, %cr3; ...; mov %rdx, %cr3
    assert l2.run(code, rdi=int(elsewhere), rsi=int(tables.cr3), rdx=own).code == SvmExit.VMMCALL
    assert (l2.register("rax"), l2.vmcb["cr3"]) == (0x5A5A_5A5A_5A5A_5A5A, own)
    assert l2.agent.read_cr(3) == own


def test_control_registers_are_apart(l2: L2) -> None:
    """What L2 writes to CR0, CR4, EFER, DR7 and RFLAGS is its own: L1 has its own back after the exit.

    AMD APM volume 2, 15.6 #VMEXIT.
    """
    l2.reset()
    before = [l2.agent.read_cr(number) for number in (0, 3, 4)] + [l2.agent.rdmsr(Msr.MSR_EFER)]
    cr4 = l2.vmcb["cr4"] ^ int(CR4.TSD)
    assert l2.run(b"\x0f\x22\xe0\xfb", rax=cr4).code == SvmExit.VMMCALL
    assert (l2.vmcb["cr4"], l2.vmcb["rflags"] >> 9 & 1) == (cr4, 1)
    after = [l2.agent.read_cr(number) for number in (0, 3, 4)] + [l2.agent.rdmsr(Msr.MSR_EFER)]
    assert after == before


def test_stale_translation(l2: L2) -> None:
    """INVLPG and MOV to CR3 of L2 drop what it has translated: a page that moved is seen by its value.

    AMD APM volume 2, 15.16 TLB Control and 15.25.8 (INVLPG).
    """
    vm = l2.vm
    pages = [vm.alloc(PAGE_SIZE) for _ in range(2)]
    for number, page in enumerate(pages):
        vm.write(page, bytes([0x30 + number]) * 8)
    where = Gva(0x7200_0000_0000)
    vm.map(where, vm.gva_to_gpa(pages[0]), PAGE_SIZE, page_size=PAGE_SIZE)
    l2.reset()
    leaf = vm.pages.walk(where).steps[-1]
    entry_gpa, _ = vm.from_raw(leaf.table)
    # L2 writes its own page table, which it sees at an address of its own.
    window = Gva(0x7300_0000_0000)
    vm.map(window, entry_gpa, PAGE_SIZE, page_size=PAGE_SIZE)
    new = leaf.value & ~0x000F_FFFF_FFFF_F000 | int(vm.to_raw(vm.gva_to_gpa(pages[1])))
    flushes = {"INVLPG": b"\x0f\x01\x3f", "MOV to CR3": b"\x0f\x20\xda\x0f\x22\xda"}
    wrong = []
    for name, flush in flushes.items():
        vm.view(window + 8 * leaf.index, 8).cast("Q")[0] = leaf.value
        l2.reset()
        l2.vmcb["tlb_ctl"] = 1
        # mov (%rdi), %rax; mov %rsi, (%rbx); flush; mov (%rdi), %rcx
        code = b"\x48\x8b\x07\x48\x89\x33" + flush + b"\x48\x8b\x0f"
        got = l2.run(code, rdi=int(where), rsi=new, rbx=int(window) + 8 * leaf.index)
        values = l2.register("rax") & 0xFF, l2.register("rcx") & 0xFF
        if got.code != SvmExit.VMMCALL or values != (0x30, 0x31):
            wrong.append(f"{name}: {got}, read {values[0]:#x} and {values[1]:#x}")
    assert not wrong, "\n".join(wrong)
