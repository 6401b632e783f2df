# SPDX-License-Identifier: Apache-2.0
"""What decides a diagnosis from afar: the machine's kind, kernel log, parameters, limits and firmware."""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
import select
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvmpy.core.kernel import ModuleParameters
from kvmpy.testing import host

_DMI = Path("/sys/class/dmi/id")
_PUBLIC_DMI = (
    "sys_vendor",
    "product_name",
    "board_vendor",
    "board_name",
    "bios_vendor",
    "bios_version",
    "bios_date",
)
_CPU = ("model name", "cpu family", "model", "stepping", "microcode")
_MODULES = ("ccp", "kvm", "kvm_amd")
_LIMITS = ("MEMLOCK", "NOFILE", "NPROC", "SIGPENDING")
_RECORD_SIZE = 8192
_JOURNAL_SECONDS = 60.0
# A panic's last messages that firmware or RAM kept (Documentation/admin-guide/pstore-blk.rst).
PSTORE = Path("/sys/fs/pstore")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        return f"({error.strerror})"


def machine() -> dict[str, Any]:
    """Return what names the machine's kind and how it was started; nothing that names this one.

    Kernel, command line, DMI names, CPU with its microcode, parameters of ccp and KVM's modules, and limits
    (soft, hard; -1 is none). No device is opened.
    """
    cpu = host.cpu_info()
    return {
        "kernel": platform.release(),
        "version": platform.version(),
        "cmdline": _read(Path("/proc/cmdline")),
        **{name: _read(_DMI / name) for name in _PUBLIC_DMI if (_DMI / name).exists()},
        **{name: cpu[name] for name in _CPU if name in cpu},
        "cpus": os.cpu_count(),
        "parameters": {module: dict(ModuleParameters(module)) for module in _MODULES},
        "limits": {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in _LIMITS},
        "cgroup_misc": _read(Path("/sys/fs/cgroup/misc.capacity")),
        "user": "root" if os.geteuid() == 0 else "not root",
    }


def platform_status() -> dict[str, Any]:
    """Return what the secure processor says of itself: PLATFORM_STATUS and SNP_PLATFORM_STATUS, or why not.

    Each waits for the secure processor, up to 100 s when it is dead.
    """
    from kvmpy.core.errors import KvmError, MissingError
    from kvmpy.core.sev_device import SevDevice
    from kvmpy.uapi.structs import sev_user_data_snp_status, sev_user_data_status

    values: dict[str, Any] = {}
    try:
        with SevDevice() as device:
            for name, argument in (
                ("SEV_PLATFORM_STATUS", sev_user_data_status()),
                ("SNP_PLATFORM_STATUS", sev_user_data_snp_status()),
            ):
                try:
                    device.command(name, argument)
                    values[name] = argument.as_dict()
                except KvmError as error:
                    values[name] = str(error)
    except (OSError, MissingError) as error:
        values["/dev/sev"] = str(error)
    return values


class KernelLog:
    """The messages in the kernel's log (``/dev/kmsg``): all that it still has, then those that come.

    With *kernel_only* those that programs write there are left out.
    """

    def __init__(self, path: Path = Path("/dev/kmsg"), *, kernel_only: bool = False) -> None:
        self.missing = ""
        self._kernel_only = kernel_only
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            self.missing = f"{path}: {error.strerror}: run as root, or sysctl kernel.dmesg_restrict=0"

    def skip(self) -> None:
        """Leave out what has been logged by now."""
        if self._fd >= 0:
            os.lseek(self._fd, 0, os.SEEK_END)

    def read(self) -> str:
        """Return what has been logged since the last call, a line for each message; "" without permission."""
        lines: list[str] = []
        while self._fd >= 0:
            try:
                record = os.read(self._fd, _RECORD_SIZE)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.EPIPE:
                    raise
                lines.append("(messages were overwritten before they were read)")
                continue
            if not record:
                break
            # Priority and facility, which is 0 for the kernel.
            if not self._kernel_only or int(record.partition(b",")[0]) >> 3 == 0:
                lines.append(message(record))
        return "".join(f"{line}\n" for line in lines)

    def fileno(self) -> int:
        """Return the descriptor, readable when there are messages; -1 without permission."""
        return self._fd

    def close(self) -> None:
        """Close it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class KernelLogFollower:
    """A thread that hands the kernel's messages to *keep* as they come; a context manager."""

    def __init__(self, log: KernelLog, keep: Callable[[bytes], None]) -> None:
        self._log = log
        self._keep = keep
        self._ends, self._wake = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._follow, name="kmsg", daemon=True)

    def _follow(self) -> None:
        waiting = select.poll()
        for fd in (self._log.fileno(), self._ends):
            waiting.register(fd, select.POLLIN)
        while True:
            ready = dict(waiting.poll())
            text = self._log.read()
            if text:
                self._keep(text.encode())
            if self._ends in ready:
                return

    def __enter__(self) -> KernelLogFollower:
        if self._log.fileno() >= 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._wake)
        if self._thread.is_alive():
            self._thread.join(10)
        os.close(self._ends)
        self._log.close()


def message(record: bytes) -> str:
    """Return a record of ``/dev/kmsg`` as dmesg prints it (Documentation/ABI/testing/dev-kmsg)."""
    head, _, text = record.decode("utf-8", "replace").partition(";")
    micros = int(head.split(",")[2])
    return f"[{micros / 1e6:12.6f}] {text.splitlines()[0] if text else ''}"


def boot_log(log: KernelLog) -> str:
    """Return the kernel's messages since boot: of *log*, or the journal's where the first are lost there."""
    text = log.read()
    if text.startswith("[    0.") or log.missing:
        return text or f"{log.missing}\n"
    command = ["journalctl", "-k", "-b", "--no-hostname", "-o", "short-monotonic", "--no-pager"]
    try:
        told = subprocess.run(command, capture_output=True, timeout=_JOURNAL_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return f"(the first messages are lost: boot with log_buf_len=4M)\n{text}"
    return told.stdout.decode("utf-8", "replace")


def last_words(since: float) -> dict[str, bytes]:
    """Return what pstore kept of crashes after *since* (seconds since the epoch), by file name."""
    results: dict[str, bytes] = {}
    for path in sorted(PSTORE.glob("*")):
        try:
            if path.stat().st_mtime >= since:
                results[path.name] = path.read_bytes()
        except OSError:
            continue
    return results


if __name__ == "__main__":
    # A process of its own: it may wait for a secure processor that is dead.
    told = {"host": host.summarize().as_dict(), "status": platform_status()}
    json.dump(told, sys.stdout, indent=2, default=repr)
