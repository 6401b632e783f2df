# SPDX-License-Identifier: Apache-2.0
"""What `kvmpy decode` says of ioctls, structs and the numbers and pages of each domain."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from kvmpy.cli.names import decoder, feature_words, sev_policy_words, snp_policy_words
from kvmpy.core.sev_errors import firmware_meaning
from kvmpy.debug.decode.decoder import (
    decode_argument,
    relative,
    relatives,
    request_words,
    struct_of,
)
from kvmpy.debug.decode.encoder import EncodeError, assignments, parse_hex, parse_number
from kvmpy.uapi.argument_text import bytes_text, run_of
from kvmpy.uapi.buffers import struct_class
from kvmpy.uapi.constants import ExitReason, SevRet
from kvmpy.uapi.error_hints import errno_name, error_words
from kvmpy.uapi.field_words import ARGUMENTS, argument_words, number_words, parse_words
from kvmpy.uapi.ioctls import BY_NR, IOCTLS, SEV_COMMANDS, SEV_PLATFORM_COMMANDS, TDX_COMMANDS, Ioctl
from kvmpy.uapi.struct_text import EXIT_MEMBERS
from kvmpy.uapi.structs import STRUCTS
from kvmpy.x86 import exceptions, ghcb, msrs, pferr, vmcb
from kvmpy.x86.bits import bit_words, cr0_words, cr4_words, efer_words, rflags_words
from kvmpy.x86.cpuid import REGISTERS, Cpuid, CpuidEntry
from kvmpy.x86.cpuid_features import BITS
from kvmpy.x86.save_area import Layout
from kvmpy.x86.vmsa import SEGMENTS, VMSA, SegmentAttribute


class DecodeError(ValueError):
    """Something that cannot be decoded; the text says why and what is expected."""


def content(text: str) -> bytes:
    """Return bytes: hexadecimal digits, ``@FILE`` (hexadecimal or binary), or ``-`` for standard input."""
    try:
        if text == "-":
            raw = sys.stdin.buffer.read()
        elif text.startswith("@"):
            raw = Path(text[1:]).read_bytes()
        else:
            return parse_hex(text)
    except OSError as error:
        raise DecodeError(f"{error.filename}: {error.strerror}") from None
    try:
        return parse_hex(raw.decode("ascii"))
    except (UnicodeDecodeError, EncodeError):
        return raw


def _one(args: Sequence[str], what: str) -> str:
    if len(args) != 1:
        raise DecodeError(f"expected {what}")
    return args[0]


# Ioctls and structs.


def find_ioctl(text: str) -> Ioctl | int | None:
    """Return the ioctl of a name or number; a number that has none; None for what is neither."""
    name = text.upper()
    for candidate in (name, f"KVM_{name}"):
        if candidate in IOCTLS:
            return IOCTLS[candidate]
    try:
        number = int(text, 0)
    except ValueError:
        return None
    if not 0 <= number < 1 << 32:
        raise DecodeError(f"{text} is not an ioctl number: those have 32 bits")
    return BY_NR.get(number, number)


def ioctl_lines(op: Ioctl, args: Sequence[str], *, full: bool, as_words: bool) -> list[str]:
    """Return what an ioctl is, and its argument where one is given."""
    if len(args) > 1:
        raise DecodeError(f"{op.name} takes one argument: its bytes as hexadecimal digits, @FILE or -")
    if args:
        return _argument_lines(op, args[0], full=full, as_words=as_words)
    kinds = ", ".join(f"{kind} ({op.cap_on(kind) or 'always there'})" for kind in op.fds)
    pointee = f", struct {op.struct}" if op.struct else f", {op.scalar}" if op.scalar else ""
    lines = [f"{op.name} = {op.nr:#x} {request_words(op.nr)}", f"  {op.doc}", f"  issued on: {kinds}"]
    lines.append(f"  argument: {op.arg}{pointee}")
    if op.struct is not None:
        kind = struct_class(op.struct)
        lines.append(f"  struct {op.struct}, {kind.SIZE} bytes:")
        lines += [f"    {field.offset:#6x} {field.size:5} {field.name}" for field in kind.FIELDS.values()]
    return lines


def _argument_lines(op: Ioctl, text: str, *, full: bool, as_words: bool) -> list[str]:
    if op.arg == "int":
        number = parse_words(ARGUMENTS[op.name], text) if op.name in ARGUMENTS else parse_number(text)
        return [f"{op.name} {argument_words(op, number)}"]
    if op.arg == "none":
        raise DecodeError(f"{op.name} takes no argument")
    data = content(text)
    if as_words and op.struct is not None:
        return [f"{op.name} {' '.join(assignments(struct_of(op.struct, data)[0]))}"]
    try:
        return [f"{op.name} {decode_argument(op, data, decoder(full=full))}"]
    except ValueError as error:
        raise DecodeError(str(error)) from None


def number_lines(nr: int, args: Sequence[str], *, full: bool) -> list[str]:
    """Return what can be said of a request number that has no name."""
    lines = [f"{nr:#x} {request_words(nr)}: no ioctl that kvmpy knows"]
    like = relative(nr)
    for op in relatives(nr):
        known = f", struct {op.struct} of {op.request.size} bytes" if op.struct else ""
        lines.append(f"  like {op.name} ({op.nr:#x} {request_words(op.nr)}{known})")
    if args:
        data = content(_one(args, "the argument's bytes"))
        if like is not None and like.struct is not None:
            value, rest = struct_of(like.struct, data)
            lines.append(f"  as {like.struct}: {decoder(full=full).struct_text(value)}")
            lines += [f"  beyond it: {bytes_text(rest, full=full)}"] if rest else []
        else:
            lines.append(f"  {bytes_text(data, full=True)}")
    return lines


def struct_lines(name: str, args: Sequence[str], *, full: bool, as_words: bool) -> list[str]:
    """Return a struct's content in words."""
    if not args:
        kind = struct_class(name)
        fields = [f"  {each.offset:#6x} {each.size:5} {each.name}" for each in kind.FIELDS.values()]
        return [f"struct {name}, {kind.SIZE} bytes:", *fields]
    data = content(_one(args, f"the bytes of struct {name}"))
    value, rest = struct_of(name, data)
    if as_words:
        return [f"{name} {' '.join(assignments(value))}"]
    lines = [f"{name} {decoder(full=full).struct_text(value)}"]
    if len(data) < value.SIZE:
        lines.append(f"  only {len(data)} of {value.SIZE} bytes")
    return lines + ([f"  beyond it: {bytes_text(rest, full=full)}"] if rest else [])


