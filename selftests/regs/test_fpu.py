# SPDX-License-Identifier: Apache-2.0
"""Floating-point and extended state: KVM_GET/SET_FPU and KVM_GET/SET_XSAVE."""

from __future__ import annotations

import errno

import pytest

from kvmpy import (
    AGENT,
    KVM_CAP_XSAVE2,
    PAGE_SIZE,
    Agent,
    Gva,
    MakeVm,
    Vcpu,
    Vm,
    kvm_cpuid2,
    kvm_fpu,
    kvm_xsave,
    refused,
)

# The legacy area and the header of the XSAVE format (Intel SDM volume 1, 13.4).
FCW, MXCSR, XMM0, HEADER = 0, 24, 160, 512
XSTATE_BV, RESERVED = HEADER, HEADER + 24
FXSAVE = 0x1F80  # MXCSR: all exceptions masked

needs_xsave = pytest.mark.requires("KVM_CAP_XSAVE", "cpu:xsave")


def xmm(number: int) -> bytes:
    """Return 16 bytes of their own for each register."""
    return bytes((number * 16 + byte) & 0xFF for byte in range(16))


def st(number: int) -> bytes:
    """Return an 80-bit number in its 16-byte place: 1.5 + *number* / 256, roughly."""
    return (0xC000_0000_0000_0000 + (number << 48)).to_bytes(8, "little") + b"\xff\x3f" + bytes(6)


def some_fpu() -> kvm_fpu:
    """Return a floating-point state unlike that of a new vCPU."""
    fpu = kvm_fpu(fcw=0x27F, fsw=0x3841, ftwx=0xFF, last_opcode=0x123, last_ip=0x4_5678, last_dp=0x9_ABCD)
    fpu.fpr = [st(number) for number in range(8)]
    fpu.xmm = [xmm(number) for number in range(16)]
    return fpu


def with_words(image: kvm_xsave, changes: dict[int, bytes]) -> kvm_xsave:
    """Return a copy of an XSAVE image with bytes at offsets replaced."""
    raw = bytearray(image.to_bytes())
    for offset, data in changes.items():
        raw[offset : offset + len(data)] = data
    return kvm_xsave.from_bytes(bytes(raw))


def take_into_use(vcpu: Vcpu) -> None:
    """Leave the vCPU with x87 and SSE state that is not in its initial configuration for XSAVE."""
    vcpu.fpu.set_xsave(with_words(vcpu.fpu.get_xsave2(), {XSTATE_BV: (3).to_bytes(8, "little")}))


def test_fpu_round_trip(vcpu: Vcpu) -> None:
    """KVM_GET_FPU returns the x87 and SSE registers that KVM_SET_FPU set.

    Documentation/virt/kvm/api.rst, 4.22 KVM_GET_FPU and 4.23 KVM_SET_FPU.
    """
    given = some_fpu()
    vcpu.fpu.set(given)
    known = vcpu.fpu.get()
    # KVM leaves MXCSR out of this pair of ioctls.
    known.mxcsr = 0
    assert known == given


@needs_xsave
def test_xsave_shows_the_fpu(vcpu: Vcpu) -> None:
    """KVM_GET_XSAVE shows the registers of KVM_SET_FPU in the legacy area, marked as present.

    Documentation/virt/kvm/api.rst, 4.42 KVM_GET_XSAVE; Intel SDM volume 1, 13.4.1 Legacy Region.
    """
    take_into_use(vcpu)
    vcpu.fpu.set(some_fpu())
    raw = vcpu.fpu.get_xsave2().to_bytes()
    assert raw[FCW : FCW + 2] == b"\x7f\x02"
    assert [raw[XMM0 + 16 * number :][:16] for number in range(16)] == [xmm(number) for number in range(16)]
    assert raw[XSTATE_BV] & 3 == 3


@needs_xsave
def test_fpu_shows_the_xsave_image(vcpu: Vcpu) -> None:
    """KVM_GET_FPU shows the registers that KVM_SET_XSAVE set.

    Documentation/virt/kvm/api.rst, 4.43 KVM_SET_XSAVE; Intel SDM volume 1, 13.4.1 Legacy Region.
    """
    image = with_words(
        vcpu.fpu.get_xsave2(), {FCW: b"\x7f\x02", XMM0 + 16 * 5: xmm(5), XSTATE_BV: (3).to_bytes(8, "little")}
    )
    vcpu.fpu.set_xsave(image)
    fpu = vcpu.fpu.get()
    assert (fpu.fcw, bytes(fpu.xmm[5])) == (0x27F, xmm(5))


