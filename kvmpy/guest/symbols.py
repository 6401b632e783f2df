# SPDX-License-Identifier: Apache-2.0
"""What an ELF image says about itself: segments, symbols, and which source line an address belongs to."""

from __future__ import annotations

import difflib
import io
import itertools
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmpy.core.address import PAGE_SIZE, Gva
from kvmpy.guest import layout
from kvmpy.guest.errors import GuestImageError, GuestSymbolError

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile

PF_X, PF_W, PF_R = 1, 2, 4
FUNCTION, OBJECT, OTHER = "function", "object", "other"

_KINDS = {"STT_FUNC": FUNCTION, "STT_OBJECT": OBJECT, "STT_NOTYPE": OTHER, "STT_COMMON": OBJECT}
_TYPES = {
    "ET_REL": "an object file that was never linked",
    "ET_DYN": "position independent or a shared library: link it with -static -no-pie",
    "ET_CORE": "a core dump",
}
_RESERVED = (
    ("descriptor tables and APIC", layout.GDT_GVA, layout.XAPIC_GVA + PAGE_SIZE),
    ("per-CPU areas", layout.PERCPU_BASE, layout.PERCPU_BASE + layout.MAX_VCPUS * layout.PERCPU_SIZE),
    ("ucall slots", layout.UCALL_BASE, layout.UCALL_BASE + layout.MAX_VCPUS * layout.UCALL_PAGE_SIZE),
    ("stacks", layout.STACK_BASE, layout.STACK_BASE + layout.MAX_VCPUS * layout.STACK_SIZE),
)


@dataclass(frozen=True)
class Symbol:
    """A name of the program: *gva*, *size* in bytes (0: not known), *type*: function, object or other."""

    name: str
    gva: Gva
    size: int
    type: str


@dataclass(frozen=True)
class Segment:
    """A part of the image: *memsize* bytes at *gva* that begin with *data*; the rest is zero.

    *shared*: the host may see it under every protection.  *user*: ring 3 may reach it.
    """

    gva: Gva
    data: memoryview
    memsize: int
    flags: int

    @property
    def readable(self) -> bool:
        """Whether the segment may be read."""
        return bool(self.flags & PF_R)

    @property
    def writable(self) -> bool:
        """Whether the segment may be written."""
        return bool(self.flags & PF_W)

    @property
    def executable(self) -> bool:
        """Whether the segment holds code."""
        return bool(self.flags & PF_X)

    @property
    def shared(self) -> bool:
        """Whether the segment is mapped shared with the host."""
        return bool(self.flags & layout.PF_SHARED)

    @property
    def user(self) -> bool:
        """Whether ring 3 may reach the segment."""
        return bool(self.flags & layout.PF_USER)

    @property
    def low(self) -> bool:
        """Whether the segment lies at the same guest-physical address, where real mode reaches it."""
        return bool(self.flags & layout.PF_LOW)


@dataclass(frozen=True)
class Image:
    """What a loader needs of an ELF, in plain numbers; segments are (gva, offset, size, memsize, flags)."""

    entry: int
    segments: tuple[tuple[int, int, int, int, int], ...]
    symbols: tuple[tuple[str, int, int, str], ...]


def _open(data: bytes, name: str) -> ELFFile:
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    if data[:4] != b"\x7fELF":
        raise GuestImageError(f"{name} is not an ELF file: it begins with {data[:4].hex(' ') or 'nothing'}")
    try:
        return ELFFile(io.BytesIO(data))
    except (ELFError, ValueError, KeyError, AttributeError) as error:
        raise GuestImageError(f"{name} is a damaged ELF file: {error}") from error


def read_image(data: bytes, name: str) -> Image:
    """Return the image in the ELF file *data*; GuestImageError when a guest of kvmpy cannot run it."""
    elf = _open(data, name)
    try:
        _check(elf, name)
        segments = _segments(elf, data, name)
        symbols = tuple(_symbols(elf))
    except GuestImageError:
        raise
    except Exception as error:  # the parser fails in every way on damaged files
        raise GuestImageError(f"{name} is a damaged ELF file: {error}") from error
    entry = int(elf.header["e_entry"])
    if not any(
        position <= entry < position + memsize and flags & PF_X for position, _, _, memsize, flags in segments
    ):
        raise GuestImageError(f"{name}: its entry {entry:#x} lies in no executable segment")
    return Image(entry, segments, symbols)


def _check(elf: ELFFile, name: str) -> None:
    machine = elf.header["e_machine"]
    if (elf.elfclass, machine) not in ((64, "EM_X86_64"), (32, "EM_386")):
        shown = str(machine).removeprefix("EM_")
        wanted = "64-bit X86_64 or 32-bit 386"
        raise GuestImageError(f"{name} is an ELF for {elf.elfclass}-bit {shown}, guests need {wanted}")
    if not elf.little_endian:
        raise GuestImageError(f"{name} is a big-endian ELF")
    kind = elf.header["e_type"]
    if kind != "ET_EXEC":
        raise GuestImageError(f"{name} is not a static executable: it is {_TYPES.get(kind, kind)}")
    if any(segment["p_type"] in ("PT_INTERP", "PT_DYNAMIC") for segment in elf.iter_segments()):
        raise GuestImageError(f"{name} is dynamically linked: link it with -static -nostdlib")


