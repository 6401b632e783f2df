# SPDX-License-Identifier: Apache-2.0
"""Kernel structs in Python: fields, views, arrays, copies, and what they refuse."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.uapi import ffi, structs
from kvmpy.uapi.struct_base import Field
from kvmpy.uapi.structs import (
    NESTED,
    STRUCTS,
    FlexStruct,
    Struct,
    kvm_cpuid2,
    kvm_cpuid_entry2,
    kvm_dirty_log,
    kvm_enable_cap,
    kvm_enc_region,
    kvm_fpu,
    kvm_ioapic_state,
    kvm_irq_level,
    kvm_irqchip,
    kvm_lapic_state,
    kvm_msr_entry,
    kvm_msr_list,
    kvm_msrs,
    kvm_nested_state,
    kvm_pit_state,
    kvm_regs,
    kvm_run,
    kvm_segment,
    kvm_sregs,
    kvm_tdx_init_vm,
    kvm_xsave,
    uffd_msg,
    uffdio_copy,
)

EVERY = sorted({**STRUCTS, **NESTED}.items())
KINDS = [pytest.param(kind, id=name) for name, kind in EVERY]


def numbers(kind: type[Struct]) -> list[Field]:
    return [field for field in kind.FIELDS.values() if field.ctype.kind == "primitive"]


def limits(field: Field) -> tuple[int, int]:
    bits = field.bits or field.size * 8
    if field.ctype.cname.startswith("int"):
        return -(1 << bits - 1), (1 << bits - 1) - 1
    return 0, (1 << bits) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_struct_is_zero(kind: type[Struct]) -> None:
    assert kind().to_bytes() == bytes(kind.SIZE)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(data=st.data())
def test_bytes_round_trip(kind: type[Struct], data: st.DataObject) -> None:
    extra = data.draw(st.integers(0, 3)) * 8 if issubclass(kind, FlexStruct) else 0
    size = kind.SIZE + extra
    raw = data.draw(st.binary(min_size=min(size, 64), max_size=64)).ljust(size, b"\x5a")[:size]
    value = kind.from_bytes(raw)
    assert value.to_bytes() == raw
    twin = copy.copy(value)
    assert twin == value
    assert twin.cdata != value.cdata


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_lie_where_the_layout_says(kind: type[Struct]) -> None:
    for field in numbers(kind):
        width = field.bits or field.size * 8
        for number in limits(field):
            value = kind()
            setattr(value, field.attribute, number)
            assert getattr(value, field.attribute) == number, field.name
            place = int.from_bytes(value.to_bytes(), "little")
            assert place == (number & (1 << width) - 1) << field.offset * 8 + field.shift, field.name


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_do_not_fit_are_refused_with_the_fields_name(kind: type[Struct]) -> None:
    value = kind()
    for field in numbers(kind):
        low, high = limits(field)
        for number in (low - 1, high + 1):
            with pytest.raises(OverflowError, match=rf"{kind.NAME}\.{field.name}: .* does not fit"):
                setattr(value, field.attribute, number)
    assert value == kind()


def test_fields_are_given_by_name() -> None:
    regs = kvm_regs(rax=1, rip=0x1000)
    assert (regs.rax, regs.rip, regs.rbx) == (1, 0x1000, 0)


def test_unknown_field_is_refused_and_close_names_are_told() -> None:
    with pytest.raises(TypeError, match=r"kvm_regs has no field 'raxx' \(did you mean rax"):
        kvm_regs(raxx=1)  # type: ignore[call-arg]


def test_unknown_attribute_is_refused() -> None:
    regs = kvm_regs()
    with pytest.raises(AttributeError):
        regs.raxx = 1  # type: ignore[attr-defined]


def test_float_is_no_number() -> None:
    with pytest.raises(TypeError):
        kvm_regs(rax=1.5)  # type: ignore[arg-type]


def test_nested_struct_is_a_view() -> None:
    sregs = kvm_sregs(cs={"selector": 8})
    code = sregs.cs
    code.base = 0x1234
    assert sregs.cs.base == 0x1234
    assert sregs.cs.selector == 8
    assert ffi.typeof(code.cdata) is ffi.typeof("struct kvm_segment *")


def test_assigning_a_struct_copies_it() -> None:
    segment = kvm_segment(base=7)
    sregs = kvm_sregs(ds=segment)
    segment.base = 9
    assert sregs.ds.base == 7
    sregs.ds = {"limit": 3}
    assert (sregs.ds.base, sregs.ds.limit) == (0, 3)


def test_struct_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="kvm_segment cannot be set from kvm_regs"):
        kvm_sregs(cs=kvm_regs())  # type: ignore[arg-type]


def test_view_keeps_the_memory_alive() -> None:
    code = kvm_sregs(cs={"base": 0x55AA}).cs
    pins = kvm_irqchip(chip={"ioapic": {"redirtbl": [{"bits": 3}]}}).chip.ioapic.redirtbl
    row = kvm_fpu(fpr=[b"one", b"two"]).fpr[1]
    gc.collect()
    scratch = [kvm_sregs(cs={"base": 1}) for _ in range(100)]
    assert code.base == 0x55AA
    assert pins[0].bits == 3
    assert row[:3] == b"two"
    assert len(scratch) == 100


def test_wrapped_memory_is_shared_with_its_owner() -> None:
    raw = ffi.new("uint8_t[]", kvm_run.SIZE)
    run = kvm_run.wrap(ffi.cast("struct kvm_run *", raw), raw)
    run.immediate_exit = 1
    raw[8] = 2
    assert raw[1] == 1
    assert run.exit_reason == 2


def test_members_of_nameless_unions_are_fields() -> None:
    level = kvm_irq_level(irq=0xFFFFFFFF)
    assert level.status == -1
    assert kvm_dirty_log(dirty_bitmap=5).padding2 == 5
    assert kvm_irq_level.fields() == {"irq": (0, 4), "status": (0, 4), "level": (4, 4)}


def test_keyword_field_has_an_underscore() -> None:
    message = uffd_msg(event=0x14, arg={"remap": {"from_": 1, "to": 2}})
    assert message.arg.remap.from_ == 1
    assert "from" in structs.NESTED["uffd_msg__arg__remap"].fields()


def test_kernel_fields_win_over_methods() -> None:
    assert kvm_enc_region(size=5).size == 5
    assert kvm_enc_region(size=5).nbytes == 16
    assert uffdio_copy(copy=-1).copy == -1
    assert kvm_regs().size == 144
    known = {
        "kvm_coalesced_mmio_zone.size",
        "kvm_create_guest_memfd.size",
        "kvm_enc_region.size",
        "kvm_memory_attributes.size",
        "kvm_nested_state.size",
        "kvm_pre_fault_memory.size",
        "kvm_stats_desc.size",
        "uffdio_copy.copy",
        "kvm_ioapic_state__redirtbl.fields",
        "kvm_run__io.size",
        "kvm_run__memory_fault.size",
        "kvm_run__tdx__get_quote.size",
    }
    hidden = {f"{name}.{field}" for name, kind in EVERY for field in kind.FIELDS if hasattr(Struct, field)}
    assert hidden == known


def test_numbers_in_an_array() -> None:
    cap = kvm_enable_cap(args=[1, 2])
    assert list(cap.args) == [1, 2, 0, 0]
    assert len(cap.args) == 4
    cap.args[-1] = 9
    assert cap.args[1:] == [2, 0, 9]
    cap.args[0:2] = [7, 8]
    assert cap.args == [7, 8, 0, 9]
    cap.args = (5,)
    assert cap.args == [5, 0, 0, 0]
    assert cap.args != [5, 0, 0]
    assert cap.args.to_bytes() == bytes([5]) + bytes(31)


@pytest.mark.parametrize("index", [4, -5])
def test_index_outside_an_array_is_refused(index: int) -> None:
    cap = kvm_enable_cap()
    with pytest.raises(IndexError, match="of 4 items"):
        cap.args[index]
    with pytest.raises(IndexError, match="of 4 items"):
        cap.args[index] = 1


def test_too_many_items_are_refused() -> None:
    cap = kvm_enable_cap()
    with pytest.raises(ValueError, match="5 numbers for 4 items"):
        cap.args = [0] * 5
    with pytest.raises(ValueError, match="1 numbers for 2 items"):
        cap.args[0:2] = [1]
    with pytest.raises(ValueError, match="4 structs for 3 items"):
        kvm_pit_state(channels=[{}] * 4)
    with pytest.raises(ValueError, match="9 rows for 8 items"):
        kvm_fpu(fpr=[b""] * 9)
    with pytest.raises(ValueError, match="17 bytes for 16 items"):
        kvm_fpu(fpr=[bytes(17)])


def test_bytes_in_an_array() -> None:
    lapic = kvm_lapic_state(regs=b"\1\2\3")
    assert lapic.regs[:4] == b"\1\2\3\0"
    assert lapic.regs[2] == 3
    lapic.regs[0x20:0x24] = (0x01020304).to_bytes(4, "little")
    assert lapic.regs[0x20:0x24:2] == b"\4\2"
    lapic.regs[0x20:0x24:2] = b"\7\7"
    assert lapic.regs[0x20:0x24] == b"\7\3\7\1"
    assert len(bytes(lapic.regs)) == 1024
    with pytest.raises(ValueError, match="3 bytes for 4 items"):
        lapic.regs[0:4] = b"abc"


def test_structs_in_an_array() -> None:
    pit = kvm_pit_state(channels=[{"count": 1}])
    pit.channels[1].count = 5
    pit.channels[2] = {"mode": 3}
    assert [channel.count for channel in pit.channels] == [1, 5, 0]
    assert [channel.mode for channel in pit.channels[1:]] == [0, 3]
    assert kvm_ioapic_state(redirtbl=[{"bits": 0x8000}]).redirtbl[0].fields.trig_mode == 1


def test_open_array_has_room_for_what_was_asked() -> None:
    msrs = kvm_msrs.with_entries(3)
    assert (msrs.nmsrs, msrs.room, len(msrs), msrs.nbytes) == (3, 3, 3, 8 + 3 * 16)
    msrs.entries[2].index = 0x10
    assert [entry.index for entry in msrs.entries_list()] == [0, 0, 0x10]
    with pytest.raises(IndexError):
        msrs.entries[3]


def test_of_copies_its_entries() -> None:
    entry = kvm_cpuid_entry2(function=1, eax=2)
    table = kvm_cpuid2.of([entry, {"function": 7}], padding=1)
    entry.eax = 3
    assert (table.nent, table.padding) == (2, 1)
    assert [(leaf.function, leaf.eax) for leaf in table.entries_list()] == [(1, 2), (7, 0)]
    assert kvm_msr_list.of([4, 5]).entries_list() == [4, 5]


def test_count_says_how_many_entries_are_listed() -> None:
    table = kvm_cpuid2.with_entries(8)
    table.nent = 2
    assert len(table.entries_list()) == 2
    assert bool(table)
    table.nent = 0
    assert table.entries_list() == []
    assert bool(table)


def test_count_beyond_the_room_is_refused() -> None:
    msrs = kvm_msrs.with_entries(1)
    msrs.nmsrs = 2
    with pytest.raises(ValueError, match="kvm_msrs counts 2 entries and has room for 1"):
        msrs.entries_list()


def test_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="kvm_msrs with -1 entries"):
        kvm_msrs.with_entries(-1)


def test_room_follows_the_bytes() -> None:
    assert kvm_nested_state.with_bytes(128 + 4096).room == 4096
    assert kvm_xsave.with_entries(3).nbytes == 4096 + 12
    assert kvm_xsave.from_bytes(bytes(4100)).room == 1
    assert kvm_msr_list().room == 0
    with pytest.raises(ValueError, match="kvm_msrs needs 8 bytes, 7 were given"):
        kvm_msrs.from_bytes(bytes(7))


def test_open_array_inside_a_nested_struct() -> None:
    domain = kvm_tdx_init_vm.with_entries(2)
    assert domain.cpuid.nent == 2
    domain.cpuid.entries[1].function = 0x24
    assert [leaf.function for leaf in domain.entries_list()] == [0, 0x24]
    assert domain.nbytes == 264 + 2 * 40


def test_fixed_struct_needs_exactly_its_bytes() -> None:
    for size in (143, 145):
        with pytest.raises(ValueError, match=f"kvm_regs has 144 bytes, {size} were given"):
            kvm_regs.from_bytes(bytes(size))


def test_equality_is_of_kind_and_content() -> None:
    assert kvm_regs(rax=1) == kvm_regs(rax=1)
    assert kvm_regs(rax=1) != kvm_regs(rax=2)
    assert kvm_regs() != kvm_sregs()
    with pytest.raises(TypeError, match="unhashable"):
        hash(kvm_regs())


def test_copies_are_independent() -> None:
    table = kvm_msrs.of([kvm_msr_entry(index=1)])
    for twin in (table.copy(), copy.copy(table), copy.deepcopy(table), pickle.loads(pickle.dumps(table))):  # noqa: S301
        assert twin == table
        twin.entries[0].index = 2
        assert table.entries[0].index == 1


def test_as_dict_is_plain() -> None:
    content: dict[str, Any] = kvm_sregs(cs={"base": 1}, interrupt_bitmap=[3]).as_dict()
    assert content["cs"]["base"] == 1
    assert content["interrupt_bitmap"] == [3, 0, 0, 0]
    assert kvm_fpu(fpr=[b"ab"]).as_dict()["fpr"][0] == b"ab" + bytes(14)
    assert kvm_msrs.of([{"index": 5}]).as_dict()["entries"] == [{"index": 5, "reserved": 0, "data": 0}]


def test_as_dict_restores_the_struct() -> None:
    before = kvm_sregs(cr0=1, cs={"base": 1}, interrupt_bitmap=[3])
    assert kvm_sregs(**before.as_dict()) == before


def test_host_address_is_where_cdata_points() -> None:
    regs = kvm_regs(rax=0x1122)
    assert ffi.cast("uint64_t *", regs.host_address)[0] == 0x1122
