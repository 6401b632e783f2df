# SPDX-License-Identifier: Apache-2.0
"""A guest program: compiled from C or assembly, or taken as an ELF, with its symbols and source lines."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

from kvmpy.core.address import Gva
from kvmpy.guest import cache, ctype, origin, packs, toolchain
from kvmpy.guest.ctype import CType
from kvmpy.guest.errors import GuestBuildError, GuestBuildWarning, GuestImageError, ToolchainError
from kvmpy.guest.packs import Places
from kvmpy.guest.symbols import Image, InlineTable, LineTable, Segment, Symbol, SymbolTable, read_image

# Part of every key: raise it when the format of cache entries changes.
_FORMAT = 1
_ELFCLASS64 = 2
_IMAGE = "program.elf"
_INDEX = "index.json"
_LINES = "lines.json"
_ARCHIVE = "libguest.a"

_lock = threading.RLock()
# What was asked for -> program; the headers it includes are looked at again each time.
_known: dict[tuple[object, ...], GuestProgram] = {}

StrPath = str | os.PathLike[str]
# Who fills the cache where that takes long: called with a program's key and recipe before gcc is, and before
# its line table is decoded.
elsewhere: Callable[[str, Mapping[str, Any]], None] | None = None
# Who collects programs: called with a program's digest, its index and its image.
collected: Callable[[str, Mapping[str, Any], bytes], None] | None = None


class GuestProgram:
    """An image that a guest can run, with its symbols and line table; it does not change."""

    def __init__(self, name: str, elf: bytes, image: Image, *, warning: str = "") -> None:
        self.name = name
        self.elf = elf
        self.warning = warning
        self.entry = Gva(image.entry)
        self._image = image
        self._inputs: tuple[tuple[str, tuple[int, int] | None], ...] = ()
        self._key = ""
        self._moved: tuple[Places, Places] | None = None
        self._types: dict[str, CType] = {}

    @classmethod
    def from_c(
        cls,
        source: str,
        *,
        name: str | None = None,
        cflags: Sequence[str] = (),
        sources: Sequence[StrPath] = (),
    ) -> GuestProgram:
        """Compile C *source*, and the files *sources*, link them with the runtime, and return the program.

        *cflags* are added for these sources.  Errors, assertions and line numbers point at the string literal
        in the file of the caller.  GuestBuildError with gcc's words, ToolchainError when gcc is missing.
        Cached by content.
        """
        return _inline(source, ".c", name, cflags, sources, origin.caller())

    @classmethod
    def from_asm(
        cls,
        source: str,
        *,
        name: str | None = None,
        cflags: Sequence[str] = (),
        sources: Sequence[StrPath] = (),
    ) -> GuestProgram:
        """Assemble *source* (with the C preprocessor) as :meth:`from_c` compiles C.

        It defines ``guest_main``, or ``_start`` when it does without the runtime's entry.
        """
        return _inline(source, ".S", name, cflags, sources, origin.caller())

    @classmethod
    def from_file(cls, *paths: StrPath, name: str | None = None, cflags: Sequence[str] = ()) -> GuestProgram:
        """Compile and link the files *paths* (.c, .S or .s), which define ``guest_main``."""
        if not paths:
            raise ValueError("from_file() needs at least one file")
        files = _files(paths)
        label = name or files[0].name
        program = _program((label, tuple(files), tuple(cflags)), label, None, files, tuple(cflags))
        _warn(program, origin.caller())
        return program

    @classmethod
    def from_elf(cls, elf: StrPath | bytes, *, name: str | None = None) -> GuestProgram:
        """Take a static x86-64 executable, by its path or as bytes; GuestImageError says what is wrong."""
        if isinstance(elf, bytes):
            data, label = elf, name or "ELF image"
        else:
            data, label = Path(elf).read_bytes(), name or Path(elf).name
        return cls(label, data, read_image(data, label))

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """What to load, in the order of addresses."""
        data = memoryview(self.elf)
        return tuple(
            Segment(Gva(gva), data[offset : offset + size], memsize, flags)
            for gva, offset, size, memsize, flags in self._image.segments
        )

    @cached_property
    def _symbols(self) -> SymbolTable:
        return SymbolTable(self.name, self._image.symbols)

    @cached_property
    def _lines(self) -> LineTable:
        return _lines(self._key, self.elf) if self._key else LineTable.of(self.elf)

    @cached_property
    def _inlined(self) -> InlineTable:
        return InlineTable(self.elf)

    @cached_property
    def bits(self) -> int:
        """The size of its code: 64, or 32 where it was compiled with ``-m32``."""
        return 64 if self.elf[4] == _ELFCLASS64 else 32

    @property
    def symbols(self) -> Mapping[str, Symbol]:
        """All symbols by name."""
        return MappingProxyType(self._symbols.by_name)

    def symbol(self, name: str) -> Symbol:
        """Return the symbol *name*; GuestSymbolError with the closest names when there is none."""
        return self._symbols.find(name)

    def address_of(self, name: str) -> Gva:
        """Return the address of the symbol *name*; GuestSymbolError when there is none."""
        return self._symbols.find(name).gva

    def type_of(self, name: str) -> CType:
        """Return the C type of the global *name*; GuestTypeError when there is no debug information of it."""
        if name not in self._types:
            self._types[name] = ctype.of_variable(self.elf, name, int(self.address_of(name)))
        return self._types[name]

    def function(self, gva: int) -> tuple[str, int] | None:
        """Return the function that *gva* lies in and the offset in it, or None."""
        return self._symbols.function(gva)

    def line(self, gva: int) -> tuple[str, int] | None:
        """Return (file, line) of the code at *gva*, or None where the program does not say."""
        found = self._lines.find(gva)
        return None if found is None else self.placed(*found)

    def placed(self, file: str, line: int) -> tuple[str, int]:
        """Return where a line of the program is on this machine: it may have been built on another one."""
        return (file, line) if self._moved is None else self._moved[0].moved(self._moved[1], file, line)

    def inlined(self, gva: int) -> list[tuple[str, str, int]]:
        """Return the calls that were inlined at *gva*, innermost first: function, and file and line of the
        call.
        """
        return [(name, *self.placed(file, line)) for name, file, line in self._inlined.find(gva)]

    def __repr__(self) -> str:
        size = sum(memsize for _, _, _, memsize, _ in self._image.segments)
        return f"<GuestProgram {self.name}, {size} bytes, entry {self.entry}>"


class _Source:
    """An inline source, with the line that tells the compiler where it comes from."""

    def __init__(self, text: str, suffix: str, where: origin.Origin) -> None:
        self.text = text
        self.suffix = suffix
        self.where = where

    def complete(self) -> str:
        return self.where.directive + self.text + ("" if self.text.endswith("\n") else "\n")

    def write(self, folder: Path) -> Path:
        path = folder / f"source{self.suffix}"
        path.write_text(self.complete(), encoding="utf-8", errors="surrogateescape")
        return path

    def explain(self, stderr: str, path: Path) -> str:
        """Return the messages with the linker's file names mended, and the lines that gcc could not show."""
        ours = re.compile(rf"^\S*/{re.escape(path.name)}:", re.MULTILINE)
        stderr = ours.sub(lambda _: f"{self.where.file}:", stderr)
        if self.where.exact:
            return stderr
        match = re.search(rf"^{re.escape(self.where.file)}:(\d+)", stderr, re.MULTILINE)
        if match is None:
            return stderr
        lines, lineno = self.text.splitlines(), int(match.group(1))
        shown = [
            f"{'>' if number == lineno else ' '} {number:4d} | {lines[number - 1]}"
            for number in range(max(1, lineno - 2), min(len(lines), lineno + 2) + 1)
        ]
        return stderr.rstrip() + "\n  in the source:\n" + "\n".join(shown)


