# SPDX-License-Identifier: Apache-2.0
"""Words to bytes and back: every struct, the refusals, and `kvmpy decode` beside `kvmpy encode`."""

from __future__ import annotations

from pathlib import Path

import pytest
from click import Command
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.cli.decode import decode
from kvmpy.cli.encode import encode
from kvmpy.debug.decode.encoder import EncodeError, assignments, build, parse_hex
from kvmpy.uapi import ffi
from kvmpy.uapi.ioctls import IOCTLS
from kvmpy.uapi.struct_base import FlexStruct, Struct, flat_fields
from kvmpy.uapi.structs import STRUCTS


def covered(kind: type[Struct], size: int) -> bytes:
    """Return a mask of the bits that fields cover, all of the entries included."""
    mask = bytearray(size)

    def mark(ctype: object, base: int) -> None:
        for field in flat_fields(ctype, base):
            mark_one(field.ctype, field.offset, field.size, field.shift, field.bits)

    def mark_one(ctype: object, offset: int, length: int, shift: int, bits: int) -> None:
        kind_of = ctype.kind  # type: ignore[attr-defined]
        if bits:
            number = ((1 << bits) - 1) << shift
            for index, byte in enumerate(number.to_bytes(length, "little")):
                mask[offset + index] |= byte
        elif kind_of in ("struct", "union"):
            mark(ctype, offset)
        elif kind_of == "array":
            item = ctype.item  # type: ignore[attr-defined]
            step = int(ffi.sizeof(item))
            count = ctype.length if ctype.length is not None else (size - offset) // step  # type: ignore[attr-defined]
            for index in range(count):
                mark_one(item, offset + index * step, step, 0, 0)
        else:
            mask[offset : offset + length] = b"\xff" * length

    mark(kind._pointer.item, 0)
    return bytes(mask)


def and_(data: bytes, mask: bytes) -> bytes:
    return bytes(a & b for a, b in zip(data, mask, strict=True))


@pytest.mark.parametrize("name", sorted(STRUCTS))
@settings(max_examples=40)
@given(data=st.data())
def test_every_struct_survives_the_way_through_words(name: str, data: st.DataObject) -> None:
    """Any content, as assignments, makes the same content: in every bit that a field covers."""
    kind = STRUCTS[name]
    size = kind.SIZE
    if issubclass(kind, FlexStruct):
        size = max(size, kind.OPEN_OFFSET + data.draw(st.integers(0, 3)) * kind.ENTRY_SIZE)
    # Mostly zeros, as real structs are; hypothesis grows them from the seed.
    raw = bytearray(size)
    places = st.tuples(st.integers(0, size - 1), st.binary(min_size=1, max_size=16))
    for start, piece in data.draw(st.lists(places, max_size=12)):
        raw[start : start + len(piece)] = piece[: size - start]
    value = kind.from_bytes(raw)
    if isinstance(value, FlexStruct) and value.COUNT is not None:
        setattr(value._holder(), value.COUNT, value.room)
    again = build(name, assignments(value))
    mask = covered(kind, value.nbytes)
    assert and_(again.to_bytes().ljust(value.nbytes, b"\0"), mask) == and_(value.to_bytes(), mask)
    assert list(assignments(again)) == list(assignments(value))


@pytest.mark.parametrize(
    ("name", "texts", "expected"),
    [
        ("kvm_regs", ["rax=1", "rip=0xfff0"], {"rax": 1, "rip": 0xFFF0}),
        ("kvm_userspace_memory_region", ["flags=KVM_MEM_READONLY|KVM_MEM_LOG_DIRTY_PAGES"], {"flags": 3}),
        ("kvm_ioeventfd", ["fd=-1", "len=4"], {"fd": -1, "len": 4}),
        ("kvm_enable_cap", ["cap=KVM_CAP_X2APIC_API", "args=1,2"], {"cap": 129}),
        ("kvm_sev_cmd", ["sev_fd=-1"], {"sev_fd": 0xFFFF_FFFF}),
    ],
)
def test_values(name: str, texts: list[str], expected: dict[str, int]) -> None:
    value = build(name, texts)
    assert {key: getattr(value, key) for key in expected} == expected


