/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Everything that guest code may use.  Each vCPU runs guest_main(), or the
 * function that the host names, with up to six arguments that the host gives.
 *
 * 32-bit programs have ring 0 and neither APIC, hypercalls nor nested guests.
 */
#ifndef KVMPY_GUEST_H
#define KVMPY_GUEST_H

#include <kvmpy/assert.h>
#include <kvmpy/atomic.h>
#include <kvmpy/cpu.h>
#include <kvmpy/exception.h>
#include <kvmpy/io.h>
#include <kvmpy/layout.h>
#include <kvmpy/printf.h>
#include <kvmpy/processor.h>
#include <kvmpy/spinlock.h>
#include <kvmpy/string.h>
#include <kvmpy/types.h>
#include <kvmpy/ucall.h>

#ifdef __x86_64__
#include <kvmpy/agent.h>
#include <kvmpy/apic.h>
#include <kvmpy/hypercall.h>
#include <kvmpy/sev.h>
#include <kvmpy/svm.h>
#include <kvmpy/user.h>
#endif

#endif /* KVMPY_GUEST_H */
