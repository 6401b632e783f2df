# SPDX-License-Identifier: Apache-2.0
"""The GHCB protocol, event by event: what KVM answers, and how it refuses malformed requests.

AMD's GHCB specification, section 4.1; sev_handle_vmgexit() in Linux.
"""

from __future__ import annotations

import pytest

from kvmpy import (
    KVM_HC_MAP_GPA_RANGE,
    KVM_HC_VAPIC_POLL_IRQ,
    KVM_SYSTEM_EVENT_SEV_TERM,
    HypercallExit,
    IoExit,
    MakeVm,
    MmioExit,
    SystemEventExit,
)
from kvmpy.x86.ghcb import HvFeature, InputError, MsrInfo, VmgExit
from selftests.sev.talk import Talker, talker

DONE = (0, 0)
CPUID, IOIO, MSR_ACCESS, RDTSC, INVD, WBINVD = 0x72, 0x7B, 0x7C, 0x6E, 0x76, 0x89
VMMCALL, READ_DR7, WRITE_DR7, HLT = 0x81, 0x27, 0x37, 0x78
UNHANDLED_GPA = 0xC000_0000
GP = 13

with_ghcb = pytest.mark.protections("all", has_ghcb=True)
with_snp = pytest.mark.protections("snp")
without_snp = pytest.mark.protections("sev-es")


def malformed(error: InputError) -> tuple[int, int]:
    """Return the outcome of a malformed request."""
    return 2, int(error)


def ioio(port: int, size: int, *, read: bool = False, string: bool = False) -> int:
    """Return sw_exit_info_1 of a port access."""
    return port << 16 | size << 4 | 1 << 9 | read | string << 2


# What is wrong with the page.


@with_ghcb
@pytest.mark.parametrize("hide", [1, 2, 4])
def test_a_word_that_is_not_declared(make_vm: MakeVm, hide: int) -> None:
    """Exit code and both its words must be declared valid: missing input otherwise."""
    assert talker(make_vm).send(VmgExit.HV_FEATURES, hide=hide).outcome == malformed(InputError.MISSING_INPUT)


@with_ghcb
@pytest.mark.parametrize("usage", [1, 0x8000_0000])
def test_another_usage(make_vm: MakeVm, usage: int) -> None:
    """A GHCB usage other than 0 is invalid."""
    assert talker(make_vm).send(VmgExit.HV_FEATURES, usage=usage).outcome == malformed(
        InputError.INVALID_USAGE
    )


@with_snp
def test_a_page_that_is_not_registered(make_vm: MakeVm) -> None:
    """SNP: a GHCB at another GPA than the registered one is refused as not registered."""
    talk = talker(make_vm, vcpus=2)
    other = talk.vm.vcpus[1].ghcb_gpa
    assert other is not None
    page = talk.vm.memory.shared_view(other, 4096)
    talk.begin(VmgExit.HV_FEATURES, msr=int(other))
    talk.agent.value()
    # KVM answers in the page that it was given.
    assert (page[0x398], page[0x3A0]) == malformed(InputError.NOT_REGISTERED)


@with_ghcb
@pytest.mark.parametrize(
    ("code", "fields"),
    [
        (CPUID, {"rax": 1}),
        (CPUID, {"rcx": 1}),
        (CPUID, {"rax": 0xD, "rcx": 0}),
        (MSR_ACCESS, {}),
        (VMMCALL, {"rax": 1}),
        (VMMCALL, {"cpl": 0}),
        (WRITE_DR7, {}),
        (0x6F, {}),
        (0x8A, {"rax": 0, "rcx": 0}),
        (0x8B, {"rax": 0}),
        (VmgExit.MMIO_READ, {}),
        (VmgExit.MMIO_WRITE, {}),
    ],
    ids=lambda value: hex(value) if isinstance(value, int) else ",".join(value) or "nothing",
)
def test_a_field_that_is_missing(make_vm: MakeVm, code: int, fields: dict[str, int]) -> None:
    """Each event has fields that it needs: missing input without them."""
    assert talker(make_vm).send(code, **fields).outcome == malformed(InputError.MISSING_INPUT)