def test_paths_and_entries() -> None:
    sregs = build("kvm_sregs", ["cs.base=0xf0000", "interrupt_bitmap[1]=2"])
    assert (sregs.cs.base, sregs.interrupt_bitmap[1]) == (0xF0000, 2)  # type: ignore[attr-defined]
    msrs = build("kvm_msrs", ["index=1", "data=2", "index=3", "entries[4].data=9"])
    assert [(each.index, each.data) for each in msrs.entries_list()] == [  # type: ignore[attr-defined]
        (1, 2), (3, 0), (0, 0), (0, 0), (0, 9),
    ]  # fmt: skip
    filters = build("kvm_msr_filter", ["ranges[15].nmsrs=8"])
    assert filters.ranges[15].nmsrs == 8  # type: ignore[attr-defined]
    indices = build("kvm_msr_list", ["indices=0x10,0x11"])
    assert indices.entries_list() == [0x10, 0x11]  # type: ignore[attr-defined]
    lapic = build("kvm_lapic_state", ["regs=00 01 02"])
    assert lapic.to_bytes()[:3] == b"\0\1\2"
    route = build("kvm_irq_routing", ["gsi=4", "type=KVM_IRQ_ROUTING_MSI", "u.msi.data=7"])
    assert route.entries_list()[0].u.msi.data == 7  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("kvm_regs", "ripp=1", "struct kvm_regs has no field 'ripp' (did you mean rip"),
        ("kvm_regs", "rax", "'rax': expected FIELD=VALUE"),
        ("kvm_regs", "rax=zz", "kvm_regs.rax: 'zz' is not a number"),
        ("kvm_regs", "rax=0x10000000000000000", "does not fit uint64_t"),
        ("kvm_regs", "rax.x=1", "kvm_regs.rax is not a struct"),
        ("kvm_regs", "ra x=1", "'ra x' is not a field"),
        ("kvm_sregs", "cs=1", "kvm_sregs.cs holds structs: name one of their fields"),
        ("kvm_sregs", "interrupt_bitmap[4]=1", "index 4 of 4 items"),
        ("kvm_sregs", "interrupt_bitmap=1,2,3,4,5", "takes 4 numbers, 5 were given"),
        ("kvm_lapic_state", "regs=" + "00" * 1025, "takes 1024 bytes, 1025 were given"),
        ("kvm_lapic_state", "regs=0g", "'g' is not a hexadecimal digit"),
        ("kvm_userspace_memory_region", "flags=KVM_MEM_X", "not a number, or names of MemFlag"),
        ("kvm_msrs", "entries[99999].data=1", "more than 65536 entries"),
    ],
)
def test_refusals(name: str, text: str, message: str) -> None:
    with pytest.raises(EncodeError) as caught:
        build(name, [text])
    assert message in str(caught.value)


def test_hexadecimal() -> None:
    assert parse_hex("0x01 02:03_ff") == b"\1\2\3\xff"
    assert parse_hex("") == b""
    for text, message in (
        ("0g", "'g' is not a hexadecimal digit (digit 2"),
        ("123", "3 hexadecimal digits: an odd"),
    ):
        with pytest.raises(EncodeError) as caught:
            parse_hex(text)
        assert message in str(caught.value)


# The commands.


def run(command: object, *arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)  # type: ignore[arg-type]


def words(*arguments: str) -> str:
    result = run(decode, *arguments)
    assert result.exit_code == 0, result.output
    return result.output.rstrip("\n")


def coded(*arguments: str) -> str:
    result = run(encode, *arguments)
    assert result.exit_code == 0, result.output
    return result.output.rstrip("\n")


