# SPDX-License-Identifier: Apache-2.0
"""What this host is: kernel, CPU, vendor module and parameters, whether KVM can be used, and the platform."""

from __future__ import annotations

import functools
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvmpy import version
from kvmpy.core.kernel import SYS_MODULE, ModuleParameters, cpu_info, kernel_config
from kvmpy.testing.errata import HostFacts
from kvmpy.testing.verdicts import Missing

PLATFORM_VARIABLE = "KVMPY_PLATFORM"
ACCELERATOR_VARIABLE = "KVMPY_ACCELERATOR"
CONFIGURATION_VARIABLE = "KVMPY_CONFIGURATION"
CLOCK_SOURCE = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")

__all__ = [
    "HostSummary",
    "ModuleParameters",
    "clock_source",
    "cpu_flag",
    "cpu_info",
    "cpu_model",
    "facts",
    "kernel",
    "kernel_config",
    "kvm_missing",
    "platform_name",
    "summarize",
    "vendor_modules",
    "vm_type_name",
]

_VENDOR_SYMBOL = re.compile(r" [tT] (pvm|svm|vmx)_(?:init|hardware_enable|hardware_setup|vcpu_run)(?:\s|$)")
_VENDORS = {"pvm": "kvm_pvm", "svm": "kvm_amd", "vmx": "kvm_intel"}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def platform_name() -> str:
    """Return where this runs: ``host``, or the name that an emulated platform gives itself."""
    return os.environ.get(PLATFORM_VARIABLE) or "host"


def cpu_model() -> str:
    """Return the CPU's name, such as ``AMD EPYC 9454``."""
    return cpu_info().get("model name", platform.machine())


def clock_source() -> str:
    """Return what this kernel takes its time from, such as ``tsc`` or ``hpet``; empty if it does not tell."""
    return _read(CLOCK_SOURCE)


def cpu_flag(name: str) -> bool:
    """Whether /proc/cpuinfo lists the CPU flag *name*."""
    return name in cpu_info().get("flags", "").split()


@functools.lru_cache(maxsize=1)
def vendor_modules() -> tuple[str, ...]:
    """Return the vendor modules that are loaded or built in (kvm_amd, kvm_intel, kvm_pvm, ...)."""
    # A module that is built in and has no parameter has no folder in sysfs: its symbols still tell.
    try:
        modules = sorted(path.name for path in SYS_MODULE.iterdir() if path.name.startswith("kvm_"))
    except OSError:
        modules = []
    if modules:
        return tuple(modules)
    try:
        with open("/proc/kallsyms", encoding="ascii", errors="replace") as symbols:
            names = {match[1] for line in symbols if (match := _VENDOR_SYMBOL.search(line))}
    except OSError:
        return ()
    return tuple(sorted(_VENDORS[name] for name in names))


def kernel() -> str:
    """Return the kernel's release and machine, such as ``6.18.44 x86_64``."""
    names = os.uname()
    return f"{names.release} {names.machine}"


def facts() -> HostFacts:
    """Return what errata conditions look at."""
    modules = ("kvm", *vendor_modules())
    parameters = {
        f"{module}.{name}": value for module in modules for name, value in ModuleParameters(module).items()
    }
    return HostFacts(os.uname().release, " ".join(vendor_modules()), cpu_model(), platform_name(), parameters)


def kvm_missing() -> Missing | None:
    """Return why KVM cannot be used here, or None when it can."""
    from kvmpy.core.errors import MissingError
    from kvmpy.core.kvm import Kvm

    try:
        Kvm().close()
    except MissingError as error:
        return Missing(error.missing, error.how, ("kvm",))
    except OSError as error:
        return Missing("a usable /dev/kvm", f"opening it failed: {error}", ("kvm",))
    return None


