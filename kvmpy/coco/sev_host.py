# SPDX-License-Identifier: Apache-2.0
"""Why KVM offers no SEV, SEV-ES or SNP guests: what its own set-up looks at, in its order, cause by cause.

sev_hardware_setup() in Linux's arch/x86/kvm/svm/sev.c (7.2; what older kernels do otherwise is said there),
svm_hardware_setup() for what comes before, iommu_snp_enable(), and drivers/crypto/ccp for the processor.  KVM
writes what became of it back into its parameters, so that one that is off is a cause only where somebody
asked for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from kvmpy.core.errors import DeadProcessorError, MissingError
from kvmpy.core.kernel import (
    ModuleOptions,
    ModuleParameters,
    Option,
    command_line,
    config_hint,
    cpu_info,
    kernel_config,
)
from kvmpy.core.kvm import Kvm
from kvmpy.core.sev_device import PlatformStatus, SevDevice
from kvmpy.core.sev_errors import SevError
from kvmpy.uapi import ffi, lib
from kvmpy.uapi.constants import VmType

SEV_LEAF = 0x8000_001F
LAB = "or `kvmpy lab run --soft-sev`, a kernel with a software AMD-SP"
KINDS = SEV, ES, SNP = VmType.KVM_X86_SEV_VM, VmType.KVM_X86_SEV_ES_VM, VmType.KVM_X86_SNP_VM
# The parameters that KVM looks at for each kind: SNP is what is left when SEV and SEV-ES were not given up.
_CHAIN = {SEV: ("sev",), ES: ("sev", "sev_es"), SNP: ("sev", "sev_es", "sev_snp")}
_ON, _OFF = ("Y", "y", "1"), ("N", "n", "0")
_SNP_FIRMWARE = (1, 51)
# From which SVN of SNP's firmware on SEV-ES is not offered beside SNP, by CPU family: AMD-SB-3023.
_NO_ES = {0x19: 0x1B, 0x1A: 0x4}
_HIDING = "kvm_amd.ciphertext_hiding_asids"
_LIMIT = "`SEV-ES ASID space limit` in the firmware setup"
_SETUP = {
    "sev": "SMEE (secure memory encryption) on in the firmware setup",
    "sev_es": "SMEE and SEV-ES on in the firmware setup",
    "sev_snp": "an EPYC 7003 or newer with SMEE, SEV-SNP and RMP coverage on in the firmware setup, and no "
    "sev=nosnp on the kernel's command line",
}
_SHOWN = "a CPU, and a hypervisor if there is one, that show it"
_NO_IOMMU = ("iommu=off", "iommu=pt", "iommu.passthrough=1", "amd_iommu=off", "amd_iommu=pgtbl_v2")
_PASS_THROUGH, _TRANSLATED = "IOMMU_DEFAULT_PASSTHROUGH", ("iommu.passthrough=0", "iommu=nopt")
_OPTIONS = ("KVM_AMD_SEV", "CRYPTO_DEV_SP_PSP", "AMD_IOMMU", _PASS_THROUGH)


@dataclass(frozen=True)
class SevHost:
    """What KVM's set-up and ccp's look at, and what they made of it.

    *asids*: how many encrypted guests have, and the first of those without SEV-ES (CPUID 0x8000001F).
    *options*: what the command line and modprobe.d ask of modules, by ``module.name``.  *device*: why
    /dev/sev cannot be opened.  *silent*: what it answers in place of a status.  *snp*: state and security
    version of SNP's firmware, None where it does not tell.
    """

    flags: frozenset[str] = frozenset()
    family: int = 0
    config: Mapping[str, str | None] = field(default_factory=dict)
    modules: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    options: Mapping[str, Option] = field(default_factory=dict)
    command_line: tuple[str, ...] = ()
    asids: tuple[int, int] | None = None
    device: MissingError | None = None
    status: PlatformStatus | None = None
    silent: str = ""
    snp: tuple[int, int] | None = None

    def parameter(self, name: str) -> str | None:
        """The value of the parameter ``module.name``, None without one."""
        module, _, parameter = name.partition(".")
        return self.modules.get(module, {}).get(parameter)

    def is_off(self, name: str) -> bool:
        """Whether there is such a parameter, and it is off."""
        value = self.parameter(name)
        return value is not None and value not in _ON

    @property
    def hidden(self) -> int:
        """Up to which ASID guests are SNP's alone: kvm_amd.ciphertext_hiding_asids, 0 without hiding."""
        value = self.parameter(_HIDING) or "0"
        return int(value) if value.isdecimal() else 0


