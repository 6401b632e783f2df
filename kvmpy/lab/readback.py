# SPDX-License-Identifier: Apache-2.0
"""What the machine inside really is, read there, beside what was asked for: a setting may have no effect."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvmpy.testing import host

# Inside, what was asked for.
VARIABLE = "KVMPY_LAB_ASKED"
# QEMU's names of CPU flags that are neither Linux's nor KVM's documentation's.
_QEMU_FLAGS = {
    "avx512bitalg": "avx512_bitalg",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "cr8legacy": "cr8_legacy",
    "ibpb": "amd_ibpb",
    "nrip-save": "nrips",
    "pause-filter": "pausefilter",
    "ssbd": "spec_ctrl_ssbd",
    "stibp": "intel_stibp",
    "tsc-deadline": "tsc_deadline_timer",
    "tsc-scale": "tscratemsr",
    "vmcb-clean": "vmcbclean",
}
# Words that the kernel reads before it has a table of them, and so calls unknown; whether they took effect.
_EARLY = {"no5lvl": lambda: not host.cpu_flag("la57")}
_IOMEM = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) : System RAM$", re.MULTILINE)


def feature(flag: str) -> str:
    """Return the name by which :mod:`kvmpy.x86.cpuid` knows QEMU's CPU flag."""
    return _QEMU_FLAGS.get(flag, flag)


def asked(parameters: Sequence[str], cpu: Sequence[str]) -> str:
    """Return the value of VARIABLE for kernel parameters and CPU flags."""
    return json.dumps({"parameters": list(parameters), "cpu": list(cpu)})


def _has(flag: str) -> bool:
    from kvmpy.uapi import ffi, lib
    from kvmpy.x86.cpuid import REGISTERS, feature_bit

    (function, index, register), bit = feature_bit(feature(flag))
    place = ffi.new("uint32_t[4]")
    lib.kvmpy_cpuid(function & 0xFFFF_0000, 0, place)
    if place[0] < function:
        return False
    lib.kvmpy_cpuid(function, index, place)
    return bool(place[REGISTERS.index(register)] >> bit & 1)


def _ignored(words: Sequence[str], first: Path) -> list[str]:
    """Return which of *words* the kernel does not know: it hands them to its first process."""
    left: set[str] = set()
    if not words:
        return []
    for name in ("cmdline", "environ"):
        left.update((first / name).read_text(encoding="utf-8", errors="replace").split("\0"))
    return [word for word in words if (not _EARLY[word]() if word in _EARLY else word in left)]


def read(*, first: Path = Path("/proc/1"), iomem: Path = Path("/proc/iomem")) -> dict[str, Any]:
    """Return what the event ``host`` says of this machine; *first* is the first process in /proc."""
    wanted: Mapping[str, list[str]] = json.loads(os.environ.get(VARIABLE, "{}"))
    words = wanted.get("parameters", [])
    parameters: dict[str, str | None] = {}
    known: dict[str, list[str]] = {}
    for module, _, name in (word.partition("=")[0].partition(".") for word in words):
        if name:
            there = host.ModuleParameters(module)
            parameters[f"{module}.{name}"] = there.get(name)
            if name not in there:
                known[module] = list(there)
    ranges = _IOMEM.findall(iomem.read_text(encoding="ascii"))
    size = sum(int(last, 16) + 1 - int(start, 16) for start, last in ranges)
    nodes = list(Path("/sys/devices/system/node").glob("node[0-9]*"))
    return {
        "parameters": parameters,
        "known": known,
        "ignored": _ignored([word for word in words if "." not in word.partition("=")[0]], first),
        "flags": {flag[1:]: _has(flag[1:]) for flag in wanted.get("cpu", [])},
        "cpus": os.cpu_count() or 1,
        "memory": size >> 20,
        "nodes": max(1, len(nodes)),
    }