def _files(paths: Sequence[StrPath]) -> list[Path]:
    files = []
    for given in paths:
        path = Path(given).absolute()
        if path.suffix not in toolchain.SUFFIXES:
            raise ValueError(f"{path} is not a source file: {', '.join(toolchain.SUFFIXES)}")
        if not path.is_file():
            raise FileNotFoundError(f"guest source {path} does not exist")
        files.append(path)
    return files


def _inline(
    source: str,
    suffix: str,
    name: str | None,
    cflags: Sequence[str],
    sources: Sequence[StrPath],
    frame: FrameType | None,
) -> GuestProgram:
    where = origin.find(source, frame)
    asked = (source, suffix, where, name, tuple(cflags), tuple(str(path) for path in sources))
    program = _known.get(asked)
    if program is None or not _unchanged(program):
        inline = _Source(source, suffix, where)
        program = _program(asked, name or where.label, inline, _files(sources), tuple(cflags))
    _warn(program, frame)
    return program


def _program(
    asked: tuple[object, ...], name: str, inline: _Source | None, files: list[Path], cflags: tuple[str, ...]
) -> GuestProgram:
    with _lock:
        program = _known.get(asked)
        if program is None or not _unchanged(program):
            program = _load_or_build(name, inline, files, cflags)
            _known[asked] = program
    return program


