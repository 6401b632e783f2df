# SPDX-License-Identifier: Apache-2.0
"""An archive of one run on somebody's machine, to attach to a report: what is in it, and what is kept out."""

from __future__ import annotations

import io
import os
import tarfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from kvmpy.debug.record.anonymous import anonymous
from kvmpy.debug.record.format import RecordError
from kvmpy.owned import OwnedFolder
from kvmpy.testing.recording import SUFFIX
from kvmpy.testing.scrub import Scrubber


def write(
    target: Path, files: Mapping[str, bytes], folders: Iterable[tuple[str, Path]], scrubber: Scrubber
) -> list[str]:
    """Write *files* and what lies in *folders* as a ``.tar.gz`` for its owner; return the names that went in.

    Texts are scrubbed, also those in records, which go in without what the firmware says of its chip. A
    record that cannot be read stays out, and so does what is neither record nor text.
    """
    top = target.name.removesuffix(".tar.gz")
    names: list[str] = []
    temporary = target.with_name(f".{target.name}.new")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb") as stream:
            with tarfile.open(fileobj=stream, mode="w:gz") as archive:
                for name, data in files.items():
                    _add(archive, f"{top}/{name}", scrubber.text(data))
                    names.append(name)
                for name, folder in folders:
                    for path in sorted(folder.rglob("*")):
                        content = _content(path, scrubber)
                        if content is not None:
                            inside = f"{name}/{path.relative_to(folder)}"
                            _add(archive, f"{top}/{scrubber.string(inside)}", content)
                            names.append(inside)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return names


def _content(path: Path, scrubber: Scrubber) -> bytes | None:
    """Return what a file may give away; None where nobody can tell what is in it."""
    if path.is_symlink() or not path.is_file():
        return None
    if path.suffix == SUFFIX:
        return _record(path, scrubber)
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else scrubber.text(data)


def _record(path: Path, scrubber: Scrubber) -> bytes | None:
    """Return a record that names neither the machine nor anybody; None where it cannot be read."""
    with OwnedFolder("archive") as folder:
        target = folder / "record"
        try:
            anonymous(path, target, scrubber.string)
        except RecordError:
            return None
        return target.read_bytes()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = len(data), 0o600, int(time.time())
    archive.addfile(entry, io.BytesIO(data))
