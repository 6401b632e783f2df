# SPDX-License-Identifier: Apache-2.0
"""Builds a lab kernel: source, configuration, compilation, and its entry in the cache."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from kvmpy.lab import debian, kconfig, kernels, places, softsev, tools, tree_copy
from kvmpy.lab.bugs import catalogue
from kvmpy.lab.coverage import kept
from kvmpy.lab.errors import BuildError, LabError
from kvmpy.lab.hooks import Snapshot
from kvmpy.lab.kernels import Kernel, Say
from kvmpy.lab.process import call

IMAGE = Path("arch/x86/boot/bzImage")
_BUILD_MIB = 800
_COPY_MIB = 2500
# What Linux 7.2 takes with the lab's options.
_STEPS = 2200
_SHOWN_AFTER = 15.0
_STEP = re.compile(rb"^  [A-Z][A-Z0-9_]* +\S", re.MULTILINE)
# Of compilers, assembler and modpost; of the linker; of make itself, whose $(error) says file and line.
_FIRST_ERROR = re.compile(
    r"\b(?:[Ee]rror|ERROR): |fatal error|undefined reference|multiple definition of|No rule to make target"
    r"|No space left|not clean|Killed|command not found|: not found$|^\S.*:\d+: \*\*\* "
)
# A full disk, or no memory for the compiler.
_NOT_THE_TREE = re.compile(r"No space left on device|fatal error: Killed signal|Cannot allocate memory")
# How make ends a message of its own, which may be of several lines.
_STOP = ".  Stop."
_MAKE_ERROR = re.compile(r"^make.*\*\*\*")
_SHOWN_LINES = 6
_MESSAGE_LINES = 20
_PATCH_SUFFIXES = (".c", ".h", ".py", ".cocci", ".patch", ".inc", ".S", ".toml")
_CONFIG_SECONDS = 600.0
BUILD_SECONDS = 4 * 3600.0


def first_error(log: str) -> str:
    """Return the first error in the output of a failed build, with the lines after it that explain it."""
    lines = log.splitlines()
    for pattern in (_FIRST_ERROR, _MAKE_ERROR):
        for index, line in enumerate(lines):
            if pattern.search(line):
                message = lines[index : index + _MESSAGE_LINES]
                ends = (number for number, text in enumerate(message, 1) if text.endswith(_STOP))
                return "\n".join(message[: next(ends, _SHOWN_LINES) if "***" in line else _SHOWN_LINES])
    return "\n".join(lines[-_SHOWN_LINES:])


def _jobs() -> int:
    return len(os.sched_getaffinity(0))


class Builder:
    """Builds one tree in a folder of its own; never writes into the tree."""

    def __init__(self, tree: Path, folder: Path, say: Say, variables: Sequence[str] = ()) -> None:
        self._tree = tree
        self._folder = folder
        self._say = say
        self._variables = variables
        self._log = folder / "kvmpy-build.log"

    def _make(self, *targets: str, seconds: float, step: str, progress: bool = False) -> None:
        command = ["nice", "make", "-C", str(self._tree), f"O={self._folder}", f"-j{_jobs()}"]
        command += [*self._variables, *targets]
        environment = os.environ | {"LC_ALL": "C", "PYTHONDONTWRITEBYTECODE": "1"}
        for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "KBUILD_OUTPUT", "ARCH", "CROSS_COMPILE"):
            environment.pop(name, None)
        shown = 0.0

        def tick(passed: float) -> None:
            nonlocal shown
            if progress and passed - shown >= _SHOWN_AFTER:
                shown = passed
                steps = len(_STEP.findall(self._log.read_bytes()))
                self._say(f"compiling: {steps} steps of about {_STEPS}, {passed:.0f} s")

        with self._log.open("wb") as log:
            try:
                status = call(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    seconds=seconds,
                    environment=environment,
                    tick=tick,
                )
            except subprocess.TimeoutExpired as error:
                raise LabError(f"{step} took longer than {seconds:.0f} s") from error
        if status != 0:
            text = self._log.read_text(encoding="utf-8", errors="replace")
            kind = LabError if _NOT_THE_TREE.search(text) else BuildError
            raise kind(f"{step} failed; the first error is:\n{first_error(text)}", f"all of it: {self._log}")

    def configure(self, fragments: Sequence[Path]) -> None:
        """Make the configuration; LabError names the options that did not survive."""
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._folder / ".config"
        wanted = _options(fragments)
        before = config.read_text(encoding="utf-8") if config.is_file() else ""
        if not before or kconfig.lost(wanted, kconfig.parse(before)):
            self._make("tinyconfig", seconds=_CONFIG_SECONDS, step="make tinyconfig")
            config.write_text(kconfig.merge(config.read_text(encoding="utf-8"), wanted), encoding="utf-8")
        self._make("olddefconfig", seconds=_CONFIG_SECONDS, step="make olddefconfig")
        final = kconfig.parse(config.read_text(encoding="utf-8"))
        must = {option: value for option, value in wanted.items() if value != "n"}
        if gone := kconfig.lost(must, final):
            raise BuildError(
                f"the configuration lost {', '.join(gone)}",
                f"this tree lacks the option, or what it depends on; see {' and '.join(map(str, fragments))}",
            )
        for option in kconfig.lost(wanted, final):
            self._say(f"note: the configuration has {option}")

    def compile(self) -> Path:
        """Compile and return the bzImage."""
        self._say(f"compiling with {_jobs()} jobs")
        start = time.monotonic()
        self._make("bzImage", seconds=BUILD_SECONDS, step="the build", progress=True)
        self._say(f"compiled in {time.monotonic() - start:.0f} s")
        return self._folder / IMAGE


def build_id(vmlinux: Path) -> str:
    """Return the GNU build id of a kernel in hexadecimal, as its /sys/kernel/notes has it; empty without."""
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import NoteSection

    if not vmlinux.is_file():
        return ""
    with vmlinux.open("rb") as stream:
        for section in ELFFile(stream).iter_sections():
            for note in section.iter_notes() if isinstance(section, NoteSection) else ():
                if note["n_type"] == "NT_GNU_BUILD_ID":
                    return str(note["n_desc"])
    return ""


def _options(fragments: Sequence[Path]) -> dict[str, str]:
    options: dict[str, str] = {}
    for fragment in fragments:
        options |= kconfig.parse(fragment.read_text(encoding="utf-8"))
    return options


class _Plan:
    """What a kernel is built with: the options, and what is patched into its tree.

    That is the software AMD-SP with *soft_sev*, the bug catalogue with *bugs*. *extra* are files with options
    besides the lab's own, which they override. With *coverage* KVM counts what it executes.
    """

    def __init__(
        self, soft_sev: bool, extra: Sequence[Path] = (), coverage: bool = False, bugs: bool = False
    ) -> None:
        self.soft_sev = soft_sev
        self.bugs = bugs
        # The numbers of those that the tree got.
        self._numbers: list[int] = []
        self.coverage = coverage
        self.fragments = [places.fragment()]
        self.suffix = ("-softsev" if soft_sev else "") + ("-bugs" if bugs else "")
        if coverage:
            extra = [places.files() / "coverage.config", *extra]
        self.extra = ", ".join(path.name for path in extra)
        digest = hashlib.sha256()
        folders = {Path(__file__).parent / "softsev": soft_sev, catalogue.FOLDER: bugs}
        for folder in (folder for folder, wanted in folders.items() if wanted):
            if (folder / "kernel.config").is_file():
                self.fragments.append(folder / "kernel.config")
            for file in sorted(path for path in folder.rglob("*") if path.suffix in _PATCH_SUFFIXES):
                digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
        for fragment in extra:
            if not _options([fragment]):
                raise LabError(f"{fragment} has no kernel option such as CONFIG_KASAN=y")
        self.fragments += extra
        for fragment in self.fragments:
            digest.update(fragment.read_bytes())
        self.digest = digest.hexdigest()[:8]

    def patch(self, tree: Path, say: Say, before: Snapshot | None = None) -> None:
        """Change *tree*, which must be the lab's own copy; what is as *before* keeps its time."""
        if self.soft_sev:
            say("adding the software AMD-SP to the source")
            softsev.apply(tree, before)
        if self.bugs:
            say("adding the bug catalogue to the source")
            self._numbers = catalogue.apply(tree, say, before)

    @property
    def patches(self) -> bool:
        """Whether :meth:`patch` changes anything."""
        return self.soft_sev or self.bugs

    def snapshot(self, tree: Path) -> Snapshot:
        """Return what :meth:`patch` made of *tree*, which need not exist."""
        soft_sev = softsev.snapshot(tree) if self.soft_sev else {}
        return soft_sev | (catalogue.snapshot(tree) if self.bugs else {})

    def compile(self, tree: Path, name: str, say: Say) -> Path:
        """Build *tree* and return the folder it was built in."""
        folder = places.cache() / "build" / f"{name}{self.suffix}"
        places.need_space(folder, _BUILD_MIB, "building the kernel")
        builder = Builder(tree, folder, say, (kept.MAKE_VARIABLE,) if self.coverage else ())
        builder.configure(self.fragments)
        builder.compile()
        return folder

    def build(self, tree: Path, name: str, origin: str, say: Say) -> tuple[Kernel, Path]:
        """Build *tree* and put the kernel into the cache; return it with the folder it was built in."""
        folder = self.compile(tree, name, say)
        beside = []
        if self.coverage:
            beside.append(folder / kept.ARCHIVE)
            kept.pack(tree, folder, beside[0])
        kernel_built = kernels.register(
            folder / IMAGE,
            origin,
            folder / ".config",
            soft_sev=self.soft_sev,
            extra=self.extra,
            build_id=build_id(folder / "vmlinux"),
            bugs=self._numbers,
            beside=beside,
        )
        return kernel_built, folder


