# SPDX-License-Identifier: Apache-2.0
"""``kvmpy encode``: words to numbers and bytes."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kvmpy.x86.save_area import Layout

Encoded = tuple[str, bytes]
"""What is printed before the bytes, and the bytes."""


def _parsers() -> dict[tuple[str, str], Callable[[str], int]]:
    from kvmpy.cli.names import NAMES
    from kvmpy.x86 import msrs

    return {key: msrs.number for key, namer in NAMES.items() if namer is msrs.name}


def _pferr(args: Sequence[str]) -> Encoded:
    from kvmpy.x86 import pferr

    return hex(pferr.encode(args)), b""


def _msr(args: Sequence[str]) -> Encoded:
    from kvmpy.x86 import msrs

    return " ".join(hex(msrs.number(name)) for name in args), b""


def _cpuid(args: Sequence[str]) -> Encoded:
    from kvmpy.x86.cpuid import feature_bit

    words = []
    for name in args:
        (function, index, register), bit = feature_bit(name)
        words.append(f"{function:#x} {index:#x} {register} bit {bit}")
    return "\n".join(words), b""


def _exit(args: Sequence[str]) -> Encoded:
    from kvmpy.cli.decoding import DecodeError
    from kvmpy.debug.decode.encoder import build
    from kvmpy.uapi import lib
    from kvmpy.uapi.constants import ExitReason

    name = args[0].upper()
    for each in (name, f"KVM_EXIT_{name}"):
        if each in ExitReason.__members__:
            reason = ExitReason[each]
            data = build("kvm_run", [f"exit_reason={each}", *args[1:]]).to_bytes()[: lib.KVMPY_RUN_HEAD]
            return str(int(reason)), data if args[1:] else b""
    raise DecodeError(f"{args[0]!r} is not an exit reason")


def _sev_error(args: Sequence[str]) -> Encoded:
    from kvmpy.cli.decoding import DecodeError
    from kvmpy.uapi.constants import SevRet

    codes = []
    for text in args:
        name = f"SEV_RET_{text.upper().removeprefix('SEV_RET_')}"
        if name not in SevRet.__members__:
            close = difflib.get_close_matches(name, SevRet.__members__, 3)
            raise DecodeError(
                f"{text!r} is not a status of the SEV firmware; close: {', '.join(close) or 'none'}"
            )
        codes.append(hex(int(SevRet[name]) & 0xFFFF_FFFF))
    return " ".join(codes), b""


def _policy(args: Sequence[str]) -> Encoded:
    from dataclasses import fields

    from kvmpy.cli.decoding import DecodeError
    from kvmpy.coco.policy import SevPolicy, SnpPolicy
    from kvmpy.debug.decode.encoder import parse_number, split

    if args[0] not in ("sev", "snp"):
        raise DecodeError("expected policy sev|snp [NAME...] [api_major=N|abi_major=N ...]")
    kind = SevPolicy if args[0] == "sev" else SnpPolicy
    names = {field.name: isinstance(field.default, bool) for field in fields(kind)}
    values: dict[str, int] = {name: False for name, is_flag in names.items() if is_flag}
    for text in args[1:]:
        name, number = split(text) if "=" in text else (text, "")
        if name not in names or names[name] == bool(number):
            raise DecodeError(f"{text!r}: an {args[0].upper()} policy has {', '.join(names)}")
        values[name] = parse_number(number) if number else True
    return hex(int(kind(**values))), b""  # type: ignore[arg-type]


def _page(layout: Layout, args: Sequence[str]) -> Encoded:
    from kvmpy.debug.decode.encoder import parse_hex, parse_number, split

    values: dict[str, int | bytes] = {}
    for text in args:
        name, value = split(text)
        values[name] = parse_number(value) if layout[name].is_number else parse_hex(value)
    return "", layout.pack(values)


def _vmsa(args: Sequence[str]) -> Encoded:
    from kvmpy.x86.vmsa import VMSA

    return _page(VMSA, args)


def _vmcb(args: Sequence[str]) -> Encoded:
    from kvmpy.x86.vmcb import VMCB

    return _page(VMCB, args)


def _ghcb(args: Sequence[str]) -> Encoded:
    from kvmpy.x86 import ghcb

    _, data = _page(ghcb.GHCB, args)
    page = bytearray(data)
    for text in args:
        name = text.partition("=")[0].strip()
        if ghcb.GHCB[name].offset < ghcb.BITMAP_END:
            ghcb.set_valid(page, name, ghcb.GHCB[name].read(page))
    return "", bytes(page)


_DOMAINS: dict[str, Callable[[Sequence[str]], Encoded]] = {
    "pferr": _pferr,
    "msr": _msr,
    "cpuid": _cpuid,
    "exit": _exit,
    "sev-error": _sev_error,
    "policy": _policy,
    "vmsa": _vmsa,
    "vmcb": _vmcb,
    "ghcb": _ghcb,
}


def _ioctl(what: str, args: Sequence[str]) -> Encoded | None:
    from kvmpy.cli.decoding import DecodeError, find_ioctl
    from kvmpy.debug.decode.encoder import build, parse_number
    from kvmpy.uapi.field_words import ARGUMENTS, parse_words
    from kvmpy.uapi.ioctls import Ioctl

    op = find_ioctl(what)
    if op is None:
        return None
    if not isinstance(op, Ioctl):
        raise DecodeError(f"{op:#x} is not an ioctl that kvmpy knows: nothing can be encoded for it")
    if op.struct is not None:
        return f"{op.nr:#x}", build(op.struct, args, _parsers()).to_bytes()
    if op.arg == "none":
        if args:
            raise DecodeError(f"{op.name} takes no argument")
        return f"{op.nr:#x}", b""
    if len(args) != 1:
        raise DecodeError(f"{op.name} takes one number")
    number = parse_words(ARGUMENTS[op.name], args[0]) if op.name in ARGUMENTS else parse_number(args[0])
    if op.arg == "int":
        return f"{op.nr:#x} {number:#x}", b""
    return f"{op.nr:#x}", (number % (1 << 64)).to_bytes(8, "little")


def _encode(what: str, args: Sequence[str]) -> Encoded:
    from kvmpy.cli.decoding import DecodeError, guess
    from kvmpy.debug.decode.encoder import build
    from kvmpy.uapi.ioctls import SEV_COMMANDS, SEV_PLATFORM_COMMANDS, TDX_COMMANDS
    from kvmpy.uapi.structs import STRUCTS

    if what in _DOMAINS:
        if not args:
            raise DecodeError(f"expected {what} and what is to be encoded")
        return _DOMAINS[what](args)
    if what in STRUCTS:
        return "", build(what, args, _parsers()).to_bytes()
    commands = {**SEV_COMMANDS, **SEV_PLATFORM_COMMANDS, **TDX_COMMANDS}
    if what.upper() in commands:
        command = commands[what.upper()]
        if command.struct is None:
            if args:
                raise DecodeError(f"{command.name} takes no struct")
            return str(command.id), b""
        return str(command.id), build(command.struct, args, _parsers()).to_bytes()
    encoded = _ioctl(what, args)
    if encoded is not None:
        return encoded
    raise DecodeError(
        f"{what!r} is not an ioctl, command, struct, or one of {', '.join(_DOMAINS)}{guess(what, _DOMAINS)}"
    )


@click.command()
@click.option("-r", "--raw", is_flag=True, help="Write only the bytes, in binary.")
@click.argument("what")
@click.argument("args", nargs=-1)
def encode(raw: bool, what: str, args: tuple[str, ...]) -> None:
    """Print the number of WHAT and the bytes of its fields, in the form that `kvmpy decode` reads.

    \b
    kvmpy encode KVM_SET_MSRS index=TSC data=5 index=0x174 data=8
    kvmpy encode KVM_SET_USER_MEMORY_REGION slot=1 flags=KVM_MEM_READONLY memory_size=0x1000
    kvmpy encode KVM_CREATE_VM KVM_X86_SNP_VM
    kvmpy encode kvm_sregs cs.base=0xf0000 efer=0x500
    kvmpy encode KVM_SEV_SNP_LAUNCH_UPDATE type=KVM_SEV_SNP_PAGE_TYPE_NORMAL len=4096
    kvmpy encode exit IO io.port=0x3f8 io.size=1
    kvmpy encode pferr P W U
    kvmpy encode msr EFER
    kvmpy encode cpuid avx2
    kvmpy encode sev-error INVALID_PARAM
    kvmpy encode policy snp smt debug abi_major=1
    kvmpy encode vmsa rip=0xfff0 cs.selector=0xf000
    kvmpy encode vmcb exit_code=0x7c exit_info_1=1
    kvmpy encode ghcb sw_exit_code=0x72 rax=1
    """
    from kvmpy.cli.decoding import DecodeError
    from kvmpy.debug.decode.encoder import EncodeError

    try:
        head, data = _encode(what, args)
    except (DecodeError, EncodeError, ValueError, OverflowError) as error:
        raise click.ClickException(str(error)) from None
    except KeyError as error:
        raise click.ClickException(str(error.args[0])) from None
    if raw:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        click.echo(" ".join(part for part in (head, data.hex()) if part))
