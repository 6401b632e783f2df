/* SPDX-License-Identifier: Apache-2.0 */
/* Between the files of the runtime. */
#ifndef KVMPY_RUNTIME_H
#define KVMPY_RUNTIME_H

#include <kvmpy/exception.h>

void guest_exception(struct exception_frame *frame);

/* End guest_user_run() with the exception in @frame. */
__noreturn void guest_user_leave(struct exception_frame *frame);

#endif /* KVMPY_RUNTIME_H */
