# SPDX-License-Identifier: Apache-2.0
"""kvmpy: real KVM virtual machines with guest code of their own, for tests of the kernel.

What can be imported from here is public and stable: ``from kvmpy import Gpa, Kvm, MakeVm, refused``.
``__init__.pyi`` lists it by topic; docs/api.md says what each name is.  Everything else may change.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

__version__ = "0.2.0"

# Names are imported at first use: the pytest plugin and `kvmpy --help` come without the native part.
_DECLARED = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_HOMES = {name: module for module, name in re.findall(r"(?m)^from (\S+) import (\w+) as \2$", _DECLARED)}
_OPEN_MODULES = re.findall(r"(?m)^from (\S+) import \*$", _DECLARED)

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - strings, read from the stub


def __getattr__(name: str) -> object:
    module = _HOMES.get(name)
    if module is not None:
        home = import_module(module)
        value = getattr(home, name) if hasattr(home, name) else import_module(f"{module}.{name}")
        globals()[name] = value
        return value
    for module in _OPEN_MODULES if not name.startswith("__") else ():
        value = getattr(import_module(module), name, None)
        if value is not None:
            globals()[name] = value
            return value
    raise AttributeError(f"module 'kvmpy' has no attribute {name!r}")
