# SPDX-License-Identifier: Apache-2.0
"""The decoder: ioctls with their arguments, pointers, results and exits as words, whatever the bytes are."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvmpy.cli import names
from kvmpy.debug.decode.decoder import Decoder, Place, as_json, relative, request_words
from kvmpy.debug.record.events import Chunk, Ioctl
from kvmpy.debug.record.format import CUT, What, When
from kvmpy.uapi import ioctls
from kvmpy.uapi.argument_text import bytes_text, exit_words
from kvmpy.uapi.buffers import BUFFERS
from kvmpy.uapi.constants import ExitReason, InternalError, MemFlag
from kvmpy.uapi.field_words import FIELDS, number_words, parse_words
from kvmpy.uapi.ioctls import BY_NR, IOCTLS
from kvmpy.uapi.struct_text import EXIT_MEMBERS
from kvmpy.uapi.structs import (
    NESTED,
    STRUCTS,
    kvm_cpuid2,
    kvm_device_attr,
    kvm_enable_cap,
    kvm_msr_filter,
    kvm_msrs,
    kvm_nested_state,
    kvm_regs,
    kvm_run,
    kvm_sev_cmd,
    kvm_sev_launch_start,
    kvm_sev_snp_launch_finish,
    kvm_sev_snp_launch_start,
)

AT = 0x7000
BELOW = 0x8000


def event(op: ioctls.Ioctl, *chunks: Chunk, arg: int = AT, result: int = 0, errno: int = 0) -> Ioctl:
    return Ioctl(1, 4, op.nr, arg, result, errno, 2, 2, chunks)


def into(data: bytes, address: int = AT, action: int = What.ARGUMENT) -> Chunk:
    return Chunk(address, data, When.IN, action)


def out(data: bytes, address: int = AT, label: int = What.ARGUMENT) -> Chunk:
    return Chunk(address, data, When.OUT, label)


def text(happened: Ioctl, place: Place | None = None, decoder: Decoder | None = None) -> str:
    return str((decoder or Decoder()).ioctl(happened, place or Place()))


def test_in_and_out_are_apart() -> None:
    regs = kvm_regs(rax=1).to_bytes()
    assert text(event(ioctls.KVM_SET_REGS, into(regs))) == "KVM_SET_REGS {rax=0x1} = 0"
    assert text(event(ioctls.KVM_GET_REGS, out(regs))) == "KVM_GET_REGS -> {rax=0x1} = 0"
    before = kvm_cpuid2.with_entries(0, nent=9).to_bytes()
    after = kvm_cpuid2.of([{"function": 7, "eax": 2}]).to_bytes()
    assert text(event(ioctls.KVM_GET_CPUID2, into(before), out(after))) == (
        "KVM_GET_CPUID2 {nent=0x9} -> {nent=0x1, entries=[{function=0x7, eax=0x2}]} = 0"
    )


def test_what_stays_the_same_is_told_once() -> None:
    msrs = kvm_msrs.of([{"index": 0x10, "data": 5}]).to_bytes()
    assert text(event(ioctls.KVM_GET_MSRS, into(msrs), out(msrs), result=1)) == (
        "KVM_GET_MSRS {nmsrs=0x1, entries=[{index=0x10, data=0x5}]} = 1"
    )


def test_errors_have_their_meaning() -> None:
    happened = event(ioctls.KVM_CREATE_VM, arg=4, result=-1, errno=22)
    assert text(happened) == (
        "KVM_CREATE_VM KVM_X86_SNP_VM = -1 EINVAL (Invalid argument): this VM type is not offered: "
        "see KVM_CAP_VM_TYPES in `kvmpy doctor`"
    )


def test_extra_names_come_from_outside() -> None:
    decoder = Decoder({("kvm_msr_entry", "index"): lambda number: {0x10: "TSC"}.get(number, hex(number))})
    msrs = kvm_msrs.of([{"index": 0x10}, {"index": 0x99}]).to_bytes()
    assert "entries=[{index=0x10 (TSC)}, {index=0x99}]" in text(
        event(ioctls.KVM_SET_MSRS, into(msrs)), None, decoder
    )


def test_capabilities_name_their_arguments() -> None:
    value = kvm_enable_cap(cap=188, args=[3])
    assert text(event(ioctls.KVM_ENABLE_CAP, into(value.to_bytes()))) == (
        "KVM_ENABLE_CAP {cap=KVM_CAP_X86_USER_SPACE_MSR, args=[0x3, 0x0, 0x0, 0x0], "
        "args[0]: KVM_MSR_EXIT_REASON_INVAL|KVM_MSR_EXIT_REASON_UNKNOWN} = 0"
    )


def test_attributes_are_named_by_the_kind_of_descriptor() -> None:
    value = kvm_device_attr(group=1, attr=1, addr=BELOW).to_bytes()
    happened = event(ioctls.KVM_GET_DEVICE_ATTR, into(value), out(b"\7" * 8, BELOW, What.NESTED))
    assert text(happened, Place("system")) == (
        "KVM_GET_DEVICE_ATTR {group=KVM_X86_GRP_SEV, attr=KVM_X86_SNP_POLICY_BITS, addr=0x8000} "
        "*addr=-> <0707070707070707> = 0"
    )
    assert "{group=0x1, attr=0x1, addr=0x8000}" in text(happened, Place("device"))


def test_commands_of_sev_lead_to_their_struct_and_its_pointers() -> None:
    command = kvm_sev_cmd(id=2, data=BELOW, sev_fd=9).to_bytes()
    after = kvm_sev_cmd(id=2, data=BELOW, sev_fd=9, error=0x16).to_bytes()
    start = kvm_sev_launch_start(policy=1, session_uaddr=0x9000, session_len=4).to_bytes()
    started = kvm_sev_launch_start(handle=5, policy=1, session_uaddr=0x9000, session_len=4).to_bytes()
    happened = event(
        ioctls.KVM_MEMORY_ENCRYPT_OP,
        into(command),
        into(start, BELOW, What.NESTED),
        into(b"\1\2\3\4", 0x9000, What.NESTED),
        out(after),
        out(started, BELOW, What.NESTED),
        result=-1,
        errno=5,
    )
    decoder = Decoder(firmware=lambda code: f"code {code}")
    assert text(happened, Place("vm", 2), decoder) == (
        "KVM_MEMORY_ENCRYPT_OP {id=KVM_SEV_LAUNCH_START, data=0x8000, sev_fd=0x9} "
        "-> {id=KVM_SEV_LAUNCH_START, data=0x8000, error=SEV_RET_INVALID_PARAM, sev_fd=0x9} "
        "*data={policy=0x1, session_uaddr=0x9000, session_len=0x4} "
        "-> {handle=0x5, policy=0x1, session_uaddr=0x9000, session_len=0x4} "
        "data.*session_uaddr=<01020304> [firmware: code 22] "
        "= -1 EIO (Input/output error): the firmware refused: its status is in the field error"
    )


def test_pointers_that_the_kernel_ignores_are_not_followed() -> None:
    """An ID block counts only where id_block_en says so; here nothing was recorded for it."""
    finish = kvm_sev_snp_launch_finish(id_block_uaddr=0x9000).to_bytes()
    command = kvm_sev_cmd(id=102, data=BELOW).to_bytes()
    happened = event(ioctls.KVM_MEMORY_ENCRYPT_OP, into(command), into(finish, BELOW, What.NESTED))
    assert "*data={id_block_uaddr=0x9000} = 0" in text(happened)


def test_the_same_number_means_tdx_on_a_tdx_vm() -> None:
    command = kvm_sev_cmd(id=1).to_bytes()
    happened = event(ioctls.KVM_MEMORY_ENCRYPT_OP, into(command))
    assert "{id=KVM_SEV_ES_INIT}" in text(happened, Place("vm", 3))
    assert "{id=KVM_TDX_INIT_VM}" in text(happened, Place("vm", 5))


def test_filters_of_msrs() -> None:
    value = kvm_msr_filter()
    value.flags = 1
    value.ranges[2] = {"flags": 3, "nmsrs": 9, "base": 0x10, "bitmap": BELOW}
    bitmap = into(b"\xff\1" + bytes(6), BELOW, What.NESTED)
    assert text(event(ioctls.KVM_X86_SET_MSR_FILTER, into(value.to_bytes()), bitmap)) == (
        "KVM_X86_SET_MSR_FILTER {flags=KVM_MSR_FILTER_DEFAULT_DENY, ranges="
        "[2: {flags=KVM_MSR_FILTER_READ|KVM_MSR_FILTER_WRITE, nmsrs=0x9, base=0x10, bitmap=0x8000}]} "
        "*ranges[2].bitmap=<ff01000000000000> = 0"
    )


def test_unknown_ioctls_are_raw() -> None:
    happened = Ioctl(1, 4, 0xC010AEFE, AT, -1, 25, 2, 2, (into(b"\1" * 16),))
    decoded = Decoder().ioctl(happened)
    assert not decoded.known
    assert str(decoded).startswith(
        "0xc010aefe _IOWR(0xae, 0xfe, 16) <01010101010101010101010101010101> = -1 ENOTTY"
    )


def test_a_larger_struct_of_a_known_ioctl_keeps_its_tail() -> None:
    """A newer kernel's struct: the part that is known by field, the rest raw."""
    nr = 0x4000_0000 | (kvm_regs.SIZE + 8) << 16 | 0xAE82
    assert relative(nr) is ioctls.KVM_SET_REGS
    happened = Ioctl(1, 4, nr, AT, 0, 0, 2, 2, (into(kvm_regs(rbx=2).to_bytes() + b"\7" * 8),))
    assert text(happened) == (
        f"{nr:#x} _IOW(0xae, 0x82, 152) (like KVM_SET_REGS, another size) {{rbx=0x2}} +<0707070707070707> = 0"
    )


