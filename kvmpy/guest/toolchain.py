# SPDX-License-Identifier: Apache-2.0
"""gcc and binutils: find them, compile the runtime once, compile and link guest programs."""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmpy.guest.errors import GuestBuildError, ToolchainError

INSTALL = "apt install gcc binutils (dnf install gcc binutils, pacman -S gcc binutils)"
# A compiler that takes longer than this is stuck.
TIMEOUT = 120.0

# What the guest may count on: no stack below RSP, no vector registers, no code that needs a loader. Aligned
# jump targets would put NOPs on paths that some hosts emulate one instruction at a time. A function that ends
# with a jump to another would be missing in backtraces.
FLAGS = (
    "-std=gnu11",
    "-O2",
    "-g",
    "-ffreestanding",
    "-fno-pic",
    "-fno-pie",
    "-mcmodel=small",
    "-mno-red-zone",
    "-mgeneral-regs-only",
    "-fno-omit-frame-pointer",
    "-fno-optimize-sibling-calls",
    "-fno-stack-protector",
    "-fno-stack-clash-protection",
    "-fcf-protection=none",
    "-fno-asynchronous-unwind-tables",
    "-fno-align-jumps",
    "-fno-align-loops",
    "-fno-align-labels",
    "-fdiagnostics-color=never",
    "-Wall",
    "-Werror=implicit-function-declaration",
    "-Werror=incompatible-pointer-types",
    "-Werror=int-conversion",
    "-Werror=return-type",
)
# What a 32-bit program is compiled with besides: structures are laid out as the host knows them.
FLAGS_32 = ("-m32", "-malign-double", "-Wno-pointer-to-int-cast", "-Wno-int-to-pointer-cast")
_LONG_MODE_ONLY = frozenset({"-mcmodel=small", "-mno-red-zone"})
LINK_FLAGS = (
    "-static",
    "-nostdlib",
    "-no-pie",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
    "-Wl,-z,max-page-size=4096",
)
SUFFIXES = (".c", ".S", ".s")


@dataclass(frozen=True)
class Toolchain:
    """The compiler driver and the archiver; ``.identity`` changes when either does."""

    cc: str
    ar: str
    identity: str


def _find(name: str, path: str | None, variable: str, package: str) -> str:
    program = shutil.which(name, path=path)
    if program is None:
        raise ToolchainError(
            f"{name} not found: guest programs cannot be built", f"apt install {package}, or set {variable}"
        )
    return program


def _identity(path: str) -> str:
    real = Path(path).resolve()
    status = real.stat()
    return f"{real} {status.st_size} {status.st_mtime_ns}"


def find() -> Toolchain:
    """Return the tools, by default ``gcc`` and ``ar`` in PATH, else what KVMPY_CC and KVMPY_AR name.

    ToolchainError names what is missing and the command that installs it.
    """
    return _find_in(
        os.environ.get("PATH"), os.environ.get("KVMPY_CC") or "gcc", os.environ.get("KVMPY_AR") or "ar"
    )


@functools.lru_cache(maxsize=8)
def _find_in(path: str | None, cc_name: str, ar_name: str) -> Toolchain:
    cc = _find(cc_name, path, "KVMPY_CC", "gcc")
    ar = _find(ar_name, path, "KVMPY_AR", "binutils")
    return Toolchain(cc, ar, f"{_identity(cc)} {_identity(ar)}")


