# SPDX-License-Identifier: Apache-2.0
"""Counters from a copy of /sys/kernel/debug/gcov: a folder, or a tar archive, with .gcda files."""

from __future__ import annotations

import os
import tarfile
import tempfile
from pathlib import Path

from kvmpy.lab.coverage.counters import DATA, Counters, CountersError
from kvmpy.lab.coverage.model import Model
from kvmpy.lab.coverage.store import Counted, Coverage, Writer
from kvmpy.lab.errors import LabError

_MAX_FILE = 4 << 20


def add(coverage: Coverage, source: Path, suite: str, test: str) -> str:
    """Add the counters in *source* as what *test* of *suite* caused; return what was added.

    LabError where there are none, or they are of another kernel.
    """
    with tempfile.TemporaryDirectory(prefix="kvmpy-gcda-") as name:
        folder = Path(name)
        for path, data in _files(source):
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        (folder / "reset").touch()
        try:
            counters = Counters(folder)
        except CountersError:
            raise LabError(f"{source} has no {DATA} files", "copy /sys/kernel/debug/gcov") from None
        try:
            data = counters.take()
        except CountersError as error:
            raise LabError(f"{source}: {error}") from error
        finally:
            counters.close()
    names = [_object(coverage, each) for each in counters.names]
    model = Model(coverage.kept)
    try:
        lines, functions = model.executed(Counted(suite, test, 0.0, data, names))
    except LabError as error:
        facts = coverage.facts
        raise LabError(
            f"{error}; the folder is about {facts.kernel}, build id {facts.build_id}",
            "import them into a folder of the kernel that counted",
        ) from error
    writer = Writer(coverage.folder, suite)
    writer.objects(names)
    writer.add(test, 0.0, data)
    if writer.failure:
        raise LabError(writer.failure)
    return f"{test} of {suite}: {len(lines)} lines, {len(functions)} functions"


def _object(coverage: Coverage, name: str) -> str:
    """Return the object that a file, wherever the copy begins, is about."""
    found = [each for each in coverage.kept.objects if name == each or name.endswith(f"/{each}")]
    return max(found, key=len, default=name)


def _files(source: Path) -> list[tuple[str, bytes]]:
    found = []
    if source.is_dir():
        for path in sorted(source.rglob(f"*{DATA}")):
            if path.is_file():
                found.append((path.relative_to(source).as_posix(), path.read_bytes()))
        return found
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                # Links are the notes, which are kept with the kernel.
                stream = archive.extractfile(member) if member.isfile() else None
                name = os.path.normpath("/" + member.name).lstrip("/")
                if stream is not None and name.endswith(DATA) and member.size <= _MAX_FILE:
                    found.append((name, stream.read()))
    except (OSError, tarfile.TarError) as error:
        raise LabError(f"{source} is neither a folder nor a tar archive: {error}") from error
    return found