@with_ghcb
def test_a_port_write_without_data(make_vm: MakeVm) -> None:
    """OUT needs RAX, a string access its scratch area: missing input without them."""
    talk = talker(make_vm)
    for info in (ioio(0x80, 1), ioio(0x80, 1, string=True), ioio(0x80, 1, read=True, string=True)):
        assert talk.send(IOIO, info, 1).outcome == malformed(InputError.MISSING_INPUT)


@with_ghcb
def test_an_msr_write_without_data(make_vm: MakeVm) -> None:
    """WRMSR needs RCX, RAX and RDX: missing input without one of them."""
    talk = talker(make_vm)
    for fields in ({"rcx": 1}, {"rcx": 1, "rax": 1}, {"rcx": 1, "rdx": 1}):
        assert talk.send(MSR_ACCESS, 1, **fields).outcome == malformed(InputError.MISSING_INPUT)


@with_ghcb
@pytest.mark.parametrize("code", [0, 0x7A, 0x400, 0x8000_0000, 0x8000_0014, 0x8000_FFF0, 1 << 40])
def test_events_that_there_are_not(make_vm: MakeVm, code: int) -> None:
    """An exit code that no guest may send is an invalid event."""
    assert talker(make_vm).send(code).outcome == malformed(InputError.INVALID_EVENT)


@without_snp
@pytest.mark.parametrize(
    "code",
    [VmgExit.PSC, VmgExit.GUEST_REQUEST, VmgExit.EXT_GUEST_REQUEST, VmgExit.AP_CREATION],
    ids=lambda code: code.name,
)
def test_events_of_snp_alone(make_vm: MakeVm, code: VmgExit) -> None:
    """What only SNP guests may ask for is an invalid event under SEV-ES."""
    assert talker(make_vm).send(code).outcome == malformed(InputError.INVALID_EVENT)


# The scratch area.


@with_ghcb
@pytest.mark.parametrize(("offset", "size"), [(-0x800, 8), (-8, 8), (0x7F0, 1), (0x7EC, 8)])
def test_scratch_outside_the_buffer(make_vm: MakeVm, offset: int, size: int) -> None:
    """A scratch area in the GHCB but not in its shared buffer is invalid."""
    talk = talker(make_vm)
    answer = talk.send(VmgExit.MMIO_WRITE, UNHANDLED_GPA, size, sw_scratch=talk.buffer_gpa + offset)
    assert answer.outcome == malformed(InputError.INVALID_SCRATCH_AREA)


@with_ghcb
def test_scratch_elsewhere(make_vm: MakeVm) -> None:
    """GHCB version 2 allows no scratch area outside the GHCB, and none at 0."""
    talk = talker(make_vm)
    for where in (0, talk.ghcb_gpa + 0x1000):
        answer = talk.send(VmgExit.MMIO_WRITE, UNHANDLED_GPA, 8, sw_scratch=where)
        assert answer.outcome == malformed(InputError.INVALID_SCRATCH_AREA)


# Events.


@with_ghcb
def test_cpuid(make_vm: MakeVm) -> None:
    """CPUID returns what KVM_SET_CPUID2 was given."""
    talk = talker(make_vm)
    table = {(entry.function, entry.index): entry for entry in talk.vcpu.cpuid.get().entries_list()}
    for leaf in (0, 0x8000_0000, 0x8000_0008):
        entry = table[leaf, 0]
        answer = talk.send(CPUID, rax=leaf, rcx=0)
        assert answer.outcome == DONE
        assert (answer.rax, answer.rbx, answer.rcx, answer.rdx) == (
            entry.eax,
            entry.ebx,
            entry.ecx,
            entry.edx,
        )


@with_ghcb
def test_msrs(make_vm: MakeVm) -> None:
    """MSRs are written and read; one that there is not raises #GP."""
    talk = talker(make_vm)
    kernel_gs_like = 0x4B56_4D00  # MSR_KVM_WALL_CLOCK_NEW: any value reads back 0
    assert talk.send(MSR_ACCESS, 0, rcx=0x10).outcome == DONE
    refused = talk.send(MSR_ACCESS, 0, rcx=0xDEAD_0000)
    assert refused.status & 0xFFFF_FFFF == 1
    assert (refused.info & 0xFF, refused.info >> 31 & 1) == (GP, 1)
    refused = talk.send(MSR_ACCESS, 1, rcx=0xDEAD_0000, rax=0, rdx=0)
    assert (refused.status & 0xFFFF_FFFF, refused.info & 0xFF) == (1, GP)
    assert talk.send(MSR_ACCESS, 0, rcx=kernel_gs_like).status & 0xFFFF_FFFF in (0, 1)


