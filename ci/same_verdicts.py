# SPDX-License-Identifier: Apache-2.0
"""Compare two JSON reports: ``same_verdicts.py FIRST SECOND`` fails where a test ended otherwise in SECOND.

FIRST may hold more tests, those of kvmpy itself for instance.
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
    different = {name: verdict for name, verdict in second.items() if first.get(name) != verdict}
    for name, verdict in sorted(different.items()):
        print(f"{name}: {first.get(name, 'not run')}, then {verdict}")
    print(f"{len(second)} tests compared, {len(different)} ended otherwise")
    return 1 if different or not second else 0


if __name__ == "__main__":
    sys.exit(main())
