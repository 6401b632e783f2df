# SPDX-License-Identifier: Apache-2.0
"""The guest policy of SNP_LAUNCH_START, bit by bit, against the state of the platform.

SEV Secure Nested Paging Firmware ABI, 4.3 (guest policy) and 8.12 (SNP_LAUNCH_START); KVM passes on what
KVM_X86_SNP_POLICY_BITS has, and refuses the rest with EINVAL (Documentation/virt/kvm/x86/
amd-memory-encryption.rst).
"""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from kvmpy import (
    Kvm,
    MakeVm,
    SevDevice,
    SevRet,
    SnpPolicy,
    kvm_sev_snp_launch_start,
    sev_user_data_snp_status,
)
from kvmpy.coco import sev_platform
from kvmpy.coco.report import PlatformInfo
from selftests.sev.attester import GUEST, Attester
from selftests.sev.conftest import BareMaker

pytestmark = [
    pytest.mark.requires("protection:snp"),
    pytest.mark.requires("sev-attr:KVM_X86_SNP_POLICY_BITS"),
]

TAKEN = (0, 0)
REFUSED_BY_KVM = (errno.EINVAL, 0)
REFUSED_BY_FIRMWARE = (errno.EIO, int(SevRet.SEV_RET_POLICY_FAILURE))


def platform_status() -> sev_user_data_snp_status:
    with SevDevice() as device:
        return device.snp_platform_status()


def start(bare: BareMaker, policy: SnpPolicy) -> tuple[int, int]:
    """Start a guest of its own with the policy."""
    return bare("snp").raw("SNP_LAUNCH_START", kvm_sev_snp_launch_start(policy=int(policy)))


def refused_unless(met: bool) -> tuple[int, int]:
    return TAKEN if met else REFUSED_BY_FIRMWARE


def smt_control() -> str:
    """Return what Linux says of hyper-threads: ``notsupported`` alone means that there are none."""
    try:
        return Path("/sys/devices/system/cpu/smt/control").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def sockets() -> int:
    """Return how many processor packages this host has."""
    places = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/physical_package_id")
    return len({place.read_text(encoding="ascii") for place in places})


# The version.


@pytest.mark.parametrize(
    ("major", "minor", "met"),
    [(0, 0, True), (0, -1, True), (0, 1, False), (1, None, False), (-1, 255, True)],
    ids=["the platform's", "a minor before", "a minor later", "a major later", "a major before"],
)
def test_the_version(bare: BareMaker, major: int, minor: int | None, met: bool) -> None:
    """A policy asks for a firmware of its ABI version or a later one: POLICY_FAILURE below it.

    SNP firmware ABI, 4.3: ABI_MAJOR and ABI_MINOR are the lowest version that will do; 8.12.
    """
    status = platform_status()
    wanted = int(status.api_major) + major
    if minor is None:
        least = 0
    elif minor == 255:
        least = 255
    else:
        least = int(status.api_minor) + minor
    if not (0 <= wanted < 256 and 0 <= least < 256):
        pytest.skip(f"firmware {status.api_major}.{status.api_minor} has no such neighbour")
    assert start(bare, SnpPolicy(abi_major=wanted, abi_minor=least)) == refused_unless(met)


# Bits that forbid what is clear.


@pytest.mark.protections("snp")
def test_hyper_threads_that_are_not_allowed(make_vm: MakeVm, bare: BareMaker) -> None:
    """A policy without SMT launches where the firmware setup has hyper-threads off: POLICY_FAILURE otherwise.

    What Linux runs of them (nosmt, smt/control) changes nothing: a report's PLATFORM_INFO says what the
    firmware sees.  SNP firmware ABI, 4.3 (SMT), 7.3 and 8.12; snp_mcmd_launch_start() of AMD's firmware.
    """
    asker = Attester(make_vm(GUEST))
    asker.start()
    seen = bool(asker.report(b"").platform_info & PlatformInfo.SMT_EN)
    assert start(bare, SnpPolicy(smt=False)) == refused_unless(not seen)


@pytest.mark.protections("snp")
def test_hyper_threads_as_the_firmware_sees_them(make_vm: MakeVm) -> None:
    """A report has SMT_EN where the processor has hyper-threads, those that Linux does not run included.

    SNP firmware ABI, 7.3 (PLATFORM_INFO); Documentation/ABI/testing/sysfs-devices-system-cpu, smt/control.
    """
    expected = {"on": True, "off": True, "forceoff": True, "notsupported": False}.get(smt_control())
    if expected is None:
        pytest.skip("this kernel cannot say whether there are hyper-threads (CONFIG_HOTPLUG_SMT)")
    asker = Attester(make_vm(GUEST))
    asker.start()
    assert bool(asker.report(b"").platform_info & PlatformInfo.SMT_EN) == expected


