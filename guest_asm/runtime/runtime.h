/* SPDX-License-Identifier: Apache-2.0 */
/* Between the files of the runtime. */
#ifndef KVMPY_RUNTIME_H
#define KVMPY_RUNTIME_H

#include <kvmpy/exception.h>

void guest_exception(struct exception_frame *frame);
void guest_nmi(struct exception_frame *frame);
void guest_vc(struct exception_frame *frame);

/* ring3.S: into ring 3; back, as if from guest_user_enter(); where functions there return to. */
void guest_user_enter(u64 (*function)(u64 arg), u64 arg, void *stack);
__noreturn void guest_user_resume(void);
extern const char guest_user_return[];

/* call.S: into a function of ring 0; back, as if from guest_call_enter(). */
u64 guest_call_enter(u64 (*function)(u64 arg), u64 arg);
__noreturn void guest_call_resume(void);

struct guest_l2;

/* l2.S: VMRUN; where L2's first function returns to. */
void guest_l2_enter(struct guest_l2 *l2);
extern const char guest_l2_end[];

/* End guest_try_call() with the exception in @frame. */
__noreturn void guest_call_leave(struct exception_frame *frame);

/* End guest_user_run() with the exception in @frame. */
__noreturn void guest_user_leave(struct exception_frame *frame);

#endif /* KVMPY_RUNTIME_H */
