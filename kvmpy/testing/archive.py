# SPDX-License-Identifier: Apache-2.0
"""An archive of one run on somebody's machine, to attach to a report: what is in it, and what is kept out."""

from __future__ import annotations

import errno
import getpass
import io
import os
import platform
import re
import tarfile
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from kvmpy.debug.record.anonymous import anonymous
from kvmpy.debug.record.format import RecordError

_DMI = Path("/sys/class/dmi/id")
_PUBLIC_DMI = (
    "sys_vendor",
    "product_name",
    "board_vendor",
    "board_name",
    "bios_vendor",
    "bios_version",
    "bios_date",
)
_ADDRESS = re.compile(rb"\b(?:[0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}\b")
_IPV4 = re.compile(rb"\b(?:[0-9]{1,3}\.){3}[0-9]{1,3}\b(?!\.)")
_RECORD_SIZE = 8192


class KernelLog:
    """The kernel's messages from now on (``/dev/kmsg``)."""

    def __init__(self, path: Path = Path("/dev/kmsg")) -> None:
        self.missing = ""
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            self.missing = f"{path}: {error.strerror}: run as root, or sysctl kernel.dmesg_restrict=0"

    def read(self) -> str:
        """Return what has been logged since the last call, a line for each message; "" without permission."""
        lines: list[str] = []
        while self._fd >= 0:
            try:
                record = os.read(self._fd, _RECORD_SIZE)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.EPIPE:
                    raise
                lines.append("(messages were overwritten before they were read)")
                continue
            if not record:
                break
            lines.append(message(record))
        return "".join(f"{line}\n" for line in lines)

    def close(self) -> None:
        """Close it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def message(record: bytes) -> str:
    """Return a record of ``/dev/kmsg`` as dmesg prints it (Documentation/ABI/testing/dev-kmsg)."""
    head, _, text = record.decode("utf-8", "replace").partition(";")
    micros = int(head.split(",")[2])
    return f"[{micros / 1e6:12.6f}] {text.splitlines()[0] if text else ''}"


def machine() -> dict[str, str]:
    """Return what names the machine's kind: model, BIOS, kernel, microcode; nothing that names this one."""
    found = {"kernel": platform.release(), "version": platform.version()}
    for name in _PUBLIC_DMI:
        try:
            found[name] = (_DMI / name).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            continue
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return found
    for line in text.partition("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "cpu family", "model", "stepping", "microcode"):
            found[name.strip()] = value.strip()
    return found


class Scrubber:
    """Takes host, user and network names out of texts, so that an archive names no machine and nobody."""

    def __init__(self, host: str | None = None, user: str | None = None, home: str | None = None) -> None:
        host = platform.node() if host is None else host
        names = {
            home if home is not None else str(Path.home()): b"~",
            host: b"<host>",
            host.partition(".")[0]: b"<host>",
            user if user is not None else _user(): b"<user>",
        }
        self._words = [
            (re.compile(rb"(?<![A-Za-z0-9_])" + re.escape(name.encode()) + rb"(?![A-Za-z0-9_])"), new)
            for name, new in sorted(names.items(), key=lambda item: -len(item[0]))
            if len(name) > 2 and name not in ("root", "localhost", "/root")
        ]

    def text(self, data: bytes) -> bytes:
        """Return *data* without the names, MAC and IP addresses."""
        for pattern, new in self._words:
            data = pattern.sub(new, data)
        return _IPV4.sub(_hide_address, _ADDRESS.sub(b"<mac>", data))


def _hide_address(match: re.Match[bytes]) -> bytes:
    # Versions such as 6.18.2.1 look the same; only what can be an address goes.
    parts = [int(part) for part in match[0].split(b".")]
    return b"<ip>" if all(part < 256 for part in parts) and parts[0] >= 10 else match[0]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


def write(
    target: Path, files: Mapping[str, bytes], folders: Iterable[tuple[str, Path]], scrubber: Scrubber
) -> list[str]:
    """Write *files* and what lies in *folders* as a ``.tar.gz``; return the names that went in.

    Texts are scrubbed, also those in records, which go in without what the firmware says of its chip; a
    record that cannot be read stays out.
    """
    top = target.name.removesuffix(".tar.gz")
    names: list[str] = []
    temporary = target.with_name(f".{target.name}.new")
    try:
        with tarfile.open(temporary, "w:gz") as archive:
            for name, data in files.items():
                _add(archive, f"{top}/{name}", scrubber.text(data))
                names.append(name)
            for name, folder in folders:
                for path in sorted(folder.rglob("*")):
                    if path.is_file() and not path.is_symlink():
                        content = _record(path, scrubber) if path.suffix == ".rec" else path.read_bytes()
                        if content is not None:
                            inside = f"{name}/{path.relative_to(folder)}"
                            _add(archive, f"{top}/{inside}", content)
                            names.append(inside)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return names


def _record(path: Path, scrubber: Scrubber) -> bytes | None:
    """Return a record that names neither the machine nor anybody; None where it cannot be read."""
    with tempfile.TemporaryDirectory(prefix="kvmpy-archive-") as folder:
        target = Path(folder) / "record"
        try:
            anonymous(path, target, lambda text: scrubber.text(text.encode()).decode())
        except RecordError:
            return None
        return target.read_bytes()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = len(data), 0o644, int(time.time())
    archive.addfile(entry, io.BytesIO(data))
