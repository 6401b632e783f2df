# SPDX-License-Identifier: Apache-2.0
"""The ladder of protections, and what sw-protected says that a host lacks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar, cast

import pytest

from kvmpy.coco import cbit, ladder, sw_protected
from kvmpy.coco.none import NoProtection
from kvmpy.coco.sw_protected import SoftwareProtected
from kvmpy.core.errors import MissingError
from kvmpy.core.kvm import Kvm
from kvmpy.guest.protection import Availability, Protection
from kvmpy.uapi.constants import (
    KVM_CAP_GUEST_MEMFD,
    KVM_CAP_MEMORY_ATTRIBUTES,
    KVM_CAP_USER_MEMORY2,
    KVM_MEMORY_ATTRIBUTE_PRIVATE,
    KVM_X86_SW_PROTECTED_VM,
)
from kvmpy.uapi.structs import kvm_cpuid2, kvm_cpuid_entry2

ORDER = ("snp", "sev-es", "sev", "sw-protected", "cbit", "none")
ALL: dict[int, int] = {
    KVM_CAP_USER_MEMORY2: 1,
    KVM_CAP_GUEST_MEMFD: 1,
    KVM_CAP_MEMORY_ATTRIBUTES: KVM_MEMORY_ATTRIBUTE_PRIVATE,
}


class FakeKvm:
    """A KVM device with the given VM types and capabilities."""

    def __init__(self, types: set[int], capabilities: dict[int, int]) -> None:
        self._types = types
        self._capabilities = capabilities

    def vm_types(self) -> set[int]:
        """The VM types."""
        return self._types

    def check_extension(self, number: int) -> int:
        """The value of a capability."""
        return self._capabilities.get(number, 0)


def fake(types: set[int], capabilities: dict[int, int]) -> Kvm:
    """Return a fake device as what the protections take."""
    return cast(Kvm, FakeKvm(types, capabilities))


class _Rung(NoProtection):
    answer: ClassVar[Availability]

    @classmethod
    def availability(cls, kvm: Kvm) -> Availability:  # noqa: ARG003 - the interface
        return cls.answer


def rung(rung_name: str, *missing: tuple[str, str]) -> type[Protection]:
    """Return a protection that is there unless it lacks something."""
    pieces = tuple(MissingError(what, how) for what, how in missing)

    class Rung(_Rung):
        name = rung_name
        answer = Availability(not pieces, pieces)

    return Rung


def test_the_order_of_strength() -> None:
    known = ladder.protections()
    assert known == tuple(name for name in ORDER if name in known)
    assert {"sw-protected", "cbit", "none"} <= set(known)


def test_auto_is_the_strongest_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    rungs = (rung("gold", ("a mine", "dig")), rung("silver"), rung("tin"))
    monkeypatch.setattr(ladder, "_LADDER", rungs)
    kvm = fake(set(), {})
    assert ladder.choose(kvm).name == "silver"
    assert ladder.resolve("auto", kvm).name == "silver"
    assert ladder.resolve("tin", kvm).name == "tin"


def test_the_choice_names_each_missing_piece_of_the_stronger(monkeypatch: pytest.MonkeyPatch) -> None:
    rungs = (
        rung("gold", ("a mine", "dig"), ("a lamp", "dig")),
        rung("silver", ("a spoon", "")),
        rung("tin"),
        rung("paper", ("ink", "buy it")),
    )
    monkeypatch.setattr(ladder, "_LADDER", rungs)
    assert ladder.choose(fake(set(), {})).lines() == [
        "protection auto: tin, the strongest that this host offers",
        "  not gold: needs a mine; a lamp (get it: dig)",
        "  not silver: needs a spoon",
    ]


def test_a_host_with_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "_LADDER", (rung("gold", ("a mine", "dig")),))
    with pytest.raises(MissingError, match="any protection"):
        ladder.choose(fake(set(), {}))


def test_a_protection_asked_for_by_name_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "_LADDER", (rung("gold", ("a mine", "dig"), ("a lamp", "buy it")),))
    with pytest.raises(MissingError) as caught:
        ladder.resolve("gold", fake(set(), {}))
    assert caught.value.missing == "protection gold: a mine; a lamp"
    assert caught.value.how == "dig; buy it"


def test_an_unknown_protection_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no protection 'moon': one of auto, .*sw-protected, cbit, none"):
        ladder.get("moon")


def test_sw_protected_is_there_with_all_its_pieces() -> None:
    answer = SoftwareProtected.availability(fake({0, KVM_X86_SW_PROTECTED_VM}, ALL))
    assert (answer.available, answer.missing, answer.note) == (True, (), "nothing is encrypted")


@pytest.mark.parametrize(
    ("types", "without", "expected"),
    [
        ({0}, None, "VM type KVM_X86_SW_PROTECTED_VM"),
        ({0, 1}, KVM_CAP_USER_MEMORY2, "KVM_CAP_USER_MEMORY2"),
        ({0, 1}, KVM_CAP_GUEST_MEMFD, "KVM_CAP_GUEST_MEMFD"),
        ({0, 1}, KVM_CAP_MEMORY_ATTRIBUTES, "KVM_CAP_MEMORY_ATTRIBUTES with KVM_MEMORY_ATTRIBUTE_PRIVATE"),
    ],
)
def test_sw_protected_names_the_missing_piece(types: set[int], without: int | None, expected: str) -> None:
    capabilities = {number: value for number, value in ALL.items() if number != without}
    answer = SoftwareProtected.availability(fake(types, capabilities))
    assert not answer.available
    assert [piece.missing.split(" (")[0] for piece in answer.missing] == [expected]


def test_sw_protected_names_all_missing_pieces_at_once() -> None:
    answer = SoftwareProtected.availability(fake({0}, {}))
    assert len(answer.missing) == 4
    assert len({piece.how for piece in answer.missing}) == 1


@pytest.mark.parametrize(
    ("config", "tdp", "wanted", "unwanted"),
    [
        ("n", "Y", "CONFIG_KVM_SW_PROTECTED_VM=y (this kernel: not set)", "tdp_mmu"),
        (None, "Y", "CONFIG_KVM_SW_PROTECTED_VM=y", "this kernel"),
        ("y", "N", "kvm.tdp_mmu=Y (this kernel: N)", "CONFIG_"),
        ("n", "N", "kvm.tdp_mmu=Y (this kernel: N)", "vendor module"),
        ("y", "Y", "two-dimensional paging", "CONFIG_"),
    ],
)
def test_sw_protected_says_how_to_get_it_here(
    monkeypatch: pytest.MonkeyPatch, config: str | None, tdp: str, wanted: str, unwanted: str
) -> None:
    monkeypatch.setattr("kvmpy.core.kernel.kernel_config", lambda _option: config)
    monkeypatch.setattr(sw_protected, "kernel_config", lambda _option: config)
    monkeypatch.setattr(sw_protected, "ModuleParameters", lambda _module: {"tdp_mmu": tdp})
    how = SoftwareProtected.availability(fake({0}, ALL)).missing[0].how
    assert wanted in how
    assert unwanted not in how
    assert how.endswith("or `kvmpy lab run`, which brings such a kernel")


@pytest.mark.parametrize(
    ("widths", "bit"),
    [(0x0030_3034, 47), (0x0034_3934, 51), (0x0000_3028, 39), (0x0000_3034, 51)],
    ids=["four-level nested paging", "five-level nested paging", "shadow paging", "no nested paging"],
)
def test_the_emulated_bit_is_one_that_can_be_mapped(widths: int, bit: int) -> None:
    """MAXPHYADDR is 52 on Genoa and Turin; nested paging of four levels maps 48 bits of it."""
    table = kvm_cpuid2.of([kvm_cpuid_entry2(function=0x8000_0008, eax=widths)])
    assert cbit.mappable_bits(cast(Kvm, SimpleNamespace(supported_cpuid=table))) - 1 == bit


def test_a_kvm_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto asks each protection once in the life of a KVM, and another KVM for itself."""
    asked: list[Kvm] = []
    whether = SoftwareProtected.availability

    def availability(kvm: Kvm) -> Availability:
        asked.append(kvm)
        return whether(kvm)

    monkeypatch.setattr(SoftwareProtected, "availability", availability)
    monkeypatch.setattr(ladder, "_LADDER", (rung("snp", ("a processor", "")), SoftwareProtected))
    without, having = fake(set(), ALL), fake({KVM_X86_SW_PROTECTED_VM}, ALL)
    for _ in range(3):
        assert ladder.resolve("auto", having).name == "sw-protected"
        with pytest.raises(MissingError, match="protection sw-protected: "):
            ladder.resolve("sw-protected", without)
    assert asked == [having, without]