@with_ghcb
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ports(make_vm: MakeVm, size: int) -> None:
    """OUT ends in KVM_EXIT_IO with its bytes, IN takes the answer."""
    talk = talker(make_vm)
    value = 0x8877_6655_4433_2211
    exit_ = talk.send_out(IOIO, ioio(0x123, size), rax=value)
    assert isinstance(exit_, IoExit)
    assert (exit_.port, exit_.size, exit_.count) == (0x123, size, 1)
    assert exit_.value == value & (1 << 8 * size) - 1
    talk.agent.value()
    exit_ = talk.send_out(IOIO, ioio(0x124, size, read=True))
    assert isinstance(exit_, IoExit)
    exit_.respond(bytes(range(1, size + 1)))
    talk.agent.value()
    assert talk.reply().outcome == DONE
    assert talk.reply().rax & (1 << 8 * size) - 1 == int.from_bytes(range(1, size + 1), "little")


@with_ghcb
def test_a_port_access_of_no_size(make_vm: MakeVm) -> None:
    """An access without an operand size does nothing."""
    assert talker(make_vm).send(IOIO, ioio(0x80, 0), rax=1).outcome == DONE


@with_ghcb
def test_port_strings(make_vm: MakeVm) -> None:
    """String accesses go through the shared buffer, all elements in one exit."""
    talk = talker(make_vm)
    text = b"sixteen bytes ok"
    exit_ = talk.send_out(IOIO, ioio(0x123, 2, string=True), 8, buffer=text, sw_scratch=talk.buffer_gpa)
    assert isinstance(exit_, IoExit)
    assert (exit_.size, exit_.count, bytes(exit_.data)) == (2, 8, text)
    talk.agent.value()
    exit_ = talk.send_out(IOIO, ioio(0x123, 4, read=True, string=True), 4, sw_scratch=talk.buffer_gpa)
    assert isinstance(exit_, IoExit)
    exit_.respond(text[::-1])
    talk.agent.value()
    assert talk.reply().buffer[:16] == text[::-1]


@with_ghcb
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_mmio(make_vm: MakeVm, size: int) -> None:
    """MMIO events end in KVM_EXIT_MMIO, and reads take the answer."""
    talk = talker(make_vm)
    data = bytes(range(16, 24))
    exit_ = talk.send_out(VmgExit.MMIO_WRITE, UNHANDLED_GPA, size, buffer=data, sw_scratch=talk.buffer_gpa)
    assert isinstance(exit_, MmioExit)
    assert (exit_.phys_addr, exit_.is_write, bytes(exit_.data)) == (UNHANDLED_GPA, True, data[:size])
    talk.agent.value()
    exit_ = talk.send_out(VmgExit.MMIO_READ, UNHANDLED_GPA, size, sw_scratch=talk.buffer_gpa)
    assert isinstance(exit_, MmioExit)
    assert not exit_.is_write
    exit_.respond(data[:size])
    talk.agent.value()
    assert talk.reply().buffer[:size] == data[:size]


@with_ghcb
def test_mmio_of_no_size(make_vm: MakeVm) -> None:
    """An MMIO access of no bytes does nothing."""
    talk = talker(make_vm)
    for code in (VmgExit.MMIO_READ, VmgExit.MMIO_WRITE):
        assert talk.send(code, UNHANDLED_GPA, 0, sw_scratch=talk.buffer_gpa).outcome == DONE


@with_ghcb
@pytest.mark.parametrize("size", [9, 16, 0x7F0])
def test_mmio_that_is_too_wide(make_vm: MakeVm, size: int) -> None:
    """GHCB version 2 knows MMIO of up to eight bytes: invalid input beyond that."""
    talk = talker(make_vm)
    answer = talk.send(VmgExit.MMIO_WRITE, UNHANDLED_GPA, size, sw_scratch=talk.buffer_gpa)
    assert answer.outcome == malformed(InputError.INVALID_INPUT)


