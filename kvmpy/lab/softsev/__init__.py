# SPDX-License-Identifier: Apache-2.0
"""The lab's software AMD-SP: SEV, SEV-ES and SEV-SNP of kvm_amd without the hardware. See README.md."""

from __future__ import annotations

from pathlib import Path

from kvmpy.lab.softsev.hooks import HookError, HookList

FOLDER = Path(__file__).resolve().parent / "kernel"
PARAMETER = "softsev"
PLATFORM = "software AMD-SP"

__all__ = ["FOLDER", "PARAMETER", "PLATFORM", "HookError", "HookList", "apply"]


def apply(tree: Path) -> list[str]:
    """Put the software AMD-SP into the kernel tree *tree*, and return the names of the hooks put in.

    A tree that has it already stays as it is. HookError names the hook that does not fit; then the tree is
    as before.
    """
    return HookList.load(FOLDER).apply(tree)