def _warn(program: GuestProgram, frame: FrameType | None) -> None:
    if program.warning:
        place = (frame.f_code.co_filename, frame.f_lineno) if frame is not None else ("<guest>", 1)
        text = f"guest program {program.name}:\n{program.warning}"
        warnings.warn_explicit(text, GuestBuildWarning, *place)


def _stamp(path: StrPath) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _unchanged(program: GuestProgram) -> bool:
    return all(_stamp(path) == stamp for path, stamp in program._inputs)


def _digest(path: StrPath) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return ""


def _load_or_build(
    name: str, inline: _Source | None, files: list[Path], cflags: tuple[str, ...]
) -> GuestProgram:
    places = Places(inline.where.file if inline else "", inline.where.line if inline else 0, _names(files))
    pack = packs.chosen()
    program = _from_pack(pack, name, _content(inline, files, cflags), places) if pack is not None else None
    if program is None:
        try:
            tools = toolchain.find()
        except ToolchainError as error:
            raise _lacking(name, pack, error) from None
        program = _from_cache(tools, name, inline, files, cflags)
    program._inputs += tuple((str(path), _stamp(path)) for path in files)
    if collected is not None and program._key:
        index = json.loads((cache.entry(program._key) / _INDEX).read_bytes())
        about = {"name": name, "places": asdict(places)}
        collected(_content(inline, files, cflags), {**index, **about}, program.elf)
    return program


def _names(files: Sequence[Path]) -> tuple[str, ...]:
    return tuple(str(path) for path in files)


def _hash(parts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(len(part)).encode() + b":" + part.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:40]


def _content(inline: _Source | None, files: list[Path], cflags: tuple[str, ...]) -> str:
    """Return a digest of what a program is made of, wherever that lies and whoever compiles it."""
    parts = [str(_FORMAT), *cflags]
    if inline is not None:
        parts += [inline.suffix, inline.text]
    for path in files:
        parts += [path.name, _digest(path)]
    return _hash(parts)


def digest_of(text: str, suffix: str) -> str:
    """Return the digest by which a pack knows the program of an inline source."""
    return _content(_Source(text, suffix, origin.Origin("", 1, exact=False)), [], ())


def build_text(text: str, suffix: str, file: str) -> GuestProgram:
    """Compile a source that stands in the Python file *file*, which nobody has called for yet."""
    where = origin.in_file(text, file, 1)
    with _lock:
        return _load_or_build(where.label, _Source(text, suffix, where), [], ())


def _from_pack(pack: packs.Pack, name: str, content: str, places: Places) -> GuestProgram | None:
    found = pack.find(content)
    return None if found is None else _read(*found, name, places)


def _lacking(name: str, pack: packs.Pack | None, error: ToolchainError) -> ToolchainError:
    if pack is None:
        return ToolchainError(error.missing, f"{error.how}; or name a pack of them with --pack: {packs.HOW}")
    return ToolchainError(
        f"the guest program {name}, which {pack.path.name} lacks ({error.missing})",
        f"{packs.HOW} and with these tests; or {error.how}",
    )


def _from_cache(
    tools: toolchain.Toolchain,
    name: str,
    inline: _Source | None,
    files: list[Path],
    cflags: tuple[str, ...],
) -> GuestProgram:
    parts = [str(_FORMAT), toolchain.runtime_hash(), tools.identity, name, *cflags]
    if inline is not None:
        parts += [inline.suffix, inline.complete()]
    for path in files:
        parts += [str(path), _digest(path)]
    key = _hash(parts)
    program = _load(key, name)
    if program is None:
        cache.drop(key)
        if elsewhere is not None:
            elsewhere(key, _recipe(name, inline, files, cflags))
            program = _load(key, name)
    if program is None:
        # What another process made, and this one cannot read, or not yet.
        cache.drop(key)
        cache.create(key, lambda workdir: _build(workdir, tools, name, inline, files, cflags))
        program = _load(key, name)
        if program is None:
            raise GuestImageError(f"guest program {name} cannot be read back from {cache.entry(key)}")
    program._key = key
    return program


def _recipe(name: str, inline: _Source | None, files: list[Path], cflags: tuple[str, ...]) -> dict[str, Any]:
    recipe: dict[str, Any] = {"name": name, "files": [str(path) for path in files], "cflags": list(cflags)}
    if inline is not None:
        recipe["inline"] = {"text": inline.text, "suffix": inline.suffix, "where": asdict(inline.where)}
    return recipe