@with_ghcb
@pytest.mark.parametrize("code", [INVD, WBINVD, VmgExit.NMI_COMPLETE], ids=hex)
def test_events_without_an_answer(make_vm: MakeVm, code: int) -> None:
    """INVD, WBINVD and NMI_COMPLETE are done and say nothing."""
    assert talker(make_vm).send(code).outcome == DONE


@with_ghcb
@pytest.mark.parametrize(
    ("number", "cpl", "result"),
    [(KVM_HC_VAPIC_POLL_IRQ, 0, 0), (0x7FFF, 0, -1000), (KVM_HC_VAPIC_POLL_IRQ, 3, -1)],
    ids=["done", "unknown", "of user mode"],
)
def test_vmmcall(make_vm: MakeVm, number: int, cpl: int, result: int) -> None:
    """VMMCALL is the hypercall in RAX, and RAX has its result: 0, -KVM_ENOSYS, or -KVM_EPERM above CPL 0.

    GHCB specification, 4.1 (VMMCALL); Documentation/virt/kvm/x86/hypercalls.rst.
    """
    answer = talker(make_vm).send(VMMCALL, rax=number, cpl=cpl)
    assert (*answer.outcome, answer.rax) == (*DONE, result & (1 << 64) - 1)


@with_ghcb
def test_a_vmmcall_for_user_space(make_vm: MakeVm) -> None:
    """A hypercall that user space takes gets its arguments from the GHCB, and its result back into RAX.

    GHCB specification, 4.1 (VMMCALL): RBX, RCX, RDX and RSI are the hypervisor's convention.
    """
    talk = talker(make_vm)
    seen: list[tuple[int, ...]] = []

    def answer(_vcpu: object, call: HypercallExit) -> bool:
        seen.append((call.nr, *call.args[:3]))
        call.respond(0x77)
        return True

    talk.vm.on_hypercall = answer
    talk.begin(VMMCALL, rax=KVM_HC_MAP_GPA_RANGE, rbx=0x30_0000, rcx=3, rdx=ENCRYPTED, rsi=0, cpl=0)
    talk.agent.value()
    assert seen == [(KVM_HC_MAP_GPA_RANGE, 0x30_0000, 3, ENCRYPTED)]
    assert (*talk.reply().outcome, talk.reply().rax) == (*DONE, 0x77)


@with_ghcb
def test_hlt(make_vm: MakeVm) -> None:
    """HLT is no event, for the processor exits without the guest's help: invalid, and the guest goes on.

    AMD APM volume 2, 15.35.3 (automatic exits); GHCB specification, 4.1 has none of that number.
    """
    talk = talker(make_vm)
    assert talk.send(HLT).outcome == malformed(InputError.INVALID_EVENT)
    assert talk.send(VmgExit.HV_FEATURES).outcome[0] == 0


@with_ghcb
def test_the_jump_table(make_vm: MakeVm) -> None:
    """The AP jump table's address is kept for all vCPUs; a third request is invalid."""
    talk = talker(make_vm)
    assert talk.send(VmgExit.AP_JUMP_TABLE, 1).outcome == DONE
    assert talk.send(VmgExit.AP_JUMP_TABLE, 0, 0x5000).outcome == DONE
    assert talk.send(VmgExit.AP_JUMP_TABLE, 1).outcome == (0, 0x5000)
    assert talk.send(VmgExit.AP_JUMP_TABLE, 2).outcome == malformed(InputError.INVALID_INPUT)


@with_ghcb
def test_features(make_vm: MakeVm) -> None:
    """HV_FEATURES answers through the page and the MSR alike, with SNP and its AP creation."""
    talk = talker(make_vm)
    answer = talk.send(VmgExit.HV_FEATURES)
    assert answer.status & 0xFFFF_FFFF == 0
    assert answer.info & (HvFeature.SNP | HvFeature.SNP_AP_CREATION) == 3
    response = talk.send_msr(MsrInfo.HV_FT_REQ)
    assert (response & 0xFFF, response >> 12) == (MsrInfo.HV_FT_RESP, answer.info)


