# SPDX-License-Identifier: Apache-2.0
"""Each cause for which KVM offers no SEV, SEV-ES or SNP, on a host that has that one."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from kvmpy.coco import sev_host
from kvmpy.coco.sev_host import ES, SEV, SNP, SevHost, causes, lacking
from kvmpy.core import kernel
from kvmpy.core.errors import MissingError
from kvmpy.core.kernel import Option
from kvmpy.core.kvm import Kvm
from kvmpy.core.sev_device import PlatformStatus, SevDevice, explain_sev_open_failure
from kvmpy.core.sev_errors import SevError, SevResult
from kvmpy.uapi import ioctls
from kvmpy.uapi.commands import SEV_PLATFORM_COMMANDS
from kvmpy.uapi.constants import VmType
from kvmpy.uapi.structs import kvm_cpuid2, kvm_cpuid_entry2, sev_user_data_snp_status

FLAGS = frozenset(
    ["svm", "npt", "lbrv", "nrip_save", "flushbyasid", "decodeassists", "sev", "sev_es", "sev_snp"]
)
KVM_AMD = {
    "sev": "Y",
    "sev_es": "Y",
    "sev_snp": "Y",
    "npt": "Y",
    "nrips": "1",
    "lbrv": "1",
    "ciphertext_hiding_asids": "0",
}
# A Genoa that has everything, before somebody or something takes a piece away.
GENOA = SevHost(
    flags=FLAGS,
    family=0x19,
    config={"KVM_AMD_SEV": "y", "CRYPTO_DEV_SP_PSP": "y", "AMD_IOMMU": "y"},
    modules={"kvm": {"mmio_caching": "Y"}, "kvm_amd": KVM_AMD, "ccp": {"psp_init_on_probe": "Y"}},
    command_line=("root=/dev/sda1", "console=ttyS0"),
    asids=(1006, 100),
    status=PlatformStatus(1, 55, 40, "initialised", 0, True),
    snp=(1, 0x17),
)
ALL, WITH_ES, SNP_ONLY = (SEV, ES, SNP), (ES, SNP), (SNP,)
NO_DEVICE = explain_sev_open_failure("/dev/sev", OSError(errno.ENOENT, "none"))
NO_PERMISSION = explain_sev_open_failure("/dev/sev", OSError(errno.EACCES, "denied"))
BOOT = "the kernel's command line"
PASSING_THROUGH = replace(GENOA, config={**GENOA.config, "IOMMU_DEFAULT_PASSTHROUGH": "y"})
ALL_ES = replace(GENOA, asids=(1006, 1007))
UNINITIALISED = replace(GENOA, status=PlatformStatus(1, 55, 40, "uninitialised", 0, False))


def with_parameters(host: SevHost = GENOA, **values: str) -> SevHost:
    """Return *host* with other parameters, ``kvm_amd__sev="N"``."""
    modules = {name: dict(parameters) for name, parameters in host.modules.items()}
    for name, value in values.items():
        module, _, parameter = name.partition("__")
        modules[module][parameter] = value
    return replace(host, modules=modules)


def without(*flags: str, host: SevHost = GENOA) -> SevHost:
    """Return *host* without CPU flags."""
    return replace(host, flags=host.flags - set(flags))


def given_up(host: SevHost = GENOA, *, es: bool = True) -> SevHost:
    """Return *host* with what KVM writes back when it gave SEV (or SEV-ES and SNP) up."""
    off = dict.fromkeys(["kvm_amd__sev"] if es else [], "N")
    return with_parameters(host, **off, kvm_amd__sev_es="N", kvm_amd__sev_snp="N")


def asked(host: SevHost, name: str, value: str = "0", source: str = BOOT) -> SevHost:
    """Return *host* where somebody asked for a parameter's value."""
    return replace(host, options={name: Option(value, source)})


