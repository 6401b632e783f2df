# SPDX-License-Identifier: Apache-2.0
"""Guest programs: compile, load, talk to them, and say what happened when they fail."""

from kvmpy.guest.errors import (
    GuestAssertionError,
    GuestBuildError,
    GuestBuildWarning,
    GuestError,
    GuestExceptionError,
    GuestImageError,
    GuestSymbolError,
    GuestTimeoutError,
    LaunchError,
    ToolchainError,
    UnexpectedExitError,
)
from kvmpy.guest.program import GuestProgram
from kvmpy.guest.symbols import Segment, Symbol

__all__ = [
    "GuestAssertionError",
    "GuestBuildError",
    "GuestBuildWarning",
    "GuestError",
    "GuestExceptionError",
    "GuestImageError",
    "GuestProgram",
    "GuestSymbolError",
    "GuestTimeoutError",
    "LaunchError",
    "Segment",
    "Symbol",
    "ToolchainError",
    "UnexpectedExitError",
]