def test_bytes_beyond_a_known_struct_are_raw() -> None:
    data = kvm_regs(rbx=2).to_bytes() + b"\5"
    assert "{rbx=0x2} +<05>" in text(event(ioctls.KVM_SET_REGS, into(data)))


def test_arguments_that_could_not_be_read() -> None:
    nothing = Chunk(8, b"", When.IN, What.ARGUMENT, CUT)
    assert "KVM_SET_REGS arg=0x8 (not readable) = -1 EFAULT" in text(
        event(ioctls.KVM_SET_REGS, nothing, arg=8, result=-1, errno=14)
    )
    part = Chunk(AT, kvm_regs(rax=3).to_bytes()[:16], When.IN, What.ARGUMENT, CUT)
    shown = text(event(ioctls.KVM_SET_REGS, part))
    assert "{rax=0x3} (only 16 of 144 bytes) [the argument could be read in part only]" in shown


@pytest.mark.parametrize("reason", list(ExitReason))
def test_every_exit_shows_its_payload(reason: ExitReason) -> None:
    run = kvm_run(exit_reason=int(reason))
    member = EXIT_MEMBERS.get(reason)
    run.padding[:] = b"\1" * 256
    head = run.to_bytes()[:288]
    shown = text(event(ioctls.KVM_RUN, out(head, 0x5000, What.RUN), arg=0))
    assert shown.startswith(f"KVM_RUN = 0 {reason.name}")
    assert ("{" in shown or " 0x101" in shown) == (member is not None)