@needs_xsave
def test_xsave_round_trip(vcpu: Vcpu) -> None:
    """KVM_GET_XSAVE2 returns the image that KVM_SET_XSAVE set, MXCSR included.

    Documentation/virt/kvm/api.rst, 4.43 KVM_SET_XSAVE and 4.134 KVM_GET_XSAVE2.
    """
    take_into_use(vcpu)
    vcpu.fpu.set(some_fpu())
    image = with_words(vcpu.fpu.get_xsave2(), {MXCSR: (FXSAVE | 0x6000).to_bytes(4, "little")})
    vcpu.fpu.set_xsave(image)
    assert vcpu.fpu.get_xsave2() == image


# Component of XSAVE, the feature that has it, and a value that all of it may have.
COMPONENTS = [
    pytest.param(number, value, id=name, marks=pytest.mark.requires("KVM_CAP_XSAVE", f"cpuid:{feature}"))
    for number, name, feature, value in (
        (2, "upper halves of YMM", "avx", bytes(range(16))),
        (5, "opmasks", "avx512f", bytes(range(16))),
        (6, "upper halves of ZMM", "avx512f", bytes(range(16))),
        (7, "ZMM16 to ZMM31", "avx512f", bytes(range(16))),
        (9, "PKRU", "pku", b"\x54\x55\x55\x55" + bytes(4)),
    )
]


