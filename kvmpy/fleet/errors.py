# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with a fleet."""

from __future__ import annotations


class FleetError(RuntimeError):
    """Something about a fleet that the user can do something about; the message says what."""