def test_unknown_exits_are_raw() -> None:
    run = kvm_run(exit_reason=999)
    run.padding[:] = b"\2" * 256
    shown = text(event(ioctls.KVM_RUN, out(run.to_bytes()[:288], 0x5000, What.RUN), arg=0))
    assert "KVM_RUN = 0 0x3e7 <0202" in shown
    assert "256 bytes" in shown


def test_a_memory_fault_is_shown_beside_its_error() -> None:
    run = kvm_run(exit_reason=39)
    run.memory_fault = {"flags": 8, "gpa": 0x1000, "size": 4096}
    happened = event(ioctls.KVM_RUN, out(run.to_bytes()[:288], 0x5000, What.RUN), arg=0, result=-1, errno=14)
    assert text(happened).endswith(
        "KVM_EXIT_MEMORY_FAULT {flags=KVM_MEMORY_EXIT_FLAG_PRIVATE, gpa=0x1000, size=0x1000}"
    )
    # What an older exit left there is no reason for this failure.
    run = kvm_run(exit_reason=5)
    happened = event(ioctls.KVM_RUN, out(run.to_bytes()[:288], 0x5000, What.RUN), arg=0, result=-1, errno=14)
    assert "KVM_EXIT_HLT" not in text(happened)


def test_json_has_every_byte() -> None:
    command = kvm_sev_cmd(id=100, data=BELOW).to_bytes()
    start = kvm_sev_snp_launch_start(policy=0x30000).to_bytes()
    happened = event(
        ioctls.KVM_MEMORY_ENCRYPT_OP, into(command), into(start, BELOW, What.NESTED), result=-1, errno=22
    )
    row = as_json(happened, Decoder().ioctl(happened))
    assert (row["ioctl"], row["errno"], row["result"]) == ("KVM_MEMORY_ENCRYPT_OP", "EINVAL", -1)
    assert [chunk["struct"] for chunk in row["chunks"]] == ["kvm_sev_cmd", "kvm_sev_snp_launch_start"]
    assert row["chunks"][1]["fields"]["policy"] == 0x30000
    assert row["chunks"][1]["bytes"] == start.hex()


