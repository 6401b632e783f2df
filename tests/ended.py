# SPDX-License-Identifier: Apache-2.0
"""What came of a command that runs tests, by the report that it left."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Ended:
    status: int
    text: str
    folder: Path

    @property
    def report(self) -> dict[str, Any]:
        results: dict[str, Any] = json.loads((self.folder / "out.json").read_text())
        return results

    def verdicts(self, column: str = "") -> dict[str, str]:
        report = self.report["reports"][column] if column else self.report
        return {test["id"].rpartition("::")[2]: test["verdict"] for test in report["tests"]}

    def test(self, name: str, column: str = "") -> dict[str, Any]:
        report = self.report["reports"][column] if column else self.report
        found: dict[str, Any] = next(test for test in report["tests"] if test["id"].endswith(f"::{name}"))
        return found

    def lost(self) -> list[str]:
        return sorted(name for name, verdict in self.verdicts().items() if verdict == "lost")