@pytest.mark.parametrize("name", sorted(IOCTLS))
def test_every_ioctl_by_number_and_by_name(name: str) -> None:
    op = IOCTLS[name]
    assert words(f"{op.nr:#x}") == words(name) == words(name.removeprefix("KVM_"))
    assert words(name).startswith(f"{name} = {op.nr:#x} ")
    if op.struct is not None:
        assert words(*coded(name).split()[:1]).startswith(f"{name} = ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("KVM_SET_MSRS", "index=TSC", "data=5"), "index=0x10 (MSR_IA32_TSC), data=0x5"),
        (("KVM_SET_MSRS", "index=0x10", "data=5"), "nmsrs=0x1"),
        (("KVM_CREATE_VM", "KVM_X86_SNP_VM"), "KVM_CREATE_VM KVM_X86_SNP_VM"),
        (("KVM_CHECK_EXTENSION", "234"), "KVM_CHECK_EXTENSION KVM_CAP_GUEST_MEMFD"),
        (("KVM_SET_IDENTITY_MAP_ADDR", "0xfeffc000"), "KVM_SET_IDENTITY_MAP_ADDR 0xfeffc000"),
        (("kvm_run", "exit_reason=KVM_EXIT_HLT"), None),
        (("KVM_SET_SREGS", "efer=0x500"), "efer=0x500 (LME LMA)"),
    ],
)
def test_what_is_encoded_can_be_decoded(arguments: tuple[str, ...], expected: str | None) -> None:
    coded_words = coded(*arguments).split()
    shown = words("kvm_run", *coded_words) if arguments[0] == "kvm_run" else words(*coded_words)
    assert (expected or "exit_reason=KVM_EXIT_HLT") in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("exit", "39"), "KVM_EXIT_MEMORY_FAULT = 39"),
        (("exit", "io"), "KVM_EXIT_IO = 2"),
        (("errno", "EEXIST", "KVM_SET_USER_MEMORY_REGION"), "the range overlaps another memory slot"),
        (("errno", "25"), "ENOTTY"),
        (("pferr", "0x200000007"), "P W U GUEST_PAGE"),
        (("msr", "EFER", "0xd01"), "SCE LME LMA NXE"),
        (("msr", "0xc0010130", "0x10000000123014"), "PSC_REQ: gfn 0x123 to private"),
        (("cpuid", "1", "0", "0", "0x80000001", "3"), "HYPERVISOR FPU VME"),
        (("sev-error", "0x16"), "SEV_RET_INVALID_PARAM = 22 (0x16): a parameter is not valid"),
        (("sev-error", "bad_measurement"), "SEV_RET_BAD_MEASUREMENT = 11"),
        (("policy", "0xb0000"), "0xb0000 as SNP policy: smt debug"),
        (("policy", "snp", "1"), "lacks bit 17, which must be one"),
        (("policy", "sev", "5"), "0x5 as SEV policy: no_debug es"),
        (("ghcb", "0x1100"), "TERM_REQ: Linux: the GHCB's GPA could not be registered"),
        (("KVM_SEV_INIT2",), "KVM_SEV_INIT2 = 22, command for sev, es, snp"),
        (("0xae55",), "0xae55 _IO(0xae, 0x55): no ioctl that kvmpy knows"),
        (("0x4100ae82",), "like KVM_SET_REGS (0x4090ae82"),
        (("0x4094ae82", "07" * 148), "beyond it: <07070707>"),
    ],
)
def test_domains(arguments: tuple[str, ...], expected: str) -> None:
    assert expected in words(*arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("pferr", "P", "W", "U", "GUEST_PAGE"), "0x200000007"),
        (("msr", "EFER", "TSC"), "0xc0000080 0x10"),
        (("cpuid", "avx2"), "0x7 0x0 ebx bit 5"),
        (("exit", "KVM_EXIT_IO"), "2"),
        (("sev-error", "INVALID_PARAM"), "0x16"),
        (("policy", "snp", "smt", "debug"), "0xb0000"),
        (("policy", "snp"), "0x20000"),
        (("policy", "sev", "no_debug", "es", "api_major=1"), "0x10005"),
        (("KVM_RUN",), "0xae80"),
        (("KVM_SEV_LAUNCH_FINISH",), "7"),
    ],
)
def test_domains_the_other_way(arguments: tuple[str, ...], expected: str) -> None:
    assert coded(*arguments) == expected


def test_pages_both_ways(tmp_path: Path) -> None:
    raw = tmp_path / "vmsa"
    raw.write_bytes(bytes.fromhex(coded("vmsa", "rip=0xfff0", "cs.attrib=0x9b", "fpreg_xmm=0102")))
    shown = words("vmsa", f"@{raw}")
    assert "0x178 rip = 0xfff0" in shown
    assert "cs.attrib = 0x9b (A RW CODE S P)" in shown
    assert "fpreg_xmm = <0102" in shown
    shown = words("vmcb", coded("vmcb", "exit_code=0x7c", "exit_info_1=1", "intercept_4=1", "tlb_ctl=3"))
    assert "tlb_ctl = 0x3 (flush ASID)" in shown
    assert "intercepts: VMRUN" in shown
    assert shown.endswith("exit: MSR (0x7c): WRMSR")
    page = coded("ghcb", "sw_exit_code=0x72", "rax=1")
    shown = words("ghcb", page)
    assert "sw_exit_code = 0x72 (CPUID)" in shown
    assert shown.endswith("valid: rax sw_exit_code")


def test_words_of_bytes_are_what_encode_takes() -> None:
    coded_words = coded("KVM_SET_REGS", "rax=7", "rip=0x1000").split()
    assert words("-w", *coded_words) == "KVM_SET_REGS rax=0x7 rip=0x1000"
    assert coded(*words("-w", *coded_words).split()).split() == coded_words


