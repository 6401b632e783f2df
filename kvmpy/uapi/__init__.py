# SPDX-License-Identifier: Apache-2.0
"""The kernel's words: struct declarations, constants, the ioctl table, and the few loops that must be C.

``ffi`` and ``lib`` are the cffi extension's; only this room and ``kvmpy.core`` touch them.
"""

from __future__ import annotations

try:
    from kvmpy.uapi._native import ffi, lib
except ModuleNotFoundError as error:
    if error.name != "kvmpy.uapi._native":
        raise
    raise ImportError(
        "kvmpy's native part is not built: run `make build` in the checkout, or `python -m pip install .`"
    ) from error

__all__ = ["ffi", "lib"]