@dataclass(frozen=True)
class HostSummary:
    """What every report says about the host."""

    kernel: str
    cpu: str
    vendor_modules: tuple[str, ...]
    platform: str
    kvm: bool
    kvm_missing: str = ""
    vm_types: tuple[str, ...] = ()
    protections: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    accelerator: str = ""
    configuration: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as JSON-ready values; a protection's text is empty when it is available."""
        return {
            "kvmpy": version.exact(),
            "kernel": self.kernel,
            "cpu": self.cpu,
            "vendor_modules": list(self.vendor_modules),
            "platform": self.platform,
            "accelerator": self.accelerator,
            "configuration": self.configuration,
            "kvm": self.kvm,
            "kvm_missing": self.kvm_missing,
            "vm_types": list(self.vm_types),
            "protections": {
                name: {"available": not missing, "missing": missing, "label": self.labels.get(name, "")}
                for name, missing in self.protections.items()
            },
        }

    def lines(self) -> list[str]:
        """Return the summary as a few lines of text."""
        modules = ", ".join(self.vendor_modules) or "no vendor module"
        first = f"kernel {self.kernel}, {modules}, {self.cpu}"
        if self.configuration:
            first += f", configuration {self.configuration}"
        if self.platform != "host":
            first += f", platform {self.platform} ({self.accelerator or 'emulated'})"
        if not self.kvm:
            return [first, f"KVM cannot be used: {self.kvm_missing}"]
        offered = [name for name, missing in self.protections.items() if not missing]
        absent = [name for name, missing in self.protections.items() if missing]
        types = ", ".join(name.removeprefix("KVM_X86_").removesuffix("_VM").lower() for name in self.vm_types)
        second = f"VM types: {types}; protections: {', '.join(offered) or 'none offered'}"
        if absent:
            second += f" (not here: {', '.join(absent)}; see kvmpy doctor)"
        return [first, second]


def summary_of(told: Mapping[str, Any]) -> HostSummary:
    """Return the summary that :meth:`HostSummary.as_dict` gave *told*; what is absent there is unknown."""
    protections: Mapping[str, Any] = told.get("protections", {})
    return HostSummary(
        str(told.get("kernel", "unknown")),
        str(told.get("cpu", "unknown")),
        tuple(told.get("vendor_modules", ())),
        str(told.get("platform", platform_name())),
        kvm=bool(told.get("kvm", False)),
        kvm_missing=str(told.get("kvm_missing", "unknown")),
        vm_types=tuple(told.get("vm_types", ())),
        protections={name: str(state["missing"]) for name, state in protections.items()},
        labels={name: str(state["label"]) for name, state in protections.items()},
        accelerator=str(told.get("accelerator", "")),
        configuration=str(told.get("configuration", "")),
    )


def vm_type_name(number: int) -> str:
    """Return the kernel's name of a VM type, or its number as text."""
    from kvmpy.uapi.constants import VmType

    try:
        return VmType(number).name
    except ValueError:
        return str(number)


def summarize() -> HostSummary:
    """Look at this host; opens /dev/kvm once."""
    missing = kvm_missing()
    common = (kernel(), cpu_model(), vendor_modules(), platform_name())
    accelerator = os.environ.get(ACCELERATOR_VARIABLE, "")
    configuration = os.environ.get(CONFIGURATION_VARIABLE, "")
    if missing is not None:
        return HostSummary(
            *common,
            kvm=False,
            kvm_missing=str(missing),
            accelerator=accelerator,
            configuration=configuration,
        )
    from kvmpy.coco import ladder
    from kvmpy.core.kvm import Kvm

    with Kvm() as kvm:
        types = tuple(vm_type_name(number) for number in sorted(kvm.vm_types()))
        offered = ladder.availability(kvm)
    protections = {
        name: "" if offered[name].available else "; ".join(entry.missing for entry in offered[name].missing)
        for name in ladder.protections()
    }
    labels = {name: ladder.get(name).label for name in protections}
    return HostSummary(
        *common,
        kvm=True,
        vm_types=types,
        protections=protections,
        labels=labels,
        accelerator=accelerator,
        configuration=configuration,
    )
