# SPDX-License-Identifier: Apache-2.0
"""Compare two JSON reports: ``same_verdicts.py FIRST SECOND`` fails where a test ended otherwise in SECOND.

Each of the selftests must be in both; tests of kvmpy itself (``tests/...``) may be in FIRST alone.  Unlike
`kvmpy compare` it takes a mended test for a difference, too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kvmpy.testing.compare import changes


def tests(report: Path) -> list[dict[str, Any]]:
    """Return the tests of a report of ``--json`` or ``--kvmpy-json``."""
    entries: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["tests"]
    return entries


def main() -> int:
    """Print each difference and a closing line; return 1 if there is a difference or nothing to compare."""
    first, second = (tests(Path(name)) for name in sys.argv[1:3])
    there = {test["id"] for test in second}
    first = [test for test in first if test["id"] in there or not test["id"].startswith("tests/")]
    different = sorted(changes([first], [second]), key=lambda change: change.test)
    for change in different:
        print(f"{change.test}: {change.before or 'not run'}, then {change.after or 'not run'}")
    compared = len(there | {test["id"] for test in first})
    print(f"{compared} tests compared, {len(different)} ended otherwise")
    return 1 if different or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
