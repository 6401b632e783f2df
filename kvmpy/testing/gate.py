# SPDX-License-Identifier: Apache-2.0
"""What happens when a test lacks something: a skip that says what and how to get it, or a failure.

``KVMPY_REQUIRE`` lists what may not be missing: ``all``, ``kvm``, a protection (``snp``), a capability
(``KVM_CAP_...``) or any other name that a skip reason ends with, separated by commas.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NoReturn

import pytest

from kvmpy.testing.verdicts import Missing

VARIABLE = "KVMPY_REQUIRE"
MISSING_KEY = pytest.StashKey[list[Missing]]()


def required_names(text: str | None = None) -> frozenset[str]:
    """Return what ``KVMPY_REQUIRE`` (or *text*) insists on, lower case."""
    value = os.environ.get(VARIABLE, "") if text is None else text
    return frozenset(name.strip().lower() for name in value.split(",") if name.strip())


def insisted(missing: Sequence[Missing], names: frozenset[str] | None = None) -> str | None:
    """Return the name in ``KVMPY_REQUIRE`` that forbids to skip for *missing*, or None."""
    wanted = required_names() if names is None else names
    if "all" in wanted:
        return "all"
    keys = {key.lower(): key for entry in missing for key in entry.keys}
    return next((key for low, key in keys.items() if low in wanted), None)


def _need(entry: Missing) -> str:
    # Why KVM cannot be used is a sentence of its own: "/dev/kvm does not exist".
    return str(entry) if "kvm" in entry.keys else f"needs {entry}"


def reason_for(missing: Sequence[Missing]) -> str:
    """Return the skip reason: each missing thing, how to get it, and the name that makes it a failure."""
    text = "; ".join(_need(entry) for entry in missing)
    key = next((key for entry in missing for key in entry.keys), "all")
    return f"{text} [{VARIABLE}={key} makes this a failure]"


def refuse(node: pytest.Item | pytest.Collector | pytest.Session, missing: Sequence[Missing]) -> NoReturn:
    """Skip the test *node* for what it lacks, or fail it where ``KVMPY_REQUIRE`` insists."""
    node.stash[MISSING_KEY] = list(missing)
    key = insisted(missing)
    if key is not None:
        text = "; ".join(_need(entry) for entry in missing)
        pytest.fail(f"{text} ({VARIABLE}={key} insists on it)", pytrace=False)
    raise pytest.skip.Exception(reason_for(missing), _use_item_location=True)
