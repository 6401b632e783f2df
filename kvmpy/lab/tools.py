# SPDX-License-Identifier: Apache-2.0
"""The programs and headers that the lab stands on, and the command that installs what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvmpy.lab.errors import LabError

QEMU = "qemu-system-x86_64"


@dataclass(frozen=True)
class Tool:
    """A program or header, and the packages that bring it."""

    name: str
    debian: str
    fedora: str
    header: bool = False


BUILD = (
    Tool("make", "make", "make"),
    Tool("gcc", "gcc libc6-dev", "gcc glibc-devel"),
    Tool("ld", "binutils", "binutils"),
    Tool("flex", "flex", "flex"),
    Tool("bison", "bison", "bison"),
    Tool("bc", "bc", "bc"),
    Tool("gelf.h", "libelf-dev", "elfutils-libelf-devel", header=True),
    Tool("openssl/opensslv.h", "libssl-dev", "openssl-devel", header=True),
)
DEBIAN = (
    Tool("apt-get", "apt", "apt"),
    Tool("apt-cache", "apt", "apt"),
    Tool("dpkg-deb", "dpkg", "dpkg"),
    Tool("tar", "tar", "tar"),
    Tool("xz", "xz-utils", "xz"),
)
RUN = (Tool(QEMU, "qemu-system-x86", "qemu-system-x86-core"),)


def _present(tool: Tool) -> bool:
    if not tool.header:
        return shutil.which(tool.name) is not None
    if shutil.which("gcc") is None:
        return True  # not to be found out; gcc itself is named
    result = subprocess.run(
        ["gcc", "-E", "-x", "c", "-"],
        input=f"#include <{tool.name}>\n".encode(),
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=60,
    )
    return result.returncode == 0


def install_command(tools: Sequence[Tool]) -> str:
    """Return the command that installs *tools* on this machine."""
    sudo = "" if os.geteuid() == 0 else "sudo "
    if shutil.which("dnf") is not None:
        return f"{sudo}dnf install {' '.join(dict.fromkeys(tool.fedora for tool in tools))}"
    return f"{sudo}apt-get install {' '.join(dict.fromkeys(tool.debian for tool in tools))}"


def need(tools: Sequence[Tool], purpose: str, present: Callable[[Tool], bool] = _present) -> None:
    """Raise LabError naming what of *tools* is missing for *purpose*, and how to install it."""
    missing = [tool for tool in tools if not present(tool)]
    if missing:
        names = ", ".join(tool.name for tool in missing)
        raise LabError(f"{purpose} needs {names}", f"install with: {install_command(missing)}")
