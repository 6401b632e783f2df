# SPDX-License-Identifier: Apache-2.0
"""A guest that sends the hypervisor whatever the test says, through its GHCB or the GHCB MSR."""

from __future__ import annotations

from dataclasses import dataclass

from kvmpy import GHCB, Agent, Exit, GuestVcpu, GuestVm, MakeVm, Ucall

BUFFER = GHCB["shared_buffer"].offset

GUEST = """
#include <kvmpy/guest.h>

struct request {
	u64 code, info_1, info_2;
	u64 msr;
	u64 usage;
	u64 hide;			/* bits: do not declare code, info_1, info_2 valid */
	u64 nr_fields;
	struct { u64 offset, value; } fields[12];
	u8 buffer[64];
};

struct reply {
	u64 status, info, rax, rbx, rcx, rdx;
	u8 buffer[64];
};

GUEST_SHARED struct request request;
GUEST_SHARED struct reply reply;

static void undeclare(u8 *ghcb, u32 field)
{
	ghcb[GHCB_VALID_BITMAP + field / 64] &= ~(1u << field / 8 % 8);
}

/* As ghcb_call(), but it may leave out what must not be left out. */
static void send_page(u8 *ghcb)
{
	u64 gpa = guest_cpu()->ghcb_gpa;

	for (u64 i = 0; i < request.nr_fields; i++)
		ghcb_put(ghcb, request.fields[i].offset, request.fields[i].value);
	memcpy(ghcb + GHCB_SHARED_BUFFER, request.buffer, sizeof(request.buffer));
	ghcb_put(ghcb, GHCB_SW_EXIT_CODE, request.code);
	ghcb_put(ghcb, GHCB_SW_EXIT_INFO_1, request.info_1);
	ghcb_put(ghcb, GHCB_SW_EXIT_INFO_2, request.info_2);
	for (int i = 0; i < 3; i++)
		if (request.hide & 1u << i)
			undeclare(ghcb, GHCB_SW_EXIT_CODE + 8 * i);
	*(volatile u32 *)(ghcb + GHCB_USAGE) = request.usage;
	if (guest_cpu()->ghcb_msr != gpa || request.msr)
		wrmsr(MSR_SEV_ES_GHCB, request.msr ? request.msr : gpa);
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

void send(void)
{
	struct ghcb_use use;

	ghcb_begin(&use);
	send_page(use.ghcb);
	ghcb_end(&use);
}

void guest_main(void)
{
	guest_agent();
}
"""


@dataclass(frozen=True)
class Reply:
    """What the hypervisor left in the GHCB."""

    status: int
    info: int
    rax: int
    rbx: int
    rcx: int
    rdx: int
    buffer: bytes

    @property
    def outcome(self) -> tuple[int, int]:
        """Status (0 done, 1 exception, 2 malformed) and what goes with it."""
        return self.status & 0xFFFF_FFFF, self.info


class Talker:
    """A launched VM with :data:`GUEST` in it."""

    def __init__(self, vm: GuestVm) -> None:
        self.vm = vm
        self.vcpu: GuestVcpu = vm.vcpus[0]
        self.agent = Agent(self.vcpu)
        self.agent.start()

    @property
    def ghcb_gpa(self) -> int:
        """Where the GHCB is."""
        assert self.vcpu.ghcb_gpa is not None
        return int(self.vcpu.ghcb_gpa)

    @property
    def buffer_gpa(self) -> int:
        """Where the GHCB's shared buffer is."""
        return self.ghcb_gpa + BUFFER

    def begin(
        self,
        code: int,
        info_1: int = 0,
        info_2: int = 0,
        *,
        msr: int = 0,
        usage: int = 0,
        hide: int = 0,
        buffer: bytes = b"",
        **fields: int,
    ) -> None:
        """Order a request; *hide* leaves code (1), info_1 (2) or info_2 (4) undeclared."""
        offsets = {name: GHCB[name].offset for name in fields}
        self.vm.symbol("request").set(
            code=code,
            info_1=info_1,
            info_2=info_2,
            msr=msr,
            usage=usage,
            hide=hide,
            nr_fields=len(fields),
            fields=[
                {"offset": offsets[name] & ~7, "value": value << offsets[name] % 8 * 8}
                for name, value in fields.items()
            ],
            buffer=buffer,
        )
        self.vm.symbol("reply").set()
        self.agent.begin_call("send")

    def reply(self) -> Reply:
        """Read what came back."""
        return Reply(**vars(self.vm.symbol("reply").value))

    def send(self, code: int, info_1: int = 0, info_2: int = 0, **more: object) -> Reply:
        """Send a request that the hypervisor answers without user space, and return the answer."""
        self.begin(code, info_1, info_2, **more)  # type: ignore[arg-type]
        self.agent.value()
        return self.reply()

    def send_msr(self, value: int) -> int:
        """Send a request through the GHCB MSR, and return what is there afterwards."""
        self.agent.begin_call("ghcb_msr_call", value)
        return self.agent.value()

    def send_out(self, code: int, info_1: int = 0, info_2: int = 0, **more: object) -> Ucall | Exit:
        """Send a request and return the exit that it ends in."""
        self.begin(code, info_1, info_2, **more)  # type: ignore[arg-type]
        return self.vcpu.next()


def talker(make_vm: MakeVm, **options: object) -> Talker:
    """Make a VM that talks."""
    return Talker(make_vm(GUEST, **options))  # type: ignore[arg-type]
