# SPDX-License-Identifier: Apache-2.0
"""What a guest gets when nobody says otherwise.  Pure."""

DEFAULT_MEMORY = 64 << 20
"""Bytes of guest memory."""
DEFAULT_DEADLINE = 20.0
"""Seconds that a guest may run without an expected exit."""
