# SPDX-License-Identifier: Apache-2.0
"""The table of what an ioctl's pointers lead to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmpy.uapi import ioctls
from kvmpy.uapi.buffers import BUFFERS, TDX_BUFFER, Buffer, Size, children_of, field_place
from kvmpy.uapi.commands import SEV_COMMANDS
from kvmpy.uapi.structs import STRUCTS


def every_buffer() -> Iterator[tuple[str, Buffer, Buffer | None]]:
    def below(
        name: str, buffer: Buffer, parent: Buffer | None
    ) -> Iterator[tuple[str, Buffer, Buffer | None]]:
        yield name, buffer, parent
        for child in (*buffer.children, *(each for case in buffer.cases.values() for each in case)):
            yield from below(f"{name}.{child.pointer}", child, buffer)

    for nr, buffer in BUFFERS.items():
        yield from below(ioctls.BY_NR[nr].name, buffer, None)
    yield from below("TDX", TDX_BUFFER, None)


def test_every_ioctl_with_a_pointer_is_there() -> None:
    assert set(BUFFERS) == {op.nr for op in ioctls.IOCTLS.values() if op.arg not in ("none", "int")}


def test_every_name_is_a_field() -> None:
    for name, buffer, parent in every_buffer():
        if parent is not None:
            assert parent.place(buffer.pointer)[1] == 8, name
            assert not buffer.when or parent.place(buffer.when)
        if buffer.size.count:
            holder = buffer if buffer.size.own else parent
            assert holder is not None
            assert holder.place(buffer.size.count)[1] in (1, 2, 4, 8), name
        if buffer.select:
            assert buffer.place(buffer.select)[1] == 4, name


def test_fields_named_like_addresses_are_followed_or_known() -> None:
    """A command struct's *_uaddr or *_address that nobody follows would be lost to every recorder."""
    followed = {(parent.struct, buffer.pointer) for _, buffer, parent in every_buffer() if parent}
    named = {
        (tag, name)
        for tag, kind in STRUCTS.items()
        if tag.startswith(("kvm_sev_", "sev_user_data_"))
        for name, entry in kind.FIELDS.items()
        if entry.size == 8 and (name.endswith(("uaddr", "_address")) or name == "address")
    }
    assert named - followed == set()


def test_sizes() -> None:
    assert Size(144).bytes(0) == 144
    assert Size(8, "nmsrs", own=True, unit=16).bytes(3) == 56
    assert Size(count="num_pages", per=8, round=8).bytes(65) == 16
    assert Size(count="num_pages", per=8, round=8).bytes(64) == 8
    assert Size(count="size", own=True, least=128).bytes(0) == 128


def test_places() -> None:
    assert field_place("kvm_msr_filter", "ranges[2].nmsrs") == (8 + 2 * 24 + 4, 4)
    assert field_place("kvm_tdx_capabilities", "cpuid.nent") == (2048, 4)
    with pytest.raises(ValueError, match="bytes have no field"):
        Buffer(None, "in", Size(8)).place("x")


def test_commands_select_their_struct() -> None:
    sev = BUFFERS[ioctls.KVM_MEMORY_ENCRYPT_OP.nr]
    for command in SEV_COMMANDS.values():
        result = [child.struct for child in children_of(sev, command.id)]
        assert result == ([command.struct] if command.struct else []), command.name
    assert list(children_of(sev, 99)) == []
    assert list(children_of(sev, None)) == []


def test_the_kernel_reads_counts_alone_where_it_fills_entries() -> None:
    assert BUFFERS[ioctls.KVM_GET_SUPPORTED_CPUID.nr].reads == 8
    assert BUFFERS[ioctls.KVM_GET_MSR_INDEX_LIST.nr].reads == 4
    assert BUFFERS[ioctls.KVM_GET_MSRS.nr].reads is None


def test_bitmaps_are_whole_quadwords() -> None:
    (bitmap,) = BUFFERS[ioctls.KVM_CLEAR_DIRTY_LOG.nr].children
    assert [bitmap.size.bytes(pages) for pages in (1, 64, 65)] == [8, 8, 16]
    ranges = BUFFERS[ioctls.KVM_X86_SET_MSR_FILTER.nr].children
    assert [each.size.bytes(9) for each in ranges] == [8] * 16
