# SPDX-License-Identifier: Apache-2.0
"""The two words of a kick, the flag and immediate_exit, and the order in which they are set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvmpy.core.address import PAGE_SIZE
from kvmpy.core.backing import Anonymous, Mapping
from kvmpy.core.errors import MissingError
from kvmpy.core.uffd import DemandPager, PageFault, Userfaultfd
from kvmpy.uapi import ffi, lib


@pytest.fixture
def area() -> Iterator[Mapping]:
    """Stands for a vCPU's run page: nothing is there yet."""
    mapping = Anonymous(huge="never").map(PAGE_SIZE)
    yield mapping
    mapping.close()


def test_the_flag_of_a_kick_comes_last(area: Mapping) -> None:
    """A run takes both back together: what a kick set behind its flag would end every run from then on."""
    try:
        Userfaultfd().close()
    except MissingError as error:
        pytest.skip(str(error))
    run = ffi.cast("struct kvm_run *", area.hva)
    native = lib.kvmpy_vcpu_new(-1, run)
    flags: list[int] = []

    def at_immediate_exit(_fault: PageFault) -> None:
        flags.append(native.kick)

    try:
        with DemandPager(at_immediate_exit) as pager:
            pager.register(area.hva, area.size)
            assert lib.kvmpy_vcpu_kick(native) == 0
        assert flags == [0]
        assert (native.kick, run.immediate_exit) == (1, 1)
    finally:
        lib.kvmpy_vcpu_free(native)


def test_a_run_that_fails_leaves_the_kick_to_the_next(area: Mapping) -> None:
    native = lib.kvmpy_vcpu_new(-1, ffi.cast("struct kvm_run *", area.hva))
    try:
        lib.kvmpy_vcpu_kick(native)
        # There is no vCPU behind it: an error, which leaves the kick to the next run.
        assert lib.kvmpy_vcpu_run(native) == lib.KVMPY_RUN_ERROR
        assert (native.kick, native.run.immediate_exit, native.busy) == (1, 1, 0)
    finally:
        lib.kvmpy_vcpu_free(native)
