# SPDX-License-Identifier: Apache-2.0
"""INIT and SIPI: how one vCPU starts another, from reset through real mode to 64-bit mode.

Under protections none and cbit only: what real mode, which has no page tables, sees of protected memory is
each protection's own matter.
"""

from __future__ import annotations

import pytest

from kvmpy import (
    KVM_MP_STATE_INIT_RECEIVED,
    KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR,
    Agent,
    Gpa,
    GuestVcpu,
    GuestVm,
    IoExit,
    MakeVm,
    VcpuThread,
)

pytestmark = pytest.mark.requires("KVM_CAP_MP_STATE", "KVM_CAP_SPLIT_IRQCHIP")

TIMEOUT = 10.0
SIPI_PAGE = 0x08
OTHER_PAGE = 0x0A
PORT = 0x10

# mov ax, cs; out 0x10, ax; again: hlt; jmp again
REAL_MODE = bytes.fromhex("8cc8 e710 f4 ebfd")

SENDER = """
#include <kvmpy/guest.h>

void send(u64 icr)
{
	apic_send(1, icr);
}

void guest_main(void)
{
	apic_enable();
	guest_agent();
}

static u64 counter;

/* What the other vCPU does before INIT. */
void before_init(void)
{
	for (;;)
		GUEST_SYNC(++counter);
}
"""

INIT = 0x4500
STARTUP = 0x4600


class Pair:
    """A VM whose vCPU 0 sends what it is told, and whose vCPU 1 waits for INIT."""

    def __init__(self, make_vm: MakeVm, *, state: int = KVM_MP_STATE_UNINITIALIZED) -> None:
        self.vm: GuestVm = make_vm(SENDER, vcpus=2)
        self.target: GuestVcpu = self.vm.vcpus[1]
        self.target.set_entry("before_init")
        for page in (SIPI_PAGE, OTHER_PAGE):
            # Without paging there is no encryption bit: real mode sees the shared page.
            self.vm.memory.shared_view(Gpa(page << 12), len(REAL_MODE))[:] = REAL_MODE
        self.agent = Agent(self.vm.vcpus[0])
        self.vm.launch()
        self.target.set_mp_state(state)

    def send(self, icr: int) -> None:
        """Let vCPU 0 send an interprocessor interrupt to vCPU 1."""
        assert isinstance(self.agent.call("send", icr), int)

    def started_at(self) -> int:
        """Run vCPU 1 and return the real-mode code segment that it starts in."""
        got = self.target.expect(IoExit, TIMEOUT)
        assert (got.port, got.size) == (PORT, 2)
        return got.value


@pytest.mark.protections("none", "cbit")
def test_init_and_sipi(make_vm: MakeVm) -> None:
    """After INIT and SIPI with vector V a vCPU runs in real mode at V000:0000.

    Intel SDM 3A, 10.4.3 (MP initialization protocol); Documentation/virt/kvm/api.rst, 4.38 KVM_GET_MP_STATE.
    """
    pair = Pair(make_vm)
    pair.send(INIT)
    pair.send(STARTUP | SIPI_PAGE)
    assert pair.started_at() == SIPI_PAGE << 8
    assert pair.target.get_mp_state() == KVM_MP_STATE_RUNNABLE
    segment = pair.target.regs.get_sregs().cs
    assert (segment.selector, segment.base) == (SIPI_PAGE << 8, SIPI_PAGE << 12)


@pytest.mark.protections("none", "cbit")
def test_waiting_vcpu_is_woken(make_vm: MakeVm) -> None:
    """A vCPU that a thread is running already, waiting for INIT, starts with INIT and SIPI.

    Intel SDM 3A, 10.4.3; Documentation/virt/kvm/api.rst, 4.10 KVM_RUN.
    """
    pair = Pair(make_vm)
    with VcpuThread(pair.started_at, vcpu=pair.target) as thread:
        pair.send(INIT)
        pair.send(STARTUP | SIPI_PAGE)
        assert thread.join(TIMEOUT) == SIPI_PAGE << 8