def present(soft_sev: bool) -> Kernel | None:
    """Return the newest cached kernel that need not be built again, with *soft_sev* of those with a software
    AMD-SP: kvmpy's own builds of other options than this kvmpy's do not count, nor those with further ones.
    """
    digests = {kind: _Plan(kind).digest for kind in (False, True)}
    for kernel in kernels.cached():
        if kernel.serves(soft_sev) and kernel.options in ("", digests[kernel.soft_sev]):
            return kernel
    return None


def _copied(tree: Path, name: str, say: Say) -> Path:
    """Return a copy of *tree* in the cache, without its repository; an earlier one is brought up to date."""
    copy = places.cache() / "trees" / name
    if copy.is_dir():
        say(f"bringing the copy of {tree} up to date")
    else:
        places.need_space(copy.parent, _COPY_MIB, f"copying {tree}")
        say(f"copying {tree}, since it is going to be changed")
    try:
        tree_copy.synchronise(tree, copy, without=(".git",))
    except OSError as error:
        raise LabError(f"copying {tree} failed: {error}") from error
    return copy


def from_source(
    tree: Path,
    say: Say,
    *,
    soft_sev: bool = False,
    extra: Sequence[Path] = (),
    coverage: bool = False,
    bugs: bool = False,
    apart: Path | None = None,
) -> Kernel:
    """Build a developer's own *tree*; what was compiled is kept, so that a second build takes less.

    *extra* are files with kernel options besides the lab's. With *coverage* KVM counts what it executes; with
    *bugs* it has the bug catalogue. With *apart*, a folder, the kernel goes there and not into the cache,
    where others would boot it. BuildError
    where the tree is why there is none.
    """
    tree = tree.resolve()
    if not (tree / "Kbuild").is_file() or not (tree / "arch" / "x86").is_dir():
        raise LabError(f"{tree} is not a Linux source tree")
    tools.need(tools.BUILD, "building a kernel")
    plan = _Plan(soft_sev, extra, coverage, bugs)
    key = f"tree-{hashlib.sha256(str(tree).encode()).hexdigest()[:12]}"
    with kernels.build_lock(say):
        say(f"building {tree}")
        built = tree
        if plan.patches:
            before = plan.snapshot(places.cache() / "trees" / f"{key}{plan.suffix}")
            built = _copied(tree, f"{key}{plan.suffix}", say)
            plan.patch(built, say, before)
        # What was compiled with other options is of no use, and would be lost for the next time.
        name = f"{key}-{plan.digest}" if plan.extra else key
        if apart is None:
            return plan.build(built, name, f"tree {tree}", say)[0]
        folder = plan.compile(built, name, say)
        try:
            image = Path(shutil.copy(folder / IMAGE, apart))
        except OSError as error:
            raise LabError(f"copying the kernel failed: {error}") from error
    return kernels.loose(image, f"tree {tree}", soft_sev=soft_sev)


