# SPDX-License-Identifier: Apache-2.0
"""The instructions that KVM's emulator decodes, as a table to make operands from.

Read from the opcode maps of Linux 7.2's arch/x86/kvm/emulate.c; operands and flags from the AMD APM volume 3.
What a processor may leave in RFLAGS as it likes is said with each form, and nothing else may differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from kvmpy.x86.bits import RFLAGS

CF, PF, AF, ZF, SF, OF = (int(RFLAGS[name]) for name in ("CF", "PF", "AF", "ZF", "SF", "OF"))
ALL = CF | PF | AF | ZF | SF | OF

CONDITIONS = ("o", "no", "b", "nb", "z", "nz", "be", "nbe", "s", "ns", "p", "np", "l", "nl", "le", "nle")


@dataclass(frozen=True)
class Form:
    """One encoding of an instruction.

    *code* is written as in the manuals: opcode bytes, ``+r`` for a register in the last of them, ``/r`` or
    ``/0`` ... ``/7`` for ModRM, and an immediate: ``ib``, ``iw``, ``iz`` (16 or 32 bits), ``iv`` (up to 64),
    ``jb`` and ``jz`` (branch displacements), ``mo`` (an absolute address).  With size ``b`` among others in
    *sizes*, bit 0 of the opcode tells it from the others.
    """

    name: str
    group: str
    code: str
    sizes: str = "bwdq"
    undefined: int = 0
    """Flags that are undefined behind it, whatever its operands are."""
    count: str = ""
    """A shift: where its count is, ``"1"``, ``"ib"`` or ``"cl"``; some flags depend on it."""
    lock: bool = False
    """LOCK is allowed with a memory destination."""
    only: str = ""
    """``"m"``: memory alone, ``"r"``: a register alone."""
    access: bool = True
    """Whether it reaches the memory that its operand names."""
    kind: str = ""
    """What makes its operands special: see :mod:`kvmpy.x86.operands`."""
    modes: tuple[int, ...] = (64, 32)
    prefix: int = 0
    """A prefix that is part of the opcode: 0x66, 0xF2 or 0xF3."""
    vex: bool = False
    """Encoded with VEX, which has 128 and 256 bits."""
    aligned: bool = False
    """Its memory must be aligned to its size."""
    same_rings: bool = False
    """It does the same in both runs only if both are in the same ring."""


def _arithmetic() -> list[Form]:
    rows = []
    for number, name in enumerate(("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp")):
        undefined, lock, first = AF if name in ("or", "and", "xor") else 0, name != "cmp", 8 * number
        rows += [
            Form(name, "arithmetic", f"{first:02x} /r", undefined=undefined, lock=lock),
            Form(name, "arithmetic", f"{first + 2:02x} /r", undefined=undefined),
            Form(name, "arithmetic", f"{first + 4:02x} iz", undefined=undefined),
            Form(name, "arithmetic", f"80 /{number} iz", undefined=undefined, lock=lock),
            Form(name, "arithmetic", f"83 /{number} ib", "wdq", undefined, lock=lock),
            Form(name, "arithmetic", f"82 /{number} ib", "b", undefined, lock=lock, modes=(32,)),
        ]
    rows += [
        Form("test", "arithmetic", "84 /r", undefined=AF),
        Form("test", "arithmetic", "a8 iz", undefined=AF),
        Form("test", "arithmetic", "f6 /0 iz", undefined=AF),
        Form("test", "alias", "f6 /1 iz", undefined=AF),
        Form("not", "arithmetic", "f6 /2", lock=True),
        Form("neg", "arithmetic", "f6 /3", lock=True),
        Form("inc", "arithmetic", "fe /0", lock=True),
        Form("dec", "arithmetic", "fe /1", lock=True),
        Form("inc", "arithmetic", "40 +r", "wd", modes=(32,)),
        Form("dec", "arithmetic", "48 +r", "wd", modes=(32,)),
        Form("xadd", "arithmetic", "0fc0 /r", lock=True),
    ]
    return rows


def _shifts() -> list[Form]:
    rows = []
    for number, name in enumerate(("rol", "ror", "rcl", "rcr", "shl", "shr", "sal", "sar")):
        for code, count in ((f"c0 /{number} ib", "ib"), (f"d0 /{number}", "1"), (f"d2 /{number}", "cl")):
            rows.append(Form(name, "shifts", code, count=count))
    for name, code in (("shld", "0fa4"), ("shrd", "0fac")):
        rows.append(Form(name, "double-shifts", f"{code} /r ib", "wdq", count="ib"))
        rows.append(
            Form(name, "double-shifts", f"{code[:-1]}{int(code[-1], 16) + 1:x} /r", "wdq", count="cl")
        )
    return rows


def _products() -> list[Form]:
    signs = SF | ZF | AF | PF
    return [
        Form("mul", "products", "f6 /4", undefined=signs),
        Form("imul", "products", "f6 /5", undefined=signs),
        Form("imul", "products", "0faf /r", "wdq", signs),
        Form("imul", "products", "69 /r iz", "wdq", signs),
        Form("imul", "products", "6b /r ib", "wdq", signs),
        Form("div", "products", "f6 /6", undefined=ALL, kind="divide"),
        Form("idiv", "products", "f6 /7", undefined=ALL, kind="divide"),
        Form("aam", "decimal", "d4 ib", "b", CF | AF | OF, modes=(32,)),
        Form("aad", "decimal", "d5 ib", "b", CF | AF | OF, modes=(32,)),
        Form("das", "decimal", "2f", "b", OF, modes=(32,)),
    ]


def _bits() -> list[Form]:
    rest = ALL & ~CF
    rows = []
    for name, code, number in (("bt", "a3", 4), ("bts", "ab", 5), ("btr", "b3", 6), ("btc", "bb", 7)):
        lock = name != "bt"
        rows.append(Form(name, "bits", f"0f{code} /r", "wdq", rest, kind="bit", lock=lock))
        rows.append(Form(name, "bits", f"0fba /{number} ib", "wdq", rest, lock=lock))
    rows += [
        Form("bsf", "bit-scans", "0fbc /r", "wdq", ALL & ~ZF),
        Form("bsr", "bit-scans", "0fbd /r", "wdq", ALL & ~ZF),
        Form("tzcnt", "count-zeros", "0fbc /r", "wdq", ALL & ~(CF | ZF), prefix=0xF3),
        Form("lzcnt", "count-zeros", "0fbd /r", "wdq", ALL & ~(CF | ZF), prefix=0xF3),
        Form("bswap", "bits", "0fc8 +r", "dq"),
    ]
    return rows


def _moves() -> list[Form]:
    rows = [
        Form("mov", "moves", "88 /r"),
        Form("mov", "moves", "8a /r"),
        Form("mov", "moves", "b0 +r ib", "b"),
        Form("mov", "moves", "b8 +r iv", "wdq"),
        Form("mov", "moves", "c6 /0 iz"),
        Form("mov", "moves", "a0 mo", kind="absolute"),
        Form("mov", "moves", "a2 mo", kind="absolute"),
        Form("lea", "moves", "8d /r", "wdq", only="m", access=False),
        Form("xchg", "moves", "86 /r", lock=True),
        Form("xchg", "moves", "90 +r", "wdq"),
        Form("cbw", "moves", "98", "wdq"),
        Form("cwd", "moves", "99", "wdq"),
        Form("xlat", "moves", "d7", "b", kind="xlat"),
        Form("movzx", "moves", "0fb6 /r", "wdq"),
        Form("movzx", "moves", "0fb7 /r", "wdq"),
        Form("movsx", "moves", "0fbe /r", "wdq"),
        Form("movsx", "moves", "0fbf /r", "wdq"),
        Form("movsxd", "moves", "63 /r", "dq", modes=(64,)),
        Form("movnti", "moves", "0fc3 /r", "dq", only="m"),
        Form("movbe", "movbe", "0f38f0 /r", "wdq", only="m"),
        Form("movbe", "movbe", "0f38f1 /r", "wdq", only="m"),
        Form("cmpxchg", "exchanges", "0fb0 /r", lock=True, only="m", kind="compare"),
        Form("cmpxchg", "exchanges", "0fb0 /r", "bwq", only="r", kind="compare"),
        Form("cmpxchg", "cmpxchg-register", "0fb1 /r", "d", only="r", kind="compare"),
        Form("cmpxchg8b", "exchanges", "0fc7 /1", "d", lock=True, only="m", kind="compare8"),
        Form("nop", "moves", "0f1f /0", "wd", access=False),
        Form("prefetch", "moves", "0f0d /1", "d", only="m", access=False),
        Form("prefetch", "moves", "0f18 /1", "d", only="m", access=False),
        Form("clflush", "clflush", "0fae /7", "d", only="m"),
        Form("fnstcw", "moves", "d9 /7", "d", only="m"),
        Form("fnstsw", "moves", "dd /7", "d", only="m"),
    ]
    for number, condition in enumerate(CONDITIONS):
        rows.append(Form(f"cmov{condition}", "conditions", f"0f4{number:x} /r", "wdq"))
        rows.append(Form(f"set{condition}", "conditions", f"0f9{number:x} /0", "b"))
    return rows


def _flags() -> list[Form]:
    names = (
        ("cmc", 0xF5),
        ("clc", 0xF8),
        ("stc", 0xF9),
        ("cld", 0xFC),
        ("std", 0xFD),
        ("sahf", 0x9E),
        ("lahf", 0x9F),
    )
    return [
        *(Form(name, "flags", f"{code:02x}", "d") for name, code in names),
        Form("salc", "flags", "d6", "b", modes=(32,)),
    ]


def _strings() -> list[Form]:
    names = (("movs", 0xA4), ("cmps", 0xA6), ("stos", 0xAA), ("lods", 0xAC), ("scas", 0xAE))
    return [Form(name, "strings", f"{code:02x}", kind="string") for name, code in names]


def _stack() -> list[Form]:
    rows = [
        Form("push", "stack", "50 +r", kind="push"),
        Form("pop", "stack", "58 +r", kind="pop"),
        Form("push", "stack", "68 iz", kind="push"),
        Form("push", "stack", "6a ib", kind="push"),
        Form("push", "stack", "ff /6", kind="push"),
        Form("pop", "stack", "8f /0", kind="pop"),
        Form("pushf", "stack", "9c", kind="push"),
        Form("popf", "popf", "9d", kind="pop", same_rings=True),
        Form("leave", "stack", "c9", kind="leave"),
        Form("pusha", "push-all", "60", kind="push", modes=(32,)),
        Form("popa", "push-all", "61", kind="pop", modes=(32,)),
    ]
    rows = [Form(**{**row.__dict__, "sizes": "wdq"}) for row in rows]
    rows.append(Form("enter", "enter", "c8 iw 00", "dq", kind="push"))
    rows.append(Form("enter", "enter-16", "c8 iw 00", "w", kind="push"))
    return rows


def _branches() -> list[Form]:
    rows = [Form(f"j{name}", "branches", f"7{number:x} jb", "d") for number, name in enumerate(CONDITIONS)]
    rows += [Form(f"j{name}", "branches", f"0f8{number:x} jz", "d") for number, name in enumerate(CONDITIONS)]
    rows += [
        Form("jmp", "branches", "eb jb", "d"),
        Form("jmp", "branches", "e9 jz", "d"),
        Form("loopnz", "branches", "e0 jb", "d", kind="loop"),
        Form("loopz", "branches", "e1 jb", "d", kind="loop"),
        Form("loop", "branches", "e2 jb", "d", kind="loop"),
        Form("jcxz", "branches", "e3 jb", "d", kind="loop"),
        Form("call", "branches", "e8 jz", "d", kind="push"),
        Form("jmp", "branches", "ff /4", "d", kind="target"),
        Form("call", "branches", "ff /2", "d", kind="call"),
        Form("ret", "branches", "c3", "d", kind="return"),
        Form("ret", "branches", "c2 iw", "d", kind="return"),
    ]
    return rows


def _vectors() -> list[Form]:
    rows = []
    for name, code, prefix, aligned in (
        ("movups", "0f10", 0, False),
        ("movups", "0f11", 0, False),
        ("movupd", "0f10", 0x66, False),
        ("movupd", "0f11", 0x66, False),
        ("movaps", "0f28", 0, True),
        ("movaps", "0f29", 0, True),
        ("movapd", "0f28", 0x66, True),
        ("movapd", "0f29", 0x66, True),
        ("movdqa", "0f6f", 0x66, True),
        ("movdqa", "0f7f", 0x66, True),
        ("movdqu", "0f6f", 0xF3, False),
        ("movdqu", "0f7f", 0xF3, False),
        ("movntps", "0f2b", 0, True),
        ("movntpd", "0f2b", 0x66, True),
        ("movntdq", "0fe7", 0x66, True),
        ("movntdqa", "0f382a", 0x66, True),
    ):
        only = "m" if "nt" in name else ""
        group = "sse4" if name == "movntdqa" else "sse"
        rows.append(
            Form(name, group, f"{code} /r", "x", prefix=prefix, only=only, aligned=aligned, kind="vector")
        )
        group = "avx-non-temporal" if "nt" in name else "avx"
        rows.append(
            Form(
                f"v{name}",
                group,
                f"{code} /r",
                "xy",
                prefix=prefix,
                only=only,
                aligned=aligned,
                kind="vector",
                vex=True,
            )
        )
    return rows


def _privileged() -> list[Form]:
    names = (
        ("hlt", "f4"), ("clts", "0f06"), ("invd", "0f08"), ("wbinvd", "0f09"), ("wrmsr", "0f30"),
        ("rdmsr", "0f32"), ("cli", "fa"), ("sti", "fb"), ("in", "e4 ib"), ("in", "ec"), ("out", "e6 ib"),
        ("out", "ee"), ("lgdt", "0f01 /2"), ("lidt", "0f01 /3"), ("lmsw", "0f01 /6"), ("invlpg", "0f01 /7"),
        ("lldt", "0f00 /2"), ("ltr", "0f00 /3"), ("mov-cr", "0f20c0"), ("mov-cr", "0f22d8"),
        ("mov-dr", "0f21c0"), ("mov-dr", "0f23f8"), ("ins", "6c"), ("outs", "6e"),
    )  # fmt: skip
    memory = ("lgdt", "lidt", "invlpg")
    return [
        Form(
            name,
            "privileged",
            code,
            "d",
            only="m" if name in memory else "",
            access=name != "invlpg",
            same_rings=True,
        )
        for name, code in names
    ]


@lru_cache(maxsize=1)
def table() -> tuple[Form, ...]:
    """Return all forms."""
    return (
        *_arithmetic(), *_shifts(), *_products(), *_bits(), *_moves(), *_flags(), *_strings(), *_stack(),
        *_branches(), *_vectors(), *_privileged(),
    )  # fmt: skip


def groups() -> tuple[str, ...]:
    """Return the names of the groups, in the order of the table."""
    return tuple(dict.fromkeys(form.group for form in table()))


def undefined_flags(form: Form, size: int, count: int) -> int:
    """Return the flags that are undefined behind a form of *size* bytes with a shift by *count*."""
    if not form.count:
        return form.undefined
    count &= 63 if size == 8 else 31
    if not count:
        return 0
    undefined = 0 if form.name.startswith(("ro", "rc")) else AF
    if count > 1:
        undefined |= OF
    if count >= 8 * size and form.name in ("shl", "sal", "shr"):
        undefined |= CF
    return undefined
