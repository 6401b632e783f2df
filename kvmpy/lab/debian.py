# SPDX-License-Identifier: Apache-2.0
"""Kernel source from a Debian suite, through apt lists of its own: the machine's lists stay as they are."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmpy.lab import places, tools
from kvmpy.lab.errors import LabError
from kvmpy.lab.kernels import Say
from kvmpy.lab.process import call

DEFAULT_SUITE = "sid"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR_VARIABLE = "KVMPY_DEBIAN_MIRROR"
_HELPER = "/usr/lib/apt/apt-helper"
_SOURCES = (Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d"))
_URI = re.compile(r"\bhttps?://\S+/debian/?(?=\s|$)")
_SUITE = re.compile(r"[a-z][a-z0-9.-]*")
_PACKAGE = re.compile(r"linux-source-(\d+)\.(\d+)")
_TREE_MIB = 3500
_SECONDS = 1800.0
_SHOWN_AFTER = 5.0


@dataclass(frozen=True)
class Package:
    """A source package as the suite's index describes it; ``size`` is in bytes."""

    name: str
    version: str
    file: str
    size: int
    sha256: str

    @property
    def origin(self) -> str:
        """Name and version."""
        return f"{self.name} {self.version}"


def machine_mirror(sources: Sequence[Path] = _SOURCES) -> str:
    """Return the Debian mirror that this machine's own apt uses; LabError when it names none."""
    for source in sources:
        for file in sorted(source.iterdir()) if source.is_dir() else [source]:
            for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
                matched = None if line.lstrip().startswith("#") else _URI.search(line)
                if matched is not None:
                    return matched.group().rstrip("/")
    raise LabError(
        "apt on this machine knows no Debian mirror",
        f"name one in {MIRROR_VARIABLE}, or build with --source TREE",
    )


def apt_options(state: Path) -> list[str]:
    """Return the options that make apt's tools keep everything in *state* and read no other list."""
    options = {
        "Dir::Etc::sourcelist": state / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State": state,
        "Dir::State::Lists": state / "lists",
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
        "APT::Sandbox::User": "",
        "APT::Update::Post-Invoke-Success::": "",
    }
    return [word for key, value in options.items() for word in ("-o", f"{key}={value}")]


def source_line(suite: str, keyring: Path = KEYRING) -> str:
    """Return the line for sources.list; LabError for a name that is no suite's, or without Debian's keys."""
    if not _SUITE.fullmatch(suite):
        raise LabError(f"{suite!r} is not a Debian suite", "such as sid, trixie, bookworm-backports")
    if not keyring.is_file():
        raise LabError(
            f"{keyring} is missing: the kernel source could not be verified",
            f"install with: {'' if os.geteuid() == 0 else 'sudo '}apt-get install debian-archive-keyring",
        )
    mirror = os.environ.get(MIRROR_VARIABLE) or machine_mirror()
    return f"deb [signed-by={keyring}] {mirror} {suite} main\n"


def newest(search: str) -> str | None:
    """Return the newest ``linux-source-X.Y`` in the output of ``apt-cache search``, None without one."""
    matched = [match for line in search.splitlines() if (match := _PACKAGE.match(line.split(" ")[0]))]
    best = max(matched, key=lambda match: (int(match[1]), int(match[2])), default=None)
    return best[0] if best is not None else None


def parse_package(show: str) -> Package:
    """Return the first package that the output of ``apt-cache show`` describes."""
    fields = dict(line.split(": ", 1) for line in show.partition("\n\n")[0].splitlines() if ": " in line)
    try:
        file = fields["Filename"].rpartition("/")[2]
        return Package(
            fields["Package"], fields["Version"], file, int(fields["Size"]), fields["SHA256"].strip()
        )
    except (KeyError, ValueError) as error:
        raise LabError(f"apt-cache describes the package without a usable {error}") from error


def _run(
    command: list[str], action: str, folder: Path | None = None, tick: Callable[[float], None] | None = None
) -> str:
    environment = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            status = call(
                command,
                stdout=out,
                stderr=err,
                seconds=_SECONDS,
                environment=environment,
                folder=folder,
                tick=tick,
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{action} took longer than {_SECONDS:.0f} s") from error
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "replace"))
    problems = [line for line in texts[1].splitlines() if line.startswith(("E:", "Err:"))]
    if status != 0 or problems:
        lines = problems or texts[1].strip().splitlines()[-3:] or [f"status {status}"]
        raise LabError(f"{action} failed: {'; '.join(lines)}", _hint("\n".join(lines)))
    return texts[0]