def _segments(elf: ELFFile, data: bytes, name: str) -> tuple[tuple[int, int, int, int, int], ...]:
    results = []
    for segment in elf.iter_segments():
        if segment["p_type"] != "PT_LOAD" or not segment["p_memsz"]:
            continue
        gva, offset = int(segment["p_vaddr"]), int(segment["p_offset"])
        size, memsize = int(segment["p_filesz"]), int(segment["p_memsz"])
        if offset + size > len(data) or size > memsize:
            raise GuestImageError(f"{name} is cut short: segment {gva:#x} goes on after its end")
        if gva + memsize > 1 << 47:
            raise GuestImageError(f"{name}: segment {gva:#x} is not in the lower half of the address space")
        for label, start, end in _RESERVED:
            if gva < end and start < gva + memsize:
                raise GuestImageError(
                    f"{name}: segment {gva:#x}, {memsize:#x} bytes, overlaps the {label} at {start:#x}"
                )
        results.append((gva, offset, size, memsize, int(segment["p_flags"])))
    if not results:
        raise GuestImageError(f"{name} has nothing to load")
    results.sort()
    for (gva, _, _, memsize, _), (following, *_) in itertools.pairwise(results):
        if (gva + memsize - 1) // PAGE_SIZE >= following // PAGE_SIZE:
            raise GuestImageError(f"{name}: segments {gva:#x} and {following:#x} share a page")
    return tuple(results)


def _symbols(elf: Any) -> Iterable[tuple[str, int, int, str]]:
    table = elf.get_section_by_name(".symtab")
    if table is None:
        return
    # Of a name that occurs more than once, the global one counts, else the first.
    known: dict[str, tuple[str, int, int, str]] = {}
    for symbol in table.iter_symbols():
        kind = _KINDS.get(symbol["st_info"]["type"])
        if kind is None or not symbol.name or symbol["st_shndx"] == "SHN_UNDEF":
            continue
        entry = (symbol.name, int(symbol["st_value"]), int(symbol["st_size"]), kind)
        if symbol["st_info"]["bind"] == "STB_LOCAL":
            known.setdefault(symbol.name, entry)
        else:
            known[symbol.name] = entry
    yield from known.values()


class SymbolTable:
    """Symbols by name and by address."""

    def __init__(self, program: str, symbols: Iterable[tuple[str, int, int, str]]) -> None:
        self._program = program
        self.by_name = {name: Symbol(name, Gva(gva), size, kind) for name, gva, size, kind in symbols}
        code = sorted((int(s.gva), s.size, s.name) for s in self.by_name.values() if s.type == FUNCTION)
        self._starts = [start for start, _, _ in code]
        self._code = code

    def find(self, name: str) -> Symbol:
        """Return the symbol *name*; GuestSymbolError with the closest names when there is none."""
        try:
            return self.by_name[name]
        except KeyError:
            closest = difflib.get_close_matches(name, self.by_name, n=3, cutoff=0.5)
            raise GuestSymbolError(name, self._program, closest) from None

    def function(self, gva: int) -> tuple[str, int] | None:
        """Return the function that *gva* lies in and the offset in it, or None."""
        number = bisect_right(self._starts, int(gva)) - 1
        if number < 0:
            return None
        start, size, name = self._code[number]
        offset = int(gva) - start
        return (name, offset) if offset < size or (size == 0 and offset == 0) else None


class LineTable:
    """Source lines by address, from the DWARF line programs of the image."""

    def __init__(self, rows: Sequence[tuple[int, tuple[str, int] | None]]) -> None:
        ordered = sorted(rows, key=lambda row: (row[0], row[1] is not None))
        self._addresses = [address for address, _ in ordered]
        self._places = [place for _, place in ordered]

    @classmethod
    def of(cls, data: bytes) -> LineTable:
        """Decode all line programs of the ELF file *data*; damaged debug information counts as none."""
        rows: list[tuple[int, tuple[str, int] | None]] = []
        try:
            elf = _open(data, "image")
            if elf.has_dwarf_info():
                dwarf = elf.get_dwarf_info()
                for unit in dwarf.iter_CUs():
                    program = dwarf.line_program_for_CU(unit)
                    if program is not None:
                        rows.extend(_rows(program))
        except Exception:  # noqa: BLE001 - line numbers are a courtesy: a post-mortem must not fail for them
            rows = []
        return cls(rows)

    @classmethod
    def load(cls, text: str) -> LineTable:
        """Return the table that `dump` has written; ValueError, KeyError or TypeError for another text."""
        files, rows = json.loads(text)
        return cls([(int(gpa), (str(files[n]), int(line)) if line else None) for gpa, n, line in rows])

    def dump(self) -> str:
        """Return the table as text: decoding the image's own takes a hundred times longer."""
        files = {place[0]: None for place in self._places if place is not None}
        numbers = {name: number for number, name in enumerate(files)}
        rows = [
            (offset, numbers[place[0]], place[1]) if place is not None else (offset, 0, 0)
            for offset, place in zip(self._addresses, self._places, strict=True)
        ]
        return json.dumps([list(files), rows], separators=(",", ":"))

    def find(self, gva: int) -> tuple[str, int] | None:
        """Return (file, line) of the code at *gva*, or None."""
        number = bisect_right(self._addresses, int(gva)) - 1
        return self._places[number] if number >= 0 else None