def test_hyper_threads_that_are_allowed(bare: BareMaker) -> None:
    """A policy with SMT launches whether hyper-threads are on or not.

    SNP firmware ABI, 4.3 (SMT): allowed, not demanded.
    """
    assert start(bare, SnpPolicy(smt=True)) == TAKEN


def test_debugging_that_is_allowed(bare: BareMaker) -> None:
    """A policy with DEBUG launches on every platform.

    SNP firmware ABI, 4.3 (DEBUG).
    """
    assert start(bare, SnpPolicy(debug=True)) == TAKEN


def test_a_migration_agent(kvm: Kvm, bare: BareMaker) -> None:
    """A policy that lets the guest have a migration agent gives EINVAL: KVM does not know how to bind one.

    Documentation/virt/kvm/x86/amd-memory-encryption.rst; KVM_SNP_POLICY_MASK_VALID, arch/x86/kvm/svm/sev.c.
    """
    policy = SnpPolicy(migrate_ma=True)
    assert int(policy) & ~sev_platform.snp_policy_bits(kvm) == 1 << 18
    assert start(bare, policy) == REFUSED_BY_KVM


def test_a_single_socket(bare: BareMaker) -> None:
    """A policy with SINGLE_SOCKET is met by a platform of one socket; ACTIVATE refuses it on another one.

    SNP firmware ABI, 4.3 (SINGLE_SOCKET) and 8.3 (SNP_ACTIVATE); Linux commit 24be2b7956a5.
    """
    assert start(bare, SnpPolicy(single_socket=True)) == refused_unless(sockets() == 1)


# Bits of later firmware: KVM offers those that the firmware names as features.


@pytest.mark.parametrize("name", ["cxl", "page_swap_disabled"])
def test_what_every_platform_meets(kvm: Kvm, bare: BareMaker, name: str) -> None:
    """CXL_ALLOW and PAGE_SWAP_DISABLE ask nothing of the platform: taken where they are on offer.

    SNP firmware ABI, 4.3; sev_get_snp_policy_bits() in Linux for what is on offer.
    """
    policy = SnpPolicy(**{name: True})
    offered = not int(policy) & ~sev_platform.snp_policy_bits(kvm)
    assert start(bare, policy) == (TAKEN if offered else REFUSED_BY_KVM)


@pytest.mark.parametrize(
    ("name", "field"), [("rapl_disabled", "rapl_dis"), ("ciphertext_hiding", "ciphertext_hiding_en")]
)
def test_what_the_platform_must_have_switched(kvm: Kvm, bare: BareMaker, name: str, field: str) -> None:
    """RAPL_DIS and CIPHERTEXT_HIDING are met where the platform's status says so: POLICY_FAILURE otherwise.

    SNP firmware ABI, 4.3, 8.12, and 8.2 (SNP_PLATFORM_STATUS) for RAPL_DIS and CIPHERTEXT_HIDING_DRAM_EN.
    """
    policy = SnpPolicy(**{name: True})
    if int(policy) & ~sev_platform.snp_policy_bits(kvm):
        assert start(bare, policy) == REFUSED_BY_KVM
    else:
        assert start(bare, policy) == refused_unless(bool(getattr(platform_status(), field)))


def test_memory_under_a_key_of_256_bits(kvm: Kvm, bare: BareMaker) -> None:
    """MEM_AES_256_XTS is taken or refused by the firmware, which alone knows how memory is encrypted.

    SNP firmware ABI, 4.3 (MEM_AES_256_XTS): no status tells the cipher.
    """
    policy = SnpPolicy(mem_aes_256_xts=True)
    if int(policy) & ~sev_platform.snp_policy_bits(kvm):
        assert start(bare, policy) == REFUSED_BY_KVM
    else:
        assert start(bare, policy) in (TAKEN, REFUSED_BY_FIRMWARE)


def test_a_refused_policy_leaves_the_guest_where_it_was(bare: BareMaker) -> None:
    """After a START that KVM or the firmware refused, the next one may succeed: no context is left behind.

    Documentation/virt/kvm/x86/amd-memory-encryption.rst: one SNP context for each VM, made by START.
    """
    vm = bare("snp")
    status = platform_status()
    later = SnpPolicy(abi_major=int(status.api_major) + 1)
    for policy, answer in (
        (int(later), REFUSED_BY_FIRMWARE),
        (int(SnpPolicy()) | 1 << 63, REFUSED_BY_KVM),
        (int(SnpPolicy()), TAKEN),
    ):
        assert vm.raw("SNP_LAUNCH_START", kvm_sev_snp_launch_start(policy=policy)) == answer