def test_bytes_from_files_and_standard_input(tmp_path: Path) -> None:
    data = bytes(8) + b"\2" + bytes(135)
    (tmp_path / "raw").write_bytes(data)
    (tmp_path / "hex").write_text(data.hex() + "\n")
    for name in ("raw", "hex"):
        assert "{rbx=0x2}" in words("kvm_regs", f"@{tmp_path / name}")
    result = CliRunner().invoke(decode, ["kvm_regs", "-"], input=data.hex())
    assert "{rbx=0x2}" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zz",), "'zz' is not an ioctl (number or name), command, struct, or one of exit"),
        (("KVM_GET_REG",), "did you mean KVM_GET_REGS"),
        (("0x1ffffffff",), "is not an ioctl number: those have 32 bits"),
        (("-5",), "is not an ioctl number"),
        (("KVM_SET_REGS", "xyz"), "'x' is not a hexadecimal digit (digit 1 of 'xyz')"),
        (("KVM_SET_REGS", "012"), "an odd number does not make whole bytes"),
        (("KVM_SET_REGS", "0102"), "KVM_SET_REGS takes 144 bytes, 2 were given"),
        (("KVM_SET_REGS", "00", "00"), "takes one argument"),
        (("KVM_SET_REGS", "@/nonexistent"), "/nonexistent: No such file or directory"),
        (("KVM_RUN", "00"), "KVM_RUN takes no argument"),
        (("KVM_SEV_LAUNCH_FINISH", "00"), "takes no struct"),
        (("pferr",), "expected pferr ERROR_CODE"),
        (("pferr", "foo"), "'foo' is not a number"),
        (("pferr", "-1"), "is not an unsigned 64-bit value"),
        (("msr", "EFERR"), "did you mean"),
        (("msr", "0x100000000"), "their numbers have 32 bits"),
        (("cpuid", "1", "2", "3"), "expected cpuid FUNCTION"),
        (("cpuid", "0x1ffffffff"), "expected cpuid FUNCTION"),
        (("sev-error", "INVALID_PARM"), "did you mean SEV_RET_INVALID_PARAM"),
        (("policy", "tdx", "1"), "expected policy [sev|snp] VALUE"),
        (("policy", "0x1ffffffffffffffff"), "is not a policy"),
        (("exit", "KVM_EXIT_IOO"), "did you mean KVM_EXIT_IO"),
        (("errno", "EINVAL", "KVM_FOO"), "'KVM_FOO' is not an ioctl"),
        (("ghcb", "0x1ffffffffffffffff"), "hexadecimal digits: an odd number"),
    ],
)
def test_what_cannot_be_decoded(arguments: tuple[str, ...], message: str) -> None:
    result = run(decode, "--", *arguments)
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zz",), "'zz' is not an ioctl, command, struct"),
        (("0xae55",), "nothing can be encoded for it"),
        (("KVM_SET_REGS", "rax"), "expected FIELD=VALUE"),
        (("KVM_SET_MSRS", "index=TSCC"), "no MSR is called 'TSCC'"),
        (("KVM_RUN", "1"), "takes no argument"),
        (("KVM_CREATE_VM",), "takes one number"),
        (("KVM_CREATE_VM", "KVM_X86_NO_VM"), "invalid literal"),
        (("pferr",), "expected pferr"),
        (("pferr", "Q"), "unknown page-fault bit 'Q'"),
        (("msr", "NOPE"), "no MSR is called"),
        (("cpuid", "nope"), "no CPUID feature is called"),
        (("exit", "NOPE"), "is not an exit reason"),
        (("sev-error", "NOPE"), "is not a status of the SEV firmware"),
        (("policy", "tdx"), "expected policy sev|snp"),
        (("policy", "snp", "smtt"), "'smtt': an SNP policy has smt"),
        (("policy", "snp", "smt=1"), "an SNP policy has"),
        (("policy", "sev", "api_major=256"), "both numbers have 8 bits"),
        (("vmsa", "ripp=1"), "vmsa has no field 'ripp' (did you mean rip"),
        (("vmsa", "cpl=256"), "does not fit 1 bytes"),
        (("ghcb", "rax"), "expected FIELD=VALUE"),
    ],
)
def test_what_cannot_be_encoded(arguments: tuple[str, ...], message: str) -> None:
    result = run(encode, *arguments)
    assert result.exit_code == 1, result.output
    assert message in result.output


@pytest.mark.parametrize("command", [decode, encode], ids=["decode", "encode"])
@pytest.mark.parametrize(
    ("name", "arch"),
    [("KVM_ARM_VCPU_INIT", "arm64"), ("KVM_S390_STORE_STATUS", "s390"), ("KVM_PPC_GET_PVINFO", "powerpc")],
)
def test_names_of_other_architectures_are_no_typing_errors(command: Command, name: str, arch: str) -> None:
    done = CliRunner().invoke(command, [name])
    assert done.exit_code == 1
    assert f"it looks like {arch}'s, and kvmpy knows x86-64" in done.output
    assert "did you mean" not in done.output
