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