@pytest.mark.parametrize(("number", "value"), COMPONENTS)
def test_extended_state(vcpu: Vcpu, number: int, value: bytes) -> None:
    """KVM_GET_XSAVE2 returns what KVM_SET_XSAVE put into each extended component, at the place of CPUID.

    Documentation/virt/kvm/api.rst, 4.43 KVM_SET_XSAVE; Intel SDM volume 1, 13.4.3 Extended Region.
    """
    leaf = next(
        entry
        for entry in vcpu.vm.kvm.supported_cpuid.entries
        if (entry.function, entry.index) == (0xD, number)
    )
    size, offset = leaf.eax, leaf.ebx
    given = (value * (size // len(value) + 1))[:size]
    image = with_words(
        vcpu.fpu.get_xsave2(), {offset: given, XSTATE_BV: (3 | 1 << number).to_bytes(8, "little")}
    )
    vcpu.fpu.set_xsave(image)
    raw = vcpu.fpu.get_xsave2().to_bytes()
    assert int.from_bytes(raw[XSTATE_BV : XSTATE_BV + 8], "little") >> number & 1
    assert raw[offset : offset + size] == given


@needs_xsave
@pytest.mark.parametrize("empty", [False, True], ids=["none", "empty"])
def test_state_before_cpuid(vm: Vm, empty: bool) -> None:
    """A vCPU without CPUID, or with an empty one, takes the image of a vCPU that has one.

    Documentation/virt/kvm/api.rst, 4.43 KVM_SET_XSAVE: no order with KVM_SET_CPUID2 is asked for.
    """
    source, target = vm.create_vcpu(0), vm.create_vcpu(1)
    source.cpuid.set(vm.kvm.supported_cpuid)
    take_into_use(source)
    source.fpu.set(some_fpu())
    if empty:
        target.cpuid.set(kvm_cpuid2(nent=0, entries=[]))
    target.fpu.set_xsave(source.fpu.get_xsave2())
    assert target.fpu.get() == source.fpu.get()


@needs_xsave
@pytest.mark.parametrize(
    ("offset", "data"),
    [
        pytest.param(XSTATE_BV, (3 | 1 << 62).to_bytes(8, "little"), id="unknown-state"),
        pytest.param(XSTATE_BV, (3 | 1 << 8).to_bytes(8, "little"), id="supervisor-state"),
        pytest.param(RESERVED, b"\x01", id="reserved-header"),
        pytest.param(HEADER + 63, b"\x80", id="end-of-header"),
        pytest.param(MXCSR, b"\x80\x1f\x00\x80", id="MXCSR"),
    ],
)
def test_xsave_refused(vcpu: Vcpu, offset: int, data: bytes) -> None:
    """An image that XRSTOR would refuse, for its XSTATE_BV, its header or its MXCSR, is refused with EINVAL.

    Documentation/virt/kvm/api.rst, 4.43 KVM_SET_XSAVE; Intel SDM volume 1, 13.8.1 Standard Form of XRSTOR.
    """
    take_into_use(vcpu)
    before = vcpu.fpu.get_xsave2()
    changes = {XSTATE_BV: (3).to_bytes(8, "little"), offset: data}
    with refused(errno.EINVAL):
        vcpu.fpu.set_xsave(with_words(before, changes))
    assert vcpu.fpu.get_xsave2() == before


@pytest.mark.requires("KVM_CAP_XSAVE2")
def test_xsave2_size(vcpu: Vcpu) -> None:
    """KVM_CAP_XSAVE2 is the size of the area, at least 4096; where it is 4096 both ioctls return the same.

    Documentation/virt/kvm/api.rst, 4.43 KVM_SET_XSAVE ("will always be at least 4096").
    """
    size = vcpu.vm.check_extension(KVM_CAP_XSAVE2)
    assert size >= PAGE_SIZE
    take_into_use(vcpu)
    vcpu.fpu.set(some_fpu())
    whole = vcpu.fpu.get_xsave2().to_bytes()
    assert len(whole) == size
    if size == PAGE_SIZE:
        assert vcpu.fpu.get_xsave().to_bytes() == whole


def fxsave(agent: Agent, area: Gva) -> None:
    """Let the guest store its state: in ring 3, which runs natively everywhere."""
    agent.must(b"\x48\x0f\xae\x07", ring=3, rdi=int(area))


@pytest.fixture
def agent(make_vm: MakeVm) -> Agent:
    return Agent(make_vm(AGENT).vcpus[0])


@pytest.mark.usefixtures("open_registers")
@needs_xsave
def test_guest_and_host_agree(agent: Agent) -> None:
    """The guest finds the host's XMM registers, MXCSR and x87 control word, and the host the guest's.

    Documentation/virt/kvm/api.rst, 4.22 KVM_GET_FPU to 4.43 KVM_SET_XSAVE.
    """
    vm, vcpu = agent.vm, agent.vcpu
    area = vm.alloc(PAGE_SIZE, user=True, private=False)
    agent.start()
    take_into_use(vcpu)
    vcpu.fpu.set(some_fpu())
    image = vcpu.fpu.get_xsave2()
    vcpu.fpu.set_xsave(with_words(image, {MXCSR: (FXSAVE | 0x2000).to_bytes(4, "little")}))
    fxsave(agent, area)
    assert vm.read(area + XMM0, 256) == b"".join(xmm(number) for number in range(16))
    assert vm.read(area + MXCSR, 4) == (FXSAVE | 0x2000).to_bytes(4, "little")
    assert vm.read(area + FCW, 2) == b"\x7f\x02"
    vm.write(area + XMM0, bytes(reversed(range(256))))
    vm.write(area + MXCSR, (FXSAVE | 0x4000).to_bytes(4, "little"))
    vm.write(area + FCW, b"\x7f\x0e")
    agent.must(b"\x48\x0f\xae\x0f", ring=3, rdi=int(area))  # fxrstor64
    fpu = vcpu.fpu.get()
    assert b"".join(bytes(row) for row in fpu.xmm) == bytes(reversed(range(256)))
    assert fpu.fcw == 0xE7F
    assert vcpu.fpu.get_xsave2().to_bytes()[MXCSR : MXCSR + 4] == (FXSAVE | 0x4000).to_bytes(4, "little")


@pytest.mark.usefixtures("open_registers")
def test_set_fpu_on_a_new_vcpu(agent: Agent) -> None:
    """The guest finds the XMM registers that KVM_SET_FPU set on a vCPU which never used its FPU.

    Documentation/virt/kvm/api.rst, 4.23 KVM_SET_FPU ("Writes the floating point state to the vcpu").
    """
    vm, vcpu = agent.vm, agent.vcpu
    area = vm.alloc(PAGE_SIZE, user=True, private=False)
    vm.launch()
    if vcpu.exits:
        pytest.skip("needs a vCPU that never ran: launching this VM ran it")
    vcpu.fpu.set(some_fpu())
    fxsave(agent, area)
    assert vm.read(area + XMM0, 256) == b"".join(xmm(number) for number in range(16))
