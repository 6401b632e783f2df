# SPDX-License-Identifier: Apache-2.0
"""Proofs of the bugs of SEV, SEV-ES and SEV-SNP."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from kvmpy import (
    AGENT,
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    PAGE_SIZE,
    Agent,
    Gpa,
    IoExit,
    Kvm,
    MakeVm,
    SevPolicy,
    SnpPolicy,
    SystemEventExit,
    Vm,
    VmType,
    kvm_sev_dbg,
    kvm_sev_init,
    kvm_sev_send_update_data,
    kvm_sev_snp_launch_update,
)
from kvmpy.coco.sev_launch import SevInitialised, SevLaunching
from kvmpy.coco.snp_launch import SnpInitialised
from kvmpy.testing.machine import KernelLog
from kvmpy.uapi import ffi

MEMORY, PAGES = Gpa(0x10_0000), 16
STAR = 0xC000_0081
CPUID_PAGE = 6


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as each:
        yield each


def launching(kvm: Kvm, stack: ExitStack, *, es: bool = False, vcpus: int = 0) -> tuple[Vm, SevLaunching]:
    """Return a VM with encrypted memory whose launch has begun."""
    kind = VmType.KVM_X86_SEV_ES_VM if es else VmType.KVM_X86_SEV_VM
    vm = stack.enter_context(kvm.create_vm(int(kind)))
    state = SevInitialised.init2(vm, es=es)
    vm.add_slot(MEMORY, PAGES * PAGE_SIZE)
    if vcpus:
        vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24)
        for _ in range(vcpus):
            vm.create_vcpu().cpuid.set(kvm.supported_cpuid)
    begun = state.start(SevPolicy(es=es))
    vm.sev.reg_region(vm.memory.hva(MEMORY, private=False), PAGES * PAGE_SIZE)
    return vm, begun


@pytest.mark.bug(150)
@pytest.mark.protections("sev-es")
def test_msrs(make_vm: MakeVm) -> None:
    agent = Agent(make_vm(AGENT).vcpus[0])
    agent.start()
    with pytest.raises(RuntimeError, match="refused"):
        agent.vcpu.msrs.get(STAR)


@pytest.mark.bug(151)
@pytest.mark.requires("protection:sev")
def test_two_pages(kvm: Kvm, stack: ExitStack) -> None:
    vm, begun = launching(kvm, stack)
    state = begun.update_data(MEMORY, 4 * PAGE_SIZE).measure().finish()
    source = bytearray(b"\x5a" * (2 * PAGE_SIZE))
    place = ffi.from_buffer(source)
    address = int(ffi.cast("uintptr_t", place))
    aligned = address + -address % PAGE_SIZE
    hva = vm.memory.hva(MEMORY, private=False)
    arg = kvm_sev_dbg(src_uaddr=aligned, dst_uaddr=hva + PAGE_SIZE - 16, len=64)
    assert vm.sev.command_raw("DBG_ENCRYPT", arg).errno == 0
    assert state.dbg_decrypt(MEMORY + PAGE_SIZE - 16, 64) == b"\x5a" * 64


@pytest.mark.bug(152)
@pytest.mark.requires("protection:sev-es")
def test_twice(kvm: Kvm, stack: ExitStack) -> None:
    vm, begun = launching(kvm, stack, es=True, vcpus=1)
    begun.update_data(MEMORY, PAGE_SIZE)
    assert vm.sev.command_raw("LAUNCH_UPDATE_VMSA").errno == 0
    assert vm.sev.command_raw("LAUNCH_UPDATE_VMSA").errno == errno.EINVAL


@pytest.mark.bug(153)
@pytest.mark.requires("protection:snp")
def test_private_mapping(kvm: Kvm, stack: ExitStack) -> None:
    vm = stack.enter_context(kvm.create_vm(int(VmType.KVM_X86_SNP_VM)))
    state = SnpInitialised.init2(vm)
    vm.add_slot(MEMORY, PAGES * PAGE_SIZE, gmem=vm.create_guest_memfd(PAGES * PAGE_SIZE))
    state.start(SnpPolicy())
    vm.set_memory_attributes(MEMORY, PAGE_SIZE, KVM_MEMORY_ATTRIBUTE_PRIVATE)
    # One function, with a register that no processor has so.
    table = bytearray(PAGE_SIZE)
    table[0] = 1
    table[16:20] = (7).to_bytes(4, "little")
    table[40:56] = b"\xff" * 16
    fd = os.memfd_create("cpuid", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    os.write(fd, table)
    with mmap.mmap(fd, PAGE_SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as area:
        place = ffi.from_buffer(area)
        address = int(ffi.cast("uintptr_t", place))
        arg = kvm_sev_snp_launch_update(
            gfn_start=int(MEMORY) // PAGE_SIZE, uaddr=address, len=PAGE_SIZE, type=CPUID_PAGE
        )
        assert vm.sev.command_raw("SNP_LAUNCH_UPDATE", arg).errno == errno.EIO
        assert bytes(area) != bytes(table)
        ffi.release(place)
    assert os.pread(fd, PAGE_SIZE, 0) == bytes(table)


@pytest.mark.bug(154)
@pytest.mark.protections("sev-es")
def test_words(make_vm: MakeVm) -> None:
    vm = make_vm(AGENT)
    text = vm.alloc(PAGE_SIZE)
    agent = Agent(vm.vcpus[0])
    # rep outsw
    agent.begin(b"\xf3\x66\x6f", rsi=int(text), rcx=4, rdx=0x80)
    got = agent.vcpu.expect(IoExit)
    assert (got.size, got.count) == (2, 4)


@pytest.mark.bug(155)
@pytest.mark.requires("protection:sev")
def test_length(kvm: Kvm, stack: ExitStack) -> None:
    vm, begun = launching(kvm, stack)
    begun.update_data(MEMORY, PAGE_SIZE).measure().finish()
    hva = vm.memory.hva(MEMORY, private=False)
    buffer = bytearray(PAGE_SIZE)
    address = int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))
    arg = kvm_sev_send_update_data(
        hdr_uaddr=address, hdr_len=64, guest_uaddr=hva + 64, guest_len=(1 << 32) - 64, trans_uaddr=address,
        trans_len=64,
    )  # fmt: skip
    result = vm.sev.command_raw("SEND_UPDATE_DATA", arg)
    assert (result.errno, result.firmware) == (errno.EINVAL, 0)


@pytest.mark.bug(156)
@pytest.mark.requires("protection:sev")
def test_late(kvm: Kvm, stack: ExitStack) -> None:
    vm = stack.enter_context(kvm.create_vm(int(VmType.KVM_X86_SEV_VM)))
    vm.create_vcpu()
    assert vm.sev.command_raw("INIT2", kvm_sev_init()).errno == errno.EINVAL


@pytest.mark.bug(157)
@pytest.mark.requires("protection:snp")
def test_first_ghcb(kvm: Kvm, stack: ExitStack) -> None:
    vm = stack.enter_context(kvm.create_vm(int(VmType.KVM_X86_SNP_VM)))
    assert vm.sev.command_raw("INIT2", kvm_sev_init(ghcb_version=1)).errno == errno.EINVAL


TALKER = """
#include <kvmpy/guest.h>

