# SPDX-License-Identifier: Apache-2.0
"""What the tests of nested SVM share: an L1 that runs the host's code in an L2."""

from __future__ import annotations

import pytest

from kvmpy import L1, L2, MakeVm


@pytest.fixture(params=[False, True], ids=["shadow", "npt"])
def npt(request: pytest.FixtureRequest) -> bool:
    """Whether L2 has nested page tables: KVM runs it on its own copy of those, else on L1's tables."""
    return bool(request.param)


@pytest.fixture
def l2(make_vm: MakeVm, npt: bool) -> L2:
    """The L2 of a VM with one vCPU."""
    return L2(make_vm(L1).vcpus[0], npt=npt)
