# SPDX-License-Identifier: Apache-2.0
"""A manifest says in JSON what an SNP guest is launched from; its digest is what the firmware will measure.

``{"pages": [{"gpa": "0x1000", "type": "normal", "file": "x.bin"}, {"gpa": 8192, "type": "zero", "pages": 2}],
"vmsas": ["vmsa0.bin"]}``: pages in the order of the launch, then one save area for each vCPU.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from kvmpy.coco.snp_digest import GPA_LIMIT, PAGE_SIZE, PageType, SnpDigest, file_page_digests
from kvmpy.parsing import MalformedError, parse_json

_TYPES = {kind.name.lower(): kind for kind in PageType if kind is not PageType.VMSA}

MAX_PAGES = 1 << 24
"""Pages without contents in one manifest, 64 GiB: every one of them takes a SHA-384."""


class ManifestError(ValueError):
    """A manifest that cannot be measured; the message names the entry."""


@dataclass(frozen=True)
class PageRun:
    """Pages of one type from *gpa* on; *file* has their contents where they are measured."""

    gpa: int
    type: PageType
    pages: int
    file: Path | None = None

    @property
    def end(self) -> int:
        """The first address behind the last page."""
        return self.gpa + self.pages * PAGE_SIZE


@dataclass(frozen=True)
class Manifest:
    """What is launched: runs of pages, then save areas, in order."""

    runs: tuple[PageRun, ...]
    vmsas: tuple[Path, ...]

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a JSON file; file names in it are relative to its folder."""
        try:
            data = parse_json(path.read_bytes())
        except MalformedError as error:
            raise ManifestError(f"{path}: {error}") from None
        return cls.parse(data, path.parent)

    @classmethod
    def parse(cls, data: object, folder: Path) -> Manifest:
        """Check a manifest that is decoded already."""
        if not isinstance(data, dict):
            raise ManifestError("a manifest is a JSON object with the keys 'pages' and 'vmsas'")
        unknown = sorted(set(data) - {"pages", "vmsas"})
        if unknown:
            raise ManifestError(f"a manifest has no key {unknown[0]!r}; known: 'pages', 'vmsas'")
        runs = tuple(
            _run(f"pages[{index}]", entry, folder)
            for index, entry in enumerate(_list(data.get("pages", []), "pages"))
        )
        _refuse_overlap(runs)
        if (pages := sum(run.pages for run in runs if run.file is None)) > MAX_PAGES:
            raise ManifestError(f"{pages} pages without a file: {MAX_PAGES} of them are measured at most")
        vmsas = []
        for index, name in enumerate(_list(data.get("vmsas", []), "vmsas")):
            file = _file(f"vmsas[{index}]", name, folder)
            if file.stat().st_size != PAGE_SIZE:
                raise ManifestError(
                    f"vmsas[{index}]: {file} has {file.stat().st_size} bytes, a VMSA has {PAGE_SIZE}"
                )
            vmsas.append(file)
        return cls(runs, tuple(vmsas))

    def digest(self, processes: int = 1, start: bytes | None = None) -> SnpDigest:
        """Return the launch digest, *start* being that of what was launched before.

        Large files are hashed by that many *processes*.
        """
        digest = SnpDigest() if start is None else SnpDigest(start)
        for run in self.runs:
            if run.file is None:
                digest.add(run.type, run.gpa, pages=run.pages)
            else:
                hashes = file_page_digests(run.file, processes)
                digest.add_digests(run.type, run.gpa, hashes, count=run.pages)
        for vmsa in self.vmsas:
            digest.add_vmsa(vmsa.read_bytes())
        return digest


def _list(value: object, key: str) -> Sequence[object]:
    if not isinstance(value, list):
        raise ManifestError(f"{key!r} is a list, not {json.dumps(value)}")
    return value


def _run(where: str, entry: object, folder: Path) -> PageRun:
    if not isinstance(entry, dict):
        raise ManifestError(f"{where}: an object with 'gpa' and 'type' is expected, not {json.dumps(entry)}")
    unknown = sorted(set(entry) - {"gpa", "type", "file", "pages"})
    if unknown:
        raise ManifestError(f"{where}: no key {unknown[0]!r}; known: 'gpa', 'type', 'file', 'pages'")
    kind = _TYPES.get(entry["type"]) if isinstance(entry.get("type"), str) else None
    if kind is None:
        raise ManifestError(f"{where}: 'type' is one of {', '.join(_TYPES)}, not {entry.get('type')!r}")
    gpa = _number(where, "gpa", entry.get("gpa"))
    if gpa % PAGE_SIZE:
        raise ManifestError(f"{where}: gpa {gpa:#x} is not aligned to {PAGE_SIZE:#x}")
    if kind is PageType.NORMAL:
        if "pages" in entry:
            raise ManifestError(f"{where}: the file of a normal page says how many pages there are")
        file = _file(where, entry.get("file"), folder)
        size = file.stat().st_size
        if not size or size % PAGE_SIZE:
            raise ManifestError(f"{where}: {file} has {size} bytes, which is not a whole number of pages")
        run = PageRun(gpa, kind, size // PAGE_SIZE, file)
    else:
        if "file" in entry:
            raise ManifestError(
                f"{where}: the contents of {kind.name.lower()} pages are not measured: no 'file'"
            )
        pages = _number(where, "pages", entry.get("pages", 1))
        if pages < 1:
            raise ManifestError(f"{where}: 'pages' is at least 1")
        run = PageRun(gpa, kind, pages)
    if run.end > GPA_LIMIT:
        raise ManifestError(f"{where}: {run.end:#x} is beyond the guest-physical address space")
    return run


def _number(where: str, key: str, value: Any) -> int:
    if isinstance(value, str):
        try:
            value = int(value, 0)
        except ValueError:
            raise ManifestError(f"{where}: {key!r} is not a number: {value!r}") from None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ManifestError(f'{where}: {key!r} is a number such as 4096 or "0x1000", not {value!r}')
    return value


def _file(where: str, name: object, folder: Path) -> Path:
    if not isinstance(name, str) or not name:
        raise ManifestError(f"{where}: a file name is missing")
    path = folder / name
    try:
        if path.is_file():
            return path
    except (OSError, ValueError) as error:
        raise ManifestError(f"{where}: {name[:200]!r} is no file name: {error}") from None
    raise ManifestError(f"{where}: no file {path}")


def _refuse_overlap(runs: Sequence[PageRun]) -> None:
    placed = sorted(enumerate(runs), key=lambda item: item[1].gpa)
    for (first, low), (second, high) in pairwise(placed):
        if high.gpa < low.end:
            raise ManifestError(
                f"pages[{second}] at {high.gpa:#x} overlaps pages[{first}], "
                f"{low.gpa:#x} to {low.end - 1:#x}: the firmware takes a page once"
            )