def command_lines(name: str, args: Sequence[str], *, full: bool, as_words: bool) -> list[str]:
    """Return what a command of SEV, /dev/sev or TDX is, and its struct where bytes are given."""
    command = {**SEV_COMMANDS, **SEV_PLATFORM_COMMANDS, **TDX_COMMANDS}[name]
    if args:
        if command.struct is None:
            raise DecodeError(f"{name} takes no struct")
        return struct_lines(command.struct, args, full=full, as_words=as_words)
    state = "" if command.implemented else "; no kernel carries it out"
    pointee = f", struct {command.struct}" if command.struct else ""
    return [
        f"{name} = {command.id}, command for {', '.join(command.families)}{state}",
        f"  {command.doc}",
        f"  data: {command.arg}{pointee}",
    ]


# Domains.


def _exit(args: Sequence[str], full: bool) -> list[str]:
    if not 1 <= len(args) <= 2:
        raise DecodeError("expected exit REASON [BYTES of struct kvm_run], or exit BYTES")
    if len(args) == 1 and not _is_name(args[0], ExitReason) and len(args[0]) > 2 * 8:
        return [decoder(full=full).exit_text(run_of(content(args[0])))]
    reason = _member(args[0], ExitReason, "KVM_EXIT_", "exit reason")
    if len(args) == 2:
        run = run_of(content(args[1]))
        run.exit_reason = reason
        return [decoder(full=full).exit_text(run)]
    lines = [f"{number_words(ExitReason, reason)} = {reason}"]
    member = EXIT_MEMBERS.get(reason)
    if member is not None:
        field = struct_class("kvm_run").FIELDS[member]
        lines.append(f"  payload: kvm_run.{member} at {field.offset:#x}, {field.size} bytes")
        if field.ctype.kind in ("struct", "union"):
            kind = struct_class(field.ctype.cname.split(" ", 1)[1])
            lines += [f"    {each.offset:#6x} {each.size:5} {each.name}" for each in kind.FIELDS.values()]
    return lines


def _is_name(text: str, kind: type[ExitReason] | type[SevRet]) -> bool:
    return text.upper() in kind.__members__


