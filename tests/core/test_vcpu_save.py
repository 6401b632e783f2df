# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
import pickle

import pytest

from kvmpy.core.vcpu_save import VcpuSnapshot
from kvmpy.uapi.structs import kvm_regs, kvm_sregs


@pytest.fixture
def snapshot() -> VcpuSnapshot:
    return VcpuSnapshot(
        cpuid=bytes(8),
        sregs=kvm_sregs(cr3=0x5000).to_bytes(),
        sregs2=b"",
        regs=kvm_regs(rax=7, rip=0x40_0000).to_bytes(),
        fpu=bytes(416),
        xsave=bytes(4096),
        xcrs=b"",
        msrs=((0x10, 1000), (0xC000_0082, 0xFFFF_8000_0000_0000)),
        lapic=bytes(1024),
        events=bytes(64),
        debugregs=bytes(128),
        nested=b"",
        mp_state=0,
        tsc_khz=None,
    )


def test_it_survives_pickle(snapshot: VcpuSnapshot) -> None:
    assert pickle.loads(pickle.dumps(snapshot)) == snapshot  # noqa: S301 - our own bytes


def test_it_survives_json(snapshot: VcpuSnapshot) -> None:
    assert VcpuSnapshot.from_dict(json.loads(json.dumps(snapshot.as_dict()))) == snapshot


@pytest.mark.parametrize("change", [{"regs": None}, {"extra": 1}])
def test_json_of_another_shape_is_refused(snapshot: VcpuSnapshot, change: dict[str, object]) -> None:
    data = snapshot.as_dict() | change
    if data["regs"] is None:
        del data["regs"]
    with pytest.raises(ValueError, match="not a vCPU snapshot"):
        VcpuSnapshot.from_dict(data)


def test_registers_can_be_looked_at(snapshot: VcpuSnapshot) -> None:
    assert (snapshot.general().rax, snapshot.general().rip) == (7, 0x40_0000)
    assert snapshot.system().cr3 == 0x5000


def test_differences_name_the_part_and_the_msr(snapshot: VcpuSnapshot) -> None:
    other = dataclasses.replace(snapshot, mp_state=3, msrs=((0x10, 2000), (0xC000_0082, 1)))
    assert snapshot.differences(other) == ["MSR 0xc0000082: 0xffff800000000000 and 0x1", "mp_state: 0 and 3"]


def test_a_running_time_stamp_counter_is_no_difference(snapshot: VcpuSnapshot) -> None:
    other = dataclasses.replace(snapshot, msrs=((0x10, 2000), (0xC000_0082, 0xFFFF_8000_0000_0000)))
    assert snapshot.differences(other) == []


def test_a_component_in_its_initial_state_is_no_difference(snapshot: VcpuSnapshot) -> None:
    marked = bytearray(snapshot.xsave)
    marked[512] = 2
    assert snapshot.differences(dataclasses.replace(snapshot, xsave=bytes(marked))) == []
    for offset in (160, 600):
        other = bytearray(marked)
        other[offset] = 1
        assert len(snapshot.differences(dataclasses.replace(snapshot, xsave=bytes(other)))) == 1
