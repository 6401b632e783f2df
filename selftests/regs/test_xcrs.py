# SPDX-License-Identifier: Apache-2.0
"""XCR0, from the host and from the guest."""

from __future__ import annotations

import errno

import pytest

from kvmpy import AGENT, CR4, KVM_MAX_XCRS, XCR0, Agent, Cpuid, MakeVm, Vcpu, kvm_xcrs, refused

pytestmark = pytest.mark.requires("KVM_CAP_XCRS", "cpu:xsave")


def xcr0(value: int) -> kvm_xcrs:
    """Return the argument that sets XCR0."""
    xcrs = kvm_xcrs(nr_xcrs=1)
    xcrs.xcrs[0].value = value
    return xcrs


def refuse(vcpu: Vcpu, xcrs: kvm_xcrs) -> None:
    """Set registers that must be refused with EINVAL, and see that XCR0 did not change."""
    before = vcpu.fpu.get_xcrs()
    with refused(errno.EINVAL):
        vcpu.fpu.set_xcrs(xcrs)
    assert vcpu.fpu.get_xcrs() == before


def test_initial(vcpu: Vcpu) -> None:
    """A new vCPU has one extended control register, XCR0, with x87 state alone.

    Documentation/virt/kvm/api.rst, 4.44 KVM_GET_XCRS; Intel SDM volume 1, 13.3 (XCR0 is 1 after reset).
    """
    xcrs = vcpu.fpu.get_xcrs()
    assert (xcrs.nr_xcrs, xcrs.flags) == (1, 0)
    assert (xcrs.xcrs[0].xcr, xcrs.xcrs[0].value) == (0, 1)


def test_all_supported(vcpu: Vcpu) -> None:
    """All the state that leaf 0xD of the vCPU's CPUID names can be enabled at once.

    Documentation/virt/kvm/api.rst, 4.45 KVM_SET_XCRS; Intel SDM volume 2, CPUID, leaf 0xD.
    """
    leaf = Cpuid.from_struct(vcpu.cpuid.get()).find(0xD, 0)
    assert leaf is not None
    everything = leaf.eax | leaf.edx << 32
    assert everything & 3 == 3
    vcpu.fpu.set_xcrs(xcr0(everything))
    assert vcpu.fpu.get_xcrs().xcrs[0].value == everything


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(0, id="nothing"),
        pytest.param(XCR0.SSE, id="no-x87"),
        pytest.param(XCR0.X87 | XCR0.AVX, id="AVX-without-SSE"),
        pytest.param(XCR0.X87 | XCR0.SSE | XCR0.BNDREGS, id="half-of-MPX"),
        pytest.param(XCR0.X87 | XCR0.SSE | XCR0.AVX | XCR0.OPMASK, id="part-of-AVX-512"),
        pytest.param(
            XCR0.X87 | XCR0.SSE | XCR0.OPMASK | XCR0.ZMM_HI256 | XCR0.HI16_ZMM, id="AVX-512-without-AVX"
        ),
        pytest.param(XCR0.X87 | XCR0.PT, id="supervisor-state"),
        pytest.param(XCR0.X87 | 1 << 62, id="unknown"),
    ],
)
def test_illegal(vcpu: Vcpu, value: int) -> None:
    """A value of XCR0 that XSETBV would refuse is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.45 KVM_SET_XCRS; Intel SDM volume 1, 13.3 Enabling the XSAVE Feature
    Set.
    """
    refuse(vcpu, xcr0(int(value)))


def test_not_in_cpuid(vcpu: Vcpu) -> None:
    """State that the vCPU's own CPUID does not name is refused with EINVAL, whatever the host has.

    Intel SDM volume 1, 13.3 Enabling the XSAVE Feature Set (XCR0 and CPUID leaf 0xD).
    """
    cpuid = Cpuid.from_struct(vcpu.cpuid.get())
    cpuid.ensure(0xD, 0).eax = int(XCR0.X87 | XCR0.SSE)
    cpuid.ensure(0xD, 0).edx = 0
    vcpu.cpuid.set(cpuid.to_struct())
    vcpu.fpu.set_xcrs(xcr0(int(XCR0.X87 | XCR0.SSE)))
    refuse(vcpu, xcr0(int(XCR0.X87 | XCR0.SSE | XCR0.AVX)))


@pytest.mark.parametrize("flags", [1, 1 << 31])
def test_flags(vcpu: Vcpu, flags: int) -> None:
    """Flags, of which there are none, are refused with EINVAL.

    arch/x86/kvm/x86.c, kvm_vcpu_ioctl_x86_set_xcrs().
    """
    xcrs = vcpu.fpu.get_xcrs()
    xcrs.flags = flags
    refuse(vcpu, xcrs)


def test_too_many(vcpu: Vcpu) -> None:
    """More registers than KVM_MAX_XCRS are refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.45 KVM_SET_XCRS (xcrs[KVM_MAX_XCRS]).
    """
    xcrs = vcpu.fpu.get_xcrs()
    xcrs.nr_xcrs = int(KVM_MAX_XCRS) + 1
    refuse(vcpu, xcrs)


@pytest.mark.usefixtures("open_registers")
@pytest.mark.requires("cpu:xsave")
def test_guest_and_host_agree(make_vm: MakeVm) -> None:
    """XGETBV returns what KVM_SET_XCRS set, and KVM_GET_XCRS what XSETBV set.

    Documentation/virt/kvm/api.rst, 4.44 KVM_GET_XCRS and 4.45 KVM_SET_XCRS.
    """
    agent = Agent(make_vm(AGENT).vcpus[0])
    assert agent.change_cr(4, put=CR4.OSXSAVE) is None
    agent.vcpu.complete_io()
    agent.vcpu.fpu.set_xcrs(xcr0(int(XCR0.X87 | XCR0.SSE)))
    assert agent.xgetbv(ring=3) == 3
    assert agent.xsetbv(1) is None
    assert agent.vcpu.fpu.get_xcrs().xcrs[0].value == 1
