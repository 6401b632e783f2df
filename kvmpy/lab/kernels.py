# SPDX-License-Identifier: Apache-2.0
"""The kernels in the cache: each a folder with bzImage, config and some facts, made by one rename."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kvmpy.lab import places
from kvmpy.lab.coverage.kept import ARCHIVE
from kvmpy.lab.errors import LabError

Say = Callable[[str], None]

# Documentation/arch/x86/boot.rst
_SIGNATURE_AT = 0x1FE
_HEADER_AT = 0x202
_VERSION_POINTER_AT = 0x20E
_SETUP = 0x200
_MIN_SIZE = 0x260
_POLL = 0.5


@dataclass(frozen=True)
class Kernel:
    """A kernel of the cache; ``config_hash`` is empty where the configuration is unknown.

    ``soft_sev``: it has the software AMD-SP. ``extra`` names what its configuration has besides the lab's:
    such a kernel is booted when it is asked for by name, or when there is no other. ``build_id`` is the
    linker's, in hexadecimal, empty where it is unknown. ``bugs`` are the numbers of the catalogue's bugs in
    it; such a kernel, too, is booted only by name.
    """

    name: str
    release: str
    origin: str
    sha256: str
    config_hash: str
    folder: Path
    soft_sev: bool = False
    extra: str = ""
    build_id: str = ""
    bugs: Sequence[int] = ()

    @property
    def coverage(self) -> Path | None:
        """The archive of a kernel that counts what KVM executes, None for any other."""
        path = self.folder / ARCHIVE
        return path if self.folder.parent == _folder() and path.is_file() else None

    @property
    def options(self) -> str:
        """What kvmpy's own build had besides the source, as a hash; empty for other trees and images."""
        return self.origin.partition(", options ")[2]

    @property
    def image(self) -> Path:
        """The bzImage."""
        return self.folder / "bzImage"

    def serves(self, soft_sev: bool) -> bool:
        """Whether it will do for who names no kernel, with *soft_sev* for who wants the software AMD-SP."""
        return not self.extra and not self.bugs and (self.soft_sev or not soft_sev)


def image_release(image: Path) -> str:
    """Return the release in a bzImage's header; LabError when *image* is no bzImage."""
    try:
        with image.open("rb") as stream:
            head = stream.read(1 << 16)
    except OSError as error:
        raise LabError(f"{image} cannot be read: {error.strerror}") from error
    if (
        len(head) < _MIN_SIZE
        or head[_SIGNATURE_AT : _SIGNATURE_AT + 2] != b"\x55\xaa"
        or head[_HEADER_AT : _HEADER_AT + 4] != b"HdrS"
    ):
        hint = "pass arch/x86/boot/bzImage of the build folder"
        if head[:4] == b"\x7fELF":
            hint = f"it is an ELF file such as vmlinux: {hint}"
        raise LabError(f"{image} is not a bzImage: it has no x86 boot header", hint)
    (pointer,) = struct.unpack_from("<H", head, _VERSION_POINTER_AT)
    text = head[pointer + _SETUP :].partition(b"\0")[0].decode("ascii", "replace") if pointer else ""
    return text.split()[0] if text.split() else "unknown"


def _folder() -> Path:
    return places.cache() / "kernels"


def _load(folder: Path) -> Kernel | None:
    try:
        facts = json.loads((folder / "kernel.json").read_text(encoding="utf-8"))
        return Kernel(folder=folder, **facts)
    except (OSError, ValueError, TypeError):
        return None


def _age_order(kernel: Kernel) -> tuple[list[int], float]:
    numbers = [int(part) for part in re.findall(r"\d+", kernel.release)[:3]]
    return numbers, (kernel.folder / "kernel.json").stat().st_mtime


def cached() -> list[Kernel]:
    """Return the kernels of the cache, the newest release first."""
    try:
        folders = [path for path in _folder().iterdir() if not path.name.startswith(".")]
    except OSError:
        return []
    matches = [kernel for kernel in map(_load, folders) if kernel is not None and kernel.image.is_file()]
    return sorted(matches, key=_age_order, reverse=True)


def _matches(kernel: Kernel, wanted: str) -> bool:
    if kernel.name == wanted or kernel.release == wanted:
        return True
    return kernel.release.startswith(wanted) and not kernel.release[len(wanted)].isdigit()


