# SPDX-License-Identifier: Apache-2.0
"""Writes the API reference of every module of kvmpy from its docstrings: api_reference.py FOLDER."""

from __future__ import annotations

import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import kvmpy

# No part of the interface: __main__ runs the command.
LEFT_OUT = ("kvmpy.__main__", "kvmpy.uapi._native", "kvmpy.selftests")


def modules() -> list[str]:
    """Return the names of all modules to document."""
    found = [module.name for module in pkgutil.walk_packages(kvmpy.__path__, "kvmpy.")]
    return ["kvmpy", *(name for name in sorted(found) if not name.startswith(LEFT_OUT))]


def main() -> None:
    """Write the reference into the folder named on the command line."""
    folder = Path(sys.argv[1])
    # Annotations that only type checkers import; pdoc shows their text all the same.
    warnings.filterwarnings("ignore", "Error parsing type annotation")
    for name in kvmpy.__all__:
        # Names that come at first use are invisible to pdoc.
        setattr(kvmpy, name, getattr(kvmpy, name))
    names = modules()
    pdoc.pdoc(*names, output_directory=folder)
    print(f"{folder / 'index.html'}: {len(names)} modules")


if __name__ == "__main__":
    main()
