# SPDX-License-Identifier: Apache-2.0
"""The lab's software AMD-SP: SEV, SEV-ES and SEV-SNP of kvm_amd without the hardware. See README.md."""

from __future__ import annotations

from pathlib import Path

from kvmpy.lab.hooks import HookError, HookList, Snapshot
from kvmpy.platforms import SOFTWARE_SP

FOLDER = Path(__file__).resolve().parent / "kernel"
PARAMETER = "softsev"
# What a kernel with it is booted with: its nested page tables have four levels.
PARAMETERS = (PARAMETER, "no5lvl")
PLATFORM = SOFTWARE_SP

__all__ = [
    "FOLDER",
    "PARAMETER",
    "PARAMETERS",
    "PLATFORM",
    "HookError",
    "HookList",
    "Snapshot",
    "apply",
    "snapshot",
]


def apply(tree: Path, before: Snapshot | None = None) -> list[str]:
    """Put the software AMD-SP into the kernel tree *tree*, and return the names of the hooks put in.

    A tree that has it already stays as it is. *before* is a :func:`snapshot` of the tree of an earlier build:
    what comes out the same keeps its time. HookError names the hook that does not fit; then the tree is as
    before.
    """
    hooks = HookList.load(FOLDER)
    done = hooks.apply(tree)
    hooks.keep_times(tree, before or {})
    return done


def snapshot(tree: Path) -> Snapshot:
    """Return what :func:`apply` made of *tree*, which need not exist: content and times of its files."""
    return HookList.load(FOLDER).snapshot(tree)