def read(kvm: Kvm) -> SevHost:
    """Look at this host."""
    device, status, silent, snp = None, None, "", None
    family = int(cpu_info().get("cpu family", "0"))
    try:
        with SevDevice() as sev:
            try:
                status = sev.platform_status()
                snp = _snp(sev, family)
            except (SevError, DeadProcessorError) as error:
                silent = str(error).splitlines()[0]
    except MissingError as error:
        device = error
    return SevHost(
        flags=frozenset(cpu_info().get("flags", "").split()),
        family=family,
        config={name: kernel_config(name) for name in _OPTIONS},
        modules={name: ModuleParameters(name) for name in ("kvm", "kvm_amd", "ccp")},
        options=ModuleOptions("kvm", "kvm_amd", "ccp"),
        command_line=command_line(),
        asids=_asids(kvm),
        device=device,
        status=status,
        silent=silent,
        snp=snp,
    )


def _cpuid(leaf: int) -> tuple[int, int, int, int]:
    place = ffi.new("uint32_t[4]")
    lib.kvmpy_cpuid(leaf, 0, place)
    return int(place[0]), int(place[1]), int(place[2]), int(place[3])


def _asids(kvm: Kvm) -> tuple[int, int] | None:
    # KVM empties the leaf where it offers no SEV; of the lab's platform only KVM knows.
    for entry in kvm.supported_cpuid.entries_list():
        if entry.function == SEV_LEAF and entry.ecx:
            return int(entry.ecx), int(entry.edx)
    if _cpuid(0x8000_0000)[0] < SEV_LEAF or not _cpuid(SEV_LEAF)[0] & 1 << 1:
        return None
    _, _, guests, first = _cpuid(SEV_LEAF)
    return guests, first


def _snp(device: SevDevice, family: int) -> tuple[int, int] | None:
    try:
        status = device.snp_platform_status()
    except SevError:
        return None
    # TCB_VERSION of the SNP firmware ABI: SNP's part is byte 6, on Turin byte 3.
    shift = 24 if family >= 0x1A else 48
    return int(status.state), int(status.current_tcb_version) >> shift & 0xFF


Cause = Callable[[SevHost, VmType], "MissingError | None"]


def _asked_off(index: int) -> Cause:
    def check(host: SevHost, kind: VmType) -> MissingError | None:
        name = f"kvm_amd.{_CHAIN[kind][index]}"
        option = host.options.get(name)
        if option is None or option.value not in _OFF:
            return None
        return MissingError(f"{name} (it is off: {option.source} asks for that)", f"{name}=1")

    return check


def _parameter(name: str, *, flag: str = "") -> Cause:
    """A parameter that is off: because somebody asked for that, or the CPU has not what it stands for."""

    def check(host: SevHost, _: VmType) -> MissingError | None:
        if not host.is_off(name):
            return None
        if flag and flag not in host.flags:
            return MissingError(f"CPU flag {flag}", _SHOWN)
        option = host.options.get(name)
        source = f" ({option.source} asks for {option.value})" if option else ""
        return MissingError(f"{name} (it is {host.parameter(name)})", f"{name}=1{source}")

    return check


def _flag(flag: str, mode: str = _SHOWN) -> Cause:
    def check(host: SevHost, _: VmType) -> MissingError | None:
        if flag in host.flags:
            return None
        return MissingError(f"CPU flag {flag}", f"{mode}, {LAB}")

    return check


