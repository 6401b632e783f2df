# SPDX-License-Identifier: Apache-2.0
"""Compare two JSON reports: ``same_verdicts.py FIRST SECOND`` fails where a test ended otherwise in SECOND.

Each of the selftests must be in both; tests of kvmpy itself (``tests/...``) may be in FIRST alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def verdicts(report: Path) -> dict[str, str]:
    """Return the verdict of each test in a report of ``--json`` or ``--kvmpy-json``, by the test's id."""
    return {test["id"]: test["verdict"] for test in json.loads(report.read_text(encoding="utf-8"))["tests"]}


def main() -> int:
    """Print each difference and a closing line; return 1 if there is a difference or nothing to compare."""
    first, second = (verdicts(Path(name)) for name in sys.argv[1:3])
    compared = {*second, *(name for name in first if not name.startswith("tests/"))}
    different = [name for name in sorted(compared) if first.get(name) != second.get(name)]
    for name in different:
        print(f"{name}: {first.get(name, 'not run')}, then {second.get(name, 'not run')}")
    print(f"{len(compared)} tests compared, {len(different)} ended otherwise")
    return 1 if different or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
