// SPDX-License-Identifier: Apache-2.0
#include <kvmpy/exception.h>
#include <kvmpy/processor.h>
#include <kvmpy/ucall.h>

#include "runtime.h"

struct fixup {
	u32 start;
	u32 end;
};

extern const struct fixup __guest_fixup_start[], __guest_fixup_end[];

/* Where the HLTs of sti_hlt() are. */
extern const u32 __guest_idle_start[], __guest_idle_end[];

static guest_handler handlers[256];

void guest_exception_install(u8 vector, guest_handler handler)
{
	WRITE_ONCE(handlers[vector], handler);
}

/* Faults leave RIP at their instruction, traps behind it, and #DB does either. */
static bool covers(const struct fixup *fixup, const struct exception_frame *frame)
{
	switch (frame->vector) {
	case BP_VECTOR:
	case OF_VECTOR:
		return frame->rip > fixup->start && frame->rip <= fixup->end;
	case DB_VECTOR:
		return frame->rip >= fixup->start && frame->rip <= fixup->end;
	default:
		return frame->rip >= fixup->start && frame->rip < fixup->end;
	}
}

static bool fix_up(struct exception_frame *frame)
{
	const struct fixup *fixup;
	struct guest_fault *fault;

	if (frame->vector >= 32 || frame->vector == NMI_VECTOR || frame->vector == MC_VECTOR)
		return false;
	/* Single steps come by everywhere. */
	if (frame->vector == DB_VECTOR && handlers[DB_VECTOR])
		return false;

	for (fixup = __guest_fixup_start; fixup < __guest_fixup_end; fixup++) {
		if (!covers(fixup, frame))
			continue;

		fault = &guest_cpu()->fault;
		fault->error_code = frame->error_code;
		fault->rip = frame->rip;
		fault->cr2 = frame->vector == PF_VECTOR ? read_cr2() : 0;
		fault->vector = frame->vector;
		fault->faulted = true;
		frame->rip = fixup->end;
		return true;
	}
	return false;
}

__noreturn void guest_exception_unexpected(struct exception_frame *frame)
{
#ifdef __i386__
	/* In ring 0 the CPU has pushed no stack pointer: it was behind the flags. */
	uintptr_t rsp = exception_from_user(frame) ? frame->rsp : (uintptr_t)&frame->rsp;
#else
	uintptr_t rsp = frame->rsp;
#endif

	for (;;)
		GUEST_UCALL(KVMPY_UCALL_CMD_EXCEPTION, frame->vector, frame->error_code, frame->rip,
			    rsp, read_cr2(), frame->rflags, frame, frame->rbp);
}

static void leave_idle(struct exception_frame *frame)
{
	for (const u32 *idle = __guest_idle_start; idle < __guest_idle_end; idle++)
		if (frame->rip == *idle)
			frame->rip++;
}

/* A handler's ucalls and GUEST_TRY() are its own, not those of the code that it interrupts. */
static void run_handler(guest_handler handler, struct exception_frame *frame)
{
	struct guest_cpu *cpu = guest_cpu();
	struct guest_ucall_slot *slot = cpu->ucall_slot;
	struct guest_fault fault = cpu->fault;

	cpu->ucall_slot = slot->next;
	handler(frame);
	cpu->ucall_slot = slot;
	cpu->fault = fault;
}

/* Called by the vector stubs. */
void guest_exception(struct exception_frame *frame)
{
	guest_handler handler = READ_ONCE(handlers[frame->vector]);

	if (fix_up(frame))
		return;
	if (frame->vector >= 32)
		leave_idle(frame);

	if (handler)
		run_handler(handler, frame);
#ifdef __x86_64__
	else if (exception_from_user(frame) && guest_cpu()->user_rsp)
		guest_user_leave(frame);
	else if (!exception_from_user(frame) && guest_cpu()->call_rsp && frame->vector < 32)
		guest_call_leave(frame);
#endif
	else
		guest_exception_unexpected(frame);
}
