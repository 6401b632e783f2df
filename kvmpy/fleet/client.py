# SPDX-License-Identifier: Apache-2.0
"""A client of the fleet's scheduler."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

from distributed import Client

from kvmpy.fleet import wire
from kvmpy.fleet.errors import FleetError
from kvmpy.fleet.host import why

_SECONDS = 15.0


@contextlib.contextmanager
def connected(address: str, certificate: Path) -> Iterator[Client]:
    """Within the block there is a client; FleetError where nobody, or somebody else, is there."""
    security = wire.security(certificate)
    try:
        client = Client(address, security=security, timeout=_SECONDS, set_as_default=False)
    except (OSError, asyncio.TimeoutError, RuntimeError, ValueError) as error:
        raise FleetError(f"no fleet at {address}: {why(error)}") from None
    try:
        yield client
    finally:
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            client.close(timeout=2)