@pytest.mark.protections("none", "cbit")
def test_state_after_init(make_vm: MakeVm) -> None:
    """INIT brings a vCPU into state INIT_RECEIVED, with the registers of a reset.

    Documentation/virt/kvm/api.rst, 4.38 KVM_GET_MP_STATE; Intel SDM 3A, table 11-1 (state after INIT).
    """
    pair = Pair(make_vm, state=KVM_MP_STATE_RUNNABLE)
    assert pair.target.sync().args == (1,)
    pair.send(INIT)
    assert pair.target.get_mp_state() == KVM_MP_STATE_INIT_RECEIVED
    regs, sregs = pair.target.regs.get(), pair.target.regs.get_sregs()
    assert (regs.rip, regs.rflags, regs.rax, regs.rsp) == (0xFFF0, 2, 0, 0)
    assert (sregs.cs.selector, sregs.cs.base) == (0xF000, 0xFFFF_0000)
    # PE and PG are off; ET is always set, CD and NW keep their values.
    assert sregs.cr0 & ~(3 << 29) == 0x10
    assert (sregs.cr3, sregs.cr4, sregs.efer) == (0, 0, 0)
    assert (sregs.idt.base, sregs.idt.limit) == (0, 0xFFFF)


@pytest.mark.protections("none", "cbit")
def test_second_sipi_is_ignored(make_vm: MakeVm) -> None:
    """A vCPU that runs takes no SIPI: it goes on where it is.

    Intel SDM 3A, 10.4.3: only a processor that waits for SIPI responds.
    """
    pair = Pair(make_vm, state=KVM_MP_STATE_RUNNABLE)
    assert pair.target.sync().args == (1,)
    pair.send(STARTUP | SIPI_PAGE)
    assert pair.target.sync().args == (2,)
    assert pair.target.sync().args == (3,)


@pytest.mark.protections("none", "cbit")
def test_first_sipi_counts(make_vm: MakeVm) -> None:
    """Once a vCPU has started, the second SIPI that boot loaders send has no effect.

    Intel SDM 3A, 10.4.4.1 (INIT, SIPI, SIPI).
    """
    pair = Pair(make_vm)
    pair.send(INIT)
    pair.send(STARTUP | SIPI_PAGE)
    assert pair.started_at() == SIPI_PAGE << 8
    pair.send(STARTUP | OTHER_PAGE)
    rip = pair.target.regs.get().rip
    pair.target.complete_io()
    assert pair.target.regs.get_sregs().cs.selector == SIPI_PAGE << 8
    assert pair.target.regs.get().rip in (rip, rip + 2)


@pytest.mark.protections("none", "cbit")
def test_init_without_sipi(make_vm: MakeVm) -> None:
    """Until the SIPI comes, a vCPU that got INIT does not run.

    Documentation/virt/kvm/api.rst, 4.38 KVM_GET_MP_STATE: INIT_RECEIVED is ready for a SIPI.
    """
    pair = Pair(make_vm)
    pair.send(INIT)
    assert pair.target.get_mp_state() == KVM_MP_STATE_INIT_RECEIVED
    with VcpuThread(lambda: pair.target.run_until_kicked(TIMEOUT), vcpu=pair.target) as thread:
        # vCPU 0 takes its time, and the other one is still where INIT left it.
        pair.send(INIT)
        pair.target.kick()
        thread.join(TIMEOUT)
    assert pair.target.regs.get().rip == 0xFFF0
    pair.send(STARTUP | SIPI_PAGE)
    assert pair.started_at() == SIPI_PAGE << 8


@pytest.mark.protections("none", "cbit")
def test_again(make_vm: MakeVm) -> None:
    """INIT and SIPI start a vCPU anew at any time, also elsewhere.

    Intel SDM 3A, 10.4.3.
    """
    pair = Pair(make_vm)
    for page in (SIPI_PAGE, OTHER_PAGE, SIPI_PAGE):
        pair.send(INIT)
        pair.send(STARTUP | page)
        assert pair.started_at() == page << 8


@pytest.mark.protections("none", "cbit")
@pytest.mark.requires("KVM_CAP_VCPU_EVENTS")
def test_sipi_by_user_space(make_vm: MakeVm) -> None:
    """State SIPI_RECEIVED with the vector of KVM_SET_VCPU_EVENTS starts a vCPU as a SIPI does.

    Documentation/virt/kvm/api.rst, 4.32 KVM_SET_VCPU_EVENTS and 4.39 KVM_SET_MP_STATE.
    """
    pair = Pair(make_vm)
    pair.send(INIT)
    assert pair.target.get_mp_state() == KVM_MP_STATE_INIT_RECEIVED
    events = pair.target.events.get()
    events.sipi_vector = OTHER_PAGE
    events.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR
    pair.target.events.set(events)
    pair.target.set_mp_state(KVM_MP_STATE_SIPI_RECEIVED)
    assert pair.started_at() == OTHER_PAGE << 8