def _config(option: str) -> Cause:
    def check(host: SevHost, _: VmType) -> MissingError | None:
        if host.config.get(option) in ("y", "m", None):
            return None
        return MissingError(f"CONFIG_{option}", config_hint(option))

    return check


def _module(host: SevHost, _: VmType) -> MissingError | None:
    return None if host.modules.get("kvm_amd") else MissingError("module kvm_amd", "modprobe kvm_amd")


def _no_asids(host: SevHost, kind: VmType) -> MissingError | None:
    """Of the kind: there are none, all are the other kind's, or SNP's alone."""
    if host.asids is None:
        return None
    guests, first = host.asids
    if not guests:
        return MissingError("an ASID for encrypted guests", "`SEV ASID count` above 0 in the firmware setup")
    if kind == SEV and first > guests:
        return MissingError(
            "an ASID for SEV without ES (all belong to SEV-ES and SNP)", f"lower {_LIMIT} (it is {first})"
        )
    if kind != SEV and first == 1:
        return MissingError("an ASID for SEV-ES and SNP (all belong to SEV)", f"raise {_LIMIT} above 1")
    if kind == ES and host.hidden >= first - 1:
        return MissingError(
            f"an ASID for SEV-ES ({_HIDING}={host.hidden} gives all {first - 1} to SNP)",
            f"a smaller {_HIDING}, or raise {_LIMIT}",
        )
    return None


def _no_es_beside_snp(host: SevHost, _: VmType) -> MissingError | None:
    least = _NO_ES.get(host.family)
    if host.snp is None or least is None or not host.snp[0] or host.snp[1] < least:
        return None
    return MissingError(
        f"SEV-ES beside SNP (not with SVN {host.snp[1]:#x} of the firmware: AMD-SB-3023)",
        "SNP guests in its place, or sev=nosnp on the kernel's command line",
    )


def _words(host: SevHost) -> Iterator[tuple[str, str, str]]:
    return (word.partition("=") for word in host.command_line)


def _iommu(host: SevHost, _: VmType) -> MissingError | None:
    asked = [f"{name}={value}" for name, _, values in _words(host) for value in values.split(",")]
    named = [each for each in asked if each in _NO_IOMMU]
    if not named and host.config.get(_PASS_THROUGH) == "y" and not set(asked) & set(_TRANSLATED):
        return MissingError(
            f"an IOMMU that SNP can use (CONFIG_{_PASS_THROUGH}=y)",
            f"boot with {_TRANSLATED[0]}, or a kernel without CONFIG_{_PASS_THROUGH}",
        )
    if not named:
        return None
    return MissingError(
        f"an IOMMU that SNP can use ({named[0]} is on the kernel's command line)",
        f"boot without {named[0]}; IOMMU enabled in the firmware setup",
    )


def _processor(host: SevHost, _: VmType) -> MissingError | None:
    """A device, and one that answers; without the CPU flag ccp makes none."""
    if host.device is not None:
        return host.device if "sev" in host.flags or "permission" in host.device.missing else None
    if host.silent:
        return MissingError("a secure processor that answers", f"reboot: {host.silent}")
    return None


def _firmware(host: SevHost, _: VmType) -> MissingError | None:
    status = host.status
    if status is None or "sev_snp" not in host.flags:
        return None
    if (status.api_major, status.api_minor) >= _SNP_FIRMWARE or (host.snp and host.snp[0]):
        return None
    return MissingError(
        f"firmware 1.51 of the secure processor, which this host's SNP needs (it is {status.version})",
        "a newer one in /lib/firmware/amd or from the BIOS; or sev=nosnp on the kernel's command line",
    )


