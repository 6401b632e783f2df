# SPDX-License-Identifier: Apache-2.0
"""Words to bytes: structs from ``field=value`` texts, and structs as such texts.

``build(name, assignments(value)) == value`` for every struct, but for bytes that no field covers.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from kvmpy.uapi.buffers import struct_class
from kvmpy.uapi.field_words import FIELDS, parse_words
from kvmpy.uapi.struct_arrays import ByteArray, IntArray, NestedArray, StructArray
from kvmpy.uapi.struct_base import Field, FlexStruct, Struct

Parser = Callable[[str], int]
Parsers = Mapping[tuple[str, str], Parser]

_STEP = re.compile(r"([A-Za-z_]\w*)((?:\[\d+\])*)")
_MOST_ENTRIES = 65536


class EncodeError(ValueError):
    """Words that are no value; the text says which and what is allowed."""


def parse_number(text: str) -> int:
    """Return a number in decimal, 0x, 0o or 0b notation; EncodeError for anything else."""
    try:
        return int(text.strip(), 0)
    except ValueError:
        raise EncodeError(f"{text!r} is not a number (decimal, 0x..., 0b...)") from None


def parse_hex(text: str) -> bytes:
    """Return bytes from hexadecimal digits, with blanks, colons and 0x allowed; EncodeError for others."""
    digits = re.sub(r"(0[xX])|[\s:,_]", "", text)
    bad = re.search(r"[^0-9a-fA-F]", digits)
    if bad is not None:
        raise EncodeError(f"{bad[0]!r} is not a hexadecimal digit (digit {bad.start() + 1} of {text[:40]!r})")
    if len(digits) % 2:
        raise EncodeError(f"{len(digits)} hexadecimal digits: an odd number does not make whole bytes")
    return bytes.fromhex(digits)


def _steps(path: str) -> list[tuple[str, list[int]]]:
    steps = []
    for part in path.split("."):
        match = _STEP.fullmatch(part)
        if match is None:
            raise EncodeError(f"{path!r} is not a field: expected name, name.name or name[number]")
        steps.append((match[1], [int(number) for number in re.findall(r"\d+", match[2])]))
    return steps


def _field(value: Struct, name: str) -> Field:
    fields = value.FIELDS
    key = name if name in fields else f"{name}_"
    if key not in fields:
        close = difflib.get_close_matches(name, fields, 3)
        hint = f" (did you mean {', '.join(close)}?)" if close else f"; it has {', '.join(fields)}"
        raise EncodeError(f"struct {value.NAME} has no field {name!r}{hint}")
    return fields[key]


class _Builder:
    def __init__(self, parsers: Parsers) -> None:
        self.parsers = parsers

    def number(self, value: Struct, field: Field, text: str) -> int:
        key = (value.NAME, field.name)
        try:
            if key in FIELDS:
                return parse_words(FIELDS[key], text)
            return int(text, 0)
        except ValueError:
            pass
        if key in self.parsers:
            try:
                return self.parsers[key](text)
            except (KeyError, ValueError) as error:
                raise EncodeError(str(error.args[0])) from None
        allowed = f", or names of {FIELDS[key].__name__}" if key in FIELDS else ""
        raise EncodeError(f"{value.NAME}.{field.name}: {text!r} is not a number{allowed}")

    def set(self, value: Struct, path: str, text: str) -> None:
        steps = _steps(path)
        for name, indices in steps[:-1]:
            place = self._into(value, name, indices)
            if not isinstance(place, Struct):
                raise EncodeError(f"{path}: {value.NAME}.{name} is not a struct")
            value = place
        name, indices = steps[-1]
        try:
            self._assign(value, name, indices, text)
        except (OverflowError, IndexError) as error:
            raise EncodeError(str(error)) from None

    def _into(self, value: Struct, name: str, indices: list[int]) -> object:
        content = getattr(value, _field(value, name).attribute)
        for index in indices:
            try:
                content = content[index]
            except (IndexError, TypeError) as error:
                raise EncodeError(f"{value.NAME}.{name}[{index}]: {error}") from None
        return content

    def _assign(self, value: Struct, name: str, indices: list[int], text: str) -> None:
        field = _field(value, name)
        content: Any = getattr(value, field.attribute)
        if isinstance(content, int) and not indices:
            setattr(value, field.attribute, _fit(self.number(value, field, text), field))
            return
        for index in indices[:-1]:
            content = content[index]
        if indices and isinstance(content, (IntArray, ByteArray)):
            content[indices[-1]] = self.number(value, field, text)
        elif indices and isinstance(content, NestedArray):
            self._bytes(content[indices[-1]], value, field, text)
        elif isinstance(content, ByteArray) and not indices:
            self._bytes(content, value, field, text)
        elif isinstance(content, IntArray) and not indices:
            numbers = [self.number(value, field, part) for part in text.split(",") if part.strip()]
            if len(numbers) > len(content):
                raise EncodeError(
                    f"{value.NAME}.{name} takes {len(content)} numbers, {len(numbers)} were given"
                )
            content.assign(numbers)
        else:
            raise EncodeError(f"{value.NAME}.{name} holds structs: name one of their fields")

    @staticmethod
    def _bytes(content: ByteArray, value: Struct, field: Field, text: str) -> None:
        data = parse_hex(text)
        if len(data) > len(content):
            raise EncodeError(f"{value.NAME}.{field.name} takes {len(content)} bytes, {len(data)} were given")
        content.assign(data)


def _fit(number: int, field: Field) -> int:
    # Flags are written as unsigned numbers, also where the field is signed.
    bits = 8 * field.size
    if field.ctype.cname.startswith("int") and 1 << (bits - 1) <= number < 1 << bits:
        return number - (1 << bits)
    if number < 0 and not field.ctype.cname.startswith("int") and -(1 << (bits - 1)) <= number:
        return number + (1 << bits)
    return number


def split(text: str) -> tuple[str, str]:
    """Return name and value of a ``name=value`` text; EncodeError when it is none."""
    name, mark, value = text.partition("=")
    if not mark or not name.strip():
        raise EncodeError(f"{text!r}: expected FIELD=VALUE")
    return name.strip(), value.strip()


def _open_array(kind: type[FlexStruct]) -> tuple[str, type[Struct] | None]:
    """Return the path of the open array of a struct, and the class of its items (None for numbers)."""
    owner: type[Struct] = kind
    for name in kind.OPEN[:-1]:
        owner = struct_class(owner.FIELDS[name].ctype.cname.split(" ", 1)[1])
    item = owner.FIELDS[kind.OPEN[-1]].ctype.item
    item_kind = struct_class(item.cname.split(" ", 1)[1]) if item.kind in ("struct", "union") else None
    return ".".join(kind.OPEN), item_kind


def _entries(kind: type[FlexStruct], pairs: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], int]:
    """Return the assignments with short names of entry fields written out, and the number of entries."""
    array, item = _open_array(kind)
    written = []
    count = 0
    seen: set[str] = set()
    for name, text in pairs:
        first = name.split(".")[0].split("[")[0]
        if name == array and item is None:
            count = max(count, len(parse_hex(text)) if kind.ENTRY_SIZE == 1 else text.count(",") + 1)
        elif name.startswith(f"{array}["):
            index = int(name[len(array) + 1 :].split("]")[0] or 0)
            if index >= _MOST_ENTRIES:
                raise EncodeError(f"{name}: more than {_MOST_ENTRIES} entries")
            count = max(count, index + 1)
        elif item is not None and first in item.FIELDS and (first not in kind.FIELDS or name in seen):
            if name in seen or not count:
                count += 1
                seen = set()
            seen.add(name)
            name = f"{array}[{count - 1}].{name}"
        written.append((name, text))
    return written, count


def build(name: str, texts: Iterable[str], parsers: Parsers | None = None) -> Struct:
    """Return the struct *name* with fields from ``field=value`` texts; what is not named is 0.

    Paths lead into nested structs (``cs.base``) and arrays (``ranges[2].flags``). Entries of an open array
    may go without their path: ``index=0x10 data=5 index=0x11 data=6``; the count follows unless it is given.
    Values are numbers, names of flags joined by ``|``, hexadecimal digits for bytes, numbers joined by ``,``
    for other arrays; *parsers* may know further names. EncodeError says what is wrong.
    """
    kind = struct_class(name)
    pairs = [split(text) for text in texts]
    if issubclass(kind, FlexStruct):
        pairs, count = _entries(kind, pairs)
        value: Struct = kind.with_entries(count)
    else:
        value = kind()
    builder = _Builder(parsers or {})
    for path, text in pairs:
        builder.set(value, path, text)
    return value


def assignments(value: Struct, prefix: str = "") -> Iterator[str]:
    """Yield the texts from which :func:`build` makes *value* again; fields that are 0 are left out."""
    yield from _assignments(value, prefix, bytearray(value.nbytes), 0)


def _assignments(value: Struct, prefix: str, told: bytearray, base: int) -> Iterator[str]:
    for field in value.FIELDS.values():
        content = getattr(value, field.attribute)
        path = f"{prefix}{field.name}"
        start = base + field.offset
        if isinstance(content, Struct):
            yield from _assignments(content, f"{path}.", told, start)
        elif isinstance(content, StructArray):
            step = content.size // len(content) if len(content) else 0
            for index in range(len(content)):
                yield from _assignments(content[index], f"{path}[{index}].", told, start + index * step)
        elif isinstance(content, int):
            if field.bits:
                if content:
                    yield f"{path}={content:#x}"
            elif content and not all(told[start : start + field.size]):
                yield f"{path}={content:#x}" if content > 0 else f"{path}={content}"
                told[start : start + field.size] = b"\1" * field.size
        else:
            raw = content.to_bytes()
            if any(raw) and not all(told[start : start + len(raw)]):
                yield from _array(path, content)
                told[start : start + len(raw)] = b"\1" * len(raw)


def _array(path: str, content: IntArray | ByteArray | NestedArray) -> Iterator[str]:
    if isinstance(content, ByteArray):
        yield f"{path}={content.to_bytes().hex()}"
    elif isinstance(content, NestedArray):
        for index in range(len(content)):
            if any(content[index].to_bytes()):
                yield f"{path}[{index}]={content[index].to_bytes().hex()}"
    else:
        yield f"{path}={','.join(map(hex, content))}"
