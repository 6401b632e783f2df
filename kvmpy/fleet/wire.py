# SPDX-License-Identifier: Apache-2.0
"""How the parts of a fleet reach each other: TLS with one certificate, and what distributed is told.

Who has the file with the key can run anything on every host of the fleet. Nobody else gets in: a worker of
distributed runs whatever it is sent.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from kvmpy import caches
from kvmpy.fleet.errors import FleetError
from kvmpy.owned import write_atomically

if TYPE_CHECKING:
    from distributed import Security

CERTIFICATE = "fleet.pem"
ADDRESS = "address"
_ROLES = ("scheduler", "worker", "client")
# Its own blame is not wanted: it takes a second host along, and names tasks that never began.
_SETTINGS = {
    "distributed.scheduler.allowed-failures": 1 << 62,
    "distributed.scheduler.work-stealing": False,
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    "distributed.worker.daemon": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.worker.profile.enabled": False,
    "distributed.comm.require-encryption": True,
    "distributed.comm.retry.count": 0,
    "distributed.logging": {"distributed": "critical", "distributed.core": "critical"},
    "logging": {"distributed": "critical", "tornado": "critical", "tornado.application": "critical"},
}


def need() -> None:
    """FleetError without the extra; otherwise distributed has its settings from here on."""
    try:
        import dask
    except ImportError:
        raise FleetError("the fleet needs distributed: pip install 'kvmpy[fleet]'") from None
    # Before distributed is imported: it reads some of them then.
    dask.config.set(_SETTINGS)
    try:
        import distributed  # noqa: F401
    except ImportError:
        raise FleetError("the fleet needs distributed: pip install 'kvmpy[fleet]'") from None


def folder() -> Path:
    """Return where certificate and address of this user's fleet are; FleetError where others may write."""
    place = caches.own("fleet")
    if place is None:
        raise FleetError(f"{caches.base() / 'fleet'} cannot be made, or others may write there")
    return place


def make(path: Path) -> None:
    """Make a key and its certificate in the file *path*, for this user alone."""
    from distributed import Security

    fresh = Security.temporary()
    text = f"{fresh.tls_worker_key}{fresh.tls_ca_file}"
    write_atomically(path, text, opener=lambda name, flags: os.open(name, flags, 0o600))


def security(path: Path) -> Security:
    """Return what distributed takes, of the certificate in *path*; FleetError where there is none."""
    from distributed import Security

    try:
        text = path.read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise FleetError(
            f"{path}: {why}: copy {CERTIFICATE} of the machine that runs `kvmpy fleet serve`"
        ) from None
    mark = "-----BEGIN CERTIFICATE-----"
    key, found, certificate = text.partition(mark)
    if not found or "PRIVATE KEY" not in key:
        raise FleetError(f"{path} is no certificate with its key, as `kvmpy fleet serve` makes one")
    words: dict[str, str] = {"tls_ca_file": mark + certificate}
    for role in _ROLES:
        words |= {f"tls_{role}_key": key, f"tls_{role}_cert": mark + certificate}
    return Security(require_encryption=True, **words)


def full_address(text: str) -> str:
    """Return *text*, HOST:PORT, as distributed wants it; FleetError for what is none, or not TLS."""
    kind, found, rest = text.partition("://")
    if found and kind != "tls":
        raise FleetError(f"{text}: a fleet talks TLS only: tls://HOST:PORT")
    rest = rest if found else text
    host, _, port = rest.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise FleetError(f"{text} is no address such as rack1:8786")
    return f"tls://{rest}"


def known_address(place: Path) -> str:
    """Return where the fleet of this user is served; FleetError without one."""
    try:
        return (place / ADDRESS).read_text(encoding="ascii").strip()
    except OSError:
        raise FleetError(
            "no fleet is served here: start `kvmpy fleet serve`, name one with --at, or take --local N"
        ) from None
