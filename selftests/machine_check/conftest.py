# SPDX-License-Identifier: Apache-2.0
"""A vCPU of a bare VM."""

from __future__ import annotations

import pytest

from kvmpy import Vcpu, Vm


@pytest.fixture
def vcpu(vm: Vm) -> Vcpu:
    return vm.create_vcpu()
