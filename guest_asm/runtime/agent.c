// SPDX-License-Identifier: Apache-2.0
#include <kvmpy/agent.h>
#include <kvmpy/string.h>
#include <kvmpy/ucall.h>

u64 guest_agent_call_kernel(u64 call);
u64 guest_agent_call_user(u64 call);

struct guest_agent_order guest_agent_orders[GUEST_AGENT_CPUS] GUEST_SHARED;
struct guest_agent_reply guest_agent_replies[GUEST_AGENT_CPUS] GUEST_SHARED;

/* Ring 3 has a stack and the registers where it may reach them. */
static struct guest_agent_call user_calls[GUEST_AGENT_CPUS] GUEST_USER_DATA;
static u64 user_stacks[GUEST_AGENT_CPUS][64] GUEST_USER_DATA;
static struct guest_agent_call kernel_calls[GUEST_AGENT_CPUS];

void guest_agent_do(void)
{
	u32 me = guest_cpu_index();
	struct guest_agent_order *order = &guest_agent_orders[me];
	struct guest_agent_reply *reply = &guest_agent_replies[me];
	struct guest_agent_call *call = order->ring ? &user_calls[me] : &kernel_calls[me];
	struct guest_user_exit exit;

	call->registers = order->registers;
	call->code = order->where;
	if (!call->code) {
		call->code = order->room;
		memcpy((void *)(uintptr_t)order->room, order->code, order->size);
	}
	if (order->ring)
		exit = guest_user_run(guest_agent_call_user, (uintptr_t)call,
				      user_stacks[me] + ARRAY_SIZE(user_stacks[me]));
	else
		exit = guest_try_call(guest_agent_call_kernel, (uintptr_t)call);
	reply->registers = call->registers;
	reply->faulted = exit.fault.faulted;
	reply->vector = exit.fault.vector;
	reply->error_code = exit.fault.error_code;
	reply->rip = exit.fault.rip;
	reply->cr2 = exit.fault.cr2;
}

__noreturn void guest_agent(void)
{
	for (;;) {
		GUEST_SYNC();
		guest_agent_do();
	}
}
