# SPDX-License-Identifier: Apache-2.0
"""Hyper-V's control word, and what the guest's headers say of the numbers."""

from __future__ import annotations

import re

from kvmpy.guest.toolchain import runtime_dir
from kvmpy.x86 import hyperv, xen
from kvmpy.x86.hyperv import HvCall
from kvmpy.x86.msr_numbers import Msr


def test_control_word() -> None:
    """Code, fast bit, variable header, repetitions and start have their places (TLFS, hypercall inputs)."""
    word = hyperv.control(HvCall.HVCALL_SEND_IPI_EX, fast=True, variable=3, reps=0xFFF, start=1)
    assert word == 0x0001_0FFF_0007_0015


def test_guest_headers() -> None:
    """The guest has the numbers under the same names."""

    def defines(name: str) -> dict[str, int]:
        text = (runtime_dir() / "include/kvmpy" / name).read_text()
        return {key: int(number, 16) for key, number in re.findall(r"#define (\w+) (0x\w+)", text)}

    words = defines("hyperv_numbers.h")
    assert words["HVCALL_SEND_IPI"] == HvCall.HVCALL_SEND_IPI
    assert words["HV_X64_MSR_EOM"] == Msr.HV_X64_MSR_EOM
    assert words["HV_CRASH_CTL_CRASH_NOTIFY"] == 1 << 63
    assert defines("xen_numbers.h") == {
        key: int(number)
        for kind in (xen.XenCall, xen.XenTimer, xen.XenEvtchnType, xen.XenRunState, xen.XenLayout)
        for key, number in kind.__members__.items()
    }
