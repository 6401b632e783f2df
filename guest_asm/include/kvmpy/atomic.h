/* SPDX-License-Identifier: Apache-2.0 */
/* Atomics on any integer of 1, 2, 4 or 8 bytes, sequentially consistent. */
#ifndef KVMPY_ATOMIC_H
#define KVMPY_ATOMIC_H

#include <kvmpy/types.h>

#define atomic_read(p)		__atomic_load_n(p, __ATOMIC_SEQ_CST)
#define atomic_set(p, v)	__atomic_store_n(p, v, __ATOMIC_SEQ_CST)
#define atomic_xchg(p, v)	__atomic_exchange_n(p, v, __ATOMIC_SEQ_CST)
#define atomic_inc(p)		((void)__atomic_fetch_add(p, 1, __ATOMIC_SEQ_CST))
#define atomic_dec(p)		((void)__atomic_fetch_sub(p, 1, __ATOMIC_SEQ_CST))
#define atomic_or(p, v)		((void)__atomic_fetch_or(p, v, __ATOMIC_SEQ_CST))
#define atomic_and(p, v)	((void)__atomic_fetch_and(p, v, __ATOMIC_SEQ_CST))
#define atomic_fetch_add(p, v)	__atomic_fetch_add(p, v, __ATOMIC_SEQ_CST)
#define atomic_add_return(p, v)	__atomic_add_fetch(p, v, __ATOMIC_SEQ_CST)

/* Store @new if *p is @old; true if it was. */
#define atomic_cmpxchg(p, old, new)						\
({										\
	__typeof__(*(p)) __old = (old);						\
										\
	__atomic_compare_exchange_n(p, &__old, new, false,			\
				    __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);	\
})

#define smp_mb()		__atomic_thread_fence(__ATOMIC_SEQ_CST)

#endif /* KVMPY_ATOMIC_H */