GUEST_SHARED u64 outcome;

/* An event with one field beside its words, or none. */
void ask(u64 code, u64 info_1, u64 info_2, u64 rax, u64 with_rax)
{
	struct ghcb_use use;

	ghcb_begin(&use);
	if (with_rax)
		ghcb_put(use.ghcb, GHCB_RAX, rax);
	ghcb_put(use.ghcb, GHCB_SW_EXIT_CODE, code);
	ghcb_put(use.ghcb, GHCB_SW_EXIT_INFO_1, info_1);
	ghcb_put(use.ghcb, GHCB_SW_EXIT_INFO_2, info_2);
	vmgexit();
	outcome = ghcb_get(use.ghcb, GHCB_SW_EXIT_INFO_1) << 32 | ghcb_get(use.ghcb, GHCB_SW_EXIT_INFO_2);
	ghcb_end(&use);
}

/* Ask for the end with interrupts on. */
void end(void)
{
	wrmsr(MSR_SEV_ES_GHCB, 0x100);
	asm volatile("sti; nop; rep; vmmcall");
}

void guest_main(void)
{
	guest_agent();
}
"""
MALFORMED = 2 << 32
CPUID, AP_CREATION = 0x72, 0x8000_0013


def asked(make_vm: MakeVm, *words: int) -> int:
    """Return what the hypervisor answers, in two words."""
    vm = make_vm(TALKER)
    agent = Agent(vm.vcpus[0])
    agent.begin_call("ask", *words)
    agent.value()
    return int(vm.symbol("outcome").u64)


@pytest.mark.bug(158)
@pytest.mark.protections("sev-es")
def test_incomplete(make_vm: MakeVm) -> None:
    assert asked(make_vm, CPUID, 0, 0, 0, 0) == MALFORMED | 4


def ending(make_vm: MakeVm) -> Agent:
    """Return a guest that is about to ask for its end."""
    agent = Agent(make_vm(TALKER).vcpus[0])
    agent.begin_call("end")
    return agent


@pytest.mark.bug(159)
@pytest.mark.protections("sev-es")
def test_end(make_vm: MakeVm) -> None:
    ending(make_vm).vcpu.expect(SystemEventExit)


@pytest.mark.bug(161)
@pytest.mark.protections("sev-es")
def test_interrupt_flag(make_vm: MakeVm) -> None:
    agent = ending(make_vm)
    agent.vcpu.expect(SystemEventExit)
    assert agent.vcpu.run_area.if_flag == 1


@pytest.mark.bug(160)
@pytest.mark.protections("snp")
def test_features(make_vm: MakeVm) -> None:
    assert asked(make_vm, AP_CREATION, 1, 0x5000, 0x8001, 1) == MALFORMED | 5


@pytest.mark.bug(162)
@pytest.mark.protections("snp")
def test_refused_creation(make_vm: MakeVm) -> None:
    vm = make_vm(TALKER)
    agent = Agent(vm.vcpus[0])
    agent.start()
    # Of the vCPU itself, from an address that is no page's.
    agent.begin_call("ask", AP_CREATION, 1, 0x5008, 1, 1)
    agent.vcpu.next(5.0)


@pytest.mark.bug(163)
@pytest.mark.protections("snp")
def test_no_warning_at_a_launch(make_vm: MakeVm) -> None:
    with closing(KernelLog(kernel_only=True)) as log:
        log.skip()
        make_vm.start(AGENT).close()
        assert "large page" not in log.read()