@with_ghcb
def test_an_event_that_the_guest_reports(make_vm: MakeVm) -> None:
    """UNSUPPORTED_EVENT, by which a guest says that it cannot go on, ends KVM_RUN with EINVAL."""
    talk = talker(make_vm)
    talk.begin(VmgExit.UNSUPPORTED_EVENT, 0x72)
    with pytest.raises(Exception, match="EINVAL"):
        talk.vcpu.sync()


# The MSR protocol.


@with_ghcb
def test_negotiation(make_vm: MakeVm) -> None:
    """SEV_INFO tells protocol 1 to 2 and the C-bit."""
    talk = talker(make_vm)
    answer = talk.send_msr(MsrInfo.SEV_INFO_REQ)
    encryption = talk.vm.encryption
    assert encryption is not None
    assert answer & 0xFFF == MsrInfo.SEV_INFO_RESP
    assert (answer >> 32 & 0xFFFF, answer >> 48) == (1, 2)
    assert answer >> 24 & 0xFF == encryption.bit


@with_ghcb
def test_cpuid_by_msr(make_vm: MakeVm) -> None:
    """CPUID through the MSR gives one register at a time, the same as the page does."""
    talk = talker(make_vm)
    page = talk.send(CPUID, rax=0x8000_0000, rcx=0)
    for register, expected in enumerate((page.rax, page.rbx, page.rcx, page.rdx)):
        answer = talk.send_msr(0x8000_0000 << 32 | register << 30 | MsrInfo.CPUID_REQ)
        assert answer & 0xFFF == MsrInfo.CPUID_RESP
        assert answer >> 30 & 3 == register
        assert answer >> 32 == expected


@with_snp
def test_registration(make_vm: MakeVm) -> None:
    """SNP: a GPA is registered and confirmed; there is no preferred one."""
    talk = talker(make_vm)
    assert talk.send_msr(MsrInfo.PREF_GPA_REQ) == ((1 << 52) - 1) << 12 | MsrInfo.PREF_GPA_RESP
    assert talk.send_msr(talk.ghcb_gpa | MsrInfo.REG_GPA_REQ) == talk.ghcb_gpa | MsrInfo.REG_GPA_RESP


@without_snp
@pytest.mark.parametrize("request_", [MsrInfo.PREF_GPA_REQ, MsrInfo.REG_GPA_REQ, MsrInfo.PSC_REQ])
def test_msr_requests_of_snp_alone(make_vm: MakeVm, request_: MsrInfo) -> None:
    """What only SNP guests may ask for ends an SEV-ES guest: KVM_SYSTEM_EVENT_SEV_TERM."""
    talk = talker(make_vm)
    talk.agent.begin_call("ghcb_msr_call", request_)
    exit_ = talk.vcpu.expect(SystemEventExit)
    assert (exit_.type, exit_.data) == (KVM_SYSTEM_EVENT_SEV_TERM, (int(request_),))


@with_ghcb
@pytest.mark.parametrize("request_", [0x003, 0x0FF, 0xFFF])
def test_msr_requests_that_there_are_not(make_vm: MakeVm, request_: int) -> None:
    """An unknown request comes back as it was."""
    assert talker(make_vm).send_msr(request_) == request_


@with_ghcb
@pytest.mark.parametrize(("reason_set", "reason"), [(0, 0), (0, 1), (0, 2), (1, 4), (5, 0xFF), (15, 7)])
def test_termination(make_vm: MakeVm, reason_set: int, reason: int) -> None:
    """A termination request reaches user space as KVM_SYSTEM_EVENT_SEV_TERM, with its reason."""
    talk = talker(make_vm)
    talk.agent.begin_call("ghcb_terminate", reason_set, reason)
    exit_ = talk.vcpu.expect(SystemEventExit)
    assert exit_.type == KVM_SYSTEM_EVENT_SEV_TERM
    assert exit_.data == (0x100 | reason_set << 12 | reason << 16,)


@with_ghcb
def test_termination_by_page(make_vm: MakeVm) -> None:
    """TERM_REQUEST does the same through the page; user space gets the page's GPA."""
    talk = talker(make_vm)
    exit_ = talk.send_out(VmgExit.TERM_REQUEST, 1, 2)
    assert isinstance(exit_, SystemEventExit)
    assert (exit_.type, exit_.data) == (KVM_SYSTEM_EVENT_SEV_TERM, (talk.ghcb_gpa,))


