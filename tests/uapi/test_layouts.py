# SPDX-License-Identifier: Apache-2.0
"""Sizes, offsets and ioctl numbers are those that gcc computes from the kernel's headers."""

from __future__ import annotations

import pytest

from kvmpy.uapi.abi import struct_abi
from kvmpy.uapi.ioctls import BY_NR, IOCTLS, decode, encode
from kvmpy.uapi.structs import NESTED, STRUCTS
from tests.uapi.golden import NUMBERS, OFFSETS, SIZES


def test_every_struct_is_in_the_golden_table() -> None:
    assert sorted(STRUCTS) == sorted(SIZES)


def test_sizes() -> None:
    assert {name: kind.SIZE for name, kind in STRUCTS.items()} == SIZES
    assert {name: kind().nbytes for name, kind in STRUCTS.items()} == SIZES


def test_offsets() -> None:
    places = (path.split(".", 1) for path in OFFSETS)
    assert {f"{name}.{field}": struct_abi(name).fields[field][0] for name, field in places} == OFFSETS


def test_fields_lie_inside_the_struct() -> None:
    for name in STRUCTS:
        layout = struct_abi(name)
        for path, (offset, size) in layout.fields.items():
            assert 0 <= offset <= offset + size <= layout.size, (name, path)
        for path, (bit, width) in layout.bits.items():
            assert 0 <= bit < bit + width <= layout.size * 8, (name, path)


def test_members_of_nameless_types_have_true_offsets() -> None:
    fields = struct_abi("kvm_run").fields
    assert fields["io"] == (32, 16)
    assert fields["io.port"] == (34, 2)
    assert fields["tdx.get_quote.size"] == (64, 8)
    assert "s.regs.regs" not in fields  # kvm_sync_regs has a name: it is a struct of its own


def test_bit_fields_have_their_place() -> None:
    bits = struct_abi("kvm_ioapic_state").bits
    assert bits["redirtbl[0].fields.delivery_mode"] == (200, 3)
    assert bits["redirtbl[0].fields.trig_mode"] == (207, 1)
    assert struct_abi("sev_user_data_snp_status").bits["rsvd1"] == (71, 25)


def test_every_ioctl_is_in_the_golden_table() -> None:
    assert sorted(IOCTLS) == sorted(NUMBERS)


def test_ioctl_numbers() -> None:
    assert {name: entry.nr for name, entry in IOCTLS.items()} == NUMBERS


def test_a_number_names_one_ioctl() -> None:
    assert len(BY_NR) == len(IOCTLS)
    assert all(BY_NR[entry.nr] is entry for entry in IOCTLS.values())


def test_encode_undoes_decode() -> None:
    for nr in NUMBERS.values():
        assert encode(*decode(nr)) == nr


@pytest.mark.parametrize(
    "parts", [(4, 0, 0, 0), (0, 256, 0, 0), (0, 0, 256, 0), (0, 0, 0, 1 << 14), (-1, 0, 0, 0)]
)
def test_encode_refuses_what_does_not_fit(parts: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="no ioctl number"):
        encode(*parts)


def test_nested_types_name_their_path() -> None:
    assert NESTED["kvm_run__io"].fields()["port"] == (2, 2)
