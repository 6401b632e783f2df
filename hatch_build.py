# SPDX-License-Identifier: Apache-2.0
"""Hatchling build hook: builds what git does not hold, places selftests and guest runtime in the wheel."""

from __future__ import annotations

import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.version import Version

# Folders of the checkout that lie inside the package once it is installed.
SHIPPED = ("selftests", "guest_asm")


class NativeBuildHook(BuildHookInterface[Any]):
    """Runs :mod:`kvmpy.build`: in place for an editable install, else with the extension in the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build, tag the wheel ``cp310-abi3`` and add what git does not know or what lies elsewhere."""
        root = Path(self.root)
        sys.path.insert(0, self.root)
        from kvmpy import __version__
        from kvmpy.build import build

        given = self.metadata.version
        if Version(given).base_version != __version__:
            raise ValueError(f"the tag makes it version {given}, kvmpy/__init__.py says {__version__}")

        if version == "editable":
            build()
            return
        self._scratch = tempfile.TemporaryDirectory(prefix="kvmpy-wheel-")
        extension, generated = build(Path(self._scratch.name))
        build_data["pure_python"] = False
        build_data["tag"] = f"cp310-abi3-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"] += [f"/{path.relative_to(root)}" for path in generated]
        exact = Path(self._scratch.name) / "_version.py"
        exact.write_text(f'version = "{given}"\n', encoding="utf-8")
        build_data["force_include"][str(exact)] = "kvmpy/_version.py"
        build_data["force_include"][str(extension)] = f"kvmpy/uapi/{extension.name}"
        for name in SHIPPED:
            build_data["force_include"][str(root / name)] = f"kvmpy/{name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the scratch folder once the wheel is written."""
        del build_data, artifact_path
        if version != "editable":
            self._scratch.cleanup()
