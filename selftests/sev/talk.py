# SPDX-License-Identifier: Apache-2.0
"""A guest that sends the hypervisor whatever the test says, through its GHCB or the GHCB MSR."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kvmpy import GHCB, Exit, GuestVcpu, GuestVm, MakeVm, Ucall

PAGE, MSR, TERMINATE = range(3)
MAX_FIELDS = 12
BUFFER = GHCB["shared_buffer"].offset

GUEST = """
#include <kvmpy/guest.h>

enum { PAGE, MSR, TERMINATE };

struct order {
	u64 what;
	u64 code, info_1, info_2;
	u64 msr;
	u64 usage;
	u64 keep;			/* bits: do not declare exit code, info_1, info_2 valid */
	u64 nr_fields;
	u64 fields[12][2];
	u8 buffer[64];
};

struct reply {
	u64 status, info, rax, rbx, rcx, rdx, msr;
	u8 buffer[64];
};

GUEST_SHARED struct order order;
GUEST_SHARED struct reply reply;

static void undeclare(u8 *ghcb, u32 field)
{
	ghcb[GHCB_VALID_BITMAP + field / 64] &= ~(1u << field / 8 % 8);
}

/* As ghcb_call(), but it may leave out what must not be left out. */
static void send(u8 *ghcb)
{
	u64 gpa = guest_cpu()->ghcb_gpa;

	for (u64 i = 0; i < order.nr_fields; i++)
		ghcb_put(ghcb, order.fields[i][0], order.fields[i][1]);
	memcpy(ghcb + GHCB_SHARED_BUFFER, order.buffer, sizeof(order.buffer));
	ghcb_put(ghcb, GHCB_SW_EXIT_CODE, order.code);
	ghcb_put(ghcb, GHCB_SW_EXIT_INFO_1, order.info_1);
	ghcb_put(ghcb, GHCB_SW_EXIT_INFO_2, order.info_2);
	for (int i = 0; i < 3; i++)
		if (order.keep & 1u << i)
			undeclare(ghcb, GHCB_SW_EXIT_CODE + 8 * i);
	*(volatile u32 *)(ghcb + GHCB_USAGE) = order.usage;
	if (guest_cpu()->ghcb_msr != gpa || order.msr)
		wrmsr(MSR_SEV_ES_GHCB, order.msr ? order.msr : gpa);
	vmgexit();
	*(volatile u32 *)(ghcb + GHCB_USAGE) = 0;
	reply.status = ghcb_get(ghcb, GHCB_SW_EXIT_INFO_1);
	reply.info = ghcb_get(ghcb, GHCB_SW_EXIT_INFO_2);
	reply.rax = ghcb_get(ghcb, GHCB_RAX);
	reply.rbx = ghcb_get(ghcb, GHCB_RBX);
	reply.rcx = ghcb_get(ghcb, GHCB_RCX);
	reply.rdx = ghcb_get(ghcb, GHCB_RDX);
	memcpy(reply.buffer, ghcb + GHCB_SHARED_BUFFER, sizeof(reply.buffer));
	wrmsr(MSR_SEV_ES_GHCB, gpa);
}

void guest_main(void)
{
	for (;;) {
		GUEST_SYNC();
		memset(&reply, 0, sizeof(reply));
		if (order.what == MSR) {
			reply.msr = ghcb_msr_call(order.msr);
		} else if (order.what == TERMINATE) {
			ghcb_terminate(order.info_1, order.info_2);
		} else {
			struct ghcb_use use;

			ghcb_begin(&use);
			send(use.ghcb);
			ghcb_end(&use);
		}
	}
}
"""


@dataclass(frozen=True)
class Reply:
    """What the hypervisor left in the GHCB (or in its MSR)."""

    status: int
    info: int
    rax: int
    rbx: int
    rcx: int
    rdx: int
    msr: int
    buffer: bytes

    @property
    def outcome(self) -> tuple[int, int]:
        """Status (0 done, 1 exception, 2 malformed) and what goes with it."""
        return self.status & 0xFFFF_FFFF, self.info


class Talker:
    """A launched VM with :data:`GUEST` in it."""

    def __init__(self, vm: GuestVm) -> None:
        self.vm = vm
        vm.launch()
        self.vcpu: GuestVcpu = vm.vcpus[0]
        self.vcpu.sync()

    @property
    def ghcb_gpa(self) -> int:
        """Where the GHCB is."""
        assert self.vcpu.ghcb_gpa is not None
        return int(self.vcpu.ghcb_gpa)

    @property
    def buffer_gpa(self) -> int:
        """Where the GHCB's shared buffer is."""
        return self.ghcb_gpa + BUFFER

    def order(
        self,
        code: int,
        info_1: int = 0,
        info_2: int = 0,
        *,
        what: int = PAGE,
        msr: int = 0,
        usage: int = 0,
        hide: int = 0,
        buffer: bytes = b"",
        **fields: int,
    ) -> None:
        """Tell the guest what to send next; *hide* leaves code (1), info_1 (2) or info_2 (4) undeclared."""
        pairs = [
            (GHCB[name].offset & ~7, value << GHCB[name].offset % 8 * 8) for name, value in fields.items()
        ]
        flat = [number for pair in pairs for number in pair]
        raw = struct.pack("<8Q", what, code, info_1, info_2, msr, usage, hide, len(pairs))
        raw += struct.pack(f"<{2 * MAX_FIELDS}Q", *flat, *[0] * (2 * MAX_FIELDS - len(flat)))
        self.vm.symbol("order").bytes = raw + buffer.ljust(64, b"\0")

    def reply(self) -> Reply:
        """Read what came back."""
        raw = self.vm.symbol("reply").bytes
        return Reply(*struct.unpack("<7Q64s", raw[:120]))

    def send(self, code: int, info_1: int = 0, info_2: int = 0, **more: object) -> Reply:
        """Send a request that the hypervisor answers without user space, and return the answer."""
        self.order(code, info_1, info_2, **more)  # type: ignore[arg-type]
        self.vcpu.sync()
        return self.reply()

    def send_msr(self, value: int) -> int:
        """Send a request through the GHCB MSR, and return what is there afterwards."""
        self.order(0, what=MSR, msr=value)
        self.vcpu.sync()
        return self.reply().msr

    def send_out(self, code: int, info_1: int = 0, info_2: int = 0, **more: object) -> Ucall | Exit:
        """Send a request and return the exit that it ends in."""
        self.order(code, info_1, info_2, **more)  # type: ignore[arg-type]
        return self.vcpu.next()


def talker(make_vm: MakeVm, **how: object) -> Talker:
    """Make a VM that talks."""
    return Talker(make_vm(GUEST, **how))  # type: ignore[arg-type]
