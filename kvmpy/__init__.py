# SPDX-License-Identifier: Apache-2.0
"""kvmpy: real KVM virtual machines with guest code of their own, for tests of the kernel."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmpy.coco.kvm import Kvm
    from kvmpy.coco.recording import record
    from kvmpy.core.address import EncryptionBit, Gpa, Gva, RawGpa
    from kvmpy.core.errors import KvmError, MissingError
    from kvmpy.debug.timeline import timeline

__version__ = "0.1.0"

__all__ = [
    "EncryptionBit",
    "Gpa",
    "Gva",
    "Kvm",
    "KvmError",
    "MissingError",
    "RawGpa",
    "__version__",
    "record",
    "timeline",
]

# Imported at first use: the pytest plugin and `kvmpy --help` come without the native part.
_HOMES = {
    "EncryptionBit": "kvmpy.core.address",
    "Gpa": "kvmpy.core.address",
    "Gva": "kvmpy.core.address",
    "Kvm": "kvmpy.coco.kvm",
    "KvmError": "kvmpy.core.errors",
    "MissingError": "kvmpy.core.errors",
    "RawGpa": "kvmpy.core.address",
    "record": "kvmpy.coco.recording",
    "timeline": "kvmpy.debug.timeline",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvmpy' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