def test_full_shortens_nothing() -> None:
    data = bytes(range(1, 101))
    assert bytes_text(data).endswith("... 100 bytes>")
    assert bytes_text(data, full=True) == f"<{data.hex()}>"
    table = kvm_cpuid2.of([{"function": number} for number in range(1, 9)]).to_bytes()
    assert "... 8 entries" in text(event(ioctls.KVM_SET_CPUID2, into(table)))
    assert "{function=0x8}]" in text(event(ioctls.KVM_SET_CPUID2, into(table)), None, Decoder(full=True))


@given(st.sampled_from(sorted(IOCTLS)), st.binary(max_size=600), st.binary(max_size=600), st.integers(0, 200))
@example("KVM_GET_REG_LIST", b"", (1 << 63).to_bytes(8, "little"), 0)
@example("KVM_GET_REG_LIST", b"\xff" * 64, b"\xff" * 64, 0)
def test_any_bytes_can_be_decoded(name: str, before: bytes, after: bytes, errno: int) -> None:
    """Whatever a program passes: words, and no exception."""
    op = IOCTLS[name]
    chunks = (into(before), out(after), into(before, BELOW, What.NESTED), out(before, 0x5000, What.RUN))
    happened = event(op, *chunks, result=-1 if errno else 0, errno=errno)
    decoded = Decoder(full=True).ioctl(happened)
    assert str(decoded).startswith(name)
    assert as_json(happened, decoded)["chunks"][0]["bytes"] == before.hex()


@given(st.integers(0, (1 << 32) - 1), st.binary(max_size=64))
def test_any_request_can_be_decoded(nr: int, data: bytes) -> None:
    decoded = Decoder().ioctl(Ioctl(0, 3, nr, AT, 0, 0, 2, 2, (into(data),)))
    assert decoded.known == (nr in BY_NR)
    if not decoded.known:
        assert decoded.name.startswith(f"{nr:#x} {request_words(nr)}")


def test_every_named_field_exists_and_its_names_are_unique() -> None:
    for (struct, name), kind in FIELDS.items():
        fields = (STRUCTS.get(struct) or NESTED[struct]).FIELDS
        assert name in fields, (struct, name)
        for member in kind.__members__.values():
            assert parse_words(
                kind, number_words(kind, int(member) & 0xFFFF_FFFF_FFFF_FFFF)
            ) & 0xFFFF_FFFF == (int(member) & 0xFFFF_FFFF)


def test_flags_without_a_name_stay_numbers() -> None:
    assert number_words(MemFlag, 0x81) == "KVM_MEM_LOG_DIRTY_PAGES|0x80"
    assert number_words(MemFlag, 0x80) == "0x80"
    assert parse_words(MemFlag, "KVM_MEM_LOG_DIRTY_PAGES|0x80") == 0x81