def _member(text: str, kind: type[ExitReason] | type[SevRet], prefix: str, what: str) -> int:
    for name in (text.upper(), prefix + text.upper()):
        if name in kind.__members__:
            return int(kind.__members__[name])
    try:
        number = int(text, 0)
        if not -(1 << 31) <= number < 1 << 32:
            raise DecodeError(f"{text[:40]} is no {what}: those have 32 bits")
        return number
    except DecodeError:
        raise
    except ValueError:
        close = difflib.get_close_matches(prefix + text.upper().removeprefix(prefix), kind.__members__, 3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise DecodeError(f"{text!r} is no {what}{hint}") from None


def _errno(args: Sequence[str], full: bool) -> list[str]:
    del full
    if not 1 <= len(args) <= 2:
        raise DecodeError("expected errno NUMBER|NAME [IOCTL]")
    names = {errno_name(number): number for number in range(1, 134)}
    number = names.get(args[0].upper()) or parse_number(args[0])
    if abs(number) >= 1 << 12:
        raise DecodeError(f"{args[0][:40]} is no errno: they are below 4096")
    if len(args) == 2 and args[1].upper() in {**SEV_COMMANDS, **SEV_PLATFORM_COMMANDS}:
        return [f"{number}: {error_words(args[1].upper(), abs(number))}"]
    op = find_ioctl(args[1]) if len(args) == 2 else None
    if len(args) == 2 and not isinstance(op, Ioctl):
        raise DecodeError(f"{args[1]!r} is not an ioctl that kvmpy knows{_elsewhere(args[1])}")
    return [f"{number}: {error_words(op.name if isinstance(op, Ioctl) else None, abs(number))}"]


def _pferr(args: Sequence[str], full: bool) -> list[str]:
    del full
    value = parse_number(_one(args, "pferr ERROR_CODE"))
    decoded = pferr.decode(value)
    return [f"{value:#x}: {decoded.words or 'no bit'}", f"  {decoded}"]


def _msr(args: Sequence[str], full: bool) -> list[str]:
    del full
    if not 1 <= len(args) <= 2:
        raise DecodeError("expected msr NUMBER|NAME [VALUE]")
    try:
        number = int(args[0], 0)
    except ValueError:
        try:
            number = msrs.number(args[0])
        except KeyError as error:
            raise DecodeError(str(error.args[0])) from None
    if not 0 <= number < 1 << 32:
        raise DecodeError(f"{args[0]} is not an MSR: their numbers have 32 bits")
    if len(args) == 1:
        return [f"{number:#x} {msrs.name(number)}"]
    value = parse_number(args[1])
    words = ghcb.msr_words(value) if number == ghcb.GHCB_MSR else msrs.decode(number, value)
    return [f"{number:#x} {msrs.name(number)} = {value:#x}", f"  {words}"]


def _cpuid(args: Sequence[str], full: bool) -> list[str]:
    del full
    if len(args) == 1 and (args[0].startswith("@") or args[0] == "-" or len(args[0]) > 18):
        value, _ = struct_of("kvm_cpuid2", content(args[0]))
        entries = list(Cpuid.from_struct(value))  # type: ignore[arg-type]
    else:
        numbers = [parse_number(text) for text in args]
        if len(numbers) not in (1, 2, 5, 6) or any(not 0 <= each < 1 << 32 for each in numbers):
            raise DecodeError(
                "expected cpuid FUNCTION [INDEX] [EAX EBX ECX EDX] of 32 bits, or the bytes of a kvm_cpuid2"
            )
        registers = numbers[-4:] if len(numbers) > 2 else [0, 0, 0, 0]
        head = numbers[: len(numbers) - 4] if len(numbers) > 2 else numbers
        flags = 1 if len(head) == 2 else 0
        entries = [CpuidEntry(head[0], head[1] if len(head) == 2 else 0, flags, *registers)]
    if len(args) in (1, 2) and not (args[0].startswith("@") or args[0] == "-" or len(args[0]) > 18):
        return _leaf_lines(entries[0])
    lines = []
    for entry in entries:
        lines.append(str(entry))
        if entry.features:
            lines.append("  " + " ".join(entry.features))
    return lines


def _leaf_lines(entry: CpuidEntry) -> list[str]:
    """Return what a leaf can say, where no values of it were given."""
    where = f"leaf {entry.function:#x}" + (f", index {entry.index}" if entry.indexed else "")
    lines = [f"{where}: give EAX EBX ECX EDX for what they say; its features:"]
    for register in REGISTERS:
        names = BITS.get((entry.function, entry.index if entry.indexed else 0, register), {})
        if names:
            lines.append(f"  {register}: " + " ".join(f"{bit}={name}" for bit, name in sorted(names.items())))
    return lines if len(lines) > 1 else [f"{where}: kvmpy knows no feature bits of it"]


def _sev_error(args: Sequence[str], full: bool) -> list[str]:
    del full
    code = _member(_one(args, "sev-error CODE|NAME"), SevRet, "SEV_RET_", "status of the SEV firmware")
    name = number_words(SevRet, code & 0xFFFF_FFFF)
    meaning = firmware_meaning(code)
    return [f"{name} = {code} ({code & 0xFFFF_FFFF:#x})" + (f": {meaning}" if meaning else "")]


def _policy(args: Sequence[str], full: bool) -> list[str]:
    del full
    if not 1 <= len(args) <= 2 or (len(args) == 2 and args[0] not in ("sev", "snp")):
        raise DecodeError("expected policy [sev|snp] VALUE")
    value = parse_number(args[-1])
    if not 0 <= value < 1 << 64:
        raise DecodeError(f"{args[-1]} is not a policy: SNP's have 64 bits, SEV's 32")
    kinds = {"snp": snp_policy_words, "sev": sev_policy_words}
    wanted = [args[0]] if len(args) == 2 else ["snp", "sev"]
    return [f"{value:#x} as {kind.upper()} policy: {kinds[kind](value)}" for kind in wanted]


_REGISTER_WORDS: dict[str, Callable[[int], str]] = {
    "cr0": cr0_words,
    "cr4": cr4_words,
    "efer": efer_words,
    "rflags": rflags_words,
    "sev_features": feature_words,
    "guest_exit_code": exceptions.vc_reason,
}


def _page_lines(layout: Layout, page: bytes, full: bool, words: dict[str, Callable[[int], str]]) -> list[str]:
    lines = []
    for name, value in layout.unpack(page).items():
        if isinstance(value, bytes):
            if any(value):
                lines.append(f"  {layout[name].offset:#05x} {name} = {bytes_text(value, full=full)}")
        elif value:
            text = f" ({words[name](value)})" if name in words else ""
            lines.append(f"  {layout[name].offset:#05x} {name} = {value:#x}{text}")
    for offset, raw in layout.nameless(page):
        lines.append(f"  {offset:#05x} (no field) = {bytes_text(raw, full=full)}")
    if len(page) < layout.size:
        lines.append(f"  the page ends after {len(page)} of {layout.size} bytes")
    return lines


_ATTRIBUTE_WORDS: dict[str, Callable[[int], str]] = {
    f"{segment}.attrib": lambda value: " ".join(bit_words(SegmentAttribute, value)) for segment in SEGMENTS
}


def _vmsa(args: Sequence[str], full: bool) -> list[str]:
    page = content(_one(args, "vmsa BYTES (hexadecimal digits, @FILE or -)"))
    lines = _page_lines(VMSA, page, full, _REGISTER_WORDS | _ATTRIBUTE_WORDS)
    return ["VMSA, fields that are not 0:", *lines]


def _tlb_words(value: int) -> str:
    known = value in vmcb.TlbControl._value2member_map_
    return f"flush {vmcb.TlbControl(value).name}" if known else "reserved"


_VMCB_WORDS: dict[str, Callable[[int], str]] = {
    "exit_code": vmcb.exit_name,
    "tlb_ctl": _tlb_words,
    "int_ctl": vmcb.int_ctl_words,
    "int_state": lambda value: " ".join(bit_words(vmcb.IntState, value)),
    "misc_ctl": lambda value: " ".join(bit_words(vmcb.MiscCtl, value)),
    "misc_ctl2": lambda value: " ".join(bit_words(vmcb.MiscCtl2, value)),
    "clean": lambda value: " ".join(bit_words(vmcb.Clean, value)),
}


def _vmcb(args: Sequence[str], full: bool) -> list[str]:
    page = content(_one(args, "vmcb BYTES (hexadecimal digits, @FILE or -)"))
    block = vmcb.Vmcb(page.ljust(vmcb.VMCB_SIZE, b"\0"))
    lines = ["VMCB, fields that are not 0:"]
    lines += _page_lines(vmcb.VMCB, page, full, _REGISTER_WORDS | _ATTRIBUTE_WORDS | _VMCB_WORDS)
    lines.append("  intercepts: " + (", ".join(vmcb.intercept_names(block.page)) or "none"))
    lines.append(f"  exit: {block.exit_text()}")
    lines += [f"  injects: {block.injected}"] if block.injected else []
    return lines


def _ghcb(args: Sequence[str], full: bool) -> list[str]:
    text = _one(args, "ghcb BYTES (hexadecimal digits, @FILE or -), or a value of the GHCB MSR")
    if len(text) <= 18 and not text.startswith(("@", "-")):
        value = parse_number(text)
        if not 0 <= value < 1 << 64:
            raise DecodeError(f"{text} is not a value of an MSR: those have 64 bits")
        return [f"GHCB MSR {value:#x}", f"  {ghcb.msr_words(value)}"]
    page = content(text)
    lines = ["GHCB, fields that are not 0:"]
    lines += _page_lines(ghcb.GHCB, page, full, {"sw_exit_code": ghcb.event_name})
    lines.append("  valid: " + (" ".join(ghcb.valid_fields(page.ljust(ghcb.GHCB_SIZE, b"\0"))) or "nothing"))
    return lines


DOMAINS: dict[str, tuple[str, Callable[[Sequence[str], bool], list[str]]]] = {
    "exit": ("an exit reason of KVM_RUN, or a run area", _exit),
    "errno": ("an errno, and what it means for an ioctl", _errno),
    "pferr": ("a page-fault error code", _pferr),
    "msr": ("an MSR by number or name, and a value's bits", _msr),
    "cpuid": ("a CPUID leaf, or the bytes of a kvm_cpuid2", _cpuid),
    "sev-error": ("a status code of the SEV firmware", _sev_error),
    "policy": ("a guest policy of SEV or SNP", _policy),
    "vmsa": ("the save area of an SEV-ES or SNP vCPU", _vmsa),
    "vmcb": ("the control block of an SVM guest", _vmcb),
    "ghcb": ("a GHCB page, or a value of the GHCB MSR", _ghcb),
}


def lines_of(what: str, args: Sequence[str], *, full: bool, as_words: bool) -> list[str]:
    """Return the lines for ``kvmpy decode WHAT ARGS``; DecodeError or EncodeError when that cannot be."""
    if what in DOMAINS:
        return DOMAINS[what][1](args, full)
    commands = {**SEV_COMMANDS, **SEV_PLATFORM_COMMANDS, **TDX_COMMANDS}
    if what.upper() in commands:
        return command_lines(what.upper(), args, full=full, as_words=as_words)
    if what in STRUCTS:
        return struct_lines(what, args, full=full, as_words=as_words)
    command_of = find_ioctl(what)
    if isinstance(command_of, Ioctl):
        return ioctl_lines(command_of, args, full=full, as_words=as_words)
    if command_of is not None:
        return number_lines(command_of, args, full=full)
    raise DecodeError(
        f"{what!r} is not an ioctl (number or name), command, struct, or one of {', '.join(DOMAINS)}"
        + guess(what, DOMAINS)
    )


_ARCHITECTURES = {
    "ARM": "arm64",
    "ARM64": "arm64",
    "VGIC": "arm64",
    "S390": "s390",
    "PPC": "powerpc",
    "RISCV": "riscv",
    "MIPS": "mips",
    "LOONGARCH": "loongarch",
}


def _elsewhere(name: str) -> str:
    """Return a remark where *name* is of another architecture than x86."""
    part = name.upper().removeprefix("KVM_").partition("_")[0]
    arch = _ARCHITECTURES.get(part, "")
    return f"; it looks like {arch}'s, and kvmpy knows x86-64" if arch else ""


def guess(what: str, domains: Iterable[str]) -> str:
    """Return what an unknown word may be: another architecture's name, or a slip for one that is known."""
    other = _elsewhere(what)
    names = [*domains, *IOCTLS, *STRUCTS, *SEV_COMMANDS, *SEV_PLATFORM_COMMANDS, *TDX_COMMANDS]
    close = [] if other else difflib.get_close_matches(what, names, 3, 0.6)
    return f"; did you mean {', '.join(close)}?" if close else other
