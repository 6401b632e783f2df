# SPDX-License-Identifier: Apache-2.0
"""Moves and mirrors of SEV guests in a race: KVM locks several VMs at once."""

from __future__ import annotations

import errno
from functools import partial

import pytest

from kvmpy import Kvm, Vm
from selftests.conftest import Beside, turns
from selftests.sev.conftest import BareMaker
from selftests.sev.test_mirrors import error_of, launched

pytestmark = pytest.mark.requires("protection:sev")

# A VM that was moved from is dead: EIO.
ALLOWED = {0, errno.EINVAL, errno.EBUSY, errno.EIO}


@pytest.mark.parametrize("kind", ["sev", "sev-es"])
def test_moves_in_a_race(kvm: Kvm, bare: BareMaker, kind: str, load_seconds: float) -> None:
    """A guest that VMs take from each other, and mirror, at once is in one of them at the end, and no other.

    arch/x86/kvm/svm/sev.c, sev_lock_two_vms(): no order of two VMs can hang.
    """
    for _ in turns(load_seconds):
        vms = [launched(bare, kind).vm, *(bare(kind, init=False, vcpus=1).vm for _ in range(2))]
        results: set[int | None] = set()

        def take(own: int, turn: int, vms: list[Vm] = vms, results: set[int | None] = results) -> None:
            source = vms[(own + 1 + turn % 2) % 3]
            results.add(error_of(lambda: vms[own].sev.move_enc_context_from(source)))

        def mirror(turn: int, vms: list[Vm] = vms, results: set[int | None] = results) -> None:
            with kvm.create_vm() as copy:
                results.add(error_of(lambda: copy.sev.copy_enc_context_from(vms[turn % 3])))

        with Beside(partial(take, 1)), Beside(partial(take, 2)), Beside(mirror):
            for turn in range(10):
                take(0, turn)
        assert results <= ALLOWED, results
        target = bare(kind, init=False, vcpus=1).vm
        assert sorted(moved(target, vm) for vm in vms) == [False, False, True]
        # There are only so many ASIDs.
        for vm in (*vms, target):
            vm.close()


def moved(target: Vm, source: Vm) -> bool:
    """Whether the guest is in *source*, and now in *target*."""
    return error_of(lambda: target.sev.move_enc_context_from(source)) == 0
