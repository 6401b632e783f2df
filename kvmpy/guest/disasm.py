# SPDX-License-Identifier: Apache-2.0
"""Disassembly for the post-mortem, with the program's own names for addresses."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

_ADDRESS = re.compile(r"\b0x[0-9a-f]{4,16}\b")


@lru_cache(maxsize=4)
def _decoder(bits: int) -> Any:
    import capstone

    modes = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
    if bits not in modes:
        raise ValueError(f"{bits}-bit code: 16, 32 or 64")
    decoder = capstone.Cs(capstone.CS_ARCH_X86, modes[bits])
    decoder.skipdata = True
    return decoder


def disassemble(
    code: bytes, address: int, *, bits: int = 64, name: Callable[[int], str | None] | None = None
) -> list[tuple[int, str]]:
    """Return (address, text) of each instruction in *code*, which lies at *address*.

    Bytes that are none show as ``.byte``.  *bits* is the mode of the code: 16, 32 or 64.  *name* tells what
    lies at an address, for the operands.
    """
    lines = []
    for where, _, mnemonic, operands in _decoder(bits).disasm_lite(code, int(address)):
        text = f"{mnemonic} {operands}".strip()
        if name is not None:
            for match in _ADDRESS.finditer(operands):
                known = name(int(match.group(), 16))
                if known:
                    text += f"  <{known}>"
                    break
        lines.append((where, text))
    return lines


def around(
    code: bytes,
    address: int,
    rip: int,
    *,
    start: int | None = None,
    before: int = 5,
    after: int = 5,
    bits: int = 64,
) -> list[tuple[int, str]]:
    """Return the instruction at *rip* with up to *before* and *after* neighbours.

    Decoding begins at *start*, a known instruction boundary such as a function's head.  Without one it
    begins at the earliest byte of *code* from which the instructions meet *rip*.
    """
    offset = int(rip) - int(address)
    if not 0 <= offset < len(code):
        raise ValueError(f"rip {int(rip):#x} is outside the {len(code)} bytes at {int(address):#x}")
    starts = [start - address] if start is not None else [*range(offset + 1)]
    for begin in starts:
        lines = disassemble(code[begin:], address + begin, bits=bits)
        at = next((number for number, (where, _) in enumerate(lines) if where == rip), None)
        if at is not None:
            return lines[max(0, at - before) : at + after + 1]
    return disassemble(code[offset:], int(rip), bits=bits)[: after + 1]