class InlineTable:
    """Calls that the compiler inlined, by address, from the DWARF entries of the image."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._dwarf: Any = None
        self._found: dict[int, list[tuple[str, str, int]]] = {}

    def find(self, gva: int) -> list[tuple[str, str, int]]:
        """Return (function, file and line of its call) for each inlined call at *gva*, innermost first."""
        address = int(gva)
        if address not in self._found:
            try:
                self._found[address] = self._look(address)
            except Exception:  # noqa: BLE001 - as for line numbers: damaged debug information counts as none
                self._found[address] = []
        return self._found[address]

    def _look(self, address: int) -> list[tuple[str, str, int]]:
        if self._dwarf is None:
            elf = _open(self._data, "image")
            if not elf.has_dwarf_info():
                return []
            self._dwarf = elf.get_dwarf_info()
        steps: list[tuple[str, str, int]] = []
        for unit in self._dwarf.iter_CUs():
            die = unit.get_top_DIE()
            if not _covers(die, address):
                continue
            program = self._dwarf.line_program_for_CU(unit)
            names = _file_names(program.header) if program is not None else {}
            while die is not None:
                die = next((child for child in die.iter_children() if _covers(child, address)), None)
                if die is not None and die.tag == "DW_TAG_inlined_subroutine":
                    values = die.attributes
                    file = names.get(values["DW_AT_call_file"].value, "?")
                    steps.append((_name(die), file, int(values["DW_AT_call_line"].value)))
            break
        return steps[::-1]


def _name(die: Any) -> str:
    for link in ("DW_AT_abstract_origin", "DW_AT_specification"):
        while "DW_AT_name" not in die.attributes and link in die.attributes:
            die = die.get_DIE_from_attribute(link)
    return _text(die.attributes["DW_AT_name"].value) if "DW_AT_name" in die.attributes else "?"


def _covers(die: Any, address: int) -> bool:
    """Tell whether *address* is code of a DWARF entry."""
    values = die.attributes
    if "DW_AT_ranges" in values:
        base = int(die.cu.get_top_DIE().attributes["DW_AT_low_pc"].value)
        ranges = die.dwarfinfo.range_lists()
        for entry in ranges.get_range_list_at_offset(values["DW_AT_ranges"].value, cu=die.cu):
            if hasattr(entry, "base_address"):
                base = int(entry.base_address)
                continue
            shift = 0 if getattr(entry, "is_absolute", False) else base
            if entry.begin_offset + shift <= address < entry.end_offset + shift:
                return True
        return False
    if "DW_AT_low_pc" not in values or "DW_AT_high_pc" not in values:
        return False
    low, high = int(values["DW_AT_low_pc"].value), values["DW_AT_high_pc"]
    end = int(high.value) if high.form == "DW_FORM_addr" else low + int(high.value)
    return low <= address < end


def _rows(program: Any) -> Iterable[tuple[int, tuple[str, int] | None]]:
    names = _file_names(program.header)
    for entry in program.get_entries():
        state = entry.state
        if state is None:
            continue
        if state.end_sequence:
            yield int(state.address), None
        elif state.line:
            yield int(state.address), (names.get(state.file, "?"), int(state.line))


def _file_names(header: Any) -> dict[int, str]:
    # Files count from 0 since DWARF 5, where entry 0 is the unit itself, and from 1 before.
    modern = header["version"] >= 5
    folders = [_text(folder) for folder in header["include_directory"]]
    names = {}
    for number, entry in enumerate(header["file_entry"], start=0 if modern else 1):
        name, folder = _text(entry.name), int(entry.dir_index)
        index = folder if modern else folder - 1
        if not name.startswith("/") and 0 <= index < len(folders):
            parent = folders[index]
            # The folder of the compilation itself is a temporary one.
            if index or not modern:
                name = f"{parent}/{name}"
        names[number] = name
    return names


def _text(value: Any) -> str:
    raw = value if isinstance(value, bytes) else getattr(value, "DW_LNCT_path", value)
    return raw.decode("utf-8", "replace") if isinstance(raw, bytes) else str(raw)