def from_debian(
    suite: str,
    say: Say,
    *,
    soft_sev: bool = False,
    extra: Sequence[Path] = (),
    coverage: bool = False,
    bugs: bool = False,
) -> Kernel:
    """Build the newest kernel source of a Debian suite, unless the cache has it with this configuration.

    *extra* are files with kernel options besides the lab's. With *coverage* KVM counts what it executes; with
    *bugs* it has the bug catalogue.
    """
    tools.need((*tools.BUILD, *tools.DEBIAN), "building a kernel")
    source = debian.Suite(suite)
    plan = _Plan(soft_sev, extra, coverage, bugs)
    with kernels.build_lock(say):
        source.update(say)
        package = source.package()
        origin = f"{package.origin}, options {plan.digest}"
        present = next((kernel for kernel in kernels.cached() if kernel.origin == origin), None)
        if present is not None:
            say(f"{package.origin} is there already: {present.name}")
            return present
        deb = source.download(package, say)
        tree = debian.unpack(deb, package, say, f"-{plan.digest}" if plan.patches else "", plan.patch)
        kernel, folder = plan.build(tree, f"{package.name}_{package.version}-{plan.digest}", origin, say)
        # A finished build has no use for them; one that failed goes on where it stopped.
        for done in (folder, tree):
            shutil.rmtree(done, ignore_errors=True)
        deb.unlink(missing_ok=True)
    return kernel


def from_image(image: Path, *, soft_sev: bool = False) -> Kernel:
    """Register a bzImage that somebody else has built."""
    return kernels.register(image, f"file {image.resolve()}", soft_sev=soft_sev)
