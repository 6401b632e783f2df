/* SPDX-License-Identifier: Apache-2.0 */
/* Ring 3. */
#ifndef KVMPY_USER_H
#define KVMPY_USER_H

#include <kvmpy/exception.h>

struct guest_user_exit {
	bool returned;		/* the function returned, @value is its result */
	u64 value;
	struct guest_fault fault;	/* else: the exception that ended it */
};

/*
 * Call @function, which must be GUEST_USER, in ring 3 with interrupts on. It
 * ends when it returns or raises an exception that has no handler.
 * @stack_top: end of a GUEST_USER_DATA array (or of memory mapped for ring 3).
 */
struct guest_user_exit guest_user_run(u64 (*function)(u64 arg), u64 arg, void *stack_top);

/* Call @function in ring 0.  It ends when it returns or raises an exception that has no handler. */
struct guest_user_exit guest_try_call(u64 (*function)(u64 arg), u64 arg);

#endif /* KVMPY_USER_H */