def find(
    wanted: str | None = None, *, soft_sev: bool = False, coverage: bool = False, bugs: bool = False
) -> Kernel:
    """Return the cached kernel of name or release *wanted* (``7.2``: the newest 7.2.x), or the newest.

    A path to a bzImage gives a kernel that is not in the cache. With *soft_sev* only kernels with the
    software AMD-SP count, else those without it come first; those with further options come last. With
    *coverage* only those count that were built for it, with *bugs* those with the catalogue; without, such a
    one must be named in full. LabError when there is none.
    """
    if wanted is not None and ("/" in wanted or Path(wanted).is_file()):
        image = Path(wanted).absolute()
        if coverage:
            raise LabError(
                f"{image} is not in the cache: nobody knows what it counts", "kvmpy lab build --coverage"
            )
        return loose(image, f"file {image}", soft_sev=soft_sev)
    everything = sorted(cached(), key=lambda kernel: (bool(kernel.extra), kernel.soft_sev))
    everything = [kernel for kernel in everything if bool(kernel.bugs) == bugs or kernel.name == wanted]
    if soft_sev:
        everything = [kernel for kernel in everything if kernel.soft_sev]
    if coverage:
        everything = [kernel for kernel in everything if kernel.coverage]
    kind, option = (" with the software AMD-SP", " --soft-sev") if soft_sev else ("", "")
    if coverage:
        kind, option = f"{kind} that counts what KVM executes", f"{option} --coverage"
    if bugs:
        kind, option = f"{kind} with the bug catalogue", f"{option} --bugs"
    if not everything:
        raise LabError(
            f"there is no lab kernel{kind}", f"build one: kvmpy lab build{option} (7 minutes on two cores)"
        )
    if wanted is None:
        return everything[0]
    for kernel in everything:
        if _matches(kernel, wanted):
            return kernel
    known = ", ".join(kernel.name for kernel in everything)
    raise LabError(
        f"there is no lab kernel {wanted}{kind}", f"there are: {known}; or build it: kvmpy lab build{option}"
    )


class _Loose(Kernel):
    """A bzImage outside of the cache; its name is its path."""

    @property
    def image(self) -> Path:
        return Path(self.name)


def loose(image: Path, origin: str, *, soft_sev: bool = False) -> Kernel:
    """Return the kernel of a bzImage that is not in the cache; LabError where it is none."""
    release = image_release(image)
    digest = hashlib.sha256(image.read_bytes()).hexdigest()
    return _Loose(str(image), release, origin, digest, "", image.parent, soft_sev)


def register(
    image: Path,
    origin: str,
    config: Path | None = None,
    *,
    soft_sev: bool = False,
    extra: str = "",
    build_id: str = "",
    bugs: Sequence[int] = (),
    beside: Sequence[Path] = (),
) -> Kernel:
    """Copy the bzImage *image* into the cache and return its entry; one that is there already is replaced.

    *beside* are further files of the entry.
    """
    release = image_release(image)
    data = image.read_bytes()
    text = config.read_bytes() if config is not None else b""
    digest = hashlib.sha256(data).hexdigest()
    config_hash = hashlib.sha256(text).hexdigest()[:8] if text else ""
    name = f"{release}-{config_hash or digest[:8]}{'-softsev' if soft_sev else ''}{'-bugs' if bugs else ''}"
    root = _folder()
    size = len(data) + sum(file.stat().st_size for file in beside)
    places.need_space(root, (size >> 20) + 16, "keeping the kernel")
    root.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
    try:
        fresh.chmod(0o755)
        (fresh / "bzImage").write_bytes(data)
        if text:
            (fresh / "config").write_bytes(text)
        for file in beside:
            shutil.copy(file, fresh)
        facts = asdict(
            Kernel(name, release, origin, digest, config_hash, fresh, soft_sev, extra, build_id, bugs)
        )
        del facts["folder"]
        (fresh / "kernel.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        target = root / name
        with contextlib.suppress(FileNotFoundError):
            _put_aside(target)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    kernel = _load(target)
    if kernel is None:
        raise LabError(f"{target} was removed while it was made")
    return kernel


def _put_aside(folder: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix=".old-", dir=folder.parent))
    try:
        folder.rename(aside / "kernel")
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove(kernel: Kernel) -> None:
    """Remove *kernel* from the cache."""
    with contextlib.suppress(FileNotFoundError):
        _put_aside(kernel.folder)


@contextlib.contextmanager
def build_lock(say: Say, patience: float = 3600.0) -> Iterator[bool]:
    """Hold the lock that keeps two builds apart; yields whether it had to be waited for.

    LabError when another build holds it for longer than *patience* seconds.
    """
    path = places.cache() / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as stream:
        waited = False
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waited:
                    stream.seek(0)
                    say(f"another lab build is running (pid {stream.read().strip() or 'unknown'}): waiting")
                    waited = True
            if time.monotonic() > end:
                raise LabError(f"another lab build has held {path} for {patience:.0f} s")
            time.sleep(_POLL)
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        yield waited