# Guest requests and AP creation: what is malformed.


@with_snp
@pytest.mark.parametrize("code", [VmgExit.GUEST_REQUEST, VmgExit.EXT_GUEST_REQUEST], ids=lambda c: c.name)
@pytest.mark.parametrize(
    ("request_", "response"), [(0x10_0008, 0x10_1000), (0x10_0000, 0x10_1008), (0x10_0000, 0x10_0000)]
)
def test_pages_of_a_guest_request(make_vm: MakeVm, code: VmgExit, request_: int, response: int) -> None:
    """Request and response are two different pages: invalid input otherwise."""
    answer = talker(make_vm).send(code, request_, response, rax=0x10_2000, rbx=1)
    assert answer.outcome == malformed(InputError.INVALID_INPUT)


@with_snp
@pytest.mark.parametrize(
    ("info_1", "vmsa", "features"),
    [
        (7 << 32 | 1, 0x5000, 1),
        (0 << 32 | 1, 0x5008, 1),
        (0 << 32 | 1, 0x20_0000, 1),
        (0 << 32 | 1, 0x5000, 0x8001),
        (0 << 32 | 3, 0x5000, 1),
    ],
    ids=["no such APIC id", "unaligned", "begins 2 MiB", "other features", "no such request"],
)
def test_an_ap_that_cannot_be(make_vm: MakeVm, info_1: int, vmsa: int, features: int) -> None:
    """AP creation of what does not exist, from a bad VMSA or with other features is invalid input."""
    answer = talker(make_vm).send(VmgExit.AP_CREATION, info_1, vmsa, rax=features)
    assert answer.outcome == malformed(InputError.INVALID_INPUT)


@with_snp
def test_ap_creation(make_vm: MakeVm) -> None:
    """AP creation at INIT, at once, and its destruction are done without a word; only creation needs RAX.

    GHCB specification, 4.1.9 (SNP AP creation).
    """
    talk = talker(make_vm, vcpus=2)
    for request in (0, 1):
        assert talk.send(VmgExit.AP_CREATION, 1 << 32 | request, 0x5000, rax=1).outcome == DONE
        answer = talk.send(VmgExit.AP_CREATION, 1 << 32 | request, 0x5000)
        assert answer.outcome == malformed(InputError.MISSING_INPUT)
    assert talk.send(VmgExit.AP_CREATION, 1 << 32 | 2).outcome == DONE


# Page state changes: what reaches user space.


def entry(gfn: int, operation: int, *, huge: bool = False, done: int = 0) -> int:
    """Return an entry of a page state change."""
    return done | gfn << 12 | operation << 52 | huge << 56


def psc(*entries: int, current: int = 0, last: int | None = None) -> bytes:
    """Return the shared buffer of a page state change."""
    end = len(entries) - 1 if last is None else last
    head = current.to_bytes(2, "little") + end.to_bytes(2, "little") + bytes(4)
    return head + b"".join(number.to_bytes(8, "little") for number in entries)


def ask(talk: Talker, buffer: bytes) -> list[tuple[int, int, int]]:
    """Send a page state change; return the hypercalls it becomes: (gpa, pages, attributes), each granted."""
    seen: list[tuple[int, int, int]] = []

    def grant(_vcpu: object, call: HypercallExit) -> bool:
        seen.append((call.args[0], call.args[1], call.args[2]))
        call.respond(0)
        return True

    talk.vm.on_hypercall = grant
    talk.begin(VmgExit.PSC, sw_scratch=talk.buffer_gpa, buffer=buffer)
    talk.agent.value()
    return seen


ENCRYPTED = 1 << 4
HUGE = 1


@with_snp
def test_psc_of_one_page(make_vm: MakeVm) -> None:
    """A page state change ends in KVM_HC_MAP_GPA_RANGE with its address, size and direction."""
    talk = talker(make_vm)
    assert ask(talk, psc(entry(0x300, 1))) == [(0x300000, 1, ENCRYPTED)]
    assert talk.reply().outcome == DONE
    assert ask(talk, psc(entry(0x300, 2))) == [(0x300000, 1, 0)]
    assert talk.reply().outcome == DONE


