# SPDX-License-Identifier: Apache-2.0
"""``@pytest.mark.requires(...)``: what a test needs from this host, checked before any fixture is set up.

A requirement is a string or a callable:

- ``kvm``: a KVM device that can be opened
- ``KVM_CAP_X``, ``KVM_CAP_X>=N``, ``KVM_CAP_X&MASK``: a capability, its least value, or bits of it
- ``ioctl:KVM_X``: the capability that the ioctl table names for it
- ``vm-type:KVM_X86_SEV_VM``: a VM type
- ``sev-attr:KVM_X86_SEV_SNP_REQ_CERTS``: an attribute of KVM_X86_GRP_SEV that is not 0
- ``protection:snp``: a protection of the ladder; ``trait:NAME``: a trait of the test's own protection
- ``cpuid:xsave``: a feature in KVM_GET_SUPPORTED_CPUID, by Linux's name
- ``msr:0x4b564d00``: an MSR in KVM_GET_MSR_INDEX_LIST or the feature MSR list
- ``param:kvm.ignore_msrs`` or ``param:kvm_amd.sev=Y``: a module parameter (and its value)
- ``cpu:FLAG``: a flag in /proc/cpuinfo
- ``tool:gcc``: a command; ``path:/dev/userfaultfd``: a file that can be read and written; ``root``: uid 0
- ``fault-injection``: root, and a kernel in which a test lets allocations fail
- ``stable-tsc``: a kernel that takes its time from the TSC, so that KVM need not correct guests' TSCs
- a callable, given an open ``Kvm``: None or True when all is there, otherwise a :class:`Missing` or a text
  (a function alone is passed as ``requires.with_args(function)``, as pytest takes it for the test otherwise)
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Union

from kvmpy.core.kernel import config_hint
from kvmpy.testing import host
from kvmpy.testing.configurations import is_value, load, with_parameter
from kvmpy.testing.verdicts import Missing

if TYPE_CHECKING:
    from kvmpy.core.kvm import Kvm

Requirement = Union[str, Callable[["Kvm"], "Missing | str | bool | None"]]

_CAP = re.compile(r"(KVM_CAP_\w+)\s*(?:(>=|&)\s*(0x[0-9a-fA-F]+|\d+))?")

# Which Kconfig option, parameter or hardware gives a capability, where KVM does not simply always have it.
_CAP_SOURCES = {
    "KVM_CAP_X86_SMM": ("KVM_SMM", ""),
    "KVM_CAP_HYPERV": ("KVM_HYPERV", ""),
    "KVM_CAP_HYPERV_CPUID": ("KVM_HYPERV", ""),
    "KVM_CAP_HYPERV_ENFORCE_CPUID": ("KVM_HYPERV", ""),
    "KVM_CAP_HYPERV_EVENTFD": ("KVM_HYPERV", ""),
    "KVM_CAP_HYPERV_SEND_IPI": ("KVM_HYPERV", ""),
    "KVM_CAP_HYPERV_SYNIC2": ("KVM_HYPERV", ""),
    "KVM_CAP_HYPERV_TIME": ("KVM_HYPERV", ""),
    "KVM_CAP_HYPERV_TLBFLUSH": ("KVM_HYPERV", ""),
    "KVM_CAP_HYPERV_VP_INDEX": ("KVM_HYPERV", ""),
    "KVM_CAP_SYS_HYPERV_CPUID": ("KVM_HYPERV", ""),
    "KVM_CAP_HYPERV_ENLIGHTENED_VMCS": ("KVM_HYPERV", "Intel with nested virtualisation"),
    "KVM_CAP_XEN_HVM": ("KVM_XEN", ""),
    "KVM_CAP_MEMORY_ATTRIBUTES": ("KVM_SW_PROTECTED_VM", "or SEV-SNP or TDX hardware; kvm.tdp_mmu=Y"),
    "KVM_CAP_GUEST_MEMFD": ("KVM_GUEST_MEMFD", "Linux 6.8 or newer"),
    "KVM_CAP_PRE_FAULT_MEMORY": ("KVM_GENERIC_PRE_FAULT_MEMORY", "two-dimensional paging (kvm.tdp_mmu=Y)"),
    "KVM_CAP_NESTED_STATE": ("", "a vendor module with nested=1 (kvm_amd or kvm_intel)"),
    "KVM_CAP_PMU_CAPABILITY": ("", "kvm.enable_pmu=Y and a CPU with a PMU visible to this kernel"),
    "KVM_CAP_PMU_EVENT_FILTER": ("", "kvm.enable_pmu=Y and a CPU with a PMU visible to this kernel"),
    "KVM_CAP_SGX_ATTRIBUTE": ("X86_SGX_KVM", "Intel SGX"),
}
_TOOL_PACKAGES = {
    "as": ("binutils", "binutils"),
    "ld": ("binutils", "binutils"),
    "objdump": ("binutils", "binutils"),
}


def _capability(kvm: Kvm, text: str) -> Missing | None:
    match = _CAP.fullmatch(text)
    if match is None:
        raise ValueError(f"not a capability requirement: {text!r}")
    from kvmpy.uapi.constants import Cap

    name, operator, operand = match.groups()
    if name not in Cap.__members__:
        raise ValueError(f"no capability named {name}")
    value = kvm.check_extension(Cap[name])
    if operator is None:
        good = value > 0
    elif operator == ">=":
        good = value >= int(operand, 0)
    else:
        good = value & int(operand, 0) == int(operand, 0)
    if good:
        return None
    option, other = _CAP_SOURCES.get(name, ("", ""))
    ways = [config_hint(option)] if option else []
    ways += [other] if other else []
    how = ", ".join(ways) or "a kernel or CPU whose KVM offers it"
    asked = f"{name} {operator} {operand} (it is {value:#x})" if operator else name
    return Missing(asked, how, (name,))


def _ioctl(kvm: Kvm, name: str) -> Missing | None:
    from kvmpy.uapi.ioctls import IOCTLS

    if name not in IOCTLS:
        raise ValueError(f"no ioctl named {name}")
    cap = IOCTLS[name].cap
    missing = _capability(kvm, cap) if cap else None
    return missing and Missing(f"{name} ({missing.what})", missing.how, (f"ioctl:{name}", *missing.keys))


def _vm_type(kvm: Kvm, name: str) -> Missing | None:
    from kvmpy.coco import sev_host
    from kvmpy.uapi.constants import VmType

    if name not in VmType.__members__:
        raise ValueError(f"no VM type named {name}")
    if VmType[name] in kvm.vm_types():
        return None
    if VmType[name] in sev_host.KINDS:
        how = "; ".join(str(cause) for cause in sev_host.causes(sev_host.read(kvm), VmType[name]))
    else:
        how = {
            "KVM_X86_SW_PROTECTED_VM": f"{config_hint('KVM_SW_PROTECTED_VM')} and kvm.tdp_mmu=Y",
            "KVM_X86_TDX_VM": "Intel TDX, and kvm_intel.tdx=1",
        }.get(name, "a kernel whose KVM offers it")
    return Missing(f"VM type {name}", how, (f"vm-type:{name}", name))


def _sev_attribute(kvm: Kvm, name: str) -> Missing | None:
    from kvmpy.core.errors import KvmError
    from kvmpy.uapi.constants import KVM_X86_GRP_SEV, SevAttr

    if name not in SevAttr.__members__:
        raise ValueError(f"no attribute of KVM_X86_GRP_SEV named {name}")
    try:
        if kvm.attrs.get_int(KVM_X86_GRP_SEV, SevAttr[name]):
            return None
    except KvmError:
        pass
    return Missing(f"attribute {name}", "a newer kernel, with SEV", (f"sev-attr:{name}", name))


def _protection(kvm: Kvm, name: str) -> Missing | None:
    from kvmpy.coco import ladder

    if name not in ladder.protections():
        raise ValueError(f"no protection named {name!r}; there are {', '.join(ladder.protections())}")
    state = ladder.availability(kvm)[name]
    if state.available:
        return None
    what = "; ".join(entry.missing for entry in state.missing)
    how = "; ".join(dict.fromkeys(entry.how for entry in state.missing if entry.how))
    return Missing(f"protection {name} ({what})", how, (name, f"protection:{name}"))


def _msr(kvm: Kvm, text: str) -> Missing | None:
    index = int(text, 0)
    if index in kvm.get_msr_index_list() or index in kvm.get_msr_feature_index_list():
        return None
    return Missing(f"MSR {index:#x}", "a KVM and CPU that list it (KVM_GET_MSR_INDEX_LIST)", (f"msr:{text}",))


def _cpuid(kvm: Kvm, feature: str) -> Missing | None:
    from kvmpy.x86.cpuid import Cpuid, FeatureNameError

    try:
        offered = Cpuid.from_struct(kvm.supported_cpuid).has(feature)
    except FeatureNameError as error:
        raise ValueError(str(error)) from None
    if offered:
        return None
    subject = f"CPUID feature {feature} in KVM_GET_SUPPORTED_CPUID"
    return Missing(subject, "a CPU that has it and a KVM that passes it on", (f"cpuid:{feature}",))


def _parameter(text: str, files: Sequence[Path]) -> Missing | None:
    name, _, wanted = text.partition("=")
    module, _, parameter = name.partition(".")
    if not parameter:
        raise ValueError(f"write a parameter as module.name, not {name!r}")
    value = host.ModuleParameters(module).get(parameter)
    keys = (f"param:{name}",)
    if value is not None and (not wanted or is_value(name, wanted, value)):
        return None
    if value is None:
        subject, how = f"module parameter {name}", f"modprobe a {module} that has it"
    else:
        subject = f"module parameter {name}={wanted} (it is {value})"
        how = f"load {module} with {parameter}={wanted}, or {name}={wanted} on the kernel's command line"
    if (entry := with_parameter(load(files).values(), name, wanted)) is not None:
        how = f"kvmpy lab run --configuration {entry.name}, or {how}"
    return Missing(subject, how, keys)


def _cpu(flag: str) -> Missing | None:
    if host.cpu_flag(flag):
        return None
    return Missing(f"CPU flag {flag}", "a CPU (or an outer hypervisor) that offers it", (f"cpu:{flag}",))


def _tool(name: str) -> Missing | None:
    if shutil.which(name):
        return None
    debian, fedora = _TOOL_PACKAGES.get(name, (name, name))
    how = f"apt-get install {debian} or dnf install {fedora}"
    return Missing(f"the command {name}", how, (f"tool:{name}",))


def _path(name: str) -> Missing | None:
    if os.access(name, os.R_OK | os.W_OK):
        return None
    state = "no permission on" if os.path.exists(name) else "no file"
    return Missing(f"{name} ({state} it)", "root, or the kernel option that provides it", (f"path:{name}",))


def _root(_text: str) -> Missing | None:
    return None if os.geteuid() == 0 else Missing("root", "run as root (sudo)", ("root",))


def _fault_injection(_text: str) -> Missing | None:
    from kvmpy.testing import fault_injection

    lacking = fault_injection.missing()
    if not lacking:
        return None
    how = f"{config_hint('FAILSLAB')}, CONFIG_FAIL_PAGE_ALLOC and CONFIG_FAULT_INJECTION_DEBUG_FS, as root"
    return Missing(f"fault injection ({lacking})", how, ("fault-injection",))


def _stable_tsc(_text: str) -> Missing | None:
    source = host.clock_source()
    if source in ("tsc", "kvm-clock", "hyperv_clocksource_tsc_page"):
        return None
    text = f"a stable TSC (the clock source is {source or 'unknown'})"
    return Missing(text, "a CPU, or an outer hypervisor, whose TSC this kernel trusts", ("stable-tsc",))


_ASK_KVM: dict[str, Callable[[Kvm, str], Missing | None]] = {
    "ioctl": _ioctl,
    "vm-type": _vm_type,
    "sev-attr": _sev_attribute,
    "protection": _protection,
    "cpuid": _cpuid,
    "msr": _msr,
}
_ASK_HOST: dict[str, Callable[[str], Missing | None]] = {
    "cpu": _cpu,
    "tool": _tool,
    "path": _path,
    "root": _root,
    "fault-injection": _fault_injection,
    "stable-tsc": _stable_tsc,
}


def _called(requirement: Callable[[Kvm], Missing | str | bool | None], kvm: Kvm) -> Missing | None:
    answer = requirement(kvm)
    if answer is None or answer is True:
        return None
    if isinstance(answer, Missing):
        return answer
    name = getattr(requirement, "__name__", "requirement")
    return Missing(answer if isinstance(answer, str) else name.replace("_", " "), "", (name,))


class Requirements:
    """Answers requirements; every answer is kept, as a host does not change in mid-run.

    *files* are further ones of configurations: a skip names the one that would run the test.
    """

    def __init__(self, files: Sequence[Path] = ()) -> None:
        self._files = files
        self._answers: dict[Requirement, Missing | None] = {}

    @functools.cached_property
    def kvm_missing(self) -> Missing | None:
        """Why KVM cannot be used, or None."""
        return host.kvm_missing()

    def missing(self, wanted: Sequence[Requirement]) -> list[Missing]:
        """Return what this host lacks of *wanted*; ValueError for a requirement that means nothing."""
        lacking = [self._one(requirement) for requirement in wanted]
        return [entry for entry in dict.fromkeys(lacking) if entry is not None]

    def _one(self, requirement: Requirement) -> Missing | None:
        if requirement not in self._answers:
            self._answers[requirement] = self._find(requirement)
        return self._answers[requirement]

    def _find(self, requirement: Requirement) -> Missing | None:
        kind, rest = "", ""
        if isinstance(requirement, str):
            kind, _, rest = requirement.partition(":")
            if kind == "param":
                return _parameter(rest, self._files)
            if kind in _ASK_HOST:
                return _ASK_HOST[kind](rest)
            if kind != "kvm" and not kind.startswith("KVM_CAP_") and kind not in _ASK_KVM:
                known = ", ".join(["kvm", "KVM_CAP_...", *_ASK_KVM, "param", *_ASK_HOST])
                raise ValueError(f"unknown requirement {requirement!r}; known are {known}, and callables")
        if self.kvm_missing is not None or requirement == "kvm":
            return self.kvm_missing
        from kvmpy.core.kvm import Kvm

        with Kvm() as kvm:
            if callable(requirement):
                return _called(requirement, kvm)
            return _ASK_KVM[kind](kvm, rest) if kind in _ASK_KVM else _capability(kvm, requirement)
