# SPDX-License-Identifier: Apache-2.0
"""Guest memory as C: code as bytes with its disassembly, words where little is set, bytes elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvmpy.debug.record.csource import byte_rows, number
from kvmpy.debug.record.format import PAGE_SIZE
from kvmpy.debug.record.guestcode import Instruction, sweep

# Fewer words than this part of an extent: list them with their places.
_SPARSE = 3
_GAP = 64
_COMMENT_AT = 56


@dataclass(frozen=True)
class Piece:
    """Part of a region's content: the C definition that holds it, and the statement that puts it there."""

    definition: list[str]
    statement: str
    words: bool = False


def extents(content: list[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Yield what is not zero in *content*, in pieces that are far enough from each other."""
    merged: list[tuple[int, bytearray]] = []
    for offset, data in sorted(content):
        if merged and offset <= merged[-1][0] + len(merged[-1][1]):
            start, before = merged[-1]
            before[offset - start : offset - start + len(data)] = data
        else:
            merged.append((offset, bytearray(data)))
    for offset, gathered in merged:
        data = bytes(gathered)
        position = 0
        while position < len(data):
            if not data[position]:
                rest = bytes(data[position:])
                position += len(rest) - len(rest.lstrip(b"\0"))
                continue
            end = data.find(bytes(_GAP), position)
            end = len(data) if end < 0 else end
            first = (offset + position) // 8 * 8 - offset
            first = max(first, 0)
            yield offset + first, bytes(data[first:end])
            position = end


def pieces(name: str, content: list[tuple[int, bytes]], code: dict[int, Instruction]) -> Iterator[Piece]:
    """Yield how the region that is called *name* in C gets its content."""
    sparse: list[tuple[int, int]] = []
    for offset, data in extents(content):
        if any(offset <= address < offset + len(data) for address in code):
            yield from _code(name, offset, data, code)
            continue
        padded = data.ljust(-(-len(data) // 8) * 8, b"\0")
        words = [
            (offset + address, int.from_bytes(padded[address : address + 8], "little"))
            for address in range(0, len(padded), 8)
            if any(padded[address : address + 8])
        ]
        if offset % 8 == 0 and (len(words) * _SPARSE <= len(padded) // 8 or len(words) <= 8):
            sparse += words
            continue
        label = f"{name}_{offset:x}"
        yield Piece(
            [f"static const unsigned char {label}[] = {{", *byte_rows(data), "};"],
            f"memcpy({name} + {offset:#x}, {label}, sizeof({label}));",
        )
    if sparse:
        label = f"{name}_words"
        rows = [f"\t{{ {offset:#x}, {number(value)} }}," for offset, value in sparse]
        yield Piece(
            [f"static const struct word {label}[] = {{", *rows, "};"],
            f"put_words({name}, {label}, sizeof({label}) / sizeof({label}[0]));",
            words=True,
        )


def _code(name: str, offset: int, data: bytes, code: dict[int, Instruction]) -> Iterator[Piece]:
    label = f"{name}_code_{offset:x}"
    rows: list[str] = []
    end = offset + len(data)
    start = plain_from = offset
    last: Instruction | None = None
    while start < end:
        known = code.get(start)
        if known is None or start + len(known.raw) > end:
            start += 1
            continue
        rows += _between(data[plain_from - offset : start - offset], plain_from, known)
        rows.append(_row(known))
        start += len(known.raw)
        plain_from, last = start, known
    rest = data[plain_from - offset :]
    rows += _between(rest, plain_from, last) if last is not None else byte_rows(rest)
    yield Piece(
        [f"static const unsigned char {label}[] = {{", *rows, "};"],
        f"memcpy({name} + {offset:#x}, {label}, sizeof({label}));",
    )


def _between(raw: bytes, offset: int, near: Instruction) -> list[str]:
    # What no jump leads to may be code all the same: the target of a pointer, a handler.
    same_page = offset // PAGE_SIZE == near.offset // PAGE_SIZE
    result = sweep(raw, offset, near) if raw and same_page else []
    return [_row(each) for each in result] or byte_rows(raw)


def _row(each: Instruction) -> str:
    text = "\t" + ", ".join(f"0x{byte:02x}" for byte in each.raw) + ","
    fill = max(1, _COMMENT_AT - len(text))
    return f"{text}{' ' * fill}/* {each.gva:#x}: {each.text} */"