# The host, the kinds that it lacks, what is named as missing, and a word of how to get it.
CASES: dict[str, tuple[SevHost, tuple[VmType, ...], str, str]] = {
    "another CPU": (without("svm"), ALL, "an AMD CPU with SVM", "an EPYC"),
    "kernel": (
        replace(GENOA, config={**GENOA.config, "KVM_AMD_SEV": "n"}),
        ALL,
        "CONFIG_KVM_AMD_SEV",
        "CONFIG_KVM_AMD_SEV=y",
    ),
    "no module": (
        replace(GENOA, modules={"kvm": {}, "kvm_amd": {}, "ccp": {}}),
        ALL,
        "module kvm_amd",
        "modprobe kvm_amd",
    ),
    "sev=0": (
        asked(given_up(UNINITIALISED), "kvm_amd.sev"),
        ALL,
        f"kvm_amd.sev (it is off: {BOOT} asks for that)",
        "kvm_amd.sev=1",
    ),
    "npt=0": (
        asked(given_up(with_parameters(kvm_amd__npt="N")), "kvm_amd.npt", "N", "/etc/modprobe.d/kvm.conf"),
        ALL,
        "kvm_amd.npt (it is N)",
        "kvm_amd.npt=1 (/etc/modprobe.d/kvm.conf asks for N)",
    ),
    "no NPT": (
        given_up(with_parameters(without("npt"), kvm_amd__npt="N")),
        ALL,
        "CPU flag npt",
        "hypervisor",
    ),
    "nrips=0": (given_up(with_parameters(kvm_amd__nrips="0")), ALL, "kvm_amd.nrips (it is 0)", "nrips=1"),
    "no NRIPS": (
        given_up(with_parameters(without("nrip_save"), kvm_amd__nrips="0")),
        ALL,
        "CPU flag nrip_save",
        "hypervisor",
    ),
    "SMEE off": (
        given_up(replace(without("sev"), device=NO_DEVICE, status=None, snp=None)),
        ALL,
        "CPU flag sev",
        "SMEE",
    ),
    "no decode assists": (given_up(without("decodeassists")), ALL, "CPU flag decodeassists", "hypervisor"),
    "no flush by ASID": (given_up(without("flushbyasid")), ALL, "CPU flag flushbyasid", "hypervisor"),
    "no ccp": (
        given_up(
            replace(
                GENOA,
                config={**GENOA.config, "CRYPTO_DEV_SP_PSP": "n"},
                modules={**GENOA.modules, "ccp": {}},
                status=None,
                snp=None,
            )
        ),
        ALL,
        "CONFIG_CRYPTO_DEV_SP_PSP",
        "CONFIG_CRYPTO_DEV_SP_PSP=y",
    ),
    "no PSP": (
        given_up(replace(GENOA, device=NO_DEVICE, status=None, snp=None)),
        ALL,
        "/dev/sev does not exist",
        "dmesg | grep -i ccp",
    ),
    "a dead PSP": (
        replace(GENOA, status=None, snp=None, silent="SEV_PLATFORM_STATUS on /dev/sev failed: EBUSY"),
        ALL,
        "a secure processor that answers",
        "reboot: SEV_PLATFORM_STATUS on /dev/sev failed: EBUSY",
    ),
    "INIT failed": (
        given_up(UNINITIALISED),
        ALL,
        "a secure processor that is initialised (its INIT failed, or kvm_amd was loaded with sev=0)",
        "dmesg | grep -iE 'ccp|sev'",
    ),
    "old firmware": (
        given_up(
            replace(UNINITIALISED, status=PlatformStatus(1, 49, 3, "uninitialised", 0, False), snp=None)
        ),
        ALL,
        "firmware 1.51 of the secure processor, which this host's SNP needs (it is 1.49.3)",
        "sev=nosnp",
    ),
    "no ASIDs": (replace(GENOA, asids=(0, 0)), ALL, "an ASID for encrypted guests", "SEV ASID count"),
    "all ASIDs for SEV-ES": (
        ALL_ES,
        (SEV,),
        "an ASID for SEV without ES (all belong to SEV-ES and SNP)",
        "lower `SEV-ES ASID space limit` in the firmware setup (it is 1007)",
    ),
    "all ASIDs for SEV": (
        given_up(replace(GENOA, asids=(1006, 1)), es=False),
        WITH_ES,
        "an ASID for SEV-ES and SNP (all belong to SEV)",
        "raise `SEV-ES ASID space limit`",
    ),
    "sev_es=0": (
        asked(given_up(es=False), "kvm_amd.sev_es"),
        WITH_ES,
        f"kvm_amd.sev_es (it is off: {BOOT} asks for that)",
        "kvm_amd.sev_es=1",
    ),
    "mmio_caching=0": (
        given_up(with_parameters(kvm__mmio_caching="N"), es=False),
        WITH_ES,
        "kvm.mmio_caching (it is N)",
        "kvm.mmio_caching=1",
    ),
    "a CPU without ES": (given_up(without("sev_es"), es=False), WITH_ES, "CPU flag sev_es", "SEV-ES on"),
    "lbrv=0": (
        given_up(with_parameters(kvm_amd__lbrv="0"), es=False),
        WITH_ES,
        "kvm_amd.lbrv (it is 0)",
        "kvm_amd.lbrv=1",
    ),
    "no LBRV": (
        given_up(with_parameters(without("lbrv"), kvm_amd__lbrv="0"), es=False),
        WITH_ES,
        "CPU flag lbrv",
        "hypervisor",
    ),
    "ciphertext hiding": (
        with_parameters(kvm_amd__ciphertext_hiding_asids="99"),
        (ES,),
        "an ASID for SEV-ES (kvm_amd.ciphertext_hiding_asids=99 gives all 99 to SNP)",
        "a smaller kvm_amd.ciphertext_hiding_asids",
    ),
    "firmware without ES on Genoa": (
        replace(GENOA, snp=(1, 0x1B)),
        (ES,),
        "SEV-ES beside SNP (not with SVN 0x1b of the firmware: AMD-SB-3023)",
        "sev=nosnp",
    ),
    "firmware without ES on Turin": (
        replace(GENOA, family=0x1A, snp=(1, 4)),
        (ES,),
        "SEV-ES beside SNP (not with SVN 0x4 of the firmware: AMD-SB-3023)",
        "sev=nosnp",
    ),
    "sev_snp=0": (
        asked(with_parameters(kvm_amd__sev_snp="N"), "kvm_amd.sev_snp"),
        SNP_ONLY,
        f"kvm_amd.sev_snp (it is off: {BOOT} asks for that)",
        "kvm_amd.sev_snp=1",
    ),
    "no RMP": (
        with_parameters(replace(without("sev_snp"), snp=(0, 0)), kvm_amd__sev_snp="N"),
        SNP_ONLY,
        "CPU flag sev_snp",
        "RMP coverage on",
    ),
    "no IOMMU driver": (
        with_parameters(
            replace(GENOA, config={**GENOA.config, "AMD_IOMMU": "n"}, snp=(0, 0)), kvm_amd__sev_snp="N"
        ),
        SNP_ONLY,
        "CONFIG_AMD_IOMMU",
        "CONFIG_AMD_IOMMU=y",
    ),
    "IOMMU in pass-through": (
        with_parameters(replace(GENOA, command_line=("quiet", "iommu=pt"), snp=(0, 0)), kvm_amd__sev_snp="N"),
        SNP_ONLY,
        "an IOMMU that SNP can use (iommu=pt is on the kernel's command line)",
        "boot without iommu=pt",
    ),
    "one of several IOMMU options": (
        with_parameters(replace(GENOA, command_line=("iommu=merge,off",), snp=(0, 0)), kvm_amd__sev_snp="N"),
        SNP_ONLY,
        "an IOMMU that SNP can use (iommu=off is on the kernel's command line)",
        "boot without iommu=off",
    ),
    "a kernel with pass-through": (
        with_parameters(replace(PASSING_THROUGH, snp=(0, 0)), kvm_amd__sev_snp="N"),
        SNP_ONLY,
        "an IOMMU that SNP can use (CONFIG_IOMMU_DEFAULT_PASSTHROUGH=y)",
        "boot with iommu.passthrough=0",
    ),
    "a kernel with pass-through that was told better": (
        with_parameters(
            replace(PASSING_THROUGH, command_line=("iommu=nopt",), snp=(0, 0)), kvm_amd__sev_snp="N"
        ),
        SNP_ONLY,
        "SNP initialised by the secure processor",
        "dmesg",
    ),
    "SNP INIT failed": (
        with_parameters(replace(GENOA, snp=(0, 0)), kvm_amd__sev_snp="N"),
        SNP_ONLY,
        "SNP initialised by the secure processor",
        "dmesg | grep -iE 'rmp|snp|iommu|ccp'",
    ),
    "off for no reason to be seen": (given_up(), ALL, "kvm_amd.sev (it is N)", "load kvm_amd with sev=1"),
    "SEV-ES off for no reason to be seen": (
        given_up(es=False),
        WITH_ES,
        "kvm_amd.sev_es (it is N)",
        "load kvm_amd with sev_es=1",
    ),
    "an old kernel": (GENOA, SNP_ONLY, "VM type KVM_X86_SNP_VM (KVM_CAP_VM_TYPES bit 4)", "6.11"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_cause(name: str) -> None:
    """The cause is the one thing that is named, with the way to get what is missing."""
    host, kinds, missing, how = CASES[name]
    for kind in kinds:
        answers = causes(host, kind)
        assert [each.missing for each in answers] == [missing]
        assert how in answers[0].how
    spared = [kind for kind in ALL if kind not in kinds]
    assert not [each.missing for kind in spared for each in causes(host, kind) if each.missing == missing]


def test_the_first_guest_initialises() -> None:
    """With psp_init_on_probe=0 a platform that is not initialised is no cause."""
    host = with_parameters(UNINITIALISED, ccp__psp_init_on_probe="N")
    assert [each.missing for each in causes(host, SNP)] == ["VM type KVM_X86_SNP_VM (KVM_CAP_VM_TYPES bit 4)"]


def test_all_pieces_at_once() -> None:
    """Causes that are independent are all named, in KVM's order."""
    host = with_parameters(
        replace(without("decodeassists"), command_line=("amd_iommu=off",)),
        kvm_amd__npt="N",
        kvm_amd__lbrv="0",
    )
    assert [each.missing for each in causes(host, SNP)] == [
        "kvm_amd.npt (it is N)",
        "CPU flag decodeassists",
        "kvm_amd.lbrv (it is 0)",
        "an IOMMU that SNP can use (amd_iommu=off is on the kernel's command line)",
    ]


def test_a_device_that_may_not_be_opened_explains_nothing() -> None:
    """No permission for /dev/sev is named, and so is what KVM lacks."""
    host = replace(given_up(), device=NO_PERMISSION, status=None, snp=None)
    reasons = [each.missing for each in causes(host, SEV)]
    assert reasons == [NO_PERMISSION.missing, "kvm_amd.sev (it is N)"]
    assert NO_PERMISSION.missing == "no permission to open /dev/sev for reading and writing"


@pytest.mark.parametrize(
    ("host", "kind", "missing"),
    [
        (GENOA, SNP, []),
        (
            replace(GENOA, asids=(1006, 1007)),
            SEV,
            ["an ASID for SEV without ES (all belong to SEV-ES and SNP)"],
        ),
        (replace(GENOA, asids=(1006, 1007)), ES, []),
        (with_parameters(kvm_amd__npt="N"), SNP, []),
        (
            replace(GENOA, device=NO_PERMISSION),
            ES,
            ["no permission to open /dev/sev for reading and writing"],
        ),
        (replace(GENOA, status=None, silent="EBUSY"), SNP, ["a secure processor that answers"]),
    ],
)
def test_what_an_offered_type_lacks(host: SevHost, kind: VmType, missing: list[str]) -> None:
    """Where KVM offers the type, ASIDs and the processor can still be missing."""
    assert [each.missing for each in lacking(host, kind)] == missing


# What the facts are read from.


class FakeKvm:
    """A KVM whose leaf 0x8000001F has these ECX and EDX."""

    def __init__(self, ecx: int, edx: int) -> None:
        entry = kvm_cpuid_entry2(function=sev_host.SEV_LEAF, eax=0x1A, ebx=51, ecx=ecx, edx=edx)
        self.supported_cpuid = kvm_cpuid2.of([entry])


class FakeDevice:
    """A secure processor with these states."""

    snp_state, failure = 1, 0

    def __enter__(self) -> FakeDevice:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def platform_status(self) -> PlatformStatus:
        """Return a status, or fail."""
        if self.failure:
            command = SEV_PLATFORM_COMMANDS["SEV_PLATFORM_STATUS"]
            raise SevError(ioctls.SEV_ISSUE_CMD, command, SevResult(-1, self.failure, 0), "/dev/sev")
        return PlatformStatus(1, 55, 40, "initialised", 3, True)

    def snp_platform_status(self) -> sev_user_data_snp_status:
        """Return a status whose TCB has another number in each byte."""
        return sev_user_data_snp_status(state=self.snp_state, current_tcb_version=0x0706050403020100)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """A Turin's /proc/cpuinfo, and an empty command line and modprobe.d in a folder."""
    info = {"cpu family": "26", "flags": "svm sev"}
    monkeypatch.setattr(sev_host, "cpu_info", lambda: info)
    monkeypatch.setattr(sev_host, "SevDevice", FakeDevice)
    monkeypatch.setattr(kernel, "COMMAND_LINE", tmp_path / "cmdline")
    monkeypatch.setattr(kernel, "MODPROBE", (tmp_path / "etc", tmp_path / "lib"))
    monkeypatch.setattr(kernel, "SYS_MODULE", tmp_path / "module")
    return info


def read() -> SevHost:
    """Read the facts with a KVM that says something of ASIDs."""
    return sev_host.read(cast(Kvm, FakeKvm(1006, 100)))


@pytest.mark.parametrize(("family", "svn"), [("25", 6), ("26", 3)])
def test_the_security_version(machine: dict[str, str], family: str, svn: int) -> None:
    """SNP's part of the TCB is byte 6, from Turin on byte 3."""
    machine["cpu family"] = family
    host = read()
    assert (host.family, host.snp, host.asids) == (int(family), (1, svn), (1006, 100))
    assert host.flags == {"svm", "sev"}


@pytest.mark.usefixtures("machine")
def test_a_processor_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDevice, "failure", errno.EBUSY)
    host = read()
    assert host.silent.startswith("SEV_PLATFORM_STATUS on /dev/sev failed: EBUSY")
    assert host.status is None


@pytest.mark.usefixtures("machine")
def test_no_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sev_host, "SevDevice", lambda: SevDevice(str(tmp_path / "sev")))
    device = read().device
    assert isinstance(device, MissingError)
    assert "does not exist" in device.missing


