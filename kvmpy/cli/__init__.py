# SPDX-License-Identifier: Apache-2.0
"""The ``kvmpy`` command: one module for each subcommand, imported when it is used."""

from __future__ import annotations
