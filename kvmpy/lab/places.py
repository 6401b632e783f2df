# SPDX-License-Identifier: Apache-2.0
"""Where the lab keeps things: the cache of this user, and the files that come with kvmpy."""

from __future__ import annotations

import shutil
from pathlib import Path

from kvmpy import caches
from kvmpy.lab.errors import LabError

MIB = 1 << 20
# Files with options that are not for --config.
_NOT_EXTRA = ("kernel", "coverage")
# Inside, where the folder with job and shares is to be seen.
INSIDE = "/run/kvmpy/job"
# In that folder: where each share belongs, by its tag.
SHARES_FILE = "shares.json"
# In that folder: the guest programs of a pack.
PACK = "guest.pack"
# Random bytes in hexadecimal, for a machine that is one of several resumed from one snapshot.
SEED_VARIABLE = "KVMPY_LAB_SEED"

# Inside, whether KVM's counters are wanted: of each "file" or of each "test".
COVERAGE_VARIABLE = "KVMPY_LAB_COVERAGE"


def cache() -> Path:
    """Return the lab's cache folder, ``$XDG_CACHE_HOME/kvmpy/lab``; it need not exist.

    LabError where others may write there: kernels and bytecode are code.
    """
    folder = caches.base() / "lab"
    if why := caches.stranger(folder):
        raise LabError(
            f"the lab's cache {folder} is not safe: {why}",
            "set HOME or XDG_CACHE_HOME to a folder of your own",
        )
    return folder


def files() -> Path:
    """Return the folder with kernel options, first process and mounts of a lab kernel."""
    return Path(__file__).resolve().parent / "files"


def fragment() -> Path:
    """Return the file with the kernel options that a lab kernel has."""
    return files() / "kernel.config"


def extra_fragment(wanted: str) -> Path:
    """Return the file with further options that *wanted* names: a path, or one of kvmpy's own (``debug``).

    LabError when there is neither.
    """
    path = Path(wanted)
    own = files() / f"{wanted}.config"
    if not path.is_file() and "/" not in wanted and wanted not in _NOT_EXTRA and own.is_file():
        path = own
    if not path.is_file():
        raise LabError(f"no file {wanted} with kernel options", "kvmpy's own are called by name: debug")
    return path


def need_space(folder: Path, megabytes: int, purpose: str) -> None:
    """Raise LabError when the file system of *folder* has less than *megabytes* MiB free."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free // MIB
    if free < megabytes:
        raise LabError(
            f"{purpose} needs {megabytes} MiB, {place} has {free} MiB free",
            "free some, or set XDG_CACHE_HOME to a folder on a larger disk (`kvmpy lab rm --all` empties the "
            "lab's cache)",
        )
