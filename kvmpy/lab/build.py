# SPDX-License-Identifier: Apache-2.0
"""Builds a lab kernel: source, configuration, compilation, and its entry in the cache."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from kvmpy.lab import debian, kconfig, kernels, places, tools
from kvmpy.lab.errors import LabError
from kvmpy.lab.kernels import Kernel, Say
from kvmpy.lab.process import dies_with_parent, end_group

IMAGE = Path("arch/x86/boot/bzImage")
_BUILD_MIB = 800
_SHOWN_AFTER = 15.0
_POLL = 0.25
_STEP = re.compile(rb"^  [A-Z][A-Z0-9_]* +\S", re.MULTILINE)
_FIRST_ERROR = re.compile(
    r"\berror: |fatal error|undefined reference|No rule to make target|No space left|not clean"
    r"|Killed|command not found|: not found$"
)
_MAKE_ERROR = re.compile(r"^make.*\*\*\*")
_SHOWN_LINES = 6
_CONFIG_SECONDS = 600.0
BUILD_SECONDS = 4 * 3600.0


def first_error(log: str) -> str:
    """Return the first error in the output of a failed build, with the lines after it that explain it."""
    lines = log.splitlines()
    for pattern in (_FIRST_ERROR, _MAKE_ERROR):
        for at, line in enumerate(lines):
            if pattern.search(line):
                return "\n".join(lines[at : at + _SHOWN_LINES])
    return "\n".join(lines[-_SHOWN_LINES:])


def _jobs() -> int:
    return len(os.sched_getaffinity(0))


class Builder:
    """Builds one tree in a folder of its own; never writes into the tree."""

    def __init__(self, tree: Path, folder: Path, say: Say) -> None:
        self._tree = tree
        self._folder = folder
        self._say = say
        self._log = folder / "kvmpy-build.log"

    def _make(self, *targets: str, seconds: float, step: str, progress: bool = False) -> None:
        command = ["nice", "make", "-C", str(self._tree), f"O={self._folder}", f"-j{_jobs()}", *targets]
        environment = os.environ | {"LC_ALL": "C", "PYTHONDONTWRITEBYTECODE": "1"}
        for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "KBUILD_OUTPUT", "ARCH", "CROSS_COMPILE"):
            environment.pop(name, None)
        start = time.monotonic()
        with self._log.open("wb") as log:
            child = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=dies_with_parent(),  # noqa: PLW1509 - no other thread is there yet
            )
            try:
                self._wait(child, start, seconds, progress, step)
            finally:
                end_group(child)
        if child.returncode != 0:
            text = self._log.read_text(encoding="utf-8", errors="replace")
            raise LabError(
                f"{step} failed; the first error is:\n{first_error(text)}", f"all of it: {self._log}"
            )

    def _wait(
        self, child: subprocess.Popen[bytes], start: float, seconds: float, progress: bool, step: str
    ) -> None:
        shown = start
        while True:
            try:
                child.wait(_POLL)
                return
            except subprocess.TimeoutExpired:
                pass
            now = time.monotonic()
            if now - start > seconds:
                raise LabError(f"{step} took longer than {seconds:.0f} s")
            if progress and now - shown >= _SHOWN_AFTER:
                shown = now
                steps = len(_STEP.findall(self._log.read_bytes()))
                self._say(f"compiling: {steps} steps, {now - start:.0f} s")

    def configure(self, fragment: Path) -> None:
        """Make the configuration; LabError names the options that did not survive."""
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._folder / ".config"
        wanted = kconfig.parse(fragment.read_text(encoding="utf-8"))
        before = config.read_text(encoding="utf-8") if config.is_file() else ""
        if not before or kconfig.lost(wanted, kconfig.parse(before)):
            self._make("tinyconfig", seconds=_CONFIG_SECONDS, step="make tinyconfig")
            config.write_text(kconfig.merge(config.read_text(encoding="utf-8"), wanted), encoding="utf-8")
        self._make("olddefconfig", seconds=_CONFIG_SECONDS, step="make olddefconfig")
        final = kconfig.parse(config.read_text(encoding="utf-8"))
        must = {option: value for option, value in wanted.items() if value != "n"}
        if gone := kconfig.lost(must, final):
            raise LabError(
                f"the configuration lost {', '.join(gone)}",
                f"this tree lacks the option, or what it depends on; see {fragment}",
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


def _build_tree(tree: Path, name: str, origin: str, say: Say) -> tuple[Kernel, Path]:
    folder = places.cache() / "build" / name
    places.need_space(folder, _BUILD_MIB, "building the kernel")
    builder = Builder(tree, folder, say)
    builder.configure(places.fragment())
    image = builder.compile()
    return kernels.register(image, origin, folder / ".config"), folder


def from_source(tree: Path, say: Say) -> Kernel:
    """Build a developer's own *tree*; what was compiled is kept, so that a second build takes less."""
    tree = tree.resolve()
    if not (tree / "Kbuild").is_file() or not (tree / "arch" / "x86").is_dir():
        raise LabError(f"{tree} is no Linux source tree")
    tools.need(tools.BUILD, "building a kernel")
    key = hashlib.sha256(str(tree).encode()).hexdigest()[:12]
    with kernels.build_lock(say):
        say(f"building {tree}")
        kernel, _ = _build_tree(tree, f"tree-{key}", f"tree {tree}", say)
    return kernel


def from_debian(suite: str, say: Say) -> Kernel:
    """Build the newest kernel source of a Debian suite, unless the cache has it with this configuration."""
    tools.need((*tools.BUILD, *tools.DEBIAN), "building a kernel")
    source = debian.Suite(suite)
    options = hashlib.sha256(places.fragment().read_bytes()).hexdigest()[:8]
    with kernels.build_lock(say):
        source.update(say)
        package = source.package()
        origin = f"{package.origin}, options {options}"
        present = next((kernel for kernel in kernels.cached() if kernel.origin == origin), None)
        if present is not None:
            say(f"{package.origin} is there already: {present.name}")
            return present
        deb = source.download(package, say)
        tree = debian.unpack(deb, package, say)
        kernel, folder = _build_tree(tree, f"{package.name}_{package.version}-{options}", origin, say)
        # A finished build has no use for them; one that failed goes on where it stopped.
        for done in (folder, tree):
            shutil.rmtree(done, ignore_errors=True)
        deb.unlink(missing_ok=True)
    return kernel


def from_image(image: Path) -> Kernel:
    """Register a bzImage that somebody else has built."""
    return kernels.register(image, f"file {image.resolve()}")
