# SPDX-License-Identifier: Apache-2.0
"""kvmpy: real KVM virtual machines with guest code of their own, for tests of the kernel."""

from __future__ import annotations

__version__ = "0.1.0"
