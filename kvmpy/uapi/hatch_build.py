# SPDX-License-Identifier: Apache-2.0
"""Hatchling build hook: compiles the cffi extension, places selftests and guest runtime inside the wheel."""

from __future__ import annotations

import runpy
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Folders of the checkout, and where they lie inside the package.
SHIPPED = {"selftests": "selftests", "guest_asm": "guest_asm"}


class NativeBuildHook(BuildHookInterface[Any]):
    """Builds ``kvmpy/uapi/_native.abi3.so``: in place for an editable install, into the wheel otherwise."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the extension, tag the wheel ``cp310-abi3`` and add the folders that ship in it."""
        root = Path(self.root)
        # Run by path: importing kvmpy.uapi would import the extension that is about to be built.
        build = runpy.run_path(str(root / "kvmpy" / "uapi" / "build.py"))["build"]
        if version == "editable":
            build()
            return
        self._scratch = tempfile.TemporaryDirectory(prefix="kvmpy-wheel-")
        made: Path = build(Path(self._scratch.name))
        build_data["pure_python"] = False
        build_data["tag"] = f"cp310-abi3-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["force_include"][str(made)] = f"kvmpy/uapi/{made.name}"
        for name, inside in SHIPPED.items():
            build_data["force_include"][str(root / name)] = f"kvmpy/{inside}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the scratch folder once the wheel is written."""
        del build_data, artifact_path
        if version != "editable":
            self._scratch.cleanup()