def build_recipe(recipe: Mapping[str, Any]) -> str:
    """Do what another process's `elsewhere` was called for, in this one's cache; return the program's key."""
    if "lines" in recipe:
        key = str(recipe["lines"])
        _lines(key, (cache.entry(key) / _IMAGE).read_bytes())
        return key
    inline = None
    if "inline" in recipe:
        part = recipe["inline"]
        inline = _Source(part["text"], part["suffix"], origin.Origin(**part["where"]))
    files = [Path(name) for name in recipe["files"]]
    with _lock:
        return _load_or_build(recipe["name"], inline, files, tuple(recipe["cflags"]))._key


def _load(key: str, name: str) -> GuestProgram | None:
    """Return the cached program, or None: not there, damaged, or a header that it includes has changed."""
    entry = cache.entry(key)
    try:
        index, elf = (entry / _INDEX).read_bytes(), (entry / _IMAGE).read_bytes()
    except OSError:
        return None
    return _read(index, elf, name)


def _read(text: bytes, elf: bytes, name: str, places: Places | None = None) -> GuestProgram | None:
    """Return the program of an index and an image; with *places* that of a pack, whose source lies there."""
    try:
        index: dict[str, Any] = json.loads(text)
        image = Image(
            index["entry"],
            tuple(
                (gva, offset, size, memsize, flags) for gva, offset, size, memsize, flags in index["segments"]
            ),
            tuple((symbol, gva, size, kind) for symbol, gva, size, kind in index["symbols"]),
        )
        sound = index["sha256"] == hashlib.sha256(elf).hexdigest()
        headers = [(str(path), str(wanted)) for path, wanted in index["headers"]]
        program = GuestProgram(name, elf, image, warning=str(index["warning"]))
        if places is not None:
            built = index["places"]
            program._moved = Places(built["file"], built["line"], tuple(built["files"])), places
            headers = [(program.placed(path, 0)[0], wanted) for path, wanted in headers]
    except (ValueError, KeyError, TypeError):
        return None
    program._inputs = tuple((path, _stamp(path)) for path, _ in headers)
    if not sound or any(_digest(path) != wanted for path, wanted in headers):
        return None
    return program


def _lines(key: str, elf: bytes) -> LineTable:
    file = cache.entry(key) / _LINES
    if elsewhere is not None:
        elsewhere(key, {"lines": key})
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return LineTable.load(file.read_text(encoding="utf-8"))
    table = LineTable.of(elf)
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as part:
            part.write(table.dump())
        os.replace(part.name, file)
    return table


def _build(
    workdir: Path,
    tools: toolchain.Toolchain,
    name: str,
    inline: _Source | None,
    files: list[Path],
    cflags: tuple[str, ...],
) -> None:
    bits = _bits(cflags)
    runtime = _runtime(tools, bits)
    sources = list(files)
    include: list[str] = []
    if inline is not None:
        sources.insert(0, inline.write(workdir))
        if inline.where.folder:
            include = ["-iquote", inline.where.folder]
    target = workdir / _IMAGE
    try:
        objects, headers, said = toolchain.compile_objects(
            tools, sources, workdir, cflags=[*include, *cflags], name=name, bits=bits
        )
        said += toolchain.link(tools, objects, runtime, target, name=name, bits=bits)
    except GuestBuildError as error:
        if inline is None:
            raise
        raise GuestBuildError(name, inline.explain(error.stderr, sources[0]), error.command) from None
    elf = target.read_bytes()
    image = read_image(elf, name)
    index = {
        "entry": image.entry,
        "segments": image.segments,
        "symbols": image.symbols,
        "headers": [(str(path), _digest(path)) for path in headers],
        "warning": said.strip(),
        "sha256": hashlib.sha256(elf).hexdigest(),
    }
    for leftover in workdir.glob("*.[od]"):
        leftover.unlink()
    (workdir / _INDEX).write_text(json.dumps(index))


def _bits(cflags: Sequence[str]) -> int:
    return 32 if "-m32" in cflags else 64


def _runtime(tools: toolchain.Toolchain, bits: int) -> Path:
    """Return the archive of the runtime, which is compiled when these tools have not done so before."""
    toolchain.check_target(tools)
    text = f"{_FORMAT} {toolchain.runtime_hash()} {tools.identity}" + (" 32" if bits == 32 else "")
    key = "runtime-" + hashlib.sha256(text.encode()).hexdigest()[:40]
    archive = cache.entry(key) / _ARCHIVE
    if not archive.is_file():

        def build(workdir: Path) -> None:
            name = "the guest runtime"
            sources = toolchain.runtime_sources(bits)
            objects, _, _ = toolchain.compile_objects(tools, sources, workdir, name=name, bits=bits)
            toolchain.archive(tools, objects, workdir / _ARCHIVE)
            for leftover in workdir.glob("*.[od]"):
                leftover.unlink()

        cache.create(key, build)
    return archive
