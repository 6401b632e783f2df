// SPDX-License-Identifier: Apache-2.0
#include <kvmpy/processor.h>
#include <kvmpy/user.h>

#include "runtime.h"

struct guest_user_exit guest_user_run(u64 (*function)(u64 arg), u64 arg, void *stack_top)
{
	u64 *stack = (u64 *)((uintptr_t)stack_top & ~15ul) - 1;
	struct guest_user_exit exit = { 0 };
	struct guest_cpu *cpu = guest_cpu();
	u64 outer = cpu->user_exit;

	*stack = (uintptr_t)guest_user_return;
	cpu->user_exit = (uintptr_t)&exit;
	guest_user_enter(function, arg, stack);
	cpu->user_exit = outer;
	return exit;
}

static void note_fault(struct guest_fault *fault, const struct exception_frame *frame)
{
	*fault = (struct guest_fault) {
		.faulted = true,
		.vector = frame->vector,
		.error_code = frame->error_code,
		.rip = frame->rip,
		.cr2 = frame->vector == PF_VECTOR ? read_cr2() : 0,
	};
}

struct guest_user_exit guest_try_call(u64 (*function)(u64 arg), u64 arg)
{
	struct guest_user_exit exit = { .fault.vector = NO_VECTOR };
	struct guest_cpu *cpu = guest_cpu();
	u64 outer = cpu->call_exit;

	cpu->call_exit = (uintptr_t)&exit;
	exit.value = guest_call_enter(function, arg);
	cpu->call_exit = outer;
	exit.returned = !READ_ONCE(exit.fault.faulted);
	return exit;
}

__noreturn void guest_call_leave(struct exception_frame *frame)
{
	struct guest_user_exit *exit = (void *)(uintptr_t)guest_cpu()->call_exit;

	note_fault(&exit->fault, frame);
	guest_call_resume();
}

__noreturn void guest_user_leave(struct exception_frame *frame)
{
	struct guest_user_exit *exit = (void *)(uintptr_t)guest_cpu()->user_exit;

	exit->value = frame->rax;
	exit->returned = frame->rip == (uintptr_t)guest_user_return && frame->vector == UD_VECTOR;
	if (exit->returned)
		exit->fault.vector = NO_VECTOR;
	else
		note_fault(&exit->fault, frame);
	guest_user_resume();
}