@with_snp
def test_psc_of_pages_in_a_row(make_vm: MakeVm) -> None:
    """Entries that follow one another with the same operation are one hypercall; others are not."""
    talk = talker(make_vm)
    entries = [entry(0x300, 1), entry(0x301, 1), entry(0x303, 1), entry(0x304, 2)]
    assert ask(talk, psc(*entries)) == [(0x300000, 2, ENCRYPTED), (0x303000, 1, ENCRYPTED), (0x304000, 1, 0)]
    assert int.from_bytes(talk.reply().buffer[:2], "little") == 4


@with_snp
def test_psc_of_huge_pages(make_vm: MakeVm) -> None:
    """A 2 MiB entry asks for 512 pages; one that was begun is finished in 4 KiB pages."""
    talk = talker(make_vm)
    calls = ask(talk, psc(entry(0x400, 1, huge=True), entry(0x600, 1, huge=True)))
    assert calls == [(0x400000, 1024, ENCRYPTED | HUGE)]
    calls = ask(talk, psc(entry(0x400, 2, huge=True, done=500)))
    assert [(gpa, pages) for gpa, pages, _ in calls] == [(0x400000 + 500 * 4096, 12)]


@with_snp
@pytest.mark.parametrize(
    "bad",
    [entry(0x301, 1, huge=True), entry(0x300, 1, done=2), entry(0x400, 1, huge=True, done=513)],
    ids=["unaligned", "too far", "too far, huge"],
)
def test_psc_of_a_bad_entry(make_vm: MakeVm, bad: int) -> None:
    """An entry that is unaligned or done beyond its end ends the change with "invalid entry"."""
    talk = talker(make_vm)
    assert ask(talk, psc(entry(0x200, 1), bad)) == [(0x200000, 1, ENCRYPTED)]
    assert talk.reply().outcome == (0, 1 << 32 | 2)


@with_snp
def test_psc_of_too_many_entries(make_vm: MakeVm) -> None:
    """A header that names more entries than the buffer holds is an invalid header."""
    talk = talker(make_vm)
    assert ask(talk, psc(entry(0x300, 1), last=253)) == []
    assert talk.reply().outcome == (0, 1 << 32 | 1)


@with_snp
def test_psc_of_other_operations(make_vm: MakeVm) -> None:
    """PSMASH and UNSMASH, which are hints, are passed over without asking user space."""
    talk = talker(make_vm)
    assert ask(talk, psc(entry(0x300, 3), entry(0x301, 4), entry(0x302, 1))) == [(0x302000, 1, ENCRYPTED)]
    assert talk.reply().outcome == DONE


@with_snp
def test_psc_that_user_space_refuses(make_vm: MakeVm) -> None:
    """A refusal of user space (EINVAL, a positive number here) reaches the guest as a generic error."""
    talk = talker(make_vm)

    def refuse(_vcpu: object, call: HypercallExit) -> bool:
        call.respond(22)
        return True

    talk.vm.on_hypercall = refuse
    talk.begin(VmgExit.PSC, sw_scratch=talk.buffer_gpa, buffer=psc(entry(0x300, 1)))
    talk.agent.value()
    assert talk.reply().outcome == (0, 0x100 << 32)


@with_snp
@pytest.mark.parametrize("operation", [1, 2])
def test_psc_by_msr(make_vm: MakeVm, operation: int) -> None:
    """One page changes its state through the MSR, too."""
    talk = talker(make_vm)
    seen: list[tuple[int, ...]] = []

    def grant(_vcpu: object, call: HypercallExit) -> bool:
        seen.append(call.args[:3])
        call.respond(0)
        return True

    talk.vm.on_hypercall = grant
    answer = talk.send_msr(operation << 52 | 0x300 << 12 | MsrInfo.PSC_REQ)
    assert answer == MsrInfo.PSC_RESP
    assert seen == [(0x300000, 1, ENCRYPTED if operation == 1 else 0)]


@with_snp
def test_psc_by_msr_of_another_operation(make_vm: MakeVm) -> None:
    """Other operations are refused through the MSR: bit 63 of the response."""
    assert talker(make_vm).send_msr(3 << 52 | 0x300 << 12 | MsrInfo.PSC_REQ) == 1 << 63 | MsrInfo.PSC_RESP