def _hint(text: str) -> str:
    if "No space left" in text or "enough free space" in text:
        return "free some space, or set XDG_CACHE_HOME to a folder on a larger disk"
    return "is the network there, and the name right?"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class _Progress:
    """Tells how much of a file has come, now and then."""

    def __init__(self, folder: Path, size: int, say: Say) -> None:
        self._folder = folder
        self._size = size
        self._say = say
        self._next = _SHOWN_AFTER

    def __call__(self, passed: float) -> None:
        if passed >= self._next:
            self._next = passed + _SHOWN_AFTER
            have = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
            self._say(f"downloaded {have >> 20} of {self._size >> 20} MiB")


class Suite:
    """The kernel source packages of one Debian suite."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._state = places.cache() / "apt" / name
        self._line = source_line(name)

    def update(self, say: Say) -> None:
        """Read the suite's index, into a folder of the lab's own."""
        tools.need(tools.DEBIAN, "getting kernel source from Debian")
        for folder in ("lists/partial", "cache/archives/partial"):
            (self._state / folder).mkdir(parents=True, exist_ok=True)
        (self._state / "sources.list").write_text(self._line, encoding="utf-8")
        (self._state / "status").touch()
        say(f"reading the package index of Debian {self.name}")
        _run(
            ["apt-get", "-q", *apt_options(self._state), "update"],
            f"reading the index of Debian {self.name}",
        )

    def package(self) -> Package:
        """Return the newest kernel source package of the index."""
        options = apt_options(self._state)
        result = newest(
            _run(["apt-cache", *options, "search", "--names-only", "^linux-source-"], "searching the index")
        )
        if result is None:
            raise LabError(f"Debian {self.name} has no package linux-source-X.Y")
        return parse_package(
            _run(["apt-cache", *options, "show", "--no-all-versions", result], f"asking for {result}")
        )

    def _uri(self, package: Package) -> str:
        wanted = f"{package.name}={package.version}"
        options = [*apt_options(self._state), "download", "--print-uris", wanted]
        printed = _run(["apt-get", "-qq", *options], f"asking where {package.origin} is")
        if (match := re.match(r"'([^']+)' ", printed)) is None:
            raise LabError(f"apt-get does not tell where {package.origin} is: {printed.strip()!r}")
        return match[1]

    def download(self, package: Package, say: Say) -> Path:
        """Return the package file, downloaded and verified; one that is there is not fetched again."""
        folder = places.cache() / "downloads"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / package.file
        if target.is_file() and _sha256(target) == package.sha256:
            say(f"{package.file} is there already, its checksum is right")
            return target
        megabytes = package.size >> 20
        places.need_space(folder, megabytes + 64, f"downloading {package.file}")
        say(f"downloading {package.file} ({megabytes} MiB)")
        path = folder / "partial" / package.file
        path.parent.mkdir(exist_ok=True)
        # Unlike `apt-get download` the helper goes on where an earlier call stopped.
        _run(
            [_HELPER, *apt_options(self._state), "download-file", self._uri(package), str(path)],
            f"downloading {package.origin}",
            path.parent,
            _Progress(path.parent, package.size, say),
        )
        if not path.is_file():
            raise LabError(f"downloading {package.origin} left no file")
        if _sha256(path) != package.sha256:
            path.unlink()
            raise LabError(f"{package.file} has the wrong SHA-256 after the download", "try again")
        path.rename(target)
        return target


def unpack(deb: Path, package: Package, say: Say, suffix: str, patch: Callable[[Path, Say], None]) -> Path:
    """Return the kernel tree of the package *deb*, after *patch* changed it; one that is there is used again.

    *suffix* is part of the folder's name, and tells one patch from another.
    """
    root = places.cache() / "trees"
    tree = root / f"{package.name}_{package.version}{suffix}"
    if (tree / "Makefile").is_file():
        return tree
    places.need_space(root, _TREE_MIB, "unpacking and building the kernel")
    say("unpacking the source")
    work = root / f".{tree.name}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        _run(["dpkg-deb", "-x", str(deb), str(work)], f"unpacking {deb.name}")
        archive = next(iter((work / "usr" / "src").glob("linux-source-*.tar.*")), None)
        if archive is None:
            raise LabError(f"{deb.name} holds no usr/src/linux-source-*.tar")
        _run(["tar", "-xf", str(archive), "-C", str(work)], f"unpacking {archive.name}")
        tree_root = next((path.parent for path in work.glob("*/Makefile")), None)
        if tree_root is None:
            raise LabError(f"{archive.name} holds no kernel tree")
        patch(tree_root, say)
        tree_root.rename(tree)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return tree
