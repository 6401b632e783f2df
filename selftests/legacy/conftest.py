# SPDX-License-Identifier: Apache-2.0
"""Legacy mode: real mode, virtual-8086 mode, protected mode of 16 and 32 bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmpy import GuestProgram, Legacy, LegacyMode, MakeVm
from kvmpy.testing import host
from kvmpy.x86 import segments

LegacyMaker = Callable[..., Legacy]


def _runs_on_the_cpu(_: object) -> str | None:
    if "kvm_pvm" in host.vendor_modules():
        return "a KVM that runs legacy mode on the CPU: kvm_pvm emulates part of it"
    return None


# Real mode and flat protected mode run everywhere, as far as KVM's emulator knows the instructions.
ON_THE_CPU = pytest.mark.requires.with_args(_runs_on_the_cpu)


@pytest.fixture
def legacy(make_vm: MakeVm) -> LegacyMaker:
    """Return a function that makes a vCPU in a mode: ``legacy(LegacyMode.VM86, program, levels=3)``."""

    def make(
        mode: LegacyMode, program: GuestProgram | None = None, *, levels: int = 0, ring: int = 0
    ) -> Legacy:
        vm = make_vm(program if program is not None else GuestProgram.from_asm("\t.text\n"))
        # Whoever emulates the lab's CPU wants TR as LTR has read it.
        tr_type = segments.TSS_BUSY if host.platform_name() == "host" else segments.TSS_AVAILABLE
        return Legacy(vm.vcpus[0], mode, levels=levels, ring=ring, tr_type=tr_type)

    return make
