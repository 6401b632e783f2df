# SPDX-License-Identifier: Apache-2.0
"""Pages with fields at fixed offsets, such as the VMSA and the GHCB: names to numbers and back.

A field of one, two, four or eight bytes is an unsigned little-endian number; longer ones are bytes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

_NUMBER_SIZES = (1, 2, 4, 8)


class Place(NamedTuple):
    """A field: *offset* and *size* in bytes."""

    name: str
    offset: int
    size: int

    @property
    def is_number(self) -> bool:
        """Whether the field is a number and not bytes."""
        return self.size in _NUMBER_SIZES

    def read(self, page: bytes | bytearray | memoryview) -> int | bytes:
        """Return the field's content in *page*."""
        raw = bytes(page[self.offset : self.offset + self.size])
        return int.from_bytes(raw, "little") if self.is_number else raw


class Layout:
    """The fields of a page of *size* bytes, by name and in the order of their offsets.

    ValueError when two fields overlap or one lies outside the page.
    """

    def __init__(self, name: str, size: int, places: Iterable[Place]) -> None:
        self.name = name
        self.size = size
        ordered = sorted(places, key=lambda place: place.offset)
        self.places: dict[str, Place] = {place.name: place for place in ordered}
        if len(self.places) != len(ordered):
            raise ValueError(f"{name}: a field's name is used twice")
        end = 0
        for place in ordered:
            if place.offset < end or place.offset + place.size > size:
                raise ValueError(f"{name}.{place.name} at {place.offset:#x} overlaps or lies outside")
            end = place.offset + place.size

    def __getitem__(self, name: str) -> Place:
        """Return a field by name; KeyError with the closest names."""
        if name not in self.places:
            close = difflib.get_close_matches(name, self.places, 3)
            hint = f" (did you mean {', '.join(close)}?)" if close else ""
            raise KeyError(f"{self.name} has no field {name!r}{hint}")
        return self.places[name]

    def unpack(self, page: bytes | bytearray | memoryview) -> dict[str, int | bytes]:
        """Return the content of every field that lies within *page*, which may be shorter than the layout."""
        return {
            name: place.read(page)
            for name, place in self.places.items()
            if place.offset + place.size <= len(page)
        }

    def pack(self, values: Mapping[str, int | bytes], base: bytes = b"") -> bytes:
        """Return a page with *values* over *base* (zeros where that is shorter).

        KeyError for an unknown field, OverflowError for a number that does not fit, ValueError for bytes that
        are too long.
        """
        if len(base) > self.size:
            raise ValueError(f"{self.name} has {self.size} bytes, {len(base)} were given")
        page = bytearray(base.ljust(self.size, b"\0"))
        for name, value in values.items():
            self.write(page, name, value)
        return bytes(page)

    def write(self, page: bytearray | memoryview, name: str, value: int | bytes) -> None:
        """Set one field of *page* in place; raises what :meth:`pack` does."""
        place = self[name]
        if isinstance(value, int):
            if not 0 <= value < 1 << 8 * place.size:
                raise OverflowError(f"{self.name}.{name}: {value:#x} does not fit {place.size} bytes")
            raw = value.to_bytes(place.size, "little")
        elif len(value) > place.size:
            raise ValueError(f"{self.name}.{name}: {len(value)} bytes do not fit {place.size}")
        else:
            raw = value.ljust(place.size, b"\0")
        page[place.offset : place.offset + place.size] = raw

    def nameless(self, page: bytes | bytearray | memoryview) -> Iterator[tuple[int, bytes]]:
        """Yield offset and content of the ranges between the fields that are not all 0, shortened to that."""
        end = 0
        for place in (*self.places.values(), Place("", len(page), 0)):
            between = bytes(page[end : place.offset])
            kept = between.lstrip(b"\0")
            if kept:
                yield end + len(between) - len(kept), kept.rstrip(b"\0")
            end = place.offset + place.size


def row(offset: int, size: int, *names: str) -> list[Place]:
    """Return fields of one *size* that follow one another from *offset* (a name of ``""`` is a hole)."""
    return [Place(name, offset + number * size, size) for number, name in enumerate(names) if name]