def test_nested_state_counts_its_own_bytes() -> None:
    value = kvm_nested_state.with_bytes(kvm_nested_state.SIZE + 4)
    value.size = value.nbytes
    assert BUFFERS[ioctls.KVM_SET_NESTED_STATE.nr].size.bytes(value.nbytes) == value.nbytes
    assert "size=0x84" in text(event(ioctls.KVM_SET_NESTED_STATE, into(value.to_bytes())))


def test_what_a_decoder_says_where_no_values_are() -> None:
    """A CPUID leaf without registers, a SEV command's errno, names of other architectures."""
    from kvmpy.cli.decoding import DecodeError, lines_of

    lines = lines_of("cpuid", ["0x8000001F"], full=False, as_words=False)
    assert "give EAX EBX ECX EDX" in lines[0]
    assert "1=SEV" in lines[1]
    assert not any("eax=0x0" in line for line in lines)
    (line,) = lines_of("errno", ["EINVAL", "KVM_SEV_SNP_LAUNCH_START"], full=False, as_words=False)
    assert "lacks bit 17" in line
    for name, arch in (("KVM_ARM_VCPU_INIT", "arm64"), ("KVM_S390_STORE_STATUS", "s390")):
        with pytest.raises(DecodeError, match=f"looks like {arch}'s") as caught:
            lines_of(name, [], full=False, as_words=False)
        assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("what", ["exit", "kvm_run", "kvm_run__internal", "post-mortem"])
def test_simultaneous_exceptions_are_told_wherever_a_run_is(what: str) -> None:
    run = kvm_run(exit_reason=ExitReason.KVM_EXIT_INTERNAL_ERROR)
    run.internal.suberror, run.internal.ndata = InternalError.KVM_INTERNAL_ERROR_SIMUL_EX, 3
    run.internal.data[:3] = [0x8000_0B0D, 0x8000_0B0E, 2]
    texts = {
        "exit": names.decoder().exit_text(run),
        "kvm_run": names.decoder().struct_text(run),
        "kvm_run__internal": names.decoder().struct_text(run.internal),
        "post-mortem": exit_words(run),
    }
    words = "exception PF_VECTOR while exception GP_VECTOR was delivered, error code 0x2"
    assert f"suberror=KVM_INTERNAL_ERROR_SIMUL_EX ({words}), ndata=0x3" in texts[what]
    run.internal.ndata = 1
    assert words not in names.decoder().struct_text(run)


def test_names_of_zero_and_of_many_registers() -> None:
    """Policy 0 lacks what must be set; the APIC is told by register; a frequency is in kHz."""
    words = names.decoder()
    start = kvm_sev_snp_launch_start()
    assert "policy=0 (" in words.struct_text(start)
    assert "lacks bit 17" in words.struct_text(start)
    state = bytearray(1024)
    state[0xF0:0xF4] = (0x1FF).to_bytes(4, "little")
    assert words.content_text("kvm_lapic_state", None, bytes(state), Place()) == "{regs={SPIV=0x1ff}}"
    happened = Ioctl(0, 3, ioctls.KVM_GET_TSC_KHZ.nr, 0, 2_400_000, 0, 2, 2)
    assert str(Decoder().ioctl(happened)) == "KVM_GET_TSC_KHZ = 2400000 kHz"


def test_exits_of_other_interfaces() -> None:
    """Hyper-V's hypercalls and debugger writes are told by name, Xen's with all their arguments."""
    words = names.decoder()
    run = kvm_run(exit_reason=ExitReason.KVM_EXIT_HYPERV)
    run.hyperv.type = 2
    run.hyperv.u.hcall.input = 0x1_005C
    assert "HVCALL_POST_MESSAGE fast" in words.exit_text(run)
    run.hyperv.u.hcall.input = 0x7777
    assert "input=0x7777" in words.exit_text(run)
    run.hyperv.type = 3
    run.hyperv.u.syndbg.msr = 0x4000_00F1
    assert "HV_X64_MSR_SYNDBG_CONTROL" in words.exit_text(run)
    run = kvm_run(exit_reason=ExitReason.KVM_EXIT_XEN)
    run.xen.type = 1
    run.xen.u.hcall.input = 29
    run.xen.u.hcall.params = [1, 2, 3, 4, 5, 0x66]
    text = words.exit_text(run)
    assert "0x1d" in text
    assert "0x66" in text
