# SPDX-License-Identifier: Apache-2.0
"""Which kvmpy this is, to the commit."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

from kvmpy import __version__

VARIABLE = "KVMPY_VERSION"
"""In a machine of the lab: what the host found, which asks git in no time."""
_SECONDS = 10.0


def exact() -> str:
    """Return the version to the commit: that of the wheel, or the checkout's, ``0.2.0+g6a3b5b1c0f2e.dirty``.

    The release alone where there is neither, as in an archive of the sources.
    """
    return os.environ.get(VARIABLE) or _exact()


@functools.lru_cache(maxsize=1)
def _exact() -> str:
    try:
        from kvmpy._version import version  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        pass
    else:
        return str(version)
    root = Path(__file__).resolve().parents[1]
    commit = _commit(root) if (root / ".git").exists() else ""
    return f"{__version__}+g{commit.replace('-', '.')}" if commit else __version__


def _commit(root: Path) -> str:
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