@pytest.mark.usefixtures("machine")
def test_what_was_asked_of_modules(tmp_path: Path) -> None:
    """/etc goes over /usr/lib, the command line over both; a hyphen is an underscore."""
    for name, text in {
        "lib/a.conf": "# options kvm_amd sev=0\noptions kvm_amd npt=0 nested=1\noptions kvm ignore_msrs=1\n",
        "etc/b.conf": "  options kvm-amd npt=1 sev_es=0\noptions other sev=0\n",
        "etc/c.txt": "options kvm_amd lbrv=0\n",
        "cmdline": "quiet kvm-amd.sev_es=1 kvm.mmio_caching=0 iommu=pt\n",
        "module/kvm_amd/parameters/sev": "N\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    host = read()
    etc, boot = str(tmp_path / "etc/b.conf"), "the kernel's command line"
    wanted: dict[str, Any] = {
        "kvm.ignore_msrs": ("1", str(tmp_path / "lib/a.conf")),
        "kvm.mmio_caching": ("0", boot),
        "kvm_amd.nested": ("1", str(tmp_path / "lib/a.conf")),
        "kvm_amd.npt": ("1", etc),
        "kvm_amd.sev_es": ("1", boot),
    }
    assert {name: (option.value, option.source) for name, option in host.options.items()} == wanted
    assert host.parameter("kvm_amd.sev") == "N"
    assert host.is_off("kvm_amd.sev")
    assert not host.is_off("kvm_amd.absent")
    assert "iommu=pt" in host.command_line


@pytest.mark.usefixtures("machine")
def test_asids_where_kvm_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """KVM empties the leaf where it offers no SEV: the CPU itself is asked."""
    leaves = {0x8000_0000: (0x8000_0028, 0, 0, 0), sev_host.SEV_LEAF: (0x1A, 51, 509, 510)}
    monkeypatch.setattr(sev_host, "_cpuid", lambda leaf: leaves[leaf])
    assert sev_host.read(cast(Kvm, FakeKvm(0, 0))).asids == (509, 510)
    leaves[sev_host.SEV_LEAF] = (0, 0, 0, 0)
    assert sev_host.read(cast(Kvm, FakeKvm(0, 0))).asids is None
    leaves[0x8000_0000] = (0x8000_0008, 0, 0, 0)
    assert sev_host.read(cast(Kvm, FakeKvm(0, 0))).asids is None


def test_the_cpu_answers() -> None:
    """CPUID leaf 0x80000000 names the largest extended leaf."""
    assert sev_host._cpuid(0x8000_0000)[0] >= 0x8000_0000
