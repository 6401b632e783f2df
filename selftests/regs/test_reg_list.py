# SPDX-License-Identifier: Apache-2.0
"""KVM_GET_REG_LIST: the registers that are reached by id."""

from __future__ import annotations

import errno

import pytest

from kvmpy import Kvm, Vcpu, ioctls, kvm_reg_list


def lists_registers(kvm: Kvm) -> str | None:
    """Ask a vCPU for its list, which no capability announces on x86."""
    with kvm.create_vm() as vm, vm.create_vcpu() as vcpu:
        answer = vcpu.ioctl_raw(ioctls.KVM_GET_REG_LIST, kvm_reg_list.with_entries(0))
    return None if answer in ((0, 0), (-1, errno.E2BIG)) else "KVM_GET_REG_LIST: Linux 6.18 or newer"


pytestmark = pytest.mark.requires("KVM_CAP_ONE_REG", lists_registers)


def register_ids(vcpu: Vcpu) -> list[int]:
    """Return the whole list."""
    short = kvm_reg_list.with_entries(0)
    vcpu.ioctl_raw(ioctls.KVM_GET_REG_LIST, short)
    whole = kvm_reg_list.with_entries(short.n)
    vcpu.ioctl(ioctls.KVM_GET_REG_LIST, whole)
    return [whole.reg[index] for index in range(whole.n)]


def test_list_too_short(vcpu: Vcpu) -> None:
    """A list without room fails with E2BIG and says how many registers there are.

    Documentation/virt/kvm/api.rst, 4.84 KVM_GET_REG_LIST.
    """
    count = len(register_ids(vcpu))
    if not count:
        pytest.skip("this vCPU has no register in the list")
    for room in {0, count - 1}:
        short = kvm_reg_list.with_entries(room)
        assert vcpu.ioctl_raw(ioctls.KVM_GET_REG_LIST, short) == (-1, errno.E2BIG)
        assert short.n == count


def test_every_register_can_be_read_and_set(vcpu: Vcpu) -> None:
    """KVM_GET_ONE_REG reads each register of the list, and KVM_SET_ONE_REG takes back what it read.

    Documentation/virt/kvm/api.rst, 4.84 ("the registers supported for the KVM_GET_ONE_REG/KVM_SET_ONE_REG
    calls").
    """
    ids = register_ids(vcpu)
    assert len(set(ids)) == len(ids)
    for register in ids:
        value = vcpu.regs.get_one(register)
        vcpu.regs.set_one(register, value)
        assert vcpu.regs.get_one(register) == value
