# SPDX-License-Identifier: Apache-2.0
"""A vCPU of a bare VM."""

from __future__ import annotations

import pytest

from kvmpy.core.vcpu import Vcpu
from kvmpy.core.vm import Vm


@pytest.fixture
def vcpu(vm: Vm) -> Vcpu:
    return vm.create_vcpu()