def _initialised(host: SevHost, _: VmType) -> MissingError | None:
    # Without psp_init_on_probe the first guest does it.
    if host.status is None or host.status.state != "uninitialised" or host.is_off("ccp.psp_init_on_probe"):
        return None
    return MissingError(
        "a secure processor that is initialised (its INIT failed, or kvm_amd was loaded with sev=0)",
        "dmesg | grep -iE 'ccp|sev' says why; modprobe -r kvm_amd && modprobe kvm_amd tries again",
    )


def _snp_initialised(host: SevHost, _: VmType) -> MissingError | None:
    if host.status is None or (host.snp is not None and host.snp[0]):
        return None
    return MissingError(
        "SNP initialised by the secure processor",
        "an RMP table of the firmware setup and an IOMMU: dmesg | grep -iE 'rmp|snp|iommu|ccp' says why not",
    )


_COMMON: tuple[Cause, ...] = (
    _config("KVM_AMD_SEV"),
    _module,
    _asked_off(0),
    _parameter("kvm_amd.npt", flag="npt"),
    _parameter("kvm_amd.nrips", flag="nrip_save"),
    _flag("sev", _SETUP["sev"]),
    _flag("decodeassists"),
    _flag("flushbyasid"),
    _config("CRYPTO_DEV_SP_PSP"),
)
_WITH_ES: tuple[Cause, ...] = (
    _asked_off(1),
    _parameter("kvm.mmio_caching"),
    _flag("sev_es", _SETUP["sev_es"]),
    _parameter("kvm_amd.lbrv", flag="lbrv"),
)
_WITH_SNP: tuple[Cause, ...] = (
    _asked_off(2),
    _flag("sev_snp", _SETUP["sev_snp"]),
    _config("AMD_IOMMU"),
    _iommu,
)
_CAUSES: dict[VmType, tuple[Cause, ...]] = {
    SEV: (*_COMMON, _no_asids, _processor, _firmware),
    ES: (*_COMMON, *_WITH_ES, _no_asids, _processor, _firmware, _no_es_beside_snp),
    SNP: (*_COMMON, *_WITH_ES, _no_asids, *_WITH_SNP, _processor, _firmware),
}
# What comes of one of those as well: causes only where there is no other.
_THEN: dict[VmType, tuple[Cause, ...]] = {
    SEV: (_initialised,),
    ES: (_initialised,),
    SNP: (_initialised, _snp_initialised),
}


def _switched_off(host: SevHost, kind: VmType) -> Iterator[MissingError]:
    for parameter in _CHAIN[kind]:
        name = f"kvm_amd.{parameter}"
        if host.is_off(name):
            yield MissingError(
                f"{name} (it is {host.parameter(name)})",
                f"load kvm_amd with {parameter}=1; if it was, see dmesg | grep -iE 'sev|snp|rmp|ccp'",
            )


def causes(host: SevHost, kind: VmType) -> list[MissingError]:
    """Return why KVM does not offer the VM type, in the order in which it looks; never empty."""
    if "svm" not in host.flags:
        return [MissingError("an AMD CPU with SVM", f"an EPYC with SEV, {LAB}")]
    answers = _hits(_CAUSES[kind], host, kind)
    # A device that this user may not open explains nothing about KVM.
    if any(missing is not host.device or "permission" not in missing.missing for missing in answers):
        return answers
    text = f"VM type {kind.name} (KVM_CAP_VM_TYPES bit {int(kind)})"
    how = f"a kernel that offers it (6.11 for SNP, 6.10 for the others), {LAB}"
    other = _hits(_THEN[kind], host, kind) or list(_switched_off(host, kind))[:1] or [MissingError(text, how)]
    return [*answers, *other]


def _hits(checks: tuple[Cause, ...], host: SevHost, kind: VmType) -> list[MissingError]:
    return [missing for check in checks if (missing := check(host, kind)) is not None]


def lacking(host: SevHost, kind: VmType) -> list[MissingError]:
    """Return what is missing to guests of a VM type that KVM offers: Linux before 7.2 looks at less."""
    return _hits((_no_asids, _processor), host, kind)
