# SPDX-License-Identifier: Apache-2.0
"""Guest policies by name: what a platform may do to an SEV, SEV-ES or SNP guest, and where it may run.

SEV and SEV-ES: SEV API, chapter 3 (32 bits).  SNP: SEV Secure Nested Paging Firmware ABI, section 4.3 (64
bits).  The firmware keeps the guest from running where its policy is not met.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

_SEV_FLAGS = {"no_debug": 0, "no_key_sharing": 1, "es": 2, "no_send": 3, "domain": 4, "sev_only": 5}
_SNP_FLAGS = {
    "smt": 16,
    "migrate_ma": 18,
    "debug": 19,
    "single_socket": 20,
    "cxl": 21,
    "mem_aes_256_xts": 22,
    "rapl_disabled": 23,
    "ciphertext_hiding": 24,
    "page_swap_disabled": 25,
}
SNP_RESERVED_ONE = 1 << 17
"""The bit of an SNP policy that must be set."""
SNP_KNOWN = SNP_RESERVED_ONE | 0xFFFF | sum(1 << bit for bit in _SNP_FLAGS.values())
"""All bits of an SNP policy that have a meaning here."""


def _version(major: int, minor: int) -> None:
    if not (0 <= major < 256 and 0 <= minor < 256):
        raise ValueError(f"API version {major}.{minor}: both numbers have 8 bits")


@dataclass(frozen=True)
class SevPolicy:
    """Policy of an SEV or SEV-ES guest; a field named ``no_...`` forbids its feature.

    *no_debug*: no DBG_DECRYPT and DBG_ENCRYPT.  *no_key_sharing*: no other guest shares its key.  *es*: must
    run with an encrypted VMSA.  *no_send*: never leaves this platform.  *domain*: goes to platforms of the
    same owner only.  *sev_only*: goes to SEV platforms only.  *api_major*.*api_minor*: the oldest firmware
    that it may be sent to.
    """

    no_debug: bool = False
    no_key_sharing: bool = False
    es: bool = False
    no_send: bool = False
    domain: bool = False
    sev_only: bool = False
    api_major: int = 0
    api_minor: int = 0

    def __post_init__(self) -> None:
        _version(self.api_major, self.api_minor)

    def __int__(self) -> int:
        flags = sum(1 << bit for name, bit in _SEV_FLAGS.items() if getattr(self, name))
        return flags | self.api_major << 16 | self.api_minor << 24

    @classmethod
    def from_int(cls, value: int) -> SevPolicy:
        """Read a policy; ValueError for reserved bits (6 to 15)."""
        if value & 0xFFC0 or value >> 32:
            raise ValueError(f"SEV policy {value:#x} has reserved bits set: {value & ~0xFFFF003F:#x}")
        flags = {name: bool(value >> bit & 1) for name, bit in _SEV_FLAGS.items()}
        return cls(**flags, api_major=value >> 16 & 0xFF, api_minor=value >> 24 & 0xFF)

    def __str__(self) -> str:
        return _words(self, int(self))


@dataclass(frozen=True)
class SnpPolicy:
    """Policy of an SNP guest; a feature that is not set is forbidden, or not required.

    *smt*: may run where hyper-threads are on (needed there).  *debug*: the host may decrypt and encrypt its
    memory.  *migrate_ma*: may have a migration agent.  *single_socket*: runs on one socket only.  *cxl*: CXL
    may be populated.  *mem_aes_256_xts*: memory is encrypted with AES-256-XTS.  *rapl_disabled*: power
    measurement is off.  *ciphertext_hiding*: the host cannot read the ciphertext.  *page_swap_disabled*: no
    page moves or swaps.  *abi_major*.*abi_minor*: the oldest firmware ABI.
    """

    smt: bool = True
    migrate_ma: bool = False
    debug: bool = False
    single_socket: bool = False
    cxl: bool = False
    mem_aes_256_xts: bool = False
    rapl_disabled: bool = False
    ciphertext_hiding: bool = False
    page_swap_disabled: bool = False
    abi_major: int = 0
    abi_minor: int = 0

    def __post_init__(self) -> None:
        _version(self.abi_major, self.abi_minor)

    def __int__(self) -> int:
        flags = sum(1 << bit for name, bit in _SNP_FLAGS.items() if getattr(self, name))
        return flags | SNP_RESERVED_ONE | self.abi_major << 8 | self.abi_minor

    @classmethod
    def from_int(cls, value: int) -> SnpPolicy:
        """Read a policy; ValueError for unknown bits, or without bit 17, which must be one."""
        if value & ~SNP_KNOWN:
            raise ValueError(f"SNP policy {value:#x} has unknown bits set: {value & ~SNP_KNOWN:#x}")
        if not value & SNP_RESERVED_ONE:
            raise ValueError(f"SNP policy {value:#x} lacks bit 17, which must be one")
        flags = {name: bool(value >> bit & 1) for name, bit in _SNP_FLAGS.items()}
        return cls(**flags, abi_major=value >> 8 & 0xFF, abi_minor=value & 0xFF)

    def __str__(self) -> str:
        return _words(self, int(self))


def _words(policy: SevPolicy | SnpPolicy, value: int) -> str:
    words = [field.name for field in fields(policy) if getattr(policy, field.name) is True]
    return f"{value:#x} ({' '.join(words) or 'nothing set'})"
