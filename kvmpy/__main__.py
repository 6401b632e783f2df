# SPDX-License-Identifier: Apache-2.0
"""Lets ``python -m kvmpy`` be the ``kvmpy`` command."""

from __future__ import annotations

from kvmpy.cli.main import main

if __name__ == "__main__":
    main()
