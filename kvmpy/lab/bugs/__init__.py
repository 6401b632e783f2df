# SPDX-License-Identifier: Apache-2.0
"""The bug catalogue: bugs that KVM had, re-created in a kernel, each behind its number. See docs/bugs.md."""

from __future__ import annotations

from pathlib import Path

# Of a kernel with the catalogue: the numbers of the bugs that are on, 0 for none.
PARAMETER = Path("/sys/module/kvm/parameters/bugs")
NONE = "0"
# Inside, the bugs that the session switches on before its first test.
VARIABLE = "KVMPY_LAB_BUGS"


def switch(numbers: str) -> None:
    """Switch on the bugs with these *numbers*, such as ``3`` or ``3,17``, and all others off; root only."""
    PARAMETER.write_text(numbers, encoding="ascii")
