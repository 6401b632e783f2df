# SPDX-License-Identifier: Apache-2.0
"""CPUID tables."""

from __future__ import annotations

import struct

import pytest

from kvmpy.uapi.structs import kvm_cpuid2, kvm_cpuid_entry2
from kvmpy.x86 import cpuid
from kvmpy.x86.cpuid import SIGNIFICANT_INDEX, Cpuid, CpuidEntry, FeatureNameError, feature_bit
from kvmpy.x86.cpuid_features import ALIASES, BITS, FEATURES

BRAND = b"AMD EPYC 9999 test part".ljust(48, b"\0")


def words(text: bytes) -> tuple[int, ...]:
    """Return text as little-endian 32-bit words."""
    return struct.unpack(f"<{len(text) // 4}I", text)


def table() -> Cpuid:
    """Return a small table of an encrypting AMD CPU."""
    ebx, edx, ecx = words(b"AuthenticAMD")
    kvm = words(b"KVMKVMKVM\0\0\0")
    brand = words(BRAND)
    return Cpuid(
        [
            CpuidEntry(0, 0, 0, 0x10, ebx, ecx, edx),
            CpuidEntry(1, 0, 0, 0x00A1_0F11, 0, 1 << 21 | 1 << 26, 1 << 25 | 1 << 26),
            CpuidEntry(7, 0, SIGNIFICANT_INDEX, 2, 1 << 7 | 1 << 0, 1 << 16, 0),
            CpuidEntry(7, 1, SIGNIFICANT_INDEX, 1 << 17, 0, 0, 0),
            CpuidEntry(0x4000_0000, 0, 0, 0x4000_0001, *kvm),
            CpuidEntry(0x4000_0001, 0, 0, 1 << 3 | 1 << 24, 0, 0, 0),
            *(CpuidEntry(0x8000_0002 + n, 0, 0, *brand[4 * n : 4 * n + 4]) for n in range(3)),
            CpuidEntry(0x8000_0008, 0, 0, 0x0034_3934, 0, 0, 0),
            CpuidEntry(0x8000_001F, 0, 0, 0x1F, 51 | 5 << 6, 509, 100),
        ]
    )


@pytest.mark.parametrize(
    ("name", "word", "bit"),
    [
        ("FPU", (1, 0, "edx"), 0),
        ("XSAVE", (1, 0, "ecx"), 26),
        ("HYPERVISOR", (1, 0, "ecx"), 31),
        ("FSGSBASE", (7, 0, "ebx"), 0),
        ("SMEP", (7, 0, "ebx"), 7),
        ("SMAP", (7, 0, "ebx"), 20),
        ("LA57", (7, 0, "ecx"), 16),
        ("PKU", (7, 0, "ecx"), 3),
        ("SHSTK", (7, 0, "ecx"), 7),
        ("IBT", (7, 0, "edx"), 20),
        ("AMX_TILE", (7, 0, "edx"), 24),
        ("FRED", (7, 1, "eax"), 17),
        ("XSAVES", (0xD, 1, "eax"), 3),
        ("SVM", (0x8000_0001, 0, "ecx"), 2),
        ("NX", (0x8000_0001, 0, "edx"), 20),
        ("GBPAGES", (0x8000_0001, 0, "edx"), 26),
        ("RDTSCP", (0x8000_0001, 0, "edx"), 27),
        ("LM", (0x8000_0001, 0, "edx"), 29),
        ("CONSTANT_TSC", (0x8000_0007, 0, "edx"), 8),
        ("NPT", (0x8000_000A, 0, "edx"), 0),
        ("SEV", (0x8000_001F, 0, "eax"), 1),
        ("SEV_ES", (0x8000_001F, 0, "eax"), 3),
        ("SEV_SNP", (0x8000_001F, 0, "eax"), 4),
        ("KVM_STEAL_TIME", (0x4000_0001, 0, "eax"), 5),
        ("KVM_MIGRATION_CONTROL", (0x4000_0001, 0, "eax"), 17),
        ("KVM_HINTS_REALTIME", (0x4000_0001, 0, "edx"), 0),
    ],
)
def test_where_features_are(name: str, word: tuple[int, int, str], bit: int) -> None:
    assert feature_bit(name) == (word, bit)


def test_the_table_of_features_is_sound() -> None:
    assert sum(len(names) for names in BITS.values()) == len(FEATURES)
    assert all(0 <= bit < 32 for _word, bit in FEATURES.values())
    assert all(register in cpuid.REGISTERS for (_f, _i, register), _bit in FEATURES.values())
    assert set(ALIASES.values()) <= set(FEATURES)
    assert not set(ALIASES) & set(FEATURES)


@pytest.mark.parametrize("name", ["x86_feature_xmm2", "SSE2", "sse2", "X86_FEATURE_XMM2"])
def test_other_spellings(name: str) -> None:
    assert feature_bit(name) == ((1, 0, "edx"), 26)


def test_unknown_features_are_refused() -> None:
    with pytest.raises(FeatureNameError, match="did you mean SMEP"):
        table().has("SMEPP")


def test_has_set_and_clear() -> None:
    leaves = table()
    assert leaves.has("SMEP")
    assert not leaves.has("SMAP")
    leaves.set_feature("SMAP")
    leaves.clear_feature("SMEP")
    entry = leaves.find(7, 0)
    assert entry is not None
    assert entry.ebx == 1 << 20 | 1
    assert {"SMAP", "FSGSBASE", "FRED", "KVM_CLOCKSOURCE2"} <= leaves.features
    assert "SMEP" not in leaves.features


