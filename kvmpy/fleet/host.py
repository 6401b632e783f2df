# SPDX-License-Identifier: Apache-2.0
"""A host of the fleet: joins as a worker of distributed, and ends with its scheduler."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from kvmpy import version
from kvmpy.fleet import wire
from kvmpy.fleet.errors import FleetError
from kvmpy.fleet.session import Here
from kvmpy.owned import OwnedFolder
from kvmpy.testing import host
from kvmpy.testing.machine import machine
from kvmpy.testing.supervisor import guarded

if TYPE_CHECKING:
    from kvmpy.lab.qemu import Options

Say = Callable[[str], None]
# Exit statuses of the process that is the worker.
ENDED, NO_WAY = 0, 3
MAX_DEATHS = 50
_JOIN_SECONDS = 20.0
_PAUSE = 0.5
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def describe(name: str, options: Options | None = None, *, dangerous: bool) -> dict[str, Any]:
    """Return what a host says about itself when it joins; with *options* it is a machine of the lab."""
    told = machine() if options is None else {}
    return {
        "name": name,
        "summary": asdict(host.summarize() if options is None else _of_machine(options)),
        "firmware": str(told.get("bios_version", "")),
        "microcode": str(told.get("microcode", "")),
        "boot": _BOOT_ID.read_text(encoding="ascii").strip(),
        "pid": os.getpid(),
        "python": ".".join(str(part) for part in sys.version_info[:3]),
        "kvmpy": version.exact(),
        "dangerous": dangerous,
    }


def _of_machine(options: Options) -> host.HostSummary:
    """Return what is known of a machine before it has booted."""
    from kvmpy.lab.runs import platform

    return host.HostSummary(
        f"{options.kernel.release} x86_64",
        "",
        (),
        platform(options),
        kvm=False,
        kvm_missing="it has not booted yet",
        accelerator=options.accel,
        configuration=options.configuration,
    )


# ---- joining


def join(
    address: str,
    certificate: Path,
    name: str,
    say: Say,
    options: Options | None = None,
    *,
    dangerous: bool = False,
) -> int:
    """Work for the fleet at *address* until it ends; whatever kills a worker, the next one joins.

    With *options* tests run in a machine of the lab.
    """
    Here.options = options
    security = wire.security(certificate)
    parent = os.getppid()

    def work() -> int:
        try:
            return asyncio.run(_work(address, security, name, say, dangerous=dangerous))
        except FleetError as error:
            say(str(error))
            return NO_WAY

    for _ in range(MAX_DEATHS):
        status = guarded(work)
        # Of whoever told it to end, and of who has nobody to work for.
        if status in (ENDED, NO_WAY, 128 + signal.SIGTERM, 128 + signal.SIGINT) or os.getppid() != parent:
            return status
        say(f"the worker of {name} died with status {status}; joining again")
        time.sleep(_PAUSE)
    say(f"{name} died {MAX_DEATHS} times; giving up")
    return NO_WAY


async def _work(address: str, security: Any, name: str, say: Say, *, dangerous: bool) -> int:
    from distributed import Worker

    about = describe(name, Here.options, dangerous=dangerous)
    with OwnedFolder("host") as folder:
        os.environ["DASK_TEMPORARY_DIRECTORY"] = str(folder)
        worker = Worker(
            address,
            security=security,
            nthreads=1,
            memory_limit=0,
            # Its own: the one before may still be believed to live.
            name=f"{name}#{uuid4().hex[:8]}",
            local_directory=str(folder),
            death_timeout=_JOIN_SECONDS,
            dashboard=False,
            dashboard_address="127.0.0.1:0",
        )
        try:
            await asyncio.wait_for(worker, _JOIN_SECONDS)
        except (OSError, asyncio.TimeoutError, RuntimeError, ValueError) as error:
            raise FleetError(f"cannot join {address}: {why(error)}") from None
        loop = asyncio.get_running_loop()
        told = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, told.set)
        try:
            await worker.scheduler.kvmpy_hello(address=worker.address, about=about)
        except OSError as error:
            raise FleetError(f"{address} went away: {why(error)}") from None
        say(f"{name} has joined {address}")
        ends = asyncio.ensure_future(worker.finished())
        await asyncio.wait({ends, asyncio.ensure_future(told.wait())}, return_when=asyncio.FIRST_COMPLETED)
        if not ends.done():
            await worker.close()
        return ENDED


def why(error: BaseException) -> str:
    """Return the innermost reason in words."""
    reasons = []
    each: BaseException | None = error
    while each is not None:
        reasons.append(str(each) or type(each).__name__)
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    text = " ".join(reasons)
    for mark, words in (
        ("refused", "nobody listens there"),
        ("CERTIFICATE_VERIFY_FAILED", "it is another fleet's: the certificate does not fit"),
        ("UNKNOWN_CA", "it is another fleet's: the certificate does not fit"),
        ("SSL", "TLS fails: the certificate does not fit, or it is no fleet"),
    ):
        if mark.lower() in text.lower():
            return words
    return reasons[0]


def default_name() -> str:
    """Return what this host is called where nobody gives it a name."""
    return socket.gethostname().partition(".")[0] or "host"