@functools.cache
def runtime_dir() -> Path:
    """Return the folder of the guest runtime: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "guest_asm", package.parent / "guest_asm"):
        if (candidate / "guest.lds").is_file():
            return candidate
    raise ToolchainError("guest_asm, the guest runtime, is not beside the package", "reinstall kvmpy")


@functools.cache
def runtime_files() -> tuple[Path, ...]:
    """Return every file of the guest runtime, in a fixed order."""
    root = runtime_dir()
    return tuple(
        sorted(
            path for path in root.rglob("*") if path.suffix in {".c", ".h", ".S", ".lds"} and path.is_file()
        )
    )


@functools.cache
def runtime_hash() -> str:
    """Return a digest of all that goes into the runtime except the compiler."""
    digest = hashlib.sha256(repr((FLAGS, FLAGS_32, LINK_FLAGS)).encode())
    for path in runtime_files():
        digest.update(str(path.relative_to(runtime_dir())).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def run(command: Sequence[str], *, cwd: Path, name: str) -> str:
    """Run one tool and return its stderr; GuestBuildError when it fails, ToolchainError when it is broken."""
    try:
        done = subprocess.run(
            list(command),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        said = f"{command[0]} did not finish in {TIMEOUT:.0f} s"
        raise GuestBuildError(name, said, shlex.join(command)) from error
    except OSError as error:
        raise ToolchainError(f"{command[0]} cannot be run: {error.strerror}", INSTALL) from error
    if done.returncode == 0:
        return done.stderr
    said = done.stderr or done.stdout or f"exit status {done.returncode}"
    missing = _missing_tool(said)
    if missing is not None:
        raise ToolchainError(missing, INSTALL)
    raise GuestBuildError(name, said, shlex.join(command))


def _missing_tool(stderr: str) -> str | None:
    for line in stderr.splitlines():
        # gcc's words for a driver without its compiler, assembler or linker.
        if "cannot execute" in line or ("cannot find 'ld'" in line):
            return f"the compiler is incomplete ({line.strip()})"
    return None


def check_target(tools: Toolchain) -> None:
    """Raise ToolchainError unless the compiler makes code for x86-64."""
    machine = _target(tools)
    if not machine.startswith("x86_64"):
        raise ToolchainError(
            f"{tools.cc} makes code for {machine}, guests need x86_64",
            "apt install gcc-x86-64-linux-gnu; KVMPY_CC=x86_64-linux-gnu-gcc KVMPY_AR=x86_64-linux-gnu-ar",
        )


@functools.lru_cache(maxsize=8)
def _target(tools: Toolchain) -> str:
    try:
        done = subprocess.run(
            [tools.cc, "-dumpmachine"], capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"{tools.cc} cannot be run: {error}", INSTALL) from error
    if done.returncode:
        raise ToolchainError(f"{tools.cc} -dumpmachine failed: {done.stderr.strip()}", INSTALL)
    return done.stdout.strip()


def compile_objects(
    tools: Toolchain,
    sources: Sequence[Path],
    workdir: Path,
    *,
    cflags: Sequence[str] = (),
    name: str,
    bits: int = 64,
) -> tuple[list[Path], list[Path], str]:
    """Compile *sources* into *workdir*; return the objects, the headers they include and the warnings.

    Headers of the runtime and of the compiler itself are not among them.
    """
    include = runtime_dir() / "include"
    # The same content gives the same image, wherever it is built.
    maps = [f"-ffile-prefix-map={runtime_dir()}=guest_asm", f"-ffile-prefix-map={workdir}=."]
    objects: list[Path] = []
    headers: dict[Path, None] = {}
    said = ""
    for number, source in enumerate(sources):
        target = workdir / f"{number}-{source.stem}.o"
        depfile = target.with_suffix(".d")
        command = [tools.cc, *flags_of(bits), *maps, f"-I{include}"]
        command += [*cflags, "-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(target)]
        said += run(command, cwd=workdir, name=name)
        objects.append(target)
        if depfile.is_file():
            for header in _dependencies(depfile.read_text()):
                path = (workdir / header).resolve()
                if path != source.resolve() and runtime_dir() not in path.parents:
                    headers[path] = None
    return objects, list(headers), said


def flags_of(bits: int) -> tuple[str, ...]:
    """Return the compiler's flags for a program of 64 or 32 bits."""
    return FLAGS if bits == 64 else (*(f for f in FLAGS if f not in _LONG_MODE_ONLY), *FLAGS_32)


def _dependencies(text: str) -> list[str]:
    # Make's own quoting: a backslash before spaces and at the end of continued lines.
    joined = text.replace("\\\n", " ").replace("$$", "$")
    _, _, names = joined.partition(": ")
    return [name.replace("\0", " ") for name in names.replace("\\ ", "\0").split()]


def archive(tools: Toolchain, objects: Sequence[Path], target: Path) -> None:
    """Make an archive of *objects*, from which a link takes only what it needs."""
    run([tools.ar, "rcsD", str(target), *map(str, objects)], cwd=target.parent, name="the guest runtime")


def link(
    tools: Toolchain,
    objects: Sequence[Path],
    runtime: Path,
    target: Path,
    *,
    name: str,
    flags: Sequence[str] = (),
    bits: int = 64,
) -> str:
    """Link *objects* with the runtime archive into the static image *target*; return the warnings."""
    script = runtime_dir() / "guest.lds"
    size = ("-m32",) if bits == 32 else ()
    command = [tools.cc, *size, *LINK_FLAGS, f"-Wl,-T,{script}", *flags, "-o", str(target)]
    command += [*map(str, objects), str(runtime)]
    return run(command, cwd=target.parent, name=name)


_SHARED = frozenset({"assert.c", "exception.c", "printf.c", "string.c"})


def runtime_sources(bits: int = 64) -> list[Path]:
    """Return the files that make the runtime archive; 32-bit programs share some with the others."""
    sources = [path for path in runtime_files() if path.suffix in {".c", ".S"}]
    if bits == 64:
        return [path for path in sources if path.parent.name == "runtime"]
    return [path for path in sources if path.parent.name == "runtime32" or path.name in _SHARED]