def test_setting_a_feature_adds_its_leaf() -> None:
    cpuid = table()
    cpuid.clear_feature("XSAVES")
    assert cpuid.find(0xD, 1) is None
    cpuid.set_feature("XSAVES")
    assert cpuid.find(0xD, 1) == CpuidEntry(0xD, 1, SIGNIFICANT_INDEX, 8)
    cpuid.set_feature("NPT")
    assert cpuid.find(0x8000_000A, 77) == CpuidEntry(0x8000_000A, edx=1)


def test_find_minds_the_index_only_where_it_counts() -> None:
    cpuid = table()
    entry = cpuid.find(7, 1)
    assert entry is not None
    assert entry.eax == 1 << 17
    assert cpuid.find(7, 2) is None
    assert cpuid.find(1, 5) is cpuid.find(1)
    assert cpuid.find(0x1234) is None


def test_remove() -> None:
    cpuid = table()
    assert cpuid.remove(7, 1) == 1
    assert cpuid.find(7, 0) is not None
    assert cpuid.remove(7) == 1
    assert cpuid.remove(7) == 0


def test_summaries() -> None:
    cpuid = table()
    assert cpuid.vendor == "AuthenticAMD"
    assert cpuid.hypervisor == "KVMKVMKVM"
    assert cpuid.brand == "AMD EPYC 9999 test part"
    assert cpuid.version == (0x19, 0x11, 1)
    assert (cpuid.maxphyaddr, cpuid.linear_bits, cpuid.guest_maxphyaddr) == (52, 57, 52)
    assert (cpuid.encryption_bit, cpuid.phys_addr_reduction, cpuid.sev_asids) == (51, 5, (509, 100))


def test_summaries_of_an_empty_table() -> None:
    cpuid = Cpuid()
    assert (cpuid.vendor, cpuid.hypervisor, cpuid.brand, cpuid.version) == ("", "", "", (0, 0, 0))
    assert (cpuid.maxphyaddr, cpuid.linear_bits, cpuid.guest_maxphyaddr) == (36, 48, 36)
    assert (cpuid.encryption_bit, cpuid.features) == (None, frozenset())


@pytest.mark.parametrize(("eax", "bit"), [(0, None), (1, 51), (2, 51), (0x1C, None)])
def test_encryption_bit_needs_sme_or_sev(eax: int, bit: int | None) -> None:
    assert Cpuid([CpuidEntry(0x8000_001F, eax=eax, ebx=51)]).encryption_bit == bit


def test_structs_there_and_back() -> None:
    source = kvm_cpuid2.of(
        [
            kvm_cpuid_entry2(function=1, eax=0x1234, edx=1 << 25),
            kvm_cpuid_entry2(function=7, index=1, flags=1, eax=5, ecx=6),
        ]
    )
    cpuid = Cpuid.from_struct(source)
    assert cpuid.entries == [CpuidEntry(1, 0, 0, 0x1234, 0, 0, 1 << 25), CpuidEntry(7, 1, 1, 5, 0, 6, 0)]
    assert cpuid.to_struct() == source
    cpuid.set_feature("SSE2")
    assert source.entries_list()[0].edx == 1 << 25  # a copy, not a view


def test_copies_are_independent() -> None:
    first = table()
    second = first.copy()
    assert first == second
    second.set_feature("SMAP")
    assert not first.has("SMAP")
    assert first != second


def test_register_of_a_missing_leaf_is_zero() -> None:
    assert table().register(0x99, 0, "eax") == 0
    with pytest.raises(ValueError, match="eip"):
        table().register(1, 0, "eip")


def test_decoded_text() -> None:
    lines = table().decode().splitlines()
    assert lines[0] == "vendor AuthenticAMD, family 0x19 model 0x11 stepping 1, AMD EPYC 9999 test part"
    assert lines[1] == "physical 52 bits, linear 57 bits, C-bit 51, hypervisor KVMKVMKVM"
    index = next(n for n, line in enumerate(lines) if line.startswith("0x00000007.0x0"))
    assert lines[index] == "0x00000007.0x0  eax 00000002 ebx 00000081 ecx 00010000 edx 00000000  features"
    assert lines[index + 1].split() == ["FSGSBASE", "SMEP", "LA57"]
    assert lines[-1].split() == ["SME", "SEV", "VM_PAGE_FLUSH", "SEV_ES", "SEV_SNP"]


def test_differences() -> None:
    first, second = table(), table()
    second.clear_feature("SMEP")
    second.remove(7, 1)
    second.ensure(0x15).eax = 1
    assert first.differences(second) == [
        "0x7.0x0 ebx: 0x81 here, 0x1 there (SMEP)",
        "0x7.0x1: only here",
        "0x15.0x0: only there",
    ]
    assert first.differences(first.copy()) == []


def test_hypervs_signature_is_no_feature() -> None:
    """Where Hyper-V's interface stands in the place of KVM's features, its signature names none of them."""
    assert CpuidEntry(0x4000_0001, eax=0x3123_7648).features == []
    assert "KVM_CLOCKSOURCE2" in CpuidEntry(0x4000_0001, eax=8).features
    assert CpuidEntry(0x4000_0003, eax=1 << 5).features == ["HV_MSR_HYPERCALL_AVAILABLE"]
