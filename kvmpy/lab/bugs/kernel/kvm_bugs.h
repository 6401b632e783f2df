/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KVMPY_KVM_BUGS_H
#define KVMPY_KVM_BUGS_H

#include <linux/bits.h>
#include <linux/compiler.h>

/* Numbers from 1 to 255; 0 stands for none. */
#define KVM_BUGS	256

extern unsigned long kvm_bugs[KVM_BUGS / BITS_PER_LONG];

/* Whether the bug is switched on: one test of a byte that is never written while it matters. */
static __always_inline bool kvm_bug(unsigned int number)
{
	return unlikely(READ_ONCE(kvm_bugs[number / BITS_PER_LONG]) & (1UL << (number % BITS_PER_LONG)));
}

#endif
